"""Raw samples through a pipe: the same as all at once, in pieces of any size, and again after the process has ended."""

import io
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from s4audio import CausalAutoencoder, S4DAutoencoder, S4Model, load, save
from s4audio.cli import main
from tests.cli.commands import ROOT, refused

ROUNDING = 1e-5  # of f32 samples between -1 and 1: blocks and the whole add up in another order; 2.4e-7 was measured
TYPES = {"s16": "<i2", "f32": "<f4"}


class Pipe(io.TextIOWrapper):
    """Standard input or output: bytes, no terminal, and no more than `most` of them at a time."""

    def __init__(self, data: bytes = b"", most: int = 10**9) -> None:
        class Bytes(io.BytesIO):
            def read1(self, size: int = -1) -> bytes:
                return super().read1(min(size, most))

        super().__init__(Bytes(data))


@pytest.fixture
def through(monkeypatch, model, capsys):
    """What `s4audio stream` makes of samples, and what it says; in this process."""

    def run(samples: np.ndarray, *options: str, most: int = 10**9, status: int = 0, tail: bytes = b"", path=model):
        name = options[options.index("--format") + 1] if "--format" in options else "s16"
        with monkeypatch.context() as patch:
            output = Pipe()
            patch.setattr(sys, "stdin", Pipe(samples.astype(TYPES[name]).tobytes() + tail, most))
            patch.setattr(sys, "stdout", output)
            assert main(["stream", str(path), *options]) == status
        return np.frombuffer(output.buffer.getvalue(), TYPES[name]), capsys.readouterr().err

    return run


def sound(length: int) -> np.ndarray:
    time = np.arange(length) / 4000
    return (0.3 * np.sin(2 * np.pi * 200 * time**1.5) * np.exp(-time / 3)).astype(np.float32)


@torch.no_grad()
def offline(model, samples: np.ndarray, gain: float = 1.0) -> np.ndarray:
    return load(model)(gain * torch.from_numpy(samples)[None, None])[0, 0].numpy() / gain


@pytest.mark.parametrize(("block", "most"), [(1, 4), (3, 1), (8, 7), (1024, 10**9), (1000, 1013)])
def test_blocks_of_any_size_give_what_the_model_gives_at_once(through, model, block, most):
    samples = sound(5003 if block > 100 else 203)
    output, told = through(samples, "--format", "f32", "--block", str(block), most=most)
    assert output.shape == samples.shape
    np.testing.assert_allclose(output, offline(model, samples), rtol=0, atol=ROUNDING)
    assert f"for blocks of {block}" in told and "times real time" in told


def test_16_bit_samples_are_within_one_step(through, model):
    samples = np.round(32767 * sound(5003))
    output, told = through(samples)
    wanted = 32768 * offline(model, (samples / 32768).astype(np.float32))
    assert np.abs(output - wanted).max() <= 0.51 and "s16 samples, little-endian, mono at 4000 Hz" in told


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9])
def test_the_output_is_as_long_as_the_input(through, length):
    assert through(sound(length), "--format", "f32", "--block", "5")[0].shape == (length,)


def test_a_gain_is_heard_by_the_model_only(through, model):
    samples = sound(3000)
    output, told = through(samples, "--format", "f32", "--gain", "9.5")
    np.testing.assert_allclose(output, offline(model, samples, 10 ** (9.5 / 20)), rtol=0, atol=ROUNDING)
    assert np.abs(output - offline(model, samples)).max() > 100 * ROUNDING
    # trained with a peak of 1, as its config.json says: what would have been right is 0.3's distance from it
    assert f"--gain {-20 * np.log10(samples.max()):.1f} would have been right" in told


def test_what_is_beyond_full_scale_is_clipped_and_counted(through, model, tmp_path):
    loud, samples = load(model), np.round(32768 * sound(4000)) / np.float32(32768)
    with torch.no_grad():
        for parameter in loud.decoder[-1].parameters():
            parameter.mul_(10)
    save(loud, tmp_path / "loud")
    wanted = offline(tmp_path / "loud", samples)
    count = int((np.abs(wanted) > 1).sum())
    output, told = through(32768 * samples, path=tmp_path / "loud")
    assert count > 100 and f"{count} samples beyond full scale were clipped" in told
    assert set(output[wanted > 1.001]) == {32767} and set(output[wanted < -1.001]) <= {-32768}
    output, told = through(samples, "--format", "f32", path=tmp_path / "loud")
    assert "clipped" not in told and np.abs(output).max() > 1


def test_an_input_that_ends_within_a_sample_is_said(through, model):
    samples = sound(50)
    output, told = through(samples, "--format", "f32", tail=b"abc")
    assert output.shape == (50,) and "the input ended within a sample: 3 of its 4 bytes were left over; is it f32?" in told


def test_samples_that_are_no_numbers_are_refused_with_their_place(through):
    samples = sound(50)
    samples[33] = np.nan
    output, told = through(samples, "--format", "f32", "--block", "10", most=40, status=2)
    assert "sample 33 of the input is not a finite number; is it f32, little-endian?" in told and len(output) == 24


def test_it_says_how_fast_it_goes_while_it_goes(through, monkeypatch):
    monkeypatch.setattr("s4audio.cli.stream.EVERY_SECONDS", 0.0)
    told = through(sound(4000), "--block", "1000")[1]
    assert [line.split()[1] for line in told.splitlines() if "real-time factor" in line] == [
        "0.2",
        "0.5",
        "0.8",
        "1.0",
        "1.0",
    ]


def test_what_cannot_be_streamed_is_refused(capsys, monkeypatch, model, tmp_path):
    save(S4DAutoencoder(3000), tmp_path / "system4")
    save(S4Model(3, 10, d_model=4, num_layers=1), tmp_path / "classifier")
    save(CausalAutoencoder(4000, strides=(2,), widths=(4, 4), d_state=4, channels=2), tmp_path / "stereo")
    save(CausalAutoencoder(4000, strides=(2,), widths=(4, 4), d_state=4, bidirectional=True), tmp_path / "both")
    assert "S4DAutoencoder, which cannot stream" in refused(capsys, "stream", str(tmp_path / "system4"))
    assert "which makes no sound" in refused(capsys, "stream", str(tmp_path / "classifier"))
    assert "stream takes models of 1 (mono)" in refused(capsys, "stream", str(tmp_path / "stereo"))
    assert "which hears the future and cannot stream" in refused(capsys, "stream", str(tmp_path / "both"))
    for block in ("0", "2000000"):
        assert "wanted 1 to 1,048,576 samples" in refused(capsys, "stream", str(model), "--block", block)
    for gain in ("nan", "61"):
        assert "wanted -60 to 60 dB" in refused(capsys, "stream", str(model), "--gain", gain)
    monkeypatch.setattr(sys, "stdin", Pipe())
    error = refused(capsys, "stream", str(model), "--load-state", str(tmp_path / "none"))
    assert "none is missing, unreadable or damaged" in error
    assert "another program" not in error and not (tmp_path / "state").exists()


@pytest.mark.parametrize("end", ["input", "output"])
def test_a_terminal_is_refused_with_an_example(capsys, monkeypatch, model, end):
    terminal = Pipe()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdin", terminal if end == "input" else Pipe())
    monkeypatch.setattr(sys, "stdout", terminal if end == "output" else Pipe())
    error = refused(capsys, "stream", str(model))
    assert f"standard {end} is no pipe and no file" in error
    assert "ffmpeg -i IN.mp3 -f s16le -ac 1 -ar 4000 - | s4audio stream MODEL" in error


def start(model, *options: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "s4audio", "stream", str(model), "--format", "f32", *options]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, cwd=ROOT, bufsize=0)


def test_a_stream_goes_on_bit_for_bit_in_another_process(through, model, tmp_path):
    """Two processes with a state between them, fed in pieces of odd numbers of bytes; and a stream that did not end."""
    samples, state, outputs = sound(6000), str(tmp_path / "state"), []
    data = samples.tobytes()
    for part, options in ((data[:9_998], ["--save-state", state]), (data[9_996:], ["--load-state", state])):
        with start(model, "--block", "300", *options) as process:
            for first in range(0, len(part), 997):
                process.stdin.write(part[first : first + 997])
                time.sleep(0.001)
            outputs.append(np.frombuffer(process.communicate()[0], "<f4"))
        assert process.returncode == 0
    # Of the first 2,499 samples 8 blocks came out, which are 300 frames of 8; the rest waited in the state.
    assert len(outputs[0]) == 2400
    np.testing.assert_array_equal(np.concatenate(outputs), through(samples, "--format", "f32", "--block", "300")[0])
    np.testing.assert_allclose(np.concatenate(outputs), offline(model, samples), rtol=0, atol=ROUNDING)


@pytest.mark.skipif(sys.platform == "win32", reason="signals and pipes of Unix")
@pytest.mark.parametrize("how", ["Ctrl-C", "SIGTERM", pytest.param("reader gone", marks=pytest.mark.slow)])
def test_a_stream_that_is_stopped_saves_its_state(through, model, tmp_path, how):
    samples, state = sound(1500), str(tmp_path / "state")
    data, options = samples.tobytes(), ["--format", "f32", "--block", "100"]
    with start(model, "--block", "100", "--save-state", state) as process:
        process.stdin.write(data[:4000])
        first = b""
        while len(first) < 4000:  # 1,000 samples are 125 frames of 8
            first += process.stdout.read(4000)
        time.sleep(0.3)
        if how != "reader gone":
            process.send_signal(signal.SIGINT if how == "Ctrl-C" else signal.SIGTERM)
        else:
            process.stdout.close()
            process.stdin.write(data[4000:4400])
        error = process.stderr.read().decode()
    assert process.returncode == {"Ctrl-C": 130, "SIGTERM": 143, "reader gone": 1}[how]
    assert ("stopped; no file is half-written" in error) == (how == "Ctrl-C")
    assert f"the state is in {state}" in error and "Traceback" not in error and "Exception" not in error
    second, told = through(samples[1000:], *options, "--load-state", state)
    assert f"going on from {state}" in told
    whole = through(samples, *options)[0]
    np.testing.assert_array_equal(np.concatenate([np.frombuffer(first, "<f4"), second]), whole)


def test_the_state_of_another_model_and_what_is_no_state_are_refused(capsys, monkeypatch, through, model, tmp_path):
    state = tmp_path / "state"
    through(sound(100), "--save-state", str(state))
    torch.manual_seed(5)
    save(CausalAutoencoder(4000, strides=(2, 4), widths=(4, 6, 8), d_state=8), tmp_path / "other")
    monkeypatch.setattr(sys, "stdin", Pipe())
    error = refused(capsys, "stream", str(tmp_path / "other"), "--load-state", str(state))
    assert f"{state} is the state of another model: its weights have the SHA-256" in error
    error = refused(capsys, "stream", str(model), "--load-state", str(model / "model.safetensors"))
    assert "is not the state of a stream; `s4audio stream --save-state FILE` writes one" in error
    state.write_bytes(state.read_bytes()[:-1])
    assert "damaged" in refused(capsys, "stream", str(model), "--load-state", str(state))


def test_a_place_that_cannot_be_written_shows_before_the_first_sample(capsys, monkeypatch, model, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setattr(sys, "stdin", Pipe(b"1234"))
    error = refused(capsys, "stream", str(model), "--save-state", str(tmp_path / "file" / "state"))
    assert "choose another place" in error and sys.stdin.buffer.tell() == 0


def test_what_an_incomplete_frame_holds_comes_out_when_a_stream_goes_on(through, tmp_path):
    samples, state, options = sound(203), str(tmp_path / "state"), ["--format", "f32", "--block", "3"]
    first, _ = through(samples[:101], *options, "--save-state", state)
    second, _ = through(samples[101:], *options, "--load-state", state)
    assert len(first) == 96  # 12 frames of 8; 3 samples are in the model and 2 wait for a block
    np.testing.assert_array_equal(np.concatenate([first, second]), through(samples, *options)[0])
