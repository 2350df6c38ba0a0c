"""What `check_folder` says of each file, that `AudioFolder` does the same, and that every number is right."""

import json
import os
import tempfile
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile

from s4audio.audio import AudioError
from s4audio.data import AudioFolder, check_folder
from s4audio.data.check import decibels, measure, summarize, warnings_about
from tests import hostile

needs_unix = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes, links and permissions are a Unix thing")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("hostile")
    hostile.make(path)
    return path


@needs_unix
def test_every_file_of_a_hostile_folder_is_called_what_it_is(folder):
    found = {str(file.path.relative_to(folder)): file for file in check_folder(folder)}
    assert sorted(found) == sorted(hostile.EXPECTED)
    for name, expected in hostile.EXPECTED.items():
        file = found[name]
        assert (file.rejected.reason if file.rejected else None, file.warnings) == (expected.reason, expected.warnings), name
        if file.rejected:
            assert str(file.rejected).startswith(hostile.sentence(folder, name, expected)), name


@needs_unix
def test_training_uses_what_check_keeps_and_says_the_same_of_the_rest(folder):
    data = AudioFolder(str(folder), 16_000, valid=str(folder / "good.wav"))
    data.setup()
    files = check_folder(folder)
    assert data.describe()["train_files"] + 1 == sum(file.rejected is None for file in files)  # and the one held out
    rejected = [str(file.rejected) for file in files if file.rejected is not None and file.rejected.reason != "not audio"]
    assert sorted(data.skipped) == sorted(rejected) and len(rejected) > 10


@needs_unix
def test_what_a_user_may_not_read_is_named():
    with tempfile.TemporaryDirectory() as place:  # not pytest's, which others may not enter
        os.chmod(place, 0o777)
        data = Path(place) / "data"
        data.mkdir(mode=0o755)
        soundfile.write(data / "good.wav", np.linspace(-0.5, 0.5, 8000), 8000)
        expected = hostile.lock(data)
        run = hostile.run_as_nobody(
            "status = main(['check', 'data'])\n"
            "data = AudioFolder('data', 8000); data.setup()\n"
            "print(status, data.describe()['train_files'], *data.skipped, sep='\\n')",
            Path(place),
        )
        assert run.returncode == 0, run.stderr
        told = json.loads((Path(place) / "check" / "check.json").read_text())
        for locked in ("locked", "locked.wav", "no way in"):
            (data / locked).chmod(0o755)
    assert "\n0\n1\n" in run.stdout  # the good one is used
    hostile.assert_every_reject_is_named(run.stdout, Path("data"), expected)
    assert {file["path"]: file["reason"] for file in told["files"]} == {
        "data/good.wav": None, **{f"data/{name}": "no permission" for name in expected}
    }  # fmt: skip


@needs_unix
def test_a_file_that_grows_while_it_is_read_is_left_out(tmp_path):
    soundfile.write(tmp_path / "good.wav", np.linspace(-0.5, 0.5, 8000), 8000)
    with hostile.growing(tmp_path / "growing.wav"):
        good, growing = check_folder(tmp_path)
        data = AudioFolder(str(tmp_path), 8000)
        data.setup()
    assert good.rejected is None and growing.rejected.reason == "changed"
    assert str(growing.rejected) == (
        f"{tmp_path / 'growing.wav'} changed while it was read; give the command again when it is whole."
    )
    assert data.skipped == [str(growing.rejected)]


def test_a_recording_is_measured_as_it_was_made(tmp_path):
    """Two channels, of which one is louder, shifted and clipped; 10 s, so that it is read in three blocks."""
    rate, seconds = 8000, 10.0
    time = np.arange(round(rate * seconds)) / rate
    left = 0.25 * np.sin(2 * np.pi * 100 * time) * (time >= 3)  # silence for 3 s
    right = left + 0.0625 * (time >= 3)
    for start, length in ((31_998, 3), (31_999 + 32_000, 5), (50_000, 2), (70_000, 4)):  # over both edges, too short, within
        right[start : start + length] = 1
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], axis=1), rate, subtype="FLOAT")
    sound = measure(tmp_path / "a.wav")
    assert (sound.seconds, sound.sample_rate, sound.channels, sound.peak) == (seconds, rate, 2, 1.0)
    assert sound.dc_offset == pytest.approx(right.mean(), abs=1e-9) and sound.dc_offset == pytest.approx(0.044, abs=1e-3)
    assert sound.silent_share == pytest.approx(0.3) and sound.clipped_runs == 3 and not sound.silent


def test_loudness_is_that_of_all_channels(tmp_path):
    """EBU Tech 3341's first signal: 1 kHz at -23 dB in both channels is -23 LUFS, and 3 LU less in one."""
    tone = 10 ** (-23 / 20) * np.sin(2 * np.pi * 1000 * np.arange(5 * 48_000) / 48_000)
    soundfile.write(tmp_path / "a.wav", np.stack([tone, tone], axis=1), 48_000, subtype="FLOAT")
    soundfile.write(tmp_path / "b.wav", tone, 48_000, subtype="FLOAT")
    assert measure(tmp_path / "a.wav").loudness_lufs == pytest.approx(-23.0, abs=0.1)
    assert measure(tmp_path / "b.wav").loudness_lufs == pytest.approx(-26.0, abs=0.1)


@pytest.mark.parametrize("seconds", [0.02, 0.39, 4.0, 4.05, 8.0])
def test_loudness_and_silence_do_not_depend_on_blocks(tmp_path, monkeypatch, seconds):
    audio = 0.1 * np.random.default_rng(0).standard_normal(round(11_025 * seconds))
    soundfile.write(tmp_path / "a.wav", audio, 11_025)
    wanted = measure(tmp_path / "a.wav")
    monkeypatch.setattr("s4audio.audio.BLOCK_SECONDS", 0.0371)
    monkeypatch.setattr("s4audio.audio.open_audio.__defaults__", (0.0371,))
    again = measure(tmp_path / "a.wav")
    assert again._replace(loudness_lufs=0, dc_offset=0) == wanted._replace(loudness_lufs=0, dc_offset=0)
    assert again.dc_offset == pytest.approx(wanted.dc_offset, abs=1e-12)
    assert (wanted.loudness_lufs is None) == (seconds < 0.4)
    assert again.loudness_lufs == pytest.approx(wanted.loudness_lufs, abs=1e-9)


def test_memory_does_not_grow_with_a_file(tmp_path):
    """10 minutes at 8 kHz are 18 MiB of samples, and a block of 4 s is 125 KiB."""
    noise = 0.1 * np.random.default_rng(0).standard_normal(60 * 8000)
    with soundfile.SoundFile(tmp_path / "a.wav", "w", 8000, 1) as file:
        for _ in range(10):
            file.write(noise)
    measure(tmp_path / "a.wav")  # imports scipy
    tracemalloc.start()
    try:
        assert measure(tmp_path / "a.wav").seconds == 600
        assert tracemalloc.get_traced_memory()[1] < 3 * 2**20
    finally:
        tracemalloc.stop()


def test_a_rate_below_the_range_of_loudness_has_none(tmp_path):
    soundfile.write(tmp_path / "a.wav", 0.1 * np.random.default_rng(0).standard_normal(6000), 3000)
    assert measure(tmp_path / "a.wav").loudness_lufs is None
    assert check_folder(tmp_path)[0].rejected is None


@pytest.mark.parametrize(("subtype", "scale"), [("PCM_16", 2**15), ("PCM_24", 2**23)])
def test_the_same_recording_in_another_format_is_a_copy_and_at_another_rate_it_is_not(tmp_path, subtype, scale):
    audio = np.round(scale * 0.3 * np.sin(np.arange(4000))) / scale
    soundfile.write(tmp_path / "a.wav", audio, 8000, subtype=subtype)
    soundfile.write(tmp_path / "b.flac", audio, 8000, subtype=subtype)
    soundfile.write(tmp_path / "c.wav", np.stack([audio, audio], axis=1), 8000, subtype=subtype)
    soundfile.write(tmp_path / "d.wav", audio, 11_025, subtype=subtype)
    reasons = [file.rejected.reason if file.rejected else None for file in check_folder(tmp_path)]
    assert reasons == [None, "duplicate", "duplicate", None]


def test_the_sum_of_what_was_found(tmp_path):
    for name, seconds, channels in (("a.wav", 6.0, 1), ("b.wav", 12.0, 2), ("c.wav", 12.0, 2)):
        samples = np.random.default_rng(round(seconds)).uniform(-0.5, 0.5, (round(seconds * 8000), 1))
        soundfile.write(tmp_path / name, samples.repeat(channels, axis=1), 8000)
    (tmp_path / "d.wav").touch()
    (tmp_path / "e.txt").touch()
    found = summarize(check_folder(tmp_path))
    assert (found["found"], found["read"], found["kept"]) == (5, 3, 2)
    assert found["skipped"] == {"duplicate": 1, "empty file": 1, "not audio": 1} and found["warnings"] == {}
    assert found["found_minutes"] == pytest.approx(0.5) and found["kept_minutes"] == pytest.approx(0.3)
    assert found["kept_share"] == pytest.approx(0.6)
    assert found["sample_rates"] == {"8000": 2} and found["channels"] == {"1": 1, "2": 1}
    ranges = found["lowest_median_highest"]
    assert ranges["seconds"] == [6.0, 9.0, 12.0] and ranges["silent_share"] == [0.0, 0.0, 0.0]
    assert ranges["peak_db"] == pytest.approx([-6.02, -6.02, -6.02], abs=0.01)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert [file["sound"] is not None for file in found["files"]] == [True, True, True, False, False]
    assert decibels(0.1) == pytest.approx(-20)


def test_threads_change_nothing_but_the_time(folder):
    told: list[tuple[int, int]] = []

    def describe(files):
        return [(file.path, str(file.rejected), file.warnings, file.sound) for file in files]

    alone = check_folder(folder, workers=1, progress=lambda *done: told.append(done))
    assert describe(check_folder(folder, workers=4)) == describe(alone)
    assert [done for done, _ in told] == list(range(1, told[-1][1] + 1))


def test_one_file_and_no_folder(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.full(8000, 0.1), 8000)
    (file,) = check_folder(tmp_path / "a.wav")
    assert file.path == tmp_path / "a.wav" and file.rejected is None and file.warnings == ("DC offset",)
    with pytest.raises(AudioError, match="does not exist; give an audio file or a folder"):
        check_folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="workers is 0; wanted at least 1"):
        check_folder(tmp_path, workers=0)


def test_an_interruption_does_not_wait_for_the_rest(tmp_path, monkeypatch):
    for number in range(50):
        (tmp_path / f"{number:02}.wav").touch()
    begun, go_on = [], threading.Event()

    def slow(path):
        begun.append(path)
        if len(begun) > 1:
            go_on.wait(10)
        return AudioError("")

    def interrupt(done, total):
        go_on.set()
        raise KeyboardInterrupt

    monkeypatch.setattr("s4audio.data.check._measure_or_refuse", slow)
    with pytest.raises(KeyboardInterrupt):
        check_folder(tmp_path, workers=1, progress=interrupt)
    assert len(begun) < 5


def test_quiet_is_not_silent_and_twice_full_scale_is_too_much(tmp_path):
    for level, share in ((0.002, 0.0), (0.0005, 1.0)):
        soundfile.write(tmp_path / "a.wav", np.full(8000, level), 8000, subtype="FLOAT")
        sound = measure(tmp_path / "a.wav")
        assert sound.silent_share == share
    assert ["over full scale" in warnings_about(sound._replace(peak=peak)) for peak in (1.9, 2.1)] == [False, True]
