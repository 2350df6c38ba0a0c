"""Training a classifier of images from a recipe: it learns, goes on where it stopped, and says what is wrong."""

import io
import json
import types
from pathlib import Path

import lightning
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from s4audio import S4Model
from s4audio.checkpoint import load, read_config
from s4audio.cli import main
from s4audio.tasks import DivergenceError, RunFolder
from s4audio.tasks.classification import confusion_matrix
from tests.cli.commands import refused
from tests.cli.test_fit import Crash, with_callback

SIZE, COLOURS = 8, {"blue": (20, 40, 220), "green": (30, 200, 50), "red": (220, 30, 40)}
RECIPE = {
    "seed_everything": 0,
    "save_every": 10,
    "model": {
        "class_path": "s4audio.tasks.ClassificationTask",
        "init_args": {
            "model": {
                "class_path": "s4audio.S4Model",
                "init_args": {"d_input": 3, "num_classes": 3, "d_model": 8, "num_layers": 1, "d_state": 4, "dropout": 0.1},
            },
            "label_smoothing": 0.05,
            "warmup_steps": 3,
            "decay_steps": 24,
        },
    },
    "data": {
        "class_path": "s4audio.data.ImageSequences",
        "init_args": {"root": "", "size": SIZE, "valid_images": 9, "batch_size": 6, "augment": "crop_flip"},
    },
    "trainer": {"max_steps": 24, "val_check_interval": 8, "log_every_n_steps": 2},
}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Noisy images of three colours, 20 and 7 of each."""
    root, generator = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, number in (("train", 20), ("test", 7)):
        for name, colour in COLOURS.items():
            (root / split / name).mkdir(parents=True)
            for index in range(number):
                pixels = np.clip(np.array(colour) + generator.normal(0, 30, (SIZE, SIZE, 3)), 0, 255).astype(np.uint8)
                buffer = io.BytesIO()
                Image.fromarray(pixels).save(buffer, "PNG")
                (root / split / name / f"{index}.png").write_bytes(buffer.getvalue())
    return root


@pytest.fixture
def recipe(tmp_path, images) -> Path:
    content = json.loads(json.dumps(RECIPE))
    content["data"]["init_args"]["root"] = str(images)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "recipe.yaml"


def fit(recipe: Path, out: Path, *options: str) -> int:
    return main(["fit", "--config", str(recipe), "--out", str(out), *options])


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_classifier_is_trained_tested_and_shown(recipe, images, tmp_path, capsys):
    assert fit(recipe, tmp_path / "run") == 0
    told = capsys.readouterr().out
    assert "data: 51 images to train on, 9 held out, 21 to test the best model on; sequences of 64 RGB pixels" in told
    assert "classes: blue, green, red" in told and "images a second" in told
    assert "best on the held-out images" in told and "test:     100.00% ± 0.00% of 21 images" in told
    page = (tmp_path / "run" / "report.html").read_text()
    assert "What it takes the images of each class for" in page and "100.00% ± 0.00% of 21 images" in page
    record = read_config(tmp_path / "run" / "best")["training"]
    assert record["classes"] == list(COLOURS) and record["scores"]["valid/accuracy"] == 1.0
    assert main(["info", str(tmp_path / "run" / "best")]) == 0
    assert "51; held out 9" in capsys.readouterr().out
    # the model itself knows what its inputs look like
    model = load(tmp_path / "run" / "best")
    assert model.input_mean.tolist() == pytest.approx([0.35, 0.35, 0.4], abs=0.05)
    red = torch.tensor(COLOURS["red"]).view(1, 3, 1).expand(1, 3, SIZE * SIZE) / 255
    assert confusion_matrix(model, [(red, torch.tensor([2]))])[2].tolist() == [0, 0, 1]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_it_goes_on_as_if_it_had_never_stopped(recipe, tmp_path):
    average = ["--model.init_args.ema_decay", "0.9"]
    assert fit(recipe, tmp_path / "whole", *average) == 0
    assert fit(recipe, tmp_path / "parts", *average, "--steps", "11") == 0
    assert fit(recipe, tmp_path / "parts", *average) == 0
    weights = [(tmp_path / run / "last" / "model.safetensors").read_bytes() for run in ("whole", "parts")]
    assert weights[0] == weights[1]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("options", [[], ["--trainer.accumulate_grad_batches", "2"]], ids=["plain", "accumulated"])
def test_a_crash_after_a_save_loses_neither_the_average_nor_a_validation(recipe, tmp_path, monkeypatch, options):
    options = ["--model.init_args.ema_decay", "0.9", "--save_every", "8", *options]
    assert fit(recipe, tmp_path / "whole", *options) == 0
    monkeypatch.setattr(lightning.Trainer, "fit", with_callback(Crash(10 * (2 if len(options) > 4 else 1))))
    assert fit(recipe, tmp_path / "crashed", *options) == 1
    monkeypatch.undo()
    state = torch.load(tmp_path / "crashed" / "trainer.ckpt", weights_only=True)
    assert state["global_step"] == 8
    assert fit(recipe, tmp_path / "crashed", *options) == 0
    weights = [(tmp_path / run / "last" / "model.safetensors").read_bytes() for run in ("whole", "crashed")]
    assert weights[0] == weights[1]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_run_that_stopped_early_is_finished_and_counts_every_validation(recipe, tmp_path, capsys, monkeypatch):
    content = yaml.safe_load(recipe.read_text())
    stopping = {"monitor": "valid/accuracy", "mode": "max", "patience": 2, "min_delta": 1.0}
    content["trainer"]["callbacks"] = [{"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": stopping}]
    recipe.write_text(yaml.safe_dump(content))
    options = ["--steps", "100", "--save_every", "8"]  # a save and a validation at the same step
    monkeypatch.setattr(lightning.Trainer, "fit", with_callback(Crash(18)))
    assert fit(recipe, tmp_path / "run", *options) == 1
    monkeypatch.undo()
    assert fit(recipe, tmp_path / "run", *options) == 0
    assert read_config(tmp_path / "run" / "last")["training"]["steps"] == 24
    capsys.readouterr()
    before = (tmp_path / "run" / "last" / "model.safetensors").read_bytes()
    assert fit(recipe, tmp_path / "run", *options) == 0
    assert "It is finished; nothing was changed. It stopped early" in capsys.readouterr().out
    assert (tmp_path / "run" / "last" / "model.safetensors").read_bytes() == before


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_run_of_an_earlier_version_goes_on(recipe, tmp_path):
    assert fit(recipe, tmp_path / "run", "--steps", "4") == 0
    stored = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    del stored["model"]["init_args"]["schedule"]
    (tmp_path / "run" / "recipe.yaml").write_text(yaml.safe_dump(stored))
    assert fit(recipe, tmp_path / "run", "--steps", "6") == 0


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_class_without_test_images_is_left_out(recipe, images, tmp_path, capsys):
    (tmp_path / "fewer").mkdir()
    (tmp_path / "fewer" / "train").symlink_to(images / "train")
    for name in COLOURS:
        (tmp_path / "fewer" / "test" / name).mkdir(parents=True)
    (tmp_path / "fewer" / "test" / "red" / "0.png").symlink_to(images / "test" / "red" / "0.png")
    assert fit(recipe, tmp_path / "run", "--root", str(tmp_path / "fewer"), "--trainer.log_every_n_steps", "0") == 0
    assert "test:     100.00% ± 0.00% of 1 images" in capsys.readouterr().out


def test_a_model_that_is_no_number_is_never_the_best(tmp_path):
    from s4audio import S4Model

    model = S4Model(1, 2, 4, 1, d_state=4)
    with torch.no_grad():
        model.head.weight[0, 0] = float("nan")
    trainer = types.SimpleNamespace(
        global_step=3, sanity_checking=False, callback_metrics={"valid/accuracy": torch.tensor(0.9)}
    )
    task = types.SimpleNamespace(
        scored_model=model, best_score="valid/accuracy", higher_is_better=True, check_last_step=lambda: None
    )
    with pytest.raises(DivergenceError, match="weights are no longer finite numbers at step 3"):
        RunFolder(tmp_path, 10, {}).on_validation_end(trainer, task)
    assert not (tmp_path / "best").exists()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_average_of_the_weights_is_what_is_saved(recipe, tmp_path):
    assert fit(recipe, tmp_path / "plain", "--steps", "4") == 0
    assert fit(recipe, tmp_path / "average", "--steps", "4", "--model.init_args.ema_decay", "0.999") == 0
    plain, average = (load(tmp_path / run / "last").head.weight for run in ("plain", "average"))
    state = torch.load(tmp_path / "average" / "trainer.ckpt", weights_only=False)["state_dict"]
    assert torch.equal(state["model.head.weight"], plain) and torch.equal(state["average.head.weight"], average)
    assert not torch.equal(plain, average)


def test_wrong_input_ends_in_a_sentence_and_status_2(recipe, tmp_path, capsys):
    def told(*options: str) -> str:
        return refused(capsys, "fit", "--config", str(recipe), "--out", str(tmp_path / "run"), *options)

    devices = ["--trainer.devices", "2", "--trainer.accelerator", "cpu"]
    assert "trainer.devices is 2; ImageSequences is for one device" in told(*devices)

    assert "nowhere does not exist; give --root FOLDER" in told("--root", "nowhere")
    assert "'train' is not accepted; images are given with --root FOLDER" in told("--train", "nowhere")
    assert "are 8 x 8 pixels; wanted 16 x 16" in told("--data.init_args.size", "16")
    assert "fraction is 0.0; wanted above 0" in told("--data.init_args.fraction", "0")
    assert "fraction is 1.2; wanted above 0" in told("--data.init_args.fraction", "1.2")
    assert "the images have 1 channels and the model reads 3" in told("--data.init_args.grey", "true")
    assert "have 3 classes and the model 4" in told("--model.init_args.model.init_args.num_classes", "4")
    assert "label_smoothing is 1.0; wanted at least 0 and below 1" in told("--model.init_args.label_smoothing", "1")
    assert "schedule is 'line'; choose one of cosine, one_cycle" in told("--model.init_args.schedule", "line")
    assert "block is 'odd'; choose one of filter" in told("--model.init_args.model.init_args.block", "odd")
    content = yaml.safe_load(recipe.read_text())
    patches = {"d_input": 3, "num_classes": 3, "d_model": 4, "num_layers": 1, "patch": 3}
    content["model"]["init_args"]["model"] = {"class_path": "s4audio.models.PatchS4Model", "init_args": patches}
    recipe.write_text(yaml.safe_dump(content))
    assert "images of 8 x 8 pixels do not divide into patches of 3 x 3" in told()
    assert "patch is 0; wanted at least 1" in told("--model.init_args.model.init_args.patch", "0")
    assert not (tmp_path / "run").exists()


def test_a_worse_accuracy_does_not_replace_the_best(tmp_path):
    model, keeper = S4Model(1, 2, 4, 1, d_state=4), RunFolder(tmp_path, 10, {})
    keeper._end_step, keeper.started = lambda *_: None, 0.0
    task = types.SimpleNamespace(
        scored_model=model, best_score="valid/accuracy", higher_is_better=True, check_last_step=lambda: None
    )
    for step, accuracy, best in ((1, 0.5, 0.5), (2, 0.4, 0.5), (3, 0.6, 0.6)):
        trainer = types.SimpleNamespace(
            global_step=step, sanity_checking=False, is_global_zero=True, global_rank=0, world_size=1,
            callback_metrics={"valid/accuracy": torch.tensor(accuracy)},
            strategy=types.SimpleNamespace(root_device=torch.device("cpu")),
        )  # fmt: skip
        keeper.on_validation_end(trainer, task)
        assert read_config(tmp_path / "best")["training"]["scores"]["valid/accuracy"] == pytest.approx(best)
