"""What a run writes (`RunFolder`) and shows (`Progress`)."""

import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from torch import Tensor, nn

from s4audio import checkpoint
from s4audio.tasks.training import DivergenceError

TRAINER_CHECKPOINT = "trainer.ckpt"


class RunFolder(lightning.Callback):
    """Keeps OUT/last and OUT/best (models) and OUT/trainer.ckpt (everything to go on); each file is replaced as a whole.

    Args:
        out: the run folder.
        every_n_steps: how often the last state is written; also at the end, and when the run is interrupted.
        training: what to write into the models' config.json; steps and scores are added.
    """

    def __init__(self, out: str | Path, every_n_steps: int, training: dict[str, Any]) -> None:
        self.out, self.every_n_steps, self.training = Path(out), every_n_steps, training
        self.best: float | None = None
        self.saved_at, self.seconds = 0, 0.0
        self.random_state: Tensor | None = None
        self.cuda_random_state: Tensor | None = None

    def on_train_start(self, trainer: lightning.Trainer, task: Any) -> None:
        self.started, self.saved_at = time.monotonic(), trainer.global_step
        if self.random_state is not None:
            torch.set_rng_state(self.random_state)
        if self.cuda_random_state is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(self.cuda_random_state, trainer.strategy.root_device)
        if trainer.global_step and (self.out / "best").exists():
            # The folder itself knows best: the trainer's checkpoint may be older than the last validation.
            scores = checkpoint.read_config(self.out / "best")["training"].get("scores", {})
            self.best = scores.get(task.best_score)

    def on_train_batch_end(self, trainer: lightning.Trainer, task: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step  # with accumulated gradients it stands still over several batches
        if step % self.every_n_steps == 0 and step != self.saved_at:
            self._save(trainer, task)

    def on_validation_end(self, trainer: lightning.Trainer, task: Any) -> None:
        score = float(trainer.callback_metrics.get(task.best_score, float("nan")))
        better = (
            score > (self.best or 0) if task.higher_is_better else score < (float("inf") if self.best is None else self.best)
        )
        if not trainer.sanity_checking and better:
            self.best = score
            _refuse_not_finite(task.scored_model, trainer.global_step)
            self._save_model(trainer, task.scored_model, "best")
        if not trainer.sanity_checking and self.saved_at == trainer.global_step:  # saved before this validation
            self._save(trainer, task)

    def on_train_end(self, trainer: lightning.Trainer, task: Any) -> None:
        self._save(trainer, task)
        if self.best is None:  # never validated
            self._save_model(trainer, task.scored_model, "best")

    def on_exception(self, trainer: lightning.Trainer, task: Any, exception: BaseException) -> None:
        if isinstance(exception, KeyboardInterrupt) and trainer.world_size == 1:  # several may be in the middle of a step
            self._save(trainer, task)

    def state_dict(self) -> dict[str, Any]:
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
        return {"random_state": torch.get_rng_state(), "cuda_random_state": cuda, "seconds": self._seconds()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.random_state, self.seconds = state_dict["random_state"], state_dict["seconds"]
        self.cuda_random_state = state_dict.get("cuda_random_state")

    def _save(self, trainer: lightning.Trainer, task: Any) -> None:
        _refuse_not_finite(task.model, trainer.global_step)
        self.saved_at = trainer.global_step
        self._save_model(trainer, task.scored_model, "last")
        path, temporary = self.out / TRAINER_CHECKPOINT, self.out / f".{TRAINER_CHECKPOINT}"
        try:
            trainer.save_checkpoint(temporary)  # all devices take part in it
            if trainer.is_global_zero:
                os.replace(temporary, path)
        except OSError as error:
            error.filename = str(path)
            raise
        finally:
            if trainer.is_global_zero:
                temporary.unlink(missing_ok=True)

    @rank_zero_only
    def _save_model(self, trainer: lightning.Trainer, model: nn.Module, name: str) -> None:
        """Of several devices, all with the same weights, the first one writes."""
        checkpoint.save(model, self.out / name, self._record(trainer))

    def _seconds(self) -> float:
        return self.seconds + time.monotonic() - self.started

    def _record(self, trainer: lightning.Trainer) -> dict[str, Any]:
        device = trainer.strategy.root_device
        on_gpu = device.type == "cuda"
        return {
            **self.training,
            "steps": trainer.global_step,
            "wall_seconds": round(self._seconds(), 1),
            "device": torch.cuda.get_device_name(device) if on_gpu else f"CPU, {torch.get_num_threads()} threads",
            "scores": {name: float(value) for name, value in trainer.callback_metrics.items()},
        }


def _refuse_not_finite(model: nn.Module, step: int) -> None:
    """Files hold numbers, or stay those of the last save.

    Raises:
        DivergenceError: a weight is no finite number.
    """
    if not all(torch.isfinite(parameter).all() for parameter in model.parameters()):
        raise DivergenceError(
            f"the weights are no longer finite numbers at step {step}; the files of the last save are from before. "
            "Try a smaller lr or ssm_lr, more warmup_steps, or trainer.gradient_clip_val 1.0."
        )


class Progress(lightning.Callback):
    """Step, loss, what is trained on a second and the time left: a bar on a terminal, else a line now and then.

    Args:
        size: how much a batch is, such as its seconds of audio.
        unit: of the size, such as "s of audio".
        every_seconds: between lines where there is no terminal.
    """

    def __init__(self, size: Callable[[Any], float], unit: str, every_seconds: float = 10.0) -> None:
        self.size, self.unit, self.every_seconds = size, unit, every_seconds
        self.console = Console()
        self.bar: Bar | None = None
        self.warned = False

    def on_train_start(self, trainer: lightning.Trainer, task: lightning.LightningModule) -> None:
        self.started = self.last_line = time.monotonic()
        self.done, self.validating, self.first_step = 0.0, 0.0, trainer.global_step
        if self.console.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"), TimeRemainingColumn())
            self.bar = Bar(*columns, console=self.console)
            total = trainer.max_steps if trainer.max_steps > 0 else None
            self.row = self.bar.add_task("training", total=total, completed=trainer.global_step, text="")
            self.bar.start()

    def on_train_batch_end(self, trainer: lightning.Trainer, task: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.done += self.size(batch)
        self.step_loss = outputs["loss"]
        now = time.monotonic()
        if self.bar is not None:
            self.bar.update(self.row, completed=trainer.global_step, text=self._text(trainer))
        elif trainer.global_step == self.first_step + 1 or now - self.last_line >= self.every_seconds:
            self._print_line(trainer)

    def _print_line(self, trainer: lightning.Trainer) -> None:
        self.last_line = time.monotonic()
        done = trainer.global_step - self.first_step
        left = (trainer.max_steps - trainer.global_step) * (self.last_line - self.started) / max(done, 1)
        remaining = f", about {timedelta(seconds=round(left))} left" if left >= 1 else ""
        self.console.print(
            f"step {trainer.global_step} of {trainer.max_steps}: {self._text(trainer)}{remaining}",
            highlight=False,
            soft_wrap=True,
        )

    def _text(self, trainer: lightning.Trainer) -> str:
        speed = self.done / max(time.monotonic() - self.started - self.validating, 1e-9)
        return f"loss {float(self.step_loss):.4g}, {speed:,.0f} {self.unit} a second"

    def on_validation_start(self, trainer: lightning.Trainer, task: lightning.LightningModule) -> None:
        self.validation_started = time.monotonic()

    def on_validation_end(self, trainer: lightning.Trainer, task: Any) -> None:
        self.validating += time.monotonic() - self.validation_started
        scores = {
            name.removeprefix("valid/"): float(v)
            for name, v in trainer.callback_metrics.items()
            if name.startswith("valid/")
        }
        text = ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
        self.console.print(f"step {trainer.global_step}: held out: {text}", highlight=False, soft_wrap=True)
        if "active_dimensions" in scores and trainer.global_step >= max(task.loss_warmup_steps.values(), default=0):
            self._warn_of_collapse(scores["active_dimensions"], task.model.latent_channels)

    def _warn_of_collapse(self, active: float, number: int) -> None:
        """Says once that a VAE ignores most of its latent."""
        if active < number / 2 and not self.warned:
            self.warned = True
            self.console.print(
                f"only {active:.0f} of {number} latent dimensions say anything about the held-out clips: the others have "
                "collapsed onto the prior. Try a smaller loss_weights.kl, a longer loss_warmup_steps.kl, more free_nats, or "
                "fewer latent_channels.",
                highlight=False, soft_wrap=True,
            )  # fmt: skip

    def on_train_end(self, trainer: lightning.Trainer, task: lightning.LightningModule) -> None:
        if self.bar is None and trainer.global_step > self.first_step:
            self._print_line(trainer)
        self._stop()

    def on_exception(self, trainer: lightning.Trainer, task: Any, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
