"""Folders of files: what is read, refused and recorded."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from s4audio import ConvVAE, Evaluator
from s4audio.audio import AudioError
from s4audio.losses import multi_resolution_stft
from s4audio.metrics.evaluator import pair_files

RATE = 4000


def write(folder: Path, number: int, seed: int = 0, seconds: float = 1.0, pitch: float = 1.0, rate: int = RATE) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    for index in range(number):
        time = np.arange(round(seconds * rate)) / rate
        tone = np.sin(2 * np.pi * pitch * generator.uniform(200, 400) * time) * np.exp(-generator.uniform(0, 4) * time)
        soundfile.write(folder / f"{index:03d}.wav", 0.3 * tone + 0.01 * generator.standard_normal(len(time)), rate)
    return folder


@pytest.fixture
def real(tmp_path) -> Path:
    return write(tmp_path / "real", 12)


def test_scores_folders_and_says_how(real, tmp_path):
    near, far = write(tmp_path / "near", 10, seed=1), write(tmp_path / "far", 10, seed=2, pitch=2.5)
    evaluator = Evaluator()
    close, distant = evaluator.score(near, real), evaluator.score(far, real)
    assert close["kad"] < distant["kad"] and close["fid"] < distant["fid"]
    assert distant["verdict"]["distinguishable"] and not close["verdict"]["distinguishable"]
    provenance = close["provenance"]
    assert provenance["embedding"]["name"] == "log_mel_1" and provenance["embedding"]["dim"] == 96
    assert provenance["sample_rate"] == RATE and provenance["normalize"] == "peak" and provenance["seed"] == 0
    assert provenance["generated"]["clips"] == 10 and provenance["reference"]["windows"] == 12
    assert provenance["reference"]["sha256"] == distant["provenance"]["reference"]["sha256"]
    assert provenance["generated"]["sha256"] != distant["provenance"]["generated"]["sha256"]
    assert set(provenance["versions"]) == {
        "s4audio", "torch", "torchaudio", "numpy", "soxr", "soundfile", "librosa"
    }  # fmt: skip
    assert json.loads(json.dumps(close)) == close == evaluator.score(near, real)


def test_names_and_order_of_files_do_not_matter(real, tmp_path):
    renamed = tmp_path / "renamed" / "deeper"
    renamed.mkdir(parents=True)
    for index, file in enumerate(sorted(real.iterdir())):
        (renamed / f"{99 - index}.wav").write_bytes(file.read_bytes())
    made = write(tmp_path / "made", 5, seed=1)
    a, b = Evaluator().score(made, real), Evaluator().score(made, renamed.parent)
    assert {**a, "folders": None} == {**b, "folders": None}  # intervals, floor and verdict too: no draw depends on a name


def test_any_object_can_be_the_embedding(real, tmp_path):
    class Loudness:
        name, sample_rate = "loudness", 2000
        details = {"sha256": "0" * 64}  # noqa: RUF012

        def __call__(self, audio):
            assert audio.shape[:2] == (1, 1) and audio.shape[-1] == 2000
            return torch.stack([audio.square().mean(-1), audio.abs().amax(-1)], dim=-1)

    scores = Evaluator(Loudness(), normalize="none").score(write(tmp_path / "made", 4, seed=1), real)
    assert scores["provenance"]["embedding"] == {
        "name": "loudness", "sample_rate": 2000, "dim": 2, "sha256": "0" * 64
    }  # fmt: skip


@pytest.mark.parametrize(
    "vectors, message",
    [(torch.zeros(1, 4), r"gives \(1, 4\); wanted \(1, windows, dim\)"), (torch.full((1, 1, 2), torch.nan), "not finite")],
)
def test_an_embedding_that_gives_something_else_is_refused(real, vectors, message):
    class Odd:
        name, sample_rate = "odd", RATE

        def __call__(self, audio):
            return vectors

    with pytest.raises(AudioError, match=message):
        Evaluator(Odd()).score(real, real)


def test_files_that_cannot_be_scored_are_counted_and_nothing_is(real, tmp_path):
    made = write(tmp_path / "made", 3)
    (made / "broken.wav").write_bytes(b"RIFF nothing")
    soundfile.write(made / "hole.wav", np.array([0.1, np.nan, 0.2] * 500), RATE, subtype="FLOAT")
    soundfile.write(made / "short.wav", 0.1 * np.ones(100), RATE)
    with pytest.raises(
        AudioError, match=r"3 of the 6 files in .*made cannot be scored, so nothing was; the first: .*broken.wav"
    ):
        Evaluator().score(made, real)
    (made / "broken.wav").unlink()
    with pytest.raises(AudioError, match=r"2 of the 5 files .*hole\.wav holds samples that are not finite numbers"):
        Evaluator().score(made, real)
    (made / "hole.wav").unlink()
    with pytest.raises(AudioError, match=r"1 of the 4 files .*short.wav: 0.025 s is too short for log_mel_1"):
        Evaluator().score(made, real)


def test_one_clip_and_empty_folders_are_refused(real, tmp_path):
    with pytest.raises(AudioError, match=r"generated: .*one has 1 clip; a score with its interval needs 3"):
        Evaluator().score(write(tmp_path / "one", 1), real)
    with pytest.raises(AudioError, match=r"reference: .*two has 2 clips; a score"):
        Evaluator().score(real, write(tmp_path / "two", 2))
    (tmp_path / "empty").mkdir()
    with pytest.raises(AudioError, match="empty holds no audio file"):
        Evaluator().score(real, tmp_path / "empty")


def test_mixed_rates_are_refused_until_one_is_chosen(real, tmp_path):
    made = write(tmp_path / "made", 4, rate=8000)
    with pytest.raises(
        AudioError, match=r"2 sample rates: 4000 Hz \(.*\), 8000 Hz \(.*\).*set sample_rate .--sample-rate. to 4000"
    ):
        Evaluator().score(made, real)
    assert Evaluator(sample_rate=4000).score(made, real)["provenance"]["sample_rate"] == 4000
    with pytest.raises(AudioError, match="is at 4000 Hz: files cannot be compared at 8000 Hz"):
        Evaluator(sample_rate=8000).score(made, real)


def test_defects_are_counted_and_told(real, tmp_path):
    made = write(tmp_path / "made", 4, seed=1)
    soundfile.write(made / "silent.wav", np.zeros(RATE), RATE)
    soundfile.write(made / "clipped.wav", np.clip(3 * np.sin(np.arange(RATE)), -1, 1), RATE)
    soundfile.write(made / "shifted.wav", 0.1 + 0.1 * np.sin(np.arange(RATE)), RATE)
    (made / "again.wav").write_bytes((made / "001.wav").read_bytes())
    (made / "taken.wav").write_bytes((real / "003.wav").read_bytes())
    scores = Evaluator().score(made, real)
    assert scores["defects"]["generated"] == {"clips": 9, "silent": 1, "clipped": 1, "dc_shifted": 1, "duplicate": 1}
    assert scores["defects"]["reference"] == {"clips": 12, "silent": 0, "clipped": 0, "dc_shifted": 0, "duplicate": 0}
    told = " ".join(scores["warnings"])
    wanted = ("silent, as mono: 1 of the 9 generated", "the same as another: 1", "the generated and the reference folder: 1")
    for words in wanted:
        assert words in told


def test_train_adds_memorization_and_the_score_of_the_training_clips(real, tmp_path):
    train = write(tmp_path / "train", 15, seed=5)
    made = write(tmp_path / "made", 6, seed=1)
    (made / "000.wav").write_bytes((train / "007.wav").read_bytes())
    found = Evaluator().score(made, real, train=train)
    first = found["memorization"]["closest"][0]
    assert (first["generated"], first["train"]) == ("000.wav", "007.wav") and first["distance"] < 1e-3
    assert found["train_against_reference"]["kad"] == pytest.approx(Evaluator().score(train, real)["kad"])
    assert "sample for sample the same in the generated and the train folder: 1 clips" in " ".join(found["warnings"])


def test_pairs_have_signal_metrics(real, tmp_path):
    made = tmp_path / "made"
    made.mkdir()
    generator = np.random.default_rng(0)
    for file in real.iterdir():
        audio, _ = soundfile.read(file)
        noise = generator.standard_normal(len(audio)) * np.sqrt((audio**2).mean() / 100)
        soundfile.write(made / f"{file.stem}_reconstructed.flac", audio + noise, RATE, subtype="PCM_24")
    paired = Evaluator().score(made, real, paired=True)["paired"]
    assert paired["pairs"] == 12 and paired["si_sdr_db"] == pytest.approx(20, abs=0.3)
    assert paired["si_sdr_db_interval"][0] < paired["si_sdr_db"] < paired["si_sdr_db_interval"][1]
    assert all(paired[name] > 0 for name in ("log_spectral_distance_db", "multi_resolution_stft", "mel_distance"))


def test_a_reconstruction_that_is_silent_has_no_mean_sdr(real, tmp_path):
    made = tmp_path / "made"
    made.mkdir()
    for number, file in enumerate(sorted(real.iterdir())):
        audio, _ = soundfile.read(file)
        soundfile.write(made / file.name, 0.9 * audio + 0.001 if number else 0 * audio, RATE)
    paired = Evaluator().score(made, real, paired=True)["paired"]
    assert paired["si_sdr_db"] is None and paired["si_sdr_db_silent"] == 1 and paired["mel_distance"] > 0


def test_pairs_are_found_by_name_and_subfolder(tmp_path):
    made, real = tmp_path / "made", tmp_path / "real"

    def pairs(generated: list[str], reference: list[str]) -> dict[str, str]:
        found = pair_files(made, [made / name for name in generated], real, [real / name for name in reference])
        return {str(a.relative_to(made)): str(b.relative_to(real)) for a, b in found}

    assert pairs(["a_b_c.wav"], ["a.wav", "a_b.flac"]) == {"a_b_c.wav": "a_b.flac"}
    assert pairs(["x/0.wav", "y/0.wav"], ["x/0.wav", "y/0.wav"]) == {"x/0.wav": "x/0.wav", "y/0.wav": "y/0.wav"}
    assert pairs(["0_reconstructed.wav"], ["x/0.wav"]) == {"0_reconstructed.wav": "x/0.wav"}
    with pytest.raises(ValueError, match="has no partner in"):
        pairs(["other.wav"], ["a.wav"])
    with pytest.raises(ValueError, match=r"has 2 partners.*; rename all but one, and what was made of them"):
        pairs(["0.wav"], ["x/0.wav", "y/0.wav"])
    with pytest.raises(ValueError, match="would both be compared with"):
        pairs(["a_1.wav", "a_2.wav"], ["a.wav"])


def test_pairs_of_other_lengths_are_refused(real, tmp_path):
    with pytest.raises(ValueError, match=r"000.wav lasts 1.50 s and .*000.wav 1.00 s: pairs may differ by 1 %"):
        Evaluator().score(write(tmp_path / "made", 12, seconds=1.5), real, paired=True)


def test_reference_files_without_a_partner_are_left_out(real, tmp_path):
    made = tmp_path / "made"
    made.mkdir()
    for file in sorted(real.iterdir())[3:8]:
        (made / file.name).write_bytes(file.read_bytes())
    scores = Evaluator().score(made, real, paired=True)
    assert scores["provenance"]["reference"]["clips"] == 5 and scores["provenance"]["paired"]
    assert scores["fid"] < 1e-6 and scores["kad"] == pytest.approx(0, abs=1e-6)


def test_clips_of_other_lengths_are_told(real, tmp_path):
    scores = Evaluator().score(write(tmp_path / "made", 4, seconds=2.0), real)
    assert "the generated clips last 2 s and those of the reference 1 s" in " ".join(scores["warnings"])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"embedding": "vggish"}, "the embedding is 'vggish'"),
        ({"normalize": "rms"}, "normalize is 'rms'"),
        ({"sample_rate": 0}, "the sample rate is 0"),
        ({"seed": -1}, "the seed is -1"),
    ],
)
def test_wrong_arguments_are_sentences(arguments, message):
    with pytest.raises(ValueError, match=message):
        Evaluator(**arguments)


def test_progress_is_told(real, tmp_path):
    said = []
    Evaluator(progress=lambda *what: said.append(what)).score(write(tmp_path / "made", 4), real)
    assert said[0][1:] == (0, 4) and said[-1] == ("scores", 5, 5)


def test_clips_learned_by_heart_are_a_warning(tmp_path):
    real, train = write(tmp_path / "real", 30, seed=1), write(tmp_path / "train", 30, seed=2)
    made = tmp_path / "made"
    made.mkdir()
    for file in train.iterdir():
        audio, _ = soundfile.read(file)
        soundfile.write(made / file.name, 0.7 * np.roll(audio, 10), RATE)
    scores = Evaluator().score(made, real, train=train)
    assert scores["memorization"]["suspicious"] and "probably learned by heart" in " ".join(scores["warnings"])
    honest = Evaluator().score(write(tmp_path / "honest", 30, seed=3), real, train=train)
    assert not honest["memorization"]["suspicious"] and "by heart" not in " ".join(honest["warnings"])


def test_an_embedding_that_hears_more_than_there_is_is_a_warning(real, tmp_path):
    class High:
        name, sample_rate = "high", 2 * RATE

        def __call__(self, audio):
            return audio.square().mean(-1, keepdim=True).numpy()  # an array will do

    assert "hears at 8000 Hz and the files are compared at 4000 Hz" in " ".join(
        Evaluator(High()).score(real, real)["warnings"]
    )


def test_a_module_listens_in_evaluation_mode_without_gradients(real):
    class Module(torch.nn.Module):
        name, sample_rate = "module", RATE

        def forward(self, audio):
            assert not self.training and not torch.is_grad_enabled()
            return audio.square().mean(-1, keepdim=True)

    Evaluator(Module()).score(real, real)


@pytest.mark.parametrize(
    "embedding, message",
    [
        (dict, "is the class dict; give an object of it"),
        (object(), r"has the name None and the sample_rate None"),
        (ConvVAE(8000, strides=(2,), widths=(2, 2), latent_channels=1), r"load_embedding\(FOLDER\)"),
    ],
)
def test_what_is_no_embedding_is_refused_before_any_work(embedding, message):
    with pytest.raises(ValueError, match=message):
        Evaluator(embedding)


def test_an_unusual_window_that_reaches_far_is_a_warning(tmp_path):
    """Silence lies next to one odd recording, whose neighbours are far: precision calls it real."""
    real = write(tmp_path / "real", 20)
    for name in range(4):
        soundfile.write(real / f"quiet{name}.wav", 1e-3 * np.random.default_rng(name).standard_normal(RATE), RATE)
    made = tmp_path / "made"
    made.mkdir()
    for name in range(8):
        soundfile.write(made / f"{name}.wav", 1e-3 * np.random.default_rng(100 + name).standard_normal(RATE), RATE)
    scores = Evaluator(normalize="none").score(made, real)
    assert scores["at_equal_n"]["precision"] > 0.5 * scores["floor"]["precision"] and scores["verdict"]["distinguishable"]
    assert "Trust coverage and recall" in " ".join(scores["warnings"])


def test_an_embedding_that_fails_names_the_file(real):
    class Failing:
        name, sample_rate = "failing", RATE

        def __call__(self, audio):
            return audio.reshape(7, -1)

    with pytest.raises(RuntimeError, match=r"the embedding failing failed on .*000\.wav: shape"):
        Evaluator(Failing()).score(real, real)


def test_pairs_are_at_the_level_of_the_reference(tmp_path):
    for number in range(4):
        x = 0.1 * np.random.default_rng(number).standard_normal(RATE).clip(-3, 3)
        for name, gain in (("real", 1.0), ("made", 0.5)):
            (tmp_path / name).mkdir(exist_ok=True)
            soundfile.write(tmp_path / name / f"{number}.wav", gain * x, RATE, subtype="FLOAT")
    paired = Evaluator().score(tmp_path / "made", tmp_path / "real", paired=True)["paired"]
    assert paired["log_spectral_distance_db"] == pytest.approx(20 * np.log10(2), rel=0.02)
    x = torch.from_numpy(x).float()[None] / np.abs(x).max()
    found = next(file for file in paired["files"] if file["reference"] == "3.wav")["multi_resolution_stft"]
    assert found == pytest.approx(multi_resolution_stft(x / 2, x).item(), rel=1e-3)
