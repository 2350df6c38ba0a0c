"""The demo from training to the page, with a few steps in place of its few minutes."""

import re

import pytest
import soundfile

from s4audio.cli import main
from tests.cli.commands import refused


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_demo_trains_generates_streams_and_writes_its_page(tmp_path, capsys):
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), "--steps", "2"]) == 0
    told = capsys.readouterr().out
    assert f"Open {out / 'report.html'} in a browser" in told
    for way in ("the model", "low-pass, as many numbers", "mean of each frame"):
        assert re.search(rf"{way} +-?[\d.]+ dB +[\d.]+ dB +[\d.]+", told), way
    sounds = {path.name: soundfile.info(path).frames for path in out.glob("*.wav")}
    for name in ("fur_elise_piano", "spring_strings"):
        assert sounds[f"{name}_input.wav"] == sounds[f"{name}_reconstructed.wav"] > 20 * 16_000
    assert sounds["fur_elise_piano_streamed.wav"] == sounds["fur_elise_piano_input.wav"]
    assert {"noise.wav", "variation.wav"} <= set(sounds)
    page = (out / "report.html").read_text()
    assert page.count("<audio") == 7 and "times real time" in page and "How it trained" in page
    difference = re.search(r"largest difference (\S+) of the peak", page)
    assert difference and float(difference[1]) < 1e-5
    assert (out / "run" / "report.html").exists() and (out / "run" / "best" / "config.json").exists()

    # the same command again trains no more, and writes the page anew
    (out / "report.html").unlink()
    assert main(["demo", "--out", str(out), "--steps", "2"]) == 0
    assert "It is finished; nothing was changed" in capsys.readouterr().out and (out / "report.html").exists()


def test_steps_must_be_some(capsys):
    assert "--steps is 0; wanted at least 1" in refused(capsys, "demo", "--steps", "0")
