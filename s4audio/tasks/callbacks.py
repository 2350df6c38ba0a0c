"""What a run writes (`RunFolder`) and shows (`Progress`)."""

import os
import shutil
import time
from pathlib import Path
from typing import Any

import lightning
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from torch import Tensor

from s4audio import checkpoint

TRAINER_CHECKPOINT = "trainer.ckpt"


class RunFolder(lightning.Callback):
    """Keeps OUT/last and OUT/best (models) and OUT/trainer.ckpt (everything needed to go on), each replaced as a whole.

    Args:
        out: the run folder.
        every_n_steps: how often the last state is written; also at the end, and when the run is interrupted.
        training: what to write into the models' config.json; steps and scores are added.
    """

    def __init__(self, out: str | Path, every_n_steps: int, training: dict[str, Any]) -> None:
        self.out, self.every_n_steps, self.training = Path(out), every_n_steps, training
        self.best_loss = float("inf")
        self.random_state: Tensor | None = None

    def on_train_start(self, trainer: lightning.Trainer, task: lightning.LightningModule) -> None:
        if self.random_state is not None:
            torch.set_rng_state(self.random_state)

    def on_train_batch_end(self, trainer: lightning.Trainer, task: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step % self.every_n_steps == 0:
            self._save(trainer, task)

    def on_validation_end(self, trainer: lightning.Trainer, task: Any) -> None:
        loss = float(trainer.callback_metrics.get("valid/loss", float("inf")))
        if not trainer.sanity_checking and loss < self.best_loss:
            self.best_loss = loss
            checkpoint.save(task.model, self.out / "best", self._record(trainer))

    def on_train_end(self, trainer: lightning.Trainer, task: lightning.LightningModule) -> None:
        self._save(trainer, task)
        if not (self.out / "best").exists():
            shutil.copytree(self.out / "last", self.out / "best")

    def on_exception(self, trainer: lightning.Trainer, task: Any, exception: BaseException) -> None:
        if isinstance(exception, KeyboardInterrupt):
            self._save(trainer, task)

    def state_dict(self) -> dict[str, Any]:
        return {"best_loss": self.best_loss, "random_state": torch.get_rng_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_loss, self.random_state = state_dict["best_loss"], state_dict["random_state"]

    def _save(self, trainer: lightning.Trainer, task: Any) -> None:
        checkpoint.save(task.model, self.out / "last", self._record(trainer))
        temporary = self.out / f".{TRAINER_CHECKPOINT}"
        trainer.save_checkpoint(temporary)
        os.replace(temporary, self.out / TRAINER_CHECKPOINT)

    def _record(self, trainer: lightning.Trainer) -> dict[str, Any]:
        scores = {name: float(value) for name, value in trainer.callback_metrics.items()}
        return {**self.training, "steps": trainer.global_step, "scores": scores}


class Progress(lightning.Callback):
    """Step, loss, seconds of audio trained per second and the time left: a bar on a terminal, else a line now and then.

    Args:
        sample_rate: of the clips, in Hz.
        every_seconds: between lines where there is no terminal.
    """

    def __init__(self, sample_rate: int, every_seconds: float = 10.0) -> None:
        self.sample_rate, self.every_seconds = sample_rate, every_seconds
        self.console = Console()
        self.bar: Bar | None = None

    def on_train_start(self, trainer: lightning.Trainer, task: lightning.LightningModule) -> None:
        self.started = self.last_line = time.monotonic()
        self.seconds_of_audio, self.validating = 0.0, 0.0
        if self.console.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"), TimeRemainingColumn())
            self.bar = Bar(*columns, console=self.console)
            total = trainer.max_steps if trainer.max_steps > 0 else None
            self.row = self.bar.add_task("training", total=total, completed=trainer.global_step, text="")
            self.bar.start()

    def on_train_batch_end(self, trainer: lightning.Trainer, task: Any, outputs: Any, batch: Tensor, batch_idx: int) -> None:
        self.seconds_of_audio += batch.shape[0] * batch.shape[-1] / self.sample_rate
        now = time.monotonic()
        if self.bar is None and now - self.last_line < self.every_seconds:
            return  # reading the loss would make a GPU wait
        speed = self.seconds_of_audio / max(now - self.started - self.validating, 1e-9)
        text = f"loss {float(outputs['loss']):.4g}, {speed:,.0f} s of audio a second"
        if self.bar is not None:
            self.bar.update(self.row, completed=trainer.global_step, text=text)
        else:
            self.last_line = now
            self.console.print(f"step {trainer.global_step} of {trainer.max_steps}: {text}", highlight=False)

    def on_validation_start(self, trainer: lightning.Trainer, task: lightning.LightningModule) -> None:
        self.validation_started = time.monotonic()

    def on_validation_end(self, trainer: lightning.Trainer, task: lightning.LightningModule) -> None:
        self.validating += time.monotonic() - self.validation_started
        scores = {
            name.removeprefix("valid/"): float(v)
            for name, v in trainer.callback_metrics.items()
            if name.startswith("valid/")
        }
        text = ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
        self.console.print(f"step {trainer.global_step}: held out: {text}", highlight=False)

    def on_train_end(self, trainer: lightning.Trainer, task: lightning.LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: lightning.Trainer, task: Any, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
