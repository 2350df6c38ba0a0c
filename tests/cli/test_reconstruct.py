"""A file through a model in blocks: as long as the input, at its level, and the same as all at once."""

import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch

from s4audio import S4DAutoencoder, S4Model, load, save
from s4audio.audio import read_audio, read_blocks, write_blocks
from s4audio.cli import main
from tests.cli.commands import limit_files, refused


@pytest.fixture
def recording(tmp_path):
    """Three seconds of stereo at another rate than the model's, at a peak of 0.3."""
    time = np.arange(3 * 11_025) / 11_025
    sound = 0.3 * np.stack([np.sin(700 * time**2), np.cos(900 * time)], 1)
    soundfile.write(tmp_path / "in.flac", sound, 11_025)
    return tmp_path / "in.flac"


def test_blocks_give_what_the_model_gives_at_once(model, recording, tmp_path):
    assert main(["reconstruct", str(model), str(recording), str(tmp_path / "out.wav")]) == 0
    whole = load(model)
    audio, _ = read_audio(recording, whole.sample_rate)
    peak = audio.abs().max()  # the model was trained on peaks of full scale; the output is back at the input's level
    with torch.no_grad():
        wanted = whole(audio.unsqueeze(0) / peak)[0] * peak
    got, rate = read_audio(tmp_path / "out.wav")
    assert rate == whole.sample_rate and got.shape == audio.shape == (1, 3 * 4000)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4)


def test_an_older_file_is_replaced_and_that_is_said(model, recording, tmp_path, capsys):
    for told in ("out.wav: written in ", "out.wav: written in the place of an older file in "):
        assert main(["reconstruct", str(model), str(recording), str(tmp_path / "out.wav")]) == 0
        assert told in capsys.readouterr().out


def test_silence_and_a_single_sample_come_through(model, tmp_path):
    for name, samples in (("silence", np.zeros(9000)), ("one", np.ones(1) * 0.5)):
        soundfile.write(tmp_path / f"{name}.wav", samples, 4000)
        assert main(["reconstruct", str(model), str(tmp_path / f"{name}.wav"), str(tmp_path / "out.wav")]) == 0
        assert soundfile.info(tmp_path / "out.wav").frames == len(samples)


def test_what_cannot_be_done_is_refused_before_anything_is_written(capsys, model, recording, tmp_path):
    save(S4DAutoencoder(3000), tmp_path / "system4")
    save(S4Model(3, 10, d_model=4, num_layers=1), tmp_path / "classifier")
    soundfile.write(tmp_path / "nan.wav", np.array([0.0] * 9000 + [np.nan], np.float32), 4000, subtype="FLOAT")
    (tmp_path / "empty.wav").write_bytes(b"")
    out = str(tmp_path / "new" / "out.wav")
    assert "cannot stream" in refused(capsys, "reconstruct", str(tmp_path / "system4"), str(recording), out)
    assert "which makes no sound" in refused(capsys, "reconstruct", str(tmp_path / "classifier"), str(recording), out)
    assert "is not a model" in refused(capsys, "reconstruct", str(tmp_path), str(recording), out)
    assert "samples that are not finite numbers, from 2.250 s on" in refused(
        capsys, "reconstruct", str(model), str(tmp_path / "nan.wav"), out
    )
    assert "is an empty file" in refused(capsys, "reconstruct", str(model), str(tmp_path / "empty.wav"), out)
    assert "does not exist" in refused(capsys, "reconstruct", str(model), str(tmp_path / "no.wav"), out)
    assert "is a folder" in refused(capsys, "reconstruct", str(model), str(tmp_path), out)
    assert "is not the name of a WAV file" in refused(capsys, "reconstruct", str(model), str(recording), out + ".mp3")
    assert "arguments are required: output" in refused(capsys, "reconstruct", str(model), str(recording))
    soundfile.write(tmp_path / "a.wav", np.zeros(10), 4000)
    same = str(tmp_path / "a.wav")
    assert "is the recording to read" in refused(capsys, "reconstruct", str(model), same, same)
    assert not (tmp_path / "new").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="limits on the size of files are a Unix thing")
def test_a_full_disk_ends_in_a_sentence_and_leaves_nothing(model, recording, tmp_path):
    """A limit on the size of files stands in for the full disk."""
    command = [sys.executable, "-m", "s4audio", "reconstruct", str(model), str(recording), str(tmp_path / "new" / "out.wav")]
    run = subprocess.run(command, capture_output=True, text=True, preexec_fn=lambda: limit_files(5000))
    assert run.returncode == 1 and len(run.stderr.strip().splitlines()) == 1
    assert "out.wav: the disk is full" in run.stderr
    assert list((tmp_path / "new").iterdir()) == []


def test_blocks_go_out_while_blocks_come_in(model, recording, tmp_path, monkeypatch):
    """The first block is written before the third is read: nothing collects the recording."""
    events = []

    def read(*arguments):
        for number, block in enumerate(read_blocks(*arguments)):
            events.append(f"read {number}")
            yield block

    def write(path, blocks, sample_rate):
        def noted():
            for number, block in enumerate(blocks):
                events.append(f"write {number}")
                yield block

        return write_blocks(path, noted(), sample_rate)

    monkeypatch.setattr("s4audio.cli.reconstruct.read_blocks", read)
    monkeypatch.setattr("s4audio.cli.reconstruct.write_blocks", write)
    assert main(["reconstruct", str(model), str(recording), str(tmp_path / "out.wav")]) == 0
    scanned = events.index("read 0", 1)  # the first pass looks for the peak
    assert events.index("write 0") < scanned + events[scanned:].index("read 2")


def test_names_with_brackets_are_names(model, recording, tmp_path, capsys):
    source = tmp_path / "song [live] ["
    recording.rename(source.with_suffix(".flac"))
    assert main(["reconstruct", str(model), str(source.with_suffix(".flac")), str(tmp_path / "[b].wav")]) == 0
    told = capsys.readouterr().out
    assert "song [live] [.flac: 3.0 s" in told and "[b].wav: " in told


def test_a_model_of_recordings_as_they_are_hears_them_so(model, recording, tmp_path):
    save(load(model), tmp_path / "model", {"normalize": "none"})
    assert main(["reconstruct", str(tmp_path / "model"), str(recording), str(tmp_path / "out.wav")]) == 0
    audio, _ = read_audio(recording, 4000)
    with torch.no_grad():
        wanted = load(model)(audio.unsqueeze(0))[0]
    torch.testing.assert_close(read_audio(tmp_path / "out.wav")[0], wanted, rtol=0, atol=1e-4)
