"""The command line from a folder of audio to sound: reproducible, resumable, and clear when something is wrong."""

import json
import types
from pathlib import Path

import lightning
import numpy as np
import pytest
import soundfile
import torch
import yaml

from s4audio import CausalAutoencoder, S4DAutoencoder, S4Model, save
from s4audio.checkpoint import read_config
from s4audio.cli import main
from s4audio.tasks.callbacks import RunFolder
from s4audio.tasks.generative import DivergenceError, GenerativeTask

ROOT = Path(__file__).parent.parent
RECIPE = str(ROOT / "recipes" / "debug.yaml")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three decaying tones of 2 s, and one that is shorter than a clip."""
    path = tmp_path_factory.mktemp("audio")
    for number, seconds in enumerate((2.0, 2.0, 2.0, 0.2)):
        time = np.arange(round(8000 * seconds)) / 8000
        tone = 0.4 * np.sin(2 * np.pi * 110 * (number + 2) * time) * np.exp(-time)
        soundfile.write(path / f"tone{number}.wav", tone, 8000)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("models") / "model"
    save(CausalAutoencoder(4000, strides=(2, 4), widths=(4, 6, 8), d_state=8), path, training={"normalize": "peak"})
    return path


def fit(folder: Path, out: Path, *options: str) -> int:
    return main(["fit", "--config", RECIPE, "--data.init_args.train", str(folder), "--out", str(out), *options])


def weights(out: Path) -> bytes:
    return (out / "last" / "model.safetensors").read_bytes()


def wav(path: Path) -> np.ndarray:
    return soundfile.read(path, dtype="int16")[0]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_fit_is_reproducible_and_goes_on_as_if_it_had_never_stopped(folder, tmp_path, capsys):
    steps = ["--trainer.max_steps", "14", "--trainer.val_check_interval", "5", "--save_every", "6"]
    assert fit(folder, tmp_path / "whole", *steps) == 0
    assert fit(folder, tmp_path / "again", *steps) == 0
    assert weights(tmp_path / "whole") == weights(tmp_path / "again")

    assert fit(folder, tmp_path / "parts", *steps, "--trainer.max_steps", "7") == 0
    half = weights(tmp_path / "parts")
    capsys.readouterr()
    assert fit(folder, tmp_path / "parts", *steps) == 0
    assert "holds a run of 7 steps; going on from there to 14" in capsys.readouterr().out
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole") != half

    assert fit(folder, tmp_path / "parts", *steps) == 0
    assert "It is finished; nothing was changed" in capsys.readouterr().out

    # what the run folder holds
    files = {p.relative_to(tmp_path / "whole").as_posix() for p in (tmp_path / "whole").rglob("*") if p.is_file()}
    assert {"trainer.ckpt", "recipe.yaml", "best/config.json", "best/model.safetensors", "last/config.json"} <= files
    assert any(name.startswith("tensorboard/events") for name in files)
    torch.load(tmp_path / "whole" / "trainer.ckpt", weights_only=True)
    record = json.loads((tmp_path / "whole" / "last" / "config.json").read_text())["training"]
    assert (record["steps"], record["normalize"], record["train_files"], record["valid_files"]) == (14, "peak", 3, 1)
    assert {"valid/si_sdr_db", "valid/loss", "train/stft"} <= set(record["scores"])

    # TensorBoard holds sounds and pictures
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "whole" / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["audio"]) == {"valid/input", "valid/output"} and events.Tags()["images"] == ["valid/clip"]


class Crash(lightning.Callback):
    """Ends the process's training in the middle of it, as a power cut would: nothing is saved."""

    def __init__(self, at_batch: int) -> None:
        self.at_batch = at_batch

    def on_train_batch_end(self, trainer, *_) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx + 1 == self.at_batch:
            raise RuntimeError("crash")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("options", [[], ["--trainer.accumulate_grad_batches", "3"]], ids=["plain", "accumulated"])
def test_a_crashed_run_goes_on_from_its_last_checkpoint(folder, tmp_path, monkeypatch, options):
    options = ["--trainer.max_steps", "6", "--trainer.val_check_interval", "100", "--save_every", "2", *options]
    assert fit(folder, tmp_path / "whole", *options) == 0
    accumulated = 3 if len(options) > 6 else 1
    monkeypatch.setattr(lightning.Trainer, "fit", with_callback(Crash(5 * accumulated - 1)))
    assert fit(folder, tmp_path / "crashed", *options) == 1
    monkeypatch.undo()
    assert torch.load(tmp_path / "crashed" / "trainer.ckpt", weights_only=True)["global_step"] == 4
    assert fit(folder, tmp_path / "crashed", *options) == 0
    assert weights(tmp_path / "crashed") == weights(tmp_path / "whole")


def with_callback(callback: lightning.Callback):
    original = lightning.Trainer.fit

    def fit_with_callback(trainer, *arguments, **options):
        trainer.callbacks.append(callback)
        return original(trainer, *arguments, **options)

    return fit_with_callback


def test_the_best_model_survives_a_resume_from_before_it(tmp_path):
    """The trainer's checkpoint of a step is written before that step's validation."""
    model, out = S4DAutoencoder(3000), tmp_path
    save(model, out / "best", training={"scores": {"valid/loss": 1.0}})
    keeper = RunFolder(out, 10, {})
    trainer = types.SimpleNamespace(
        global_step=10, sanity_checking=False, callback_metrics={"valid/loss": torch.tensor(2.0)},
        strategy=types.SimpleNamespace(root_device=torch.device("cpu")),
    )  # fmt: skip
    keeper.on_train_start(trainer, None)
    keeper.on_validation_end(trainer, types.SimpleNamespace(model=model))
    assert read_config(out / "best")["training"]["scores"] == {"valid/loss": 1.0}
    trainer.callback_metrics = {"valid/loss": torch.tensor(0.5)}
    keeper.on_validation_end(trainer, types.SimpleNamespace(model=model))
    assert read_config(out / "best")["training"]["scores"] == {"valid/loss": 0.5}


def test_weights_that_are_not_numbers_are_not_saved(tmp_path):
    model = S4DAutoencoder(3000)
    with torch.no_grad():
        model.outer.D.fill_(float("nan"))
    with pytest.raises(DivergenceError, match="weights are no longer finite numbers at step 5"):
        RunFolder(tmp_path, 10, {})._save(types.SimpleNamespace(global_step=5), types.SimpleNamespace(model=model))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_run_goes_on_only_as_it_began(folder, tmp_path, capsys):
    steps = ["--trainer.max_steps", "2", "--trainer.val_check_interval", "2"]
    assert fit(folder, tmp_path / "run", *steps) == 0
    recipe, before = (tmp_path / "run" / "recipe.yaml").read_text(), weights(tmp_path / "run")
    for option, key in (
        (["--model.init_args.lr", "1e-7"], "model.init_args.lr"),
        (["--data.init_args.normalize", "none"], "data.init_args.normalize"),
        (["--model.init_args.model.init_args.latent_channels", "5"], "latent_channels"),
    ):
        capsys.readouterr()
        assert fit(folder, tmp_path / "run", *steps, "--trainer.max_steps", "4", *option) == 2
        assert f"{key} is not what it was when the run" in capsys.readouterr().err
    assert (tmp_path / "run" / "recipe.yaml").read_text() == recipe and weights(tmp_path / "run") == before

    (tmp_path / "run" / "trainer.ckpt").write_bytes(b"junk")
    assert fit(folder, tmp_path / "run", *steps) == 2
    assert "trainer.ckpt is damaged" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_without_validation_best_is_the_last(folder, tmp_path):
    for steps in ("1", "3"):
        assert fit(folder, tmp_path / "run", "--trainer.max_steps", steps, "--trainer.val_check_interval", "100") == 0
        assert (tmp_path / "run" / "best" / "model.safetensors").read_bytes() == weights(tmp_path / "run")


def test_noise_gives_the_same_clips_whatever_the_batch(model, tmp_path):
    def generate(out: str, *options: str) -> list[np.ndarray]:
        arguments = [
            "generate",
            str(model),
            "--from",
            "noise",
            "--num",
            "3",
            "--seconds",
            "1.1",
            "--out",
            str(tmp_path / out),
        ]
        assert main([*arguments, *options]) == 0
        return [wav(tmp_path / out / f"noise_{'7' if '7' in options else '0'}_{i:03d}.wav") for i in range(3)]

    first, again, single = generate("a"), generate("b"), generate("c", "--batch-size", "1")
    other = generate("d", "--seed", "7")
    for index in range(3):
        assert len(first[index]) == 4400
        assert np.array_equal(first[index], again[index])
        assert np.abs(first[index].astype(int) - single[index]).max() <= 1
        assert not np.array_equal(first[index], other[index])
    assert not np.array_equal(first[0], first[1])
    assert sorted(p.suffix for p in (tmp_path / "a").iterdir()) == [".png"] * 3 + [".wav"] * 3


def test_recordings_are_reconstructed_or_varied(model, folder, tmp_path):
    for out, variation in (("same", "0"), ("near", "0.1"), ("far", "0.9")):
        arguments = ["generate", str(model), "--from", str(folder), "--variation", variation, "--out", str(tmp_path / out)]
        assert main(arguments) == 0
    names = sorted(p.name for p in (tmp_path / "same").glob("*.wav"))
    assert names == [f"tone{i}.wav" for i in range(4)]
    same, near, far = (
        wav(tmp_path / name).astype(float)
        for name in ("same/tone0.wav", "near/tone0_variation_0.1.wav", "far/tone0_variation_0.9.wav")
    )
    assert len(same) == 8000  # 2 s at the model's 4,000 Hz
    assert 0 < np.abs(near - same).mean() < np.abs(far - same).mean()
    assert (tmp_path / "same" / "tone0.png").stat().st_size > 10_000


def test_recordings_come_at_the_level_of_training_unless_told(model, folder, tmp_path, capsys):
    for out, options in (("trained", []), ("peak", ["--normalize", "peak"]), ("none", ["--normalize", "none"])):
        arguments = ["generate", str(model), "--from", str(folder / "tone0.wav"), "--out", str(tmp_path / out)]
        assert main([*arguments, *options]) == 0
        assert ("as they are" in capsys.readouterr().out) == (out == "none")
    trained, peak, none = (wav(tmp_path / out / "tone0.wav") for out in ("trained", "peak", "none"))
    assert np.array_equal(trained, peak) and not np.array_equal(peak, none)


def test_files_of_one_name_do_not_overwrite_each_other(model, folder, tmp_path):
    for name in ("a/x.wav", "a/x_2.wav", "b/x.wav"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes((folder / "tone3.wav").read_bytes())
    assert main(["generate", str(model), "--from", str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 0
    assert sorted(p.name for p in (tmp_path / "out").glob("*.wav")) == ["x.wav", "x_2.wav", "x_3.wav"]


def test_recordings_are_never_overwritten(capsys, model, folder, tmp_path):
    source = tmp_path / "x.wav"
    source.write_bytes((folder / "tone3.wav").read_bytes())
    before = source.read_bytes()
    for origin in (source, tmp_path):
        assert "would be overwritten" in refused(
            capsys, "generate", str(model), "--from", str(origin), "--out", str(tmp_path)
        )
    assert source.read_bytes() == before


def test_system_4_generates_too(tmp_path, folder):
    save(S4DAutoencoder(3000), tmp_path / "model")
    assert main(["generate", str(tmp_path / "model"), "--from", "noise", "--num", "1", "--out", str(tmp_path / "a")]) == 0
    assert len(wav(tmp_path / "a" / "noise_0_000.wav")) == 30_000


def refused(capsys, *arguments: str) -> str:
    assert main(list(arguments)) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("s4audio: ") and "Traceback" not in error and len(error.splitlines()) == 1
    return error


def test_wrong_input_ends_in_a_sentence_and_status_2(capsys, model, folder, tmp_path):
    save(S4Model(3, 10, d_model=4, num_layers=1), tmp_path / "classifier")
    (tmp_path / "empty").mkdir()
    generate = ["generate", str(model), "--out", str(tmp_path / "out"), "--from"]
    assert "'foo' is not a verb" in refused(capsys, "foo")
    assert "is not a model: it has no config.json" in refused(capsys, "generate", str(folder), "--from", "noise")
    assert "which classifies" in refused(capsys, "generate", str(tmp_path / "classifier"), "--from", "noise")
    assert "does not exist" in refused(capsys, *generate, str(tmp_path / "nowhere"))
    assert "holds no audio file" in refused(capsys, *generate, str(tmp_path / "empty"))
    assert "--variation is 2.0" in refused(capsys, *generate, str(folder), "--variation", "2")
    assert "must be at least 1" in refused(capsys, *generate, "noise", "--num", "0")
    assert "--from noise there is none" in refused(capsys, *generate, "noise", "--variation", "0.5")
    assert "--seconds positive" in refused(capsys, *generate, "noise", "--seconds", "inf")
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_wrong_recipes_end_in_a_sentence_and_status_2(capsys, folder, tmp_path):
    def with_change(change) -> str:
        recipe = yaml.safe_load(Path(RECIPE).read_text())
        change(recipe)
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        return refused(capsys, "fit", "--config", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "run"))

    def set_model(key, value):
        return lambda recipe: recipe["model"]["init_args"]["model"]["init_args"].update({key: value})

    assert "'latent_chanels' is not accepted" in with_change(set_model("latent_chanels", 3))
    assert "'modell' is not accepted" in with_change(lambda recipe: recipe.update(modell=3))
    assert "widths has 1 entries" in with_change(set_model("widths", [4]))
    assert "the data is at 4000 Hz and the model at 8000 Hz" in with_change(set_model("sample_rate", 8000))
    assert "max_steps" in with_change(lambda recipe: recipe["trainer"].update(max_steps="forty"))
    assert "trainer.devices is 2" in with_change(lambda recipe: recipe["trainer"].update(devices=2))
    assert "trainer.logger is set" in with_change(lambda recipe: recipe["trainer"].update(logger=False))
    assert "have 1 (mono)" in with_change(set_model("channels", 2))
    classifier = {"class_path": "s4audio.S4Model", "init_args": {"d_input": 1, "num_classes": 2}}
    assert "is no generator" in with_change(lambda recipe: recipe["model"]["init_args"].update(model=classifier))
    missing = refused(
        capsys, "fit", "--config", RECIPE, "--data.init_args.train", str(tmp_path / "no"), "--out", str(tmp_path / "run")
    )
    assert "train: " in missing and "does not exist" in missing
    assert "fit needs a recipe" in refused(capsys, "fit")
    fit_here = ["fit", "--config", RECIPE, "--data.init_args.train", str(folder), "--out", str(tmp_path / "run")]
    assert "the trainer refuses" in refused(capsys, *fit_here, "--trainer.accelerator", "tpu")
    assert not (tmp_path / "run").exists()


def test_help_says_what_there_is(capsys):
    assert main(["--help"]) == 0
    assert "generate MODEL --from noise" in capsys.readouterr().out
    assert main([]) == 2


def test_divergence_stops_with_the_step_and_the_term():
    task = GenerativeTask(S4DAutoencoder(3000))
    with pytest.raises(DivergenceError, match=r"the mse loss is nan at step 0.*try a smaller lr"):
        task.total_loss({"mse": torch.tensor(float("nan"))})
    with pytest.raises(ValueError, match=r"loss_weights names \['stft'\], but the model has the losses \['mse'\]"):
        GenerativeTask(S4DAutoencoder(3000), loss_weights={"stft": 1.0}).total_loss({"mse": torch.tensor(1.0)})
