"""Training of autoregressive models, and generation with one: what the verbs say and write of SaShiMi and WaveNet."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml

from s4audio import checkpoint, load
from s4audio.audio import quantize, read_audio
from s4audio.cli import generate, main
from s4audio.models.sashimi import RunawayError
from tests.cli.commands import ROOT, refused, wav

RATE = 400  # Hz: the page has 5 s of audio, made sample by sample
SIZES = {
    "sashimi_digits": {"d_model": 4, "num_blocks": 1, "pools": [2, 4], "d_state": 4, "num_levels": 16},
    "wavenet_digits": {"d_model": 4, "d_skip": 4, "num_stacks": 1, "num_layers": 2, "num_levels": 16},
}


def recipe_file(tmp_path: Path, name: str) -> str:
    """A shipped recipe with a small network at a low rate."""
    recipe = yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text())
    recipe["model"]["init_args"]["model"]["init_args"] |= {**SIZES[name], "sample_rate": RATE}
    recipe["data"]["init_args"] |= {"sample_rate": RATE, "batch_size": 2, "clip_seconds": 0.25, "valid": None}
    recipe["trainer"] |= {"accelerator": "cpu"}
    (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    return str(tmp_path / f"{name}.yaml")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_sashimi_trains_is_described_and_goes_on_with_a_recording(folder, tmp_path, capsys):
    run = tmp_path / "run"
    recipe = recipe_file(tmp_path, "sashimi_digits")
    assert main(["fit", "--config", recipe, "--train", str(folder), "--steps", "2", "--out", str(run)]) == 0
    assert f"listen:   s4audio generate {run / 'best'} --from noise" in capsys.readouterr().out
    page = (run / "report.html").read_text()
    assert page.count("<audio") == 1 and "Make sound from noise" in page
    assert main(["info", str(run / "best"), "--plot", str(tmp_path / "poles.png")]) == 0
    told = [line.split() for line in capsys.readouterr().out.splitlines() if ".inner.1 " in line]
    assert {line[0]: " ".join(line[3:5]) for line in told} == {
        "layers.0.inner.0.inner.0.inner.1": "50 Hz", "layers.0.inner.1.inner.1": "200 Hz", "layers.1.inner.1": "400 Hz"
    }  # fmt: skip
    soundfile.write(tmp_path / "tone.wav", 0.3 * np.sin(np.arange(200) / 5), RATE)
    given = ["generate", str(run / "best"), "--from", str(tmp_path / "tone.wav"), "--normalize", "none"]
    options = ["--temperature", "0.8", "--top-p", "0.9", "--seed", "3", "--out", str(tmp_path / "out")]
    assert main([*given, "--continue", "0.5", *options]) == 0
    made = wav(tmp_path / "out" / "tone_continued_0.5_seed_3.wav")
    assert len(made) == 400 and np.array_equal(made[:200], wav(tmp_path / "tone.wav"))
    model = load(run / "best")
    audio = read_audio(tmp_path / "tone.wav", RATE)[0].unsqueeze(0)
    wanted = model.continue_(audio, 200, temperature=0.8, top_p=0.9, generator=[generate.noise_of(3, 0)])
    assert torch.equal(quantize(torch.from_numpy(made[200:] / 32768).float(), 16), model.codes(wanted)[0])
    assert "cannot do --variation; it can do --from noise, --continue." in refused(capsys, *given, *options)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_wavenet_trains_and_is_not_asked_for_sound(folder, tmp_path, capsys):
    recipe, run = recipe_file(tmp_path, "wavenet_digits"), tmp_path / "run"
    assert main(["train", str(folder), "--recipe", recipe, "--steps", "2", "--out", str(run)]) == 0
    told, page = capsys.readouterr().out, (run / "report.html").read_text()
    assert f"next:     s4audio info {run / 'best'}" in told and "generate" not in page
    assert checkpoint.read_config(run / "best")["training"]["scores"]["valid/nll"] > 0
    assert main(["info", str(run / "best")]) == 0 and "no state-space layers" in capsys.readouterr().out
    assert "which makes no sound" in refused(capsys, "generate", str(run / "best"), "--from", "noise")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_model_that_runs_away_has_a_page_that_says_it(folder, tmp_path, monkeypatch, capsys):
    def run_away(*_: object) -> None:
        raise RunawayError("clip 0 of the batch ran away: so it was.")

    monkeypatch.setattr("s4audio.models.sashimi.refuse_runaway", run_away)
    recipe, run = recipe_file(tmp_path, "sashimi_digits"), tmp_path / "run"
    assert main(["train", str(folder), "--recipe", recipe, "--steps", "1", "--out", str(run)]) == 0
    assert "no sounds from noise: clip 0 of the batch ran away" in capsys.readouterr().err
    assert "There is nothing to hear: clip 0 of the batch ran away" in (run / "report.html").read_text()
