"""Training of flows: labels from folders, the average of the weights, and that it goes on as if it had not stopped."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml

from s4audio import CausalAutoencoder, checkpoint, save
from s4audio.cli import main
from tests.cli.commands import ROOT, refused

SMALL = {"strides": [4], "widths": [4, 8], "num_blocks": 1, "d_state": 4}


def recipe_file(tmp_path: Path, name: str, **model) -> str:
    """A shipped recipe with a small network and small batches."""
    recipe = yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text())
    recipe["model"]["init_args"]["model"]["init_args"] |= {**SMALL, **model}
    recipe["data"]["init_args"] |= {"batch_size": 2, "clip_seconds": 0.25, "valid": None}
    recipe["trainer"] |= {"accelerator": "cpu", "log_every_n_steps": 1}
    (tmp_path / f"{name}_small.yaml").write_text(yaml.safe_dump(recipe))
    return str(tmp_path / f"{name}_small.yaml")


@pytest.fixture(scope="module")
def spoken(tmp_path_factory) -> Path:
    """Three tones of 0.3 s in each of the folders one and two."""
    path = tmp_path_factory.mktemp("spoken")
    for number in range(6):
        place = path / ("one", "two")[number % 2]
        place.mkdir(exist_ok=True)
        tone = 0.4 * np.sin(2 * np.pi * 110 * (number + 2) * np.arange(2400) / 8000)
        soundfile.write(place / f"{number}.wav", tone, 8000)
    return path


def weights(model: Path) -> bytes:
    return (model / "model.safetensors").read_bytes()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_flow_of_classes_trains_and_goes_on_as_if_it_had_never_stopped(spoken, tmp_path):
    """What is trained, its average, and the moments of the data; the recipe gets the names of the classes."""
    recipe = recipe_file(tmp_path, "flow_digits_8k")
    options = ["--train", str(spoken), "--trainer.val_check_interval", "4", "--out"]
    assert main(["fit", "--config", recipe, *options, str(tmp_path / "whole"), "--steps", "8"]) == 0
    assert main(["fit", "--config", recipe, *options, str(tmp_path / "parts"), "--steps", "4"]) == 0
    half = weights(tmp_path / "parts" / "last")
    assert main(["fit", "--config", recipe, *options, str(tmp_path / "parts"), "--steps", "8"]) == 0
    for name in ("last", "best"):
        assert weights(tmp_path / "whole" / name) == weights(tmp_path / "parts" / name) != half
    config = checkpoint.read_config(tmp_path / "whole" / "best")
    assert config["arguments"]["classes"] == ["one", "two"] and "valid/flow" in config["training"]["scores"]
    kept = torch.load(tmp_path / "whole" / "trainer.ckpt", weights_only=True)["state_dict"]
    saved = checkpoint.load(tmp_path / "whole" / "last").state_dict()
    assert all(torch.equal(saved[name], kept[f"average.{name}"]) for name in saved)
    assert not torch.equal(saved["leave.weight"], kept["model.leave.weight"]) and saved["num_batches"] == 8
    assert "From noise" in (tmp_path / "whole" / "report.html").read_text()
    written = yaml.safe_load((tmp_path / "whole" / "recipe.yaml").read_text())
    assert list(written["model"]["init_args"]["model"]["init_args"]["classes"]) == ["one", "two"]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_train_makes_a_flow_of_latents_with_sounds_scores_and_a_page(folder, tmp_path, monkeypatch, capsys):
    """On an autoencoder in a folder, which the model's own folder does not need; and another from that."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    autoencoder = CausalAutoencoder(16_000, strides=(16,), widths=(4, 8), latent_channels=3, d_state=4)
    save(autoencoder, tmp_path / "runs" / "autoencoder_16k_convolution" / "best")
    recipe = recipe_file(tmp_path, "flow_16k")
    assert main(["train", str(folder), "--recipe", recipe, "--steps", "2", "--out", "run"]) == 0
    shutil.rmtree(tmp_path / "runs")
    config = checkpoint.read_config("run/best")
    assert config["class"] == "Flow" and config["arguments"]["autoencoder"]["class"] == "CausalAutoencoder"
    kept = checkpoint.load("run/best").autoencoder.state_dict()
    assert all(torch.equal(value, autoencoder.state_dict()[name]) for name, value in kept.items())
    assert len(list((tmp_path / "run" / "sounds" / "noise").glob("*.wav"))) == 4
    (varied,) = (tmp_path / "run" / "sounds" / "varied").glob("*.wav")
    assert soundfile.info(varied).samplerate == 16_000 and not (tmp_path / "run" / "sounds" / "reconstructed").exists()
    page = (tmp_path / "run" / "report.html").read_text()
    assert "with variation 0.5" in page and "Make sound from noise" in page and page.count("<audio") >= 3
    assert main(["info", "run/best"]) == 0
    told = capsys.readouterr().out
    assert "autoencoder.encoder" in told and "blocks_inside.0.block" in told
    options = "--from-model", "run/best", "--steps", "1", "--out", "other"
    assert main(["train", str(folder), "--recipe", recipe, *options]) == 0
    before, after = (checkpoint.load(name).state_dict()["leave.weight"] for name in ("run/best", "other/best"))
    assert 0 < (before - after).abs().max() < 0.01  # a step of AdamW from there, not from new weights


def test_what_does_not_fit_together_is_refused(spoken, folder, tmp_path, capsys):
    recipe = recipe_file(tmp_path, "flow_digits_8k")
    fit = ["fit", "--config", recipe, "--out", str(tmp_path / "run"), "--train"]
    assert "is in no subfolder of" in refused(capsys, *fit, str(folder))
    named = "--model.init_args.model.init_args.classes"
    error = refused(capsys, *fit, str(spoken), named, json.dumps(["one", "three"]))
    assert "of the classes one, two, and the model's (classes) are one, three" in error
    broken = tmp_path / "spoken"
    shutil.copytree(spoken, broken)
    (broken / "four").mkdir()
    (broken / "four" / "damaged.wav").write_bytes(b"no sound")
    assert "Of four there is no recording that can be used." in refused(capsys, *fit, str(broken))
    without = "--data.init_args.labels", "null"
    assert "classes one, two and the data no labels" in refused(capsys, *fit, str(spoken), named, '["one","two"]', *without)
    debug = ["fit", "--config", str(ROOT / "recipes" / "debug.yaml"), "--out", str(tmp_path / "run"), "--train", str(spoken)]
    assert "CausalAutoencoder takes no labels" in refused(capsys, *debug, "--data.init_args.labels", "folder")
    latent = recipe_file(tmp_path, "flow_16k")
    error = refused(capsys, "fit", "--config", latent, "--out", str(tmp_path / "run"), "--train", str(folder))
    assert "runs/autoencoder_16k_convolution/best, is not there; train it first" in error
    assert not (tmp_path / "run").exists()
