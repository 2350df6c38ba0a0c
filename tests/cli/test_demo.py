"""The demo from training to the page, with a few steps in place of its few minutes."""

import re

import numpy as np
import pytest
import soundfile

from s4audio.cli import main
from tests.cli.commands import ROOT, refused


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_demo_trains_generates_streams_and_writes_its_page(tmp_path, capsys):
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), "--steps", "2"]) == 0
    told = capsys.readouterr().out
    assert f"Open {out / 'report.html'} in a browser" in told
    rows = dict(re.findall(r"^ +([\w -]+(?:, [\w ]+)?)  +(-?[\d.]+) dB +[\d.]+ dB +[\d.]+$", told, flags=re.MULTILINE))
    scores = {name.strip(): float(value) for name, value in rows.items()}
    means = []
    for file in sorted((ROOT / "samples" / "valid").iterdir()):
        audio, _ = soundfile.read(file)
        frames = np.pad(audio, (0, -len(audio) % 16)).reshape(-1, 16)
        held = np.repeat(frames.mean(1), 16)[: len(audio)]
        projected = audio * (held @ audio) / (audio @ audio)
        means.append(10 * np.log10((projected @ projected) / ((held - projected) @ (held - projected))))
    assert scores["mean of each frame"] == pytest.approx(np.mean(means), abs=0.06)
    assert scores["low-pass, as many numbers"] > 20 > scores["the model"]  # two steps are no training
    sounds = {path.name: soundfile.info(path).frames for path in out.glob("*.wav")}
    for name in ("fur_elise_piano", "spring_strings"):
        assert sounds[f"{name}_input.wav"] == sounds[f"{name}_reconstructed.wav"] > 20 * 16_000
    assert sounds["fur_elise_piano_streamed.wav"] == sounds["fur_elise_piano_input.wav"]
    assert sounds["noise.wav"] == 5 * 16_000 and sounds["variation.wav"] == 12 * 16_000
    varied, plain = (soundfile.read(out / f"{name}.wav")[0] for name in ("variation", "fur_elise_piano_reconstructed"))
    assert np.abs(varied - plain[: len(varied)]).max() > 1e-3
    page = (out / "report.html").read_text()
    assert (
        page.count("<audio") == 8 and page.count("<svg") == 8 + 3 and "times real time" in page and "How it trained" in page
    )
    difference = re.search(r"largest difference (\S+) of the peak", page)
    assert difference and float(difference[1]) < 1e-5
    assert (out / "run" / "report.html").exists() and (out / "run" / "best" / "config.json").exists()

    # the same command again trains no more, and writes the page anew
    (out / "report.html").unlink()
    assert main(["demo", "--out", str(out), "--steps", "2"]) == 0
    assert "It is finished; nothing was changed" in capsys.readouterr().out and (out / "report.html").exists()


def test_steps_must_be_some(capsys):
    assert "--steps is 0; wanted at least 1" in refused(capsys, "demo", "--steps", "0")
