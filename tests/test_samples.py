"""The clips that ship: what their README says, and what their script makes."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from s4audio import Flow
from s4audio.checkpoint import load, read_config, save

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


@pytest.fixture(scope="module")
def renderer(script):
    spec = importlib.util.spec_from_file_location("render_scores", SAMPLES / "render_scores.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_rendered_pieces_come_from_free_encodings_and_are_each_in_one_split(renderer):
    pieces = renderer.pieces()
    assert {split for _, _, split, _ in pieces.values()} == {"train", "valid", "test"}
    assert len({title for title, *_ in pieces.values()}) == len(pieces)
    free = ("Apache-2.0", "CC BY", "CC0", "public domain")
    assert all(licence.startswith(free) and "NC" not in licence for _, licence, _, _ in pieces.values())


def test_a_typed_score_is_read_in_seconds_and_semitones(renderer):
    score = renderer.typed("train/minuet_harpsichord")
    beat = 60 / 132
    first = [note for note in score if note.part == 0][:3]
    assert [note.pitch for note in first] == [74, 67, 69]  # D5 G4 A4
    assert [note.start for note in first] == pytest.approx([0, beat, 1.5 * beat])
    assert [note.length for note in first] == pytest.approx([beat, beat / 2, beat / 2])


def test_a_performance_is_the_score_in_another_key_and_tempo_and_the_same_for_the_same_seed(renderer):
    score = renderer.typed("train/minuet_harpsichord")
    played, programs, _ = renderer.perform(score, np.random.default_rng(3))
    assert (played, programs) == renderer.perform(score, np.random.default_rng(3))[:2]
    assert played != renderer.perform(score, np.random.default_rng(4))[0]
    assert len({new.pitch - old.pitch for new, old in zip(played, score, strict=True)}) == 1
    late = [(new.start, old.start) for new, old in zip(played, score, strict=True) if old.start > 5]
    tempo = np.mean([old / new for new, old in late])
    assert max(abs(new - old / tempo) for new, old in late) < 0.05 and 0.85 < tempo < 1.2
    assert len(programs) == 2 and all(0.15 <= note.loudness <= 1 for note in played)


def test_the_midi_file_has_every_note_and_ends_one_before_it_is_struck_again(renderer, tmp_path):
    """Overlapping notes of one pitch are what fluidsynth is left hanging by."""
    import mido

    note = renderer.Note
    played = [note(0, 0.0, 2.0, 60, 0.5), note(0, 1.0, 1.0, 60, 0.5), note(1, 1.0, 0.5, 60, 0.5), note(0, 500.0, 1, 62, 0.5)]
    renderer.write_midi(tmp_path / "a.mid", played, (0, 40))
    now, events = 0.0, []
    for message in mido.MidiFile(tmp_path / "a.mid"):
        now += message.time
        if message.type in ("note_on", "note_off"):
            events.append((round(now, 3), message.type, message.channel, message.note))
    assert [event for event in events if event[2] == 0 and event[3] == 60] == [
        (0, "note_on", 0, 60), (1, "note_off", 0, 60), (1, "note_on", 0, 60), (2, "note_off", 0, 60)
    ]  # fmt: skip
    assert [event[:2] for event in events if event[2] == 1] == [(1, "note_on"), (1.5, "note_off")]
    assert max(event[0] for event in events) <= renderer.LONGEST and sum(event[3] == 62 for event in events) <= 1


def test_a_pretrained_model_keeps_its_state_spaces_and_rounds_its_matrices(tmp_path):
    net = Flow(8000, strides=(2,), widths=(4, 4), num_blocks=1, d_state=4).eval()
    save(net, tmp_path / "run", {"steps": 7})
    command = [sys.executable, SAMPLES / "make_pretrained.py", tmp_path / "run", "small", "--out", tmp_path]
    subprocess.run(command, check=True)
    kept, small = load(tmp_path / "run").state_dict(), load(tmp_path / "small").state_dict()
    rounded = {name for name in kept if not torch.equal(kept[name], small[name])}
    assert rounded and all(name.endswith(".weight") for name in rounded) and not any(".log_dt" in name for name in rounded)
    assert all(torch.equal(kept[name].half().float(), small[name]) for name in rounded)
    size, smaller = ((tmp_path / name / "model.safetensors").stat().st_size for name in ("run", "small"))
    assert smaller < size and read_config(tmp_path / "small")["training"] == {"steps": 7}
