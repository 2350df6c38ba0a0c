"""What a run writes (`RunFolder`) and shows (`Progress`)."""

import io
import math
import shutil
import signal
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from s4audio import checkpoint
from s4audio.audio import write_audio
from s4audio.files import replacing
from s4audio.tasks.training import Batch, DivergenceError

RandomState = tuple[Tensor, Tensor | None]  # of numbers drawn on the CPU, and on a GPU
TRAINER_CHECKPOINT, PREVIOUS_CHECKPOINT = "trainer.ckpt", "trainer.previous.ckpt"


class WholeCheckpoints(TorchCheckpointIO):
    """Writes a trainer's checkpoint whole or not at all, and keeps the one before."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        content = io.BytesIO()  # torch.save into a file makes another error of a full disk
        torch.save(checkpoint, content)
        with replacing(path, durable=True, previous=Path(path).with_name(PREVIOUS_CHECKPOINT)) as file:
            file.write(content.getbuffer())


class RunFolder(lightning.Callback):
    """Keeps OUT/last and OUT/best (models), and OUT/trainer.ckpt (everything to go on) with the one before it.

    Whatever ends the process, at whatever moment, the run goes on from trainer.ckpt to the same weights. Each file is
    replaced as a whole, a model before the checkpoint that knows of it, and a checkpoint is made after a step and the
    validation that may follow it, never between them: what is done again from there makes the same best and last.

    Ctrl-C waits for the end of the step, and of its validation, and saves; a second one does not wait and does not save.

    Args:
        out: the run folder.
        every_n_steps: how often the last state is written; also at the end, and when the run is interrupted.
        training: what to write into the models' config.json; steps and scores are added.
    """

    def __init__(self, out: str | Path, every_n_steps: int, training: dict[str, Any]) -> None:
        self.out, self.every_n_steps, self.training = Path(out), every_n_steps, training
        self.best: float | None = None
        self.saved_at, self.seconds = 0, 0.0
        self.scores: dict[str, float] = {}
        self.random_states: list[RandomState] = []  # to go on with, of each device
        self.to_stop = False
        self.on_ctrl_c: Any = None  # what Ctrl-C does elsewhere

    def setup(self, trainer: lightning.Trainer, task: Any, stage: str) -> None:
        trainer.strategy.checkpoint_io = WholeCheckpoints()

    def on_train_start(self, trainer: lightning.Trainer, task: Any) -> None:
        self.started, self.saved_at = time.monotonic(), trainer.global_step
        if threading.current_thread() is threading.main_thread():
            self.to_stop, self.on_ctrl_c = False, signal.signal(signal.SIGINT, self._stop_soon)
        if trainer.global_rank < len(self.random_states):
            random_state, cuda = self.random_states[trainer.global_rank]
            torch.set_rng_state(random_state)
            if cuda is not None and torch.cuda.is_available():
                torch.cuda.set_rng_state(cuda, trainer.strategy.root_device)
        elif trainer.global_rank:  # all begin with one seed, and noise that they shared would be half as much noise
            torch.manual_seed(torch.initial_seed() + trainer.global_rank)
        if trainer.global_step and (self.out / "best" / checkpoint.CONFIG).exists():
            # The folder itself knows best: the trainer's checkpoint may be older than the last validation.
            scores = checkpoint.read_config(self.out / "best")["training"].get("scores", {})
            self.best = scores.get(task.best_score)

    def on_train_batch_end(self, trainer: lightning.Trainer, task: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not _validates(trainer):
            self._end_step(trainer, task)

    def on_validation_end(self, trainer: lightning.Trainer, task: Any) -> None:
        if trainer.sanity_checking:
            return
        task.check_last_step()
        score = float(trainer.callback_metrics.get(task.best_score, float("nan")))
        better = (
            score > (self.best or 0) if task.higher_is_better else score < (float("inf") if self.best is None else self.best)
        )
        if better:
            self._save_model(trainer, task.scored_model, "best")
            self.best = score
        self._end_step(trainer, task)

    def on_train_end(self, trainer: lightning.Trainer, task: Any) -> None:
        if self.best is None:  # never validated
            self._save_model(trainer, task.scored_model, "best")
        if self.saved_at != trainer.global_step:
            self._save(trainer, task)
        self._restore_ctrl_c()

    def on_exception(self, trainer: lightning.Trainer, task: Any, exception: BaseException) -> None:
        self._restore_ctrl_c()
        if isinstance(exception, DivergenceError) and trainer.is_global_zero:
            last = f"The last checkpoint is {self.out / TRAINER_CHECKPOINT}, of step {self.saved_at}."
            kept = self._keep(exception.batches, getattr(task.model, "sample_rate", None))
            exception.args = (f"{exception} {kept}{last if self.saved_at else 'There is no checkpoint yet.'}",)

    def state_dict(self) -> dict[str, Any]:
        """What goes into a checkpoint, which all devices make together and the first one writes."""
        return {"random_states": _random_states(), "seconds": self._seconds(), "scores": dict(self.scores)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.random_states, self.seconds = state_dict["random_states"], state_dict["seconds"]
        self.scores = state_dict.get("scores", {})

    def _end_step(self, trainer: lightning.Trainer, task: Any) -> None:
        """After a batch and the validation that may follow it: saves if it is time, and stops if that was asked for."""
        step = trainer.global_step
        if _batches(trainer) % trainer.accumulate_grad_batches:
            return  # in the middle of a step
        alone = trainer.world_size == 1  # several devices cannot save together while one of them stops
        if step != self.saved_at and (step % self.every_n_steps == 0 or (self.to_stop and alone)):
            self._save(trainer, task)
        if self.to_stop:
            raise KeyboardInterrupt

    def _save(self, trainer: lightning.Trainer, task: Any) -> None:
        task.check_last_step()
        for logger in trainer.loggers:
            logger.save()  # the curves up to here, which nobody will draw again
        self._save_model(trainer, task.scored_model, "last")
        trainer.save_checkpoint(self.out / TRAINER_CHECKPOINT)
        self.saved_at = trainer.global_step

    @rank_zero_only
    def _save_model(self, trainer: lightning.Trainer, model: nn.Module, name: str) -> None:
        """Of several devices, all with the same weights, the first one writes."""
        _refuse_not_finite(model, trainer.global_step)
        checkpoint.save(model, self.out / name, self._record(trainer))

    def _keep(self, batches: list[Batch], sample_rate: int | None) -> str:
        """Writes the batches that a training diverged on, clips of audio also to be heard; returns where, in a sentence."""
        if not batches:
            return ""
        folder = self.out / "diverged"
        parts = {f"batch{i}.part{j}": part for i, batch in enumerate(batches) for j, part in enumerate(batch)}
        shutil.rmtree(folder, ignore_errors=True)
        try:
            with replacing(folder / "batch.safetensors") as file:
                file.write(to_bytes({name: part.detach().cpu().contiguous() for name, part in parts.items()}))
            for number, clip in enumerate(clip for batch in batches for clip in batch[0] if sample_rate):
                write_audio(folder / f"clip{number}.wav", clip.detach().float().cpu().nan_to_num(0, 1, -1), sample_rate or 0)
        except OSError as error:
            return f"The batch could not be saved ({error.strerror}). "
        return f"The batch is in {folder}. "

    def _stop_soon(self, *_: Any) -> None:
        self.to_stop = True
        self._restore_ctrl_c()

    def _restore_ctrl_c(self) -> None:
        if self.on_ctrl_c is not None:
            signal.signal(signal.SIGINT, self.on_ctrl_c)
            self.on_ctrl_c = None

    def _seconds(self) -> float:
        return self.seconds + time.monotonic() - self.started

    def _record(self, trainer: lightning.Trainer) -> dict[str, Any]:
        device = trainer.strategy.root_device
        on_gpu = device.type == "cuda"
        scores = ((name, float(value)) for name, value in trainer.callback_metrics.items())
        self.scores |= {name: value for name, value in scores if math.isfinite(value)}
        return {
            **self.training,
            "steps": trainer.global_step,
            "wall_seconds": round(self._seconds(), 1),
            "device": torch.cuda.get_device_name(device) if on_gpu else f"CPU, {torch.get_num_threads()} threads",
            "scores": dict(self.scores),
        }


def _random_states() -> list[RandomState]:
    """Those of the random numbers of each device."""
    own = torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [own]
    states: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(states, own)
    return states


def _batches(trainer: lightning.Trainer) -> int:
    """How many the trainer has used."""
    return trainer.fit_loop.epoch_loop.total_batch_idx + 1


def _validates(trainer: lightning.Trainer) -> bool:
    """Whether a validation follows this batch. A trainer that is saved before one leaves it out when it goes on."""
    every = trainer.val_check_batch
    return bool(trainer.enable_validation and every and _batches(trainer) % every == 0)


def _refuse_not_finite(model: nn.Module, step: int) -> None:
    """Files hold numbers, or stay those of the last save.

    Raises:
        DivergenceError: a weight, or what the model has counted, is no finite number.
    """
    if not all(torch.isfinite(value).all() for value in model.state_dict().values()):
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

    def on_train_start(self, trainer: lightning.Trainer, task: Any) -> None:
        self.started = self.last_line = time.monotonic()
        self.silent = True  # the first step is told as soon as it is done
        self.done, self.validating, self.first_step = 0.0, 0.0, trainer.global_step
        self.parts, self.skipped = task.parts, task.skipped
        if self.console.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"), TimeRemainingColumn())
            self.bar = Bar(*columns, console=self.console)
            total = trainer.max_steps if trainer.max_steps > 0 else None
            self.row = self.bar.add_task("training", total=total, completed=trainer.global_step, text="")
            self.bar.start()

    def on_train_batch_end(self, trainer: lightning.Trainer, task: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._tell(trainer.global_step, task)
        self.done += self.size(batch)
        self.outputs = outputs
        now = time.monotonic()
        if self.bar is not None:
            self.bar.update(self.row, completed=trainer.global_step, text=self._text(trainer))
        elif (self.silent and trainer.global_step > self.first_step) or now - self.last_line >= self.every_seconds:
            self.silent = False
            self._print_line(trainer)

    def _tell(self, step: int, task: Any) -> None:
        """Says what the task has to say, that a batch did not fit into memory, or that an update was left out."""
        while task.news:
            self._print(f"step {step}: {task.news.pop(0)}")
        if task.parts != self.parts:
            self.parts = task.parts
            self._print(
                f"step {step}: a batch does not fit into memory; going on with each in {task.parts} parts, whose gradients "
                "add up to the same steps."
            )
        if task.skipped != self.skipped:
            self.skipped = task.skipped
            self._print(f"an update was left out, {task.skipped} so far: {task.why_skipped}.")

    def _print(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)

    def _print_line(self, trainer: lightning.Trainer) -> None:
        self.last_line = time.monotonic()
        done = trainer.global_step - self.first_step
        left = (trainer.max_steps - trainer.global_step) * (self.last_line - self.started) / max(done, 1)
        remaining = f", about {timedelta(seconds=round(left))} left" if left >= 1 else ""
        self._print(f"step {trainer.global_step} of {trainer.max_steps}: {self._text(trainer)}{remaining}")

    def _text(self, trainer: lightning.Trainer) -> str:
        speed = self.done / max(time.monotonic() - self.started - self.validating, 1e-9)
        values = ", ".join(f"{name} {float(value):.4g}" for name, value in self.outputs.items())
        return f"{values}, {speed:,.0f} {self.unit} a second"

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
        self._print(f"step {trainer.global_step}: held out: {text}")
        if "active_dimensions" in scores and trainer.global_step >= max(task.loss_warmup_steps.values(), default=0):
            self._warn_of_collapse(scores["active_dimensions"], task.model.latent_channels)

    def _warn_of_collapse(self, active: float, number: int) -> None:
        """Says once that a VAE ignores most of its latent."""
        if active < number / 2 and not self.warned:
            self.warned = True
            self._print(
                f"only {active:.0f} of {number} latent dimensions say anything about the held-out clips: the others have "
                "collapsed onto the prior. Try a smaller loss_weights.kl, a longer loss_warmup_steps.kl, more free_nats, or "
                "fewer latent_channels."
            )

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
