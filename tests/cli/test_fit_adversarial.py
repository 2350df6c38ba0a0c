"""A generator and a discriminator by a recipe: what is told, what is kept, and that it goes on bit for bit."""

import re
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import yaml

from s4audio.checkpoint import read_config
from s4audio.cli import main, train
from s4audio.cli.run_page import read_curves
from tests.cli.commands import RECIPE, without_pictures
from tests.cli.test_fit import Crash, weights, with_callback

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
START = 5  # the first step with a discriminator


def adversarial(folder: Path) -> dict[str, Any]:
    """The recipe debug.yaml with a discriminator."""
    recipe = yaml.safe_load(Path(RECIPE).read_text())
    recipe["model"]["class_path"] = "s4audio.tasks.AdversarialTask"
    recipe["model"]["init_args"] |= {
        "discriminator": {"class_path": "s4audio.models.Discriminator", "init_args": {"sizes": [64, 16], "width": 4}},
        "adversarial_start_step": START, "decay_steps": 26, "warmup_steps": 3,
    }  # fmt: skip
    recipe["data"]["init_args"] |= {"train": str(folder), "clip_seconds": 0.25, "batch_size": 2}
    recipe["trainer"] |= {"val_check_interval": 4, "log_every_n_steps": 1}
    return recipe


@pytest.fixture
def recipe(folder, tmp_path, monkeypatch) -> Path:
    without_pictures(monkeypatch)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(adversarial(folder)))
    return tmp_path / "recipe.yaml"


def fit(recipe: Path, out: Path, *options: str) -> int:
    return main(["fit", "--config", str(recipe), "--out", str(out), *options])


@pytest.mark.parametrize("half", [4, 7])
def test_it_goes_on_as_if_it_had_never_stopped(recipe, tmp_path, capsys, half):
    """From before the discriminator's first step, and from after it."""
    assert fit(recipe, tmp_path / "whole", "--steps", "12") == 0
    told = capsys.readouterr().out
    assert f"the discriminator takes part, as from step {START} on" in told
    assert re.search(r"discriminator \d.*, accuracy \d", told)
    assert fit(recipe, tmp_path / "parts", "--steps", str(half)) == 0
    assert weights(tmp_path / "parts") != weights(tmp_path / "whole")
    assert fit(recipe, tmp_path / "parts", "--steps", "12") == 0
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    ours, theirs = (torch.load(tmp_path / run / "trainer.ckpt", weights_only=True) for run in ("parts", "whole"))
    assert any(name.startswith("discriminator.") for name in theirs["state_dict"])
    assert all(torch.equal(ours["state_dict"][name], value) for name, value in theirs["state_dict"].items())
    moments, others = (state["optimizer_states"][0]["state"] for state in (ours, theirs))
    assert moments.keys() == others.keys()
    assert all(torch.equal(moments[i]["exp_avg_sq"], others[i]["exp_avg_sq"]) for i in others)


def test_a_crashed_run_goes_on_from_its_last_checkpoint(recipe, tmp_path, monkeypatch):
    options = ["--steps", "10", "--save_every", "3"]
    assert fit(recipe, tmp_path / "whole", *options) == 0
    with monkeypatch.context() as patch:
        patch.setattr(lightning.Trainer, "fit", with_callback(Crash(8)))
        assert fit(recipe, tmp_path / "crashed", *options) == 1
    assert torch.load(tmp_path / "crashed" / "trainer.ckpt", weights_only=True)["global_step"] == 6
    assert fit(recipe, tmp_path / "crashed", *options) == 0
    assert weights(tmp_path / "crashed") == weights(tmp_path / "whole")


def test_the_latest_model_is_the_best_and_holds_no_discriminator(recipe, tmp_path):
    assert fit(recipe, tmp_path / "run", "--steps", "12") == 0
    assert (tmp_path / "run" / "best" / "model.safetensors").read_bytes() == weights(tmp_path / "run")
    config = read_config(tmp_path / "run" / "best")
    assert config["class"] == "CausalAutoencoder" and config["training"]["steps"] == 12
    curves = read_curves(tmp_path / "run")
    steps, values = curves["train/accuracy"]
    assert steps == list(range(START, 12)) and all(0 <= value <= 1 for value in values)
    assert curves["gradient_norm/discriminator"][0] == steps == curves["train/feature"][0]
    assert curves["gradient_norm/model"][0] == list(range(12))
    assert {"valid/loss", "valid/si_sdr_db"} <= curves.keys()


def test_a_length_in_minutes_is_planned_by_steps_with_a_discriminator(recipe, folder, tmp_path, monkeypatch):
    judged, measure = [], train._Stopwatch.on_train_batch_end

    def note(watch, trainer, *given) -> None:
        judged.append(trainer.lightning_module.judged)
        measure(watch, trainer, *given)

    monkeypatch.setattr(train._Stopwatch, "on_train_batch_end", note)
    later = ["--model.init_args.adversarial_start_step", "1000"]
    planned = train._planned(["--config", str(recipe), "--train", str(folder), "--out", str(tmp_path / "run"), *later], 60)
    assert planned[0] == "--steps" and all(judged) and len(judged) >= train.PILOT_STEPS
