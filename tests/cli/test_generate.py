"""Audio from noise and from recordings: the same seed gives the same clips, and nothing is overwritten."""

from pathlib import Path

import numpy as np
import torch

from s4audio import S4DAutoencoder, load, save
from s4audio.audio import normalize, read_audio
from s4audio.checkpoint import fingerprint, kind
from s4audio.cli import main
from s4audio.cli.generate import _distinct_names, made_by
from tests.cli.commands import refused, wav


def test_noise_gives_the_same_clips_whatever_the_batch(model, tmp_path):
    def generate(out: str, *options: str) -> list[np.ndarray]:
        arguments = [
            "generate",
            str(model),
            "--from",
            "noise",
            "--num",
            "3",
            "--seconds",
            "1.1",
            "--out",
            str(tmp_path / out),
        ]
        assert main([*arguments, *options]) == 0
        return [wav(tmp_path / out / f"noise_{'7' if '7' in options else '0'}_{i:03d}.wav") for i in range(3)]

    first, again, single = generate("a"), generate("b"), generate("c", "--batch-size", "1")
    other = generate("d", "--seed", "7")
    for index in range(3):
        assert len(first[index]) == 4400
        assert np.array_equal(first[index], again[index])
        assert np.abs(first[index].astype(int) - single[index]).max() <= 1
        assert not np.array_equal(first[index], other[index])
    assert not np.array_equal(first[0], first[1])
    assert sorted(p.suffix for p in (tmp_path / "a").iterdir()) == [".json"] + [".png"] * 3 + [".wav"] * 3
    assert made_by(tmp_path / "a") == (
        [{"class": "CausalAutoencoder", "kind": kind(model), "sha256": fingerprint(model)}],
        None,
    )


def test_recordings_are_reconstructed_or_varied(model, folder, tmp_path):
    for out, variation in (("same", "0"), ("near", "0.1"), ("far", "0.9")):
        arguments = ["generate", str(model), "--from", str(folder), "--variation", variation, "--out", str(tmp_path / out)]
        assert main(arguments) == 0
    names = sorted(p.name for p in (tmp_path / "same").glob("*.wav"))
    assert names == [f"tone{i}_reconstructed.wav" for i in range(4)]
    same, near, far = (
        wav(tmp_path / name).astype(float)
        for name in ("same/tone0_reconstructed.wav", "near/tone0_variation_0.1.wav", "far/tone0_variation_0.9.wav")
    )
    assert len(same) == 8000  # 2 s at the model's 4,000 Hz
    assert 0 < np.abs(near - same).mean() < np.abs(far - same).mean()
    assert (tmp_path / "same" / "tone0_reconstructed.png").stat().st_size > 10_000
    for variation, name in (("0", "tone0_reconstructed.wav"), ("0.1", "tone0_variation_0.1_seed_7.wav")):
        one = [
            "--from",
            str(folder / "tone0.wav"),
            "--variation",
            variation,
            "--seed",
            "7",
            "--out",
            str(tmp_path / "seven"),
        ]
        assert main(["generate", str(model), *one]) == 0
        assert (tmp_path / "seven" / name).exists()


def test_recordings_come_at_the_level_of_training_unless_told(model, folder, tmp_path, capsys):
    for out, options in (("trained", []), ("peak", ["--normalize", "peak"]), ("none", ["--normalize", "none"])):
        arguments = ["generate", str(model), "--from", str(folder / "tone0.wav"), "--out", str(tmp_path / out)]
        assert main([*arguments, *options]) == 0
        assert ("hears them as loud as they are" in capsys.readouterr().out) == (out == "none")
    trained, peak, none = (wav(tmp_path / out / "tone0_reconstructed.wav") for out in ("trained", "peak", "none"))
    assert np.array_equal(trained, peak) and not np.array_equal(peak, none)
    original, _ = read_audio(folder / "tone0.wav", 4000)
    network = load(model)
    with torch.no_grad():  # the output is back at the level of the recording
        wanted = network(normalize(original, "peak").unsqueeze(0))[0, 0] * original.abs().max()
    assert np.abs(peak / 32768 - wanted.numpy()).max() < 1e-4


def test_files_of_one_name_do_not_overwrite_each_other(model, folder, tmp_path):
    for name in ("a/x.wav", "a/x_2.wav", "b/x.wav"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes((folder / "tone3.wav").read_bytes())
    assert main(["generate", str(model), "--from", str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 0
    assert sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.wav")) == [
        "a/x_2_reconstructed.wav", "a/x_reconstructed.wav", "b/x_reconstructed.wav",
    ]  # fmt: skip


def test_recordings_are_never_overwritten(capsys, model, folder, tmp_path):
    """Neither the one that is read nor one of the same name beside it."""
    for name in ("x.wav", "x_reconstructed.wav"):
        (tmp_path / name).write_bytes((folder / "tone3.wav").read_bytes())
    before = (tmp_path / "x.wav").read_bytes()
    out = ["--out", str(tmp_path)]
    assert "would be overwritten" in refused(capsys, "generate", str(model), "--from", str(tmp_path), *out)
    (tmp_path / "x.flac").write_bytes((folder / "tone0.wav").read_bytes())
    assert main(["generate", str(model), "--from", str(tmp_path / "x.flac"), *out]) == 0
    assert (tmp_path / "x.wav").read_bytes() == before


def test_names_that_some_systems_take_for_one_get_numbers():
    files = [Path("a/X.wav"), Path("a/x.flac"), Path("a/x_2.wav"), Path("a/b/x.wav")]
    assert _distinct_names(files, Path("a")) == ["X", "x_2", "x_2_2", "b/x"]
    assert _distinct_names([Path("a/X.wav")], Path("a/X.wav")) == ["X"]


def test_system_4_generates_too(tmp_path, folder):
    save(S4DAutoencoder(3000), tmp_path / "model")
    assert main(["generate", str(tmp_path / "model"), "--from", "noise", "--num", "1", "--out", str(tmp_path / "a")]) == 0
    assert len(wav(tmp_path / "a" / "noise_0_000.wav")) == 30_000


def test_options_of_noise_are_refused_with_a_recording(capsys, model, folder):
    for option in (["--num", "2"], ["--seconds", "3"]):
        error = refused(capsys, "generate", str(model), "--from", str(folder / "tone0.wav"), *option)
        assert f"{option[0]} is for --from noise; a recording gives one clip." in error


def test_clips_that_take_the_place_of_others_are_said(capsys, model, tmp_path):
    command = ["generate", str(model), "--from", "noise", "--num", "1", "--seconds", "0.1", "--out", str(tmp_path / "a")]
    assert main(command) == 0
    assert "in place of" not in capsys.readouterr().out
    assert main(command) == 0
    assert "noise_0_000.wav and .png, in place of older ones" in capsys.readouterr().out


def test_a_recording_that_cannot_be_read_is_skipped(model, folder, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.wav").write_bytes(b"nothing")
    (tmp_path / "in" / "b.wav").write_bytes((folder / "tone3.wav").read_bytes())
    assert main(["generate", str(model), "--from", str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 0
    assert [path.name for path in (tmp_path / "out").glob("*.wav")] == ["b_reconstructed.wav"]
    told = capsys.readouterr().err
    assert "skipped: " in told and told.endswith("skipped 1 of 2 recordings\n")


def test_each_recording_has_noise_of_its_own(model, folder, tmp_path):
    (tmp_path / "in").mkdir()
    for name in "ab":
        (tmp_path / "in" / f"{name}.wav").write_bytes((folder / "tone3.wav").read_bytes())
    options = "--variation", "1", "--out", str(tmp_path / "out")
    assert main(["generate", str(model), "--from", str(tmp_path / "in"), *options]) == 0
    a, b = (wav(tmp_path / "out" / f"{name}_variation_1.wav") for name in "ab")
    assert not np.array_equal(a, b)
