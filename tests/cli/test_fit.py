"""Training by a recipe: reproducible, resumable, and clear when something is wrong."""

import json
import os
import re
import signal
import types
from pathlib import Path

import lightning
import pytest
import torch
import yaml

from s4audio import S4DAutoencoder, save
from s4audio.checkpoint import read_config
from s4audio.cli import fit_audio, main
from s4audio.tasks import DivergenceError, GenerativeTask
from s4audio.tasks.callbacks import RunFolder
from tests.cli.commands import RECIPE, ROOT, fit, refused, without_pictures


@pytest.fixture
def no_pictures():
    with pytest.MonkeyPatch.context() as patch:
        without_pictures(patch)
        yield


def weights(out: Path) -> bytes:
    return (out / "last" / "model.safetensors").read_bytes()


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


@pytest.mark.usefixtures("no_pictures")
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


class Interrupt(lightning.Callback):
    """Ctrl-C in the middle of a step, once or twice."""

    def __init__(self, at_step: int, times: int = 1) -> None:
        self.at_step, self.times = at_step, times

    def on_before_optimizer_step(self, trainer, *_) -> None:
        if trainer.global_step + 1 == self.at_step:
            for _ in range(self.times):
                os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.usefixtures("no_pictures")
def test_with_accumulated_gradients_steps_are_told_once_and_scored_when_asked(folder, tmp_path, capsys):
    options = ["--trainer.accumulate_grad_batches", "4", "--trainer.val_check_interval"]
    assert fit(folder, tmp_path / "run", "--steps", "10", *options, "20") == 0
    told = capsys.readouterr().out
    assert re.findall(r"step (\d+): held out", told) == ["5", "10"] and told.count("step 1 of 10:") == 1
    assert fit(folder, tmp_path / "short", "--steps", "2", *options, "20") == 0
    assert re.findall(r"step (\d+): held out", capsys.readouterr().out) == ["2"]


@pytest.mark.parametrize("accumulated", [1, 2])
def test_ctrl_c_saves_and_the_same_command_goes_on_as_if_nothing_had_been(
    folder, tmp_path, monkeypatch, capsys, accumulated
):
    """Also in front of a validation, and between the batches of a step."""
    every = ["--trainer.val_check_interval", str(2 * accumulated), "--trainer.accumulate_grad_batches", str(accumulated)]
    options = ["--steps", "6", *every, "--save_every", "100"]
    assert fit(folder, tmp_path / "whole", *options) == 0
    for step in (3, 4):
        capsys.readouterr()
        monkeypatch.setattr(lightning.Trainer, "fit", with_callback(Interrupt(step)))
        with pytest.raises(SystemExit) as caught:
            fit(folder, tmp_path / f"stopped{step}", *options)
        monkeypatch.undo()
        told = capsys.readouterr().out
        assert caught.value.code == 130 and f"stopped, and saved {tmp_path}/stopped{step}/last of step {step}" in told
        assert ("step 4: held out" in told) == (step == 4)
        assert fit(folder, tmp_path / f"stopped{step}", *options) == 0
        assert weights(tmp_path / f"stopped{step}") == weights(tmp_path / "whole")
        told = capsys.readouterr().out
        assert f"holds a run of {step} steps" in told and "step 6: held out" in told
        assert ("step 4: held out" in told) == (step == 3)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_second_ctrl_c_does_not_wait_and_saves_nothing_half_done(folder, tmp_path, monkeypatch, capsys):
    options = ["--steps", "6", "--save_every", "2"]
    for step, told in (
        (2, "stopped before anything was saved; the same command begins anew"),
        (4, "last of step 2; the same"),
    ):
        monkeypatch.setattr(lightning.Trainer, "fit", with_callback(Interrupt(step, times=2)))
        with pytest.raises(SystemExit):
            fit(folder, tmp_path / "run", *options)
        monkeypatch.undo()
        assert told in capsys.readouterr().out
    assert fit(folder, tmp_path / "run", *options) == 0
    assert fit(folder, tmp_path / "whole", *options) == 0
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


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
        global_step=10, sanity_checking=False, callback_metrics={"valid/loss": torch.tensor(2.0)}, world_size=1,
        accumulate_grad_batches=1, global_rank=0,
        strategy=types.SimpleNamespace(root_device=torch.device("cpu")),
        fit_loop=types.SimpleNamespace(epoch_loop=types.SimpleNamespace(total_batch_idx=9)),
    )  # fmt: skip
    task = types.SimpleNamespace(
        scored_model=model, best_score="valid/loss", higher_is_better=False, check_last_step=lambda: None
    )
    keeper.on_train_start(trainer, task)
    keeper.on_exception(trainer, task, RuntimeError())
    keeper.on_validation_end(trainer, task)
    assert read_config(out / "best")["training"]["scores"] == {"valid/loss": 1.0}
    trainer.callback_metrics = {"valid/loss": torch.tensor(0.5)}
    keeper.on_validation_end(trainer, task)
    assert read_config(out / "best")["training"]["scores"] == {"valid/loss": 0.5}


def test_weights_that_are_not_numbers_are_not_saved(tmp_path):
    model = S4DAutoencoder(3000)
    with torch.no_grad():
        model.outer.D.fill_(float("nan"))
    trainer = types.SimpleNamespace(global_step=5, loggers=[])
    task = types.SimpleNamespace(scored_model=model, check_last_step=lambda: None)
    with pytest.raises(DivergenceError, match="weights are no longer finite numbers at step 5"):
        RunFolder(tmp_path, 10, {})._save(trainer, task)
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
        assert fit(folder, tmp_path / "run", "--trainer.max_steps", steps, "--trainer.limit_val_batches", "0") == 0
        assert (tmp_path / "run" / "best" / "model.safetensors").read_bytes() == weights(tmp_path / "run")


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
    assert "trainer refuses the recipe" in with_change(lambda recipe: recipe["trainer"].update(devices=0))
    assert "save_every is 0; wanted at least 1" in with_change(lambda recipe: recipe.update(save_every=0))
    assert "trainer.val_check_interval is 0; wanted at least 1 step" in with_change(
        lambda recipe: recipe["trainer"].update(val_check_interval=0)
    )
    assert "latent_channels 0 and channels 1 must all be at least 1" in with_change(set_model("latent_channels", 0))
    assert "trainer.fast_dev_run writes no run" in with_change(lambda recipe: recipe["trainer"].update(fast_dev_run=True))
    assert "trainer.logger is set" in with_change(lambda recipe: recipe["trainer"].update(logger=False))
    assert "have 1 (mono)" in with_change(set_model("channels", 2))
    classifier = {"class_path": "s4audio.S4Model", "init_args": {"d_input": 1, "num_classes": 2}}
    assert "is no generator" in with_change(lambda recipe: recipe["model"]["init_args"].update(model=classifier))
    missing = refused(
        capsys, "fit", "--config", RECIPE, "--data.init_args.train", str(tmp_path / "no"), "--out", str(tmp_path / "run")
    )
    assert "train: " in missing and "does not exist" in missing
    assert "fit needs a recipe" in refused(capsys, "fit")
    assert "the recipe no.yaml does not exist; there are autoencoder_16k, " in refused(capsys, "fit", "--config", "no.yaml")
    error = refused(capsys, "fit", "--config", "flow_clasical_3k.yaml")
    assert error.endswith("the recipe flow_clasical_3k.yaml does not exist; did you mean recipes/flow_classical_3k.yaml?")
    (tmp_path / "words.yaml").write_text("just some words")
    assert "words.yaml is no recipe: wanted YAML" in refused(capsys, "fit", "--config", str(tmp_path / "words.yaml"))
    assert "is no recipe: it is not a text file" in refused(capsys, "fit", "--config", str(folder / "tone0.wav"))
    assert "'trian' is not accepted; did you mean train?" in refused(
        capsys, "fit", "--config", RECIPE, "--data.init_args.trian", "x"
    )
    assert "--trian x; did you mean train?" in refused(capsys, "fit", "--config", RECIPE, "--trian", "x")
    assert "wanted a whole number" in refused(capsys, "fit", "--config", RECIPE, "--steps", "lots").replace(
        "Expected", "wanted"
    )
    assert "holds files that are no run" in refused(
        capsys, "fit", "--config", RECIPE, "--train", str(folder), "--out", str(folder)
    )
    fit_here = ["fit", "--config", RECIPE, "--data.init_args.train", str(folder), "--out", str(tmp_path / "run")]
    assert "the trainer refuses" in refused(capsys, *fit_here, "--trainer.accelerator", "tpu")
    assert not (tmp_path / "run").exists()


def test_a_loss_weight_without_its_loss_is_refused():
    with pytest.raises(ValueError, match=r"loss_weights names \['stft'\], but the model has the losses \['mse'\]"):
        GenerativeTask(S4DAutoencoder(3000), loss_weights={"stft": 1.0}).total_loss({"mse": torch.tensor(1.0)})


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_short_run_is_scored_and_short_options_are_understood(folder, tmp_path, capsys):
    options = ["--train", str(folder), "--steps=3", "--out", str(tmp_path / "run"), "--trainer.val_check_interval", "100"]
    assert main(["fit", "--config=recipes/debug.yaml", *options]) == 0
    told = capsys.readouterr().out
    assert "step 3: held out: si_sdr_db" in told and "best on the held-out clips" in told
    held_out = re.search(r"held out: (tone\d\.wav)", told)
    assert held_out and f"{held_out[1]} through the model" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_recordings_come_from_a_cache_that_may_move_be_deleted_or_be_damaged(folder, tmp_path, capsys):
    options = ["--trainer.limit_val_batches", "0", "--data.init_args.cache"]
    assert fit(folder, tmp_path / "run", "--steps", "1", *options, str(tmp_path / "cache")) == 0
    (home,) = (tmp_path / "cache").iterdir()
    megabytes = sum(path.stat().st_size for path in home.iterdir()) / 1e6
    said = f"cache: {megabytes:.1f} MB of the {megabytes:.1f} MB in {tmp_path / 'cache'}; it can be deleted at any time"
    assert said in capsys.readouterr().out
    (home / "manifest.json").write_bytes(b"junk")
    assert fit(folder, tmp_path / "run", "--steps", "2", *options, str(tmp_path / "cache")) == 0
    said = capsys.readouterr().out
    assert "manifest.json was damaged; everything is decoded again" in said and "going on from there to 2" in said
    assert fit(folder, tmp_path / "run", "--steps", "3", *options, str(tmp_path / "elsewhere")) == 0
    inside = ["fit", "--config", RECIPE, "--train", str(folder), "--data.init_args.cache", str(folder / "cache")]
    assert "is inside of" in refused(capsys, *inside, "--out", str(tmp_path / "other"))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_vae_trains_and_says_that_it_has_collapsed(folder, tmp_path, capsys):
    recipe = str(ROOT / "recipes" / "vae_classical.yaml")
    small = ["--model.init_args.model.init_args.widths", "[4,8,8,8]", "--model.init_args.loss_weights.kl", "1000"]
    small += ["--model.init_args.loss_warmup_steps.kl", "0", "--model.init_args.model.init_args.free_nats", "0"]
    data = ["--train", str(folder), "--valid", str(folder)]
    arguments = ["fit", "--config", recipe, *data, "--out", str(tmp_path / "run"), "--steps", "30", *small]
    assert main([*arguments, "--data.init_args.batch_size", "2", "--data.init_args.clip_seconds", "1"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"only \d+ of 32 latent dimensions say anything", said) and "active_dimensions" in said
    page = (tmp_path / "run" / "report.html").read_text()
    assert "What it remembers" not in page  # it has no state space
    assert main(["info", str(tmp_path / "run" / "best")]) == 0 and "no state-space layers" in capsys.readouterr().out
    assert (
        main(["generate", str(tmp_path / "run" / "best"), "--from", "noise", "--num", "1", "--out", str(tmp_path / "g")])
        == 0
    )


def test_durations_are_of_all_clips_of_a_batch_and_in_minutes_if_long():
    data = types.SimpleNamespace(sample_rate=100)
    assert fit_audio.size(torch.zeros(3, 1, 250), data) == fit_audio.size((torch.zeros(3, 1, 250), None), data) == 7.5
    assert [fit_audio._duration(seconds) for seconds in (7.5, 90.0)] == ["7.5 s", "1.5 min"]
