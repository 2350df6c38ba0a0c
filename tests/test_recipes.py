"""Every recipe builds its model and data: a key that does not exist is an error."""

from pathlib import Path

import pytest
import yaml
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.core import LightningDataModule, LightningModule

import s4audio.data
import s4audio.tasks

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_builds(path):
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_lightning_class_args(LightningModule, "model", subclass_mode=True)
    parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True)
    recipe = yaml.safe_load(path.read_text())
    built = parser.instantiate(parser.parse_object({key: recipe[key] for key in ("model", "data")}))
    if isinstance(built["model"], s4audio.tasks.ClassificationTask):
        assert built["model"].model.d_input == built["data"].channels
    else:
        assert built["model"].model.sample_rate == built["data"].sample_rate
    assert recipe["seed_everything"] is not None and recipe["trainer"]["max_steps"] > 0


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_says_what_it_makes_and_how_to_run_it(path):
    first, second, *_ = path.read_text().splitlines()
    assert first.startswith("# Makes ") and ":" in first
    assert second.startswith(f"#   s4audio fit --config recipes/{path.name}")
