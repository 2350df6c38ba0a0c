"""Every recipe builds its model and data: a key that does not exist is an error."""

from pathlib import Path

import pytest
import yaml
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.core import LightningDataModule, LightningModule

import s4audio
import s4audio.data
import s4audio.tasks

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))


def train_first(recipe: dict, folder: Path) -> None:
    """Puts the autoencoder that a recipe takes from runs/NAME/best there, untrained, as recipes/NAME.yaml builds it."""
    model = recipe["model"]["init_args"]["model"]["init_args"]
    path = Path(((model.get("autoencoder") or {}).get("init_args") or {}).get("path", ""))
    if path.name:
        assert path.parts[0] == "runs" and path.name == "best"
        described = yaml.safe_load((RECIPES[0].parent / f"{path.parts[1]}.yaml").read_text())["model"]["init_args"]["model"]
        made = getattr(s4audio, described["class_path"].rpartition(".")[2])(**described["init_args"])
        s4audio.save(made, folder / path)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_builds(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train_first(yaml.safe_load(path.read_text()), tmp_path)
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
