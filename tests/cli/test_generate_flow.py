"""Everything that `s4audio generate` does with a flow, and what it says where a model cannot do it."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch import nn

from s4audio import CausalAutoencoder, Flow, checkpoint, load, save
from s4audio.audio import read_audio
from s4audio.cli import generate as module
from s4audio.cli import main
from s4audio.models.flow import GUIDANCE, NUM_STEPS
from tests.cli.commands import refused, wav


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    """At 4,000 Hz, with two classes; its clips were of 0.3 s."""
    torch.manual_seed(0)
    model = Flow(4000, classes=("seven", "two"), strides=(4,), widths=(4, 8), num_blocks=1, d_state=4)
    for block in model.modules():
        if hasattr(block, "modulation"):
            nn.init.normal_(block.modulation.weight)  # else labels change nothing yet
    path = tmp_path_factory.mktemp("flows") / "raw"
    save(model, path, {"normalize": "peak", "clip_seconds": 0.3})
    return path


@pytest.fixture(scope="module")
def latent(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    autoencoder = CausalAutoencoder(4000, strides=(2, 4), widths=(4, 6, 8), d_state=8)
    path = tmp_path_factory.mktemp("flows") / "latent"
    save(Flow(4000, autoencoder=autoencoder, strides=(2,), widths=(4, 8), num_blocks=1, d_state=4), path)
    return path


def made(model: Path, out: Path, *options: str) -> dict[str, np.ndarray]:
    assert main(["generate", str(model), "--steps", "2", "--out", str(out), *options]) == 0
    return {path.stem: wav(path) for path in sorted(out.glob("*.wav"))}


def test_labels_by_name(raw, tmp_path):
    noise = ("--from", "noise", "--num", "2", "--label")
    two, seven = (made(raw, tmp_path / name, *noise, name) for name in ("two", "seven"))
    assert list(two) == ["two_0_000", "two_0_001"] and len(two["two_0_000"]) == 1200  # 0.3 s, as in training
    assert not np.array_equal(two["two_0_000"], seven["seven_0_000"])
    stronger = made(raw, tmp_path / "stronger", *noise, "two", "--guidance", "4")
    assert not np.array_equal(two["two_0_000"], stronger["two_0_000"])
    model = load(raw)
    wanted = model.sample(
        2, 1200, label=torch.tensor([1, 1]), num_steps=2, generator=[module.noise_of(0, k) for k in (0, 1)]
    )
    assert np.abs(two["two_0_001"] / 32768 - wanted[1, 0].numpy()).max() < 1e-4


def test_clips_longer_than_those_with_labels_are_made_with_a_note(raw, tmp_path, capsys):
    for seconds, noted in (("0.3", False), ("0.4", True)):
        clips = made(raw, tmp_path / seconds, "--from", "noise", "--num", "1", "--label", "two", "--seconds", seconds)
        assert len(clips["two_0_000"]) == round(4000 * float(seconds))
        assert ("learned one label a clip, clips of 0.3 s" in capsys.readouterr().out) == noted


@pytest.mark.parametrize("kind", ["raw", "latent"])
def test_the_same_seed_makes_the_same_clips_at_any_batch_size(kind, request, tmp_path):
    options = "--from", "noise", "--num", "3", "--seconds", "0.5"
    together = made(request.getfixturevalue(kind), tmp_path / "a", *options)
    alone = made(request.getfixturevalue(kind), tmp_path / "b", *options, "--batch-size", "1")
    assert list(together) == ["noise_0_000", "noise_0_001", "noise_0_002"]
    for name, clip in together.items():
        assert np.abs(clip.astype(int) - alone[name]).max() <= 1 and len(clip) == 2000


@pytest.mark.parametrize("kind", ["raw", "latent"])
def test_a_span_is_made_anew_and_the_rest_is_the_recording(kind, request, folder, tmp_path):
    """Bit for bit, though the model heard it at a peak of full scale."""
    path = request.getfixturevalue(kind)
    for number in range(2):
        tone, rate = soundfile.read(folder / f"tone{number}.wav")
        (tmp_path / "in").mkdir(exist_ok=True)
        soundfile.write(tmp_path / "in" / f"{number}.wav", tone[: rate // 2 : 2], 4000)
    clips = made(path, tmp_path / "out", "--from", str(tmp_path / "in"), "--inpaint", "0.2:0.3", "--normalize", "peak")
    assert list(clips) == ["0_inpainted_0.2-0.3", "1_inpainted_0.2-0.3"]
    for number, clip in enumerate(clips.values()):
        given = wav(tmp_path / "in" / f"{number}.wav")
        assert np.array_equal(clip[:800], given[:800]) and np.array_equal(clip[1200:], given[1200:])
        assert (clip[800:1200] != given[800:1200]).mean() > 0.9
    (longer,) = made(path, tmp_path / "more", "--from", str(tmp_path / "in" / "0.wav"), "--continue", "0.25").values()
    assert len(longer) == 3000 and np.array_equal(longer[:2000], wav(tmp_path / "in" / "0.wav")) and longer[2000:].any()


def test_what_stood_in_a_span_has_no_say(raw, folder, tmp_path):
    """A click there does not make the rest sound fainter to the model, which hears recordings at a peak of full scale."""
    tone, rate = soundfile.read(folder / "tone0.wav")
    spans = []
    for name, click in (("plain", 0.0), ("click", 0.9)):
        audio = 0.02 * tone[: rate // 2 : 2]
        audio[900:1100] += click
        soundfile.write(tmp_path / f"{name}.wav", audio, 4000)
        options = "--from", str(tmp_path / f"{name}.wav"), "--inpaint", "0.2:0.3", "--normalize", "peak"
        (clip,) = made(raw, tmp_path / name, *options).values()
        spans.append(clip[800:1200])
    assert np.array_equal(*spans) and spans[0].any()


def test_nothing_is_fitted_to_silence(raw, tmp_path, capsys):
    soundfile.write(tmp_path / "silent.wav", np.zeros(2000), 4000)
    for option in ("--inpaint=0.1:0.2", "--continue=0.1", "--variation=0.5"):
        error = refused(capsys, "generate", str(raw), "--from", str(tmp_path / "silent.wav"), option, "--out", str(tmp_path))
        assert "silent.wav is silent, and there is nothing that the model could fit to" in error


def test_recordings_are_varied_with_another_label(raw, folder, tmp_path):
    source = "--from", str(folder / "tone3.wav")
    assert main(["generate", str(raw), *source, "--out", str(tmp_path)]) == 0
    same = wav(tmp_path / "tone3_reconstructed.wav")
    original, _ = read_audio(folder / "tone3.wav", 4000)
    assert np.abs(same / 32768 - original[0].numpy()).max() < 1e-4
    plain, labelled = (
        made(raw, tmp_path, *source, "--variation", "0.7", *options)[f"tone3_variation_0.7{name}"]
        for name, options in (("", ()), ("_two", ("--label", "two")))
    )
    assert not np.array_equal(plain, same) and not np.array_equal(plain, labelled)


def test_an_interpolation_goes_from_one_recording_to_the_other(raw, folder, tmp_path, capsys):
    ends = str(folder / "tone0.wav"), str(folder / "tone3.wav")  # 2 s and 0.2 s
    clips = made(raw, tmp_path, "--interpolate", *ends, "--num", "3", "--steps", "50")
    assert "from tone0.wav to tone3.wav, 0.2 s of each, as the shorter" in capsys.readouterr().out
    assert list(clips) == ["tone0_to_tone3_000", "tone0_to_tone3_001", "tone0_to_tone3_002"]
    for clip, path in zip((clips["tone0_to_tone3_000"], clips["tone0_to_tone3_002"]), ends, strict=True):
        given = read_audio(path, 4000)[0][0, :800].numpy()
        assert len(clip) == 800 and np.abs(clip / 32768 - given).max() < 0.05 * np.abs(given).max()
    assert len(made(raw, tmp_path / "five", "--interpolate", *ends)) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "--from is missing: noise, a recording, or a folder"),
        ("--from noise --label eight", "--label is eight; the model knows seven, two."),
        ("--from noise --label 2", "--label is 2; the model knows seven, two."),
        ("--from noise --temperature 0.9", "a Flow; it takes --label, --steps, --guidance."),
        ("--from noise --inpaint 1:2", "--inpaint and --continue need a recording"),
        ("--from noise --continue 1", "--inpaint and --continue need a recording"),
        ("--from noise --steps 0", "--steps is 0; wanted at least 1 and at most 1000."),
        ("--from noise --normalize none", "--normalize is the level of recordings; with --from noise there is none."),
        ("--from TONE --batch-size 2", "--batch-size is for --from noise; a recording gives one clip."),
        ("--from TONE --label two", "--label does nothing where a recording is only reconstructed; give --variation"),
        ("--from noise --label two --guidance -1", "--guidance is -1.0; wanted at least 0 and at most 100."),
        ("--from noise --guidance 2", "--guidance says how closely to follow a label, and there is no --label."),
        ("--from TONE --inpaint 1-2", "--inpaint is 1-2; wanted START:STOP in seconds"),
        ("--from TONE --inpaint 2:1", "wanted a start of at least 0 and a later stop"),
        ("--from TONE --inpaint nan:1", "wanted a start of at least 0 and a later stop"),
        ("--from TONE --inpaint 1.5:2.5", "is 2.00 s long, and --inpaint asks for 1.5 to 2.5 s"),
        ("--from TONE --inpaint 1:1.00001", "asks for 1 to 1.00001 s, which is not even a sample at 4000 Hz"),
        ("--from TONE --continue 0", "--continue is 0; wanted a positive number of seconds"),
        ("--from TONE --continue inf", "--continue is inf; wanted a positive number of seconds"),
        ("--from TONE --continue 1 --variation 0.5", "not allowed with argument"),
        ("--from TONE --interpolate TONE TONE", "--interpolate names its two recordings itself"),
        ("--interpolate TONE FOLDER", "--interpolate takes two recordings"),
        ("--interpolate TONE TONE --seconds 3", "--seconds is for --from noise; two recordings give clips as long as"),
        ("--interpolate TONE TONE --num 1", "--num is 1; wanted at least 2."),
        ("--interpolate TONE TONE --guidance 2", "--guidance does nothing for --interpolate"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(raw, folder, tmp_path, capsys, options, message):
    words = [{"TONE": str(folder / "tone0.wav"), "FOLDER": str(folder)}.get(word, word) for word in options.split()]
    assert message in refused(capsys, "generate", str(raw), "--out", str(tmp_path / "out"), *words)
    assert not list(tmp_path.rglob("*.wav"))


def test_a_model_says_what_it_can_do_instead(model, latent, folder, tmp_path, capsys):
    tone = str(folder / "tone0.wav")
    for path, options, message in (
        (model, ("--from", tone, "--inpaint", "1:2"), "cannot do --inpaint; it can do --from noise, --variation."),
        (model, ("--interpolate", tone, tone), "cannot do --interpolate; it can do --from noise, --variation."),
        (model, ("--from", "noise", "--steps", "4"), "--steps does nothing for --from noise of"),
        (model, ("--from", "noise", "--label", "two"), "a CausalAutoencoder; leave it out."),
        (latent, ("--from", "noise", "--label", "two"), "a Flow without labels; it takes --steps."),
        (latent, ("--from", "noise", "--guidance", "2"), "a Flow without labels; it takes --steps."),
        (latent, ("--from", tone, "--top-p", "0.9"), "--top-p does nothing for --variation of"),
    ):
        assert message in refused(capsys, "generate", str(path), "--out", str(tmp_path / "out"), *options)
    assert not (tmp_path / "out").exists()


def test_recordings_are_never_overwritten_by_an_interpolation(raw, folder, tmp_path, capsys):
    (tmp_path / "tone3_to_tone3_001.wav").symlink_to(folder / "tone3.wav")
    ends = str(folder / "tone3.wav"), str(folder / "tone3.wav")
    error = refused(capsys, "generate", str(raw), "--interpolate", *ends, "--out", str(tmp_path))
    assert "would be overwritten" in error


def test_options_of_other_models_reach_their_methods(tmp_path, monkeypatch):
    """By the signature of the method, and only if they are given."""
    told = []

    class Drawing(nn.Module):
        sample_rate, channels = 4000, 1

        def sample(self, batch_size, num_samples, *, label=None, generator=None, temperature=1.0, top_p=1.0):
            told.append((temperature, top_p))
            return torch.zeros(batch_size, 1, num_samples)

    monkeypatch.setattr(module, "load_generator", lambda *_: Drawing())
    monkeypatch.setattr(module.checkpoint, "read_config", lambda _: {"training": {}, "class": "Drawing"})
    monkeypatch.setattr(module, "_record", lambda *_: None)
    options = "--from", "noise", "--num", "1", "--seconds", "0.1", "--out", str(tmp_path)
    assert main(["generate", "model", *options, "--temperature", "0.7"]) == 0
    assert main(["generate", "model", *options, "--top-p", "0.9"]) == 0
    assert told == [(0.7, 1.0), (1.0, 0.9)]


def test_models_are_listed_and_taken_by_name(raw, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoint, "PRETRAINED", tmp_path / "shipped")
    assert main(["models"]) == 0
    assert capsys.readouterr().out == "this installation comes without pretrained models\n"
    save(load(raw), tmp_path / "shipped" / "digits-4k")
    assert main(["models"]) == 0
    told = capsys.readouterr().out
    size = (tmp_path / "shipped" / "digits-4k" / "model.safetensors").stat().st_size / 1e6
    assert all(word in told for word in ("digits-4k", "Flow", "4,000 Hz", "seven, two", f"{size:.1f} MB"))
    assert len(made(Path("digits-4k"), tmp_path / "out", "--from", "noise", "--seconds", "0.1")) == 4
    error = refused(capsys, "evaluate", "GENERATED", "REFERENCE", "--embedding", "digits-4k")
    assert "digits-4k is a Flow, which has no encoder" in error
    assert main(["info", "digits-4k"]) == 0
    assert "seven, two" in capsys.readouterr().out and (tmp_path / "poles.png").exists()


def test_a_value_that_the_model_refuses_leaves_no_folder(capsys, raw, tmp_path):
    options = ("--from", "noise", "--label", "two", "--guidance", "-1", "--out", str(tmp_path / "out"))
    assert "guidance is -1" in refused(capsys, "generate", str(raw), *options)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()  # and one that was there stays
    refused(capsys, "generate", str(raw), *options)
    assert (tmp_path / "out").is_dir() and not list((tmp_path / "out").iterdir())
    refused(capsys, "generate", str(raw), *options[:-1], str(tmp_path / "out" / "p" / "q"))
    assert not list((tmp_path / "out").iterdir())


def test_of_a_model_with_labels_a_continuation_is_unlike_its_clips(capsys, raw, latent, folder, tmp_path):
    options = ("--from", str(folder / "tone0.wav"), "--continue", "0.1", "--steps", "2", "--out", str(tmp_path / "out"))
    assert main(["generate", str(raw), *options]) == 0
    assert "learned one label a clip, clips of 0.3 s; longer ones are unlike them" in capsys.readouterr().out
    assert main(["generate", str(latent), *options]) == 0
    assert "note:" not in capsys.readouterr().out


def test_each_end_of_an_interpolation_is_at_its_own_level(raw, folder, tmp_path):
    ends, (samples, rate) = [], soundfile.read(folder / "tone3.wav")
    for name, gain in (("loud", 1.0), ("faint", 0.1)):
        soundfile.write(tmp_path / f"{name}.wav", gain * samples, rate)
        ends.append(str(tmp_path / f"{name}.wav"))
    clips = made(raw, tmp_path / "out", "--interpolate", *ends, "--num", "2", "--steps", "50")
    for clip, path in zip(clips.values(), ends, strict=True):
        given = read_audio(path, 4000)[0][0].numpy()
        assert np.abs(clip / 32768 - given).max() < 0.05 * np.abs(given).max() + 1e-4


def test_the_note_names_every_model_once(model, raw, tmp_path):
    for each in (model, raw, model):
        assert (
            main(["generate", str(each), "--from", "noise", "--num", "1", "--seconds", "0.1", "--out", str(tmp_path)]) == 0
        )
    assert [note["class"] for note in module.made_by(tmp_path)[0]] == ["Flow", "CausalAutoencoder"]


def test_help_names_the_defaults(capsys):
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert f"of a flow's solver (default {NUM_STEPS})" in told and f"follows the label (default {GUIDANCE:g})" in told
