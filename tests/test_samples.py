"""The clips that ship: what their README says, and what their script makes."""

import importlib.util
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

SAMPLES = Path(__file__).parents[1] / "samples"
CLIPS = sorted([*SAMPLES.glob("train/*.flac"), *SAMPLES.glob("valid/*.flac")])


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_samples", SAMPLES / "make_samples.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_readme_lists_every_clip_with_its_length():
    told = dict(re.findall(r"`((?:train|valid)/\w+\.flac)` \| (\d+) \|", (SAMPLES / "README.md").read_text()))
    seconds = {path.relative_to(SAMPLES).as_posix(): soundfile.info(path).duration for path in CLIPS}
    assert {name: str(round(length)) for name, length in seconds.items()} == told
    assert 180 < sum(seconds.values()) < 400


@pytest.mark.parametrize("path", CLIPS, ids=lambda path: path.stem)
def test_a_clip_is_music_at_a_sane_level(path):
    audio, rate = soundfile.read(path)
    assert rate == 16_000 and audio.ndim == 1
    assert np.abs(audio).max() == pytest.approx(0.7, abs=1e-3)
    assert -24 < 10 * np.log10(np.mean(audio**2)) < -14
    power = np.abs(np.fft.rfft(audio)) ** 2
    share = power / power.sum()
    assert np.exp(-(share[share > 0] * np.log(share[share > 0])).sum()) > 30  # many partials, not a test tone


def test_the_script_makes_the_clips(script):
    """To within a few steps of 16 bits: numpy and scipy may round differently from version to version."""
    name = "train/silent_night_music_box"
    made = script.play(script.PIECES[name], script.seed_of(name))
    kept, _ = soundfile.read(SAMPLES / f"{name}.flac")
    assert len(made) == len(kept) and np.abs(made - kept).max() < 4 / 32768
    assert {path.relative_to(SAMPLES).with_suffix("").as_posix() for path in CLIPS} == set(script.PIECES)


def test_the_parts_of_a_piece_end_together(script):
    for name, piece in script.PIECES.items():
        ends = [max(start + length for start, length, _, _ in script.notes(part.score)) for part in piece.parts]
        assert max(ends) - min(ends) <= 3, name  # beats


def test_the_notation(script):
    assert script.notes("!0.5 A4/2 C4+E4 -/1 A4") == [
        (0.0, 2.0, 440.0, 0.5), (2.0, 2.0, script.pitch("C4"), 0.5), (2.0, 2.0, script.pitch("E4"), 0.5),
        (5.0, 1.0, 440.0, 0.5),
    ]  # fmt: skip
    assert script.pitch("A3") == 220 and script.pitch("Bb4") == pytest.approx(script.pitch("A#4"))
    assert script.broken("C4+E4+G4", "0120") == "C4 E4 G4 C4"
