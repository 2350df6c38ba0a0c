"""The scripts of the published figures run, and say what the library says."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from s4audio import CausalAutoencoder, load, save
from s4audio.audio import read_audio
from s4audio.metrics.signal import si_sdr

ROOT = Path(__file__).parents[1]


@pytest.fixture
def model(tmp_path) -> Path:
    torch.manual_seed(0)
    save(CausalAutoencoder(4000, strides=(4,), widths=(4, 8), d_state=8, latent_channels=2), tmp_path / "model")
    return tmp_path / "model"


def run(script: str, *arguments: str) -> str:
    command = [sys.executable, str(ROOT / "evaluation" / script), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=None, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_reconstruction_scores_whole_files(model, tmp_path):
    (tmp_path / "clips").mkdir()
    for number in range(2):
        soundfile.write(tmp_path / "clips" / f"{number}.wav", 0.3 * np.sin(np.arange(9000) * 0.1 * (number + 1)), 4000)
    json_file, picture = tmp_path / "scores.json", tmp_path / "picture.png"
    told = run(
        "reconstruction.py", str(model), "--split", f"test={tmp_path / 'clips'}", "--json", str(json_file),
        "--picture", str(picture),
    )  # fmt: skip
    scores = json.loads(json_file.read_text())["splits"]["test"]
    built = load(model)
    with torch.no_grad():
        wanted = [
            si_sdr(built(audio.unsqueeze(0))[0], audio).item()
            for audio, _ in (read_audio(tmp_path / "clips" / f"{number}.wav") for number in range(2))
        ]
    assert scores["si_sdr_db"] == pytest.approx(np.mean(wanted), abs=1e-3) and scores["files"] == 2
    assert scores["latent_numbers_a_second"] == 2000 and scores["low_pass_si_sdr_db"] > 20  # the tones lie below 1,000 Hz
    assert "low-pass of as many numbers" in told and picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_long_file_takes_no_more_memory(model, tmp_path):
    """40 times as long; a copy of the longer file alone, as numbers, would be 9 MiB."""
    run("bench/stream_file.py", str(model), "--minutes", "0.25", "10", "--json", str(tmp_path / "figures.json"))
    figures = json.loads((tmp_path / "figures.json").read_text())
    short, long = figures["files"]
    assert long["samples"] == 10 * 60 * 4000
    assert long["peak_mib"] < short["peak_mib"] + 6
    assert long["largest_difference_from_forward"] < 1e-4
