"""The one task that trains every generator: sum the losses that the model names, step, validate, listen."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from s4audio.metrics.signal import si_sdr
from s4audio.tasks.training import TrainingTask


class GenerativeTask(TrainingTask):
    """Trains a generator with AdamW.

    Args:
        model: has `training_losses(audio, label) -> dict of named losses`; one that can `encode` is called with audio
            to reconstruct it.
        loss_weights: weight of each named loss; 1 for those not listed.
        loss_warmup_steps: of a linear rise of a named loss's weight from 0, such as a VAE's `kl`.
        lr: as all of what follows, of TrainingTask.

    Raises:
        ValueError: as TrainingTask.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_weights: dict[str, float] | None = None,
        loss_warmup_steps: dict[str, int] | None = None,
        lr: float = 3e-3,
        ssm_lr: float = 1e-3,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.99),
        schedule: str = "cosine",
        warmup_steps: int = 0,
        decay_steps: int | None = None,
        cuda_graph: bool = True,
        compile: bool = False,
        ema_decay: float | None = None,
        on_nan: str = "stop",
    ) -> None:
        super().__init__(
            model, lr, ssm_lr, weight_decay, betas, schedule, warmup_steps, decay_steps, cuda_graph, compile, on_nan,
            ema_decay,
        )  # fmt: skip
        self.loss_weights, self.loss_warmup_steps = loss_weights or {}, loss_warmup_steps or {}

    def losses(self, *batch: Tensor) -> dict[str, Tensor]:
        """The model's own."""
        return self.model.training_losses(*batch)

    def weights(self, names: list[str], step: int | None) -> list[float]:
        """As of TrainingTask.

        Raises:
            ValueError: a weight or a warm-up is given for a loss that the model does not have.
        """
        for argument, named in (("loss_weights", self.loss_weights), ("loss_warmup_steps", self.loss_warmup_steps)):
            unknown = set(named) - set(names)
            if unknown:
                raise ValueError(f"{argument} names {sorted(unknown)}, but the model has the losses {sorted(names)}.")
        return [self._weight(name, step) for name in names]

    def _weight(self, name: str, step: int | None) -> float:
        warmup = self.loss_warmup_steps.get(name, 0)
        rise = 1.0 if step is None or step >= warmup else step / warmup
        return rise * self.loss_weights.get(name, 1.0)

    def training_step(self, batch: Tensor | Sequence[Tensor], batch_idx: int) -> Tensor:
        """One batch of clips (B, 1, T), with labels (B,) if the data has them."""
        total, losses = self.total_and_losses(*parts(batch))
        self.log_dict(self.mean_over_devices({f"train/{name}": loss for name, loss in {**losses, "loss": total}.items()}))
        return total

    def validation_step(self, batch: Tensor | Sequence[Tensor], batch_idx: int) -> None:
        """The losses and, of a model that reconstructs, the SI-SDR, averaged over the validation clips."""
        model, (audio, *label) = self.scored_model, parts(batch)
        if hasattr(model, "encode"):  # else it makes audio and cannot reconstruct any
            self._reconstruct(model, audio, batch_idx)
        losses = model.training_losses(audio, *label)
        values = {f"valid/{name}": loss for name, loss in losses.items()}
        self.log_dict({**values, "valid/loss": self.total_loss(losses)}, batch_size=audio.shape[0], on_epoch=True)

    def _reconstruct(self, model: Any, audio: Tensor, batch_idx: int) -> None:
        """Scores and shows what the model makes of clips."""
        estimate = model(audio)
        audible = audio.square().mean((1, 2)) > 0  # SI-SDR has no value on silence
        if audible.any():
            score = si_sdr(estimate[audible], audio[audible]).mean()
            self.log("valid/si_sdr_db", score, batch_size=int(audible.sum()), on_epoch=True)
        if hasattr(model, "active_dimensions"):
            self.log("valid/active_dimensions", float(model.active_dimensions(audio)), batch_size=audio.shape[0])
        if batch_idx == 0:
            self._show(audio[0], estimate[0])

    def _show(self, clip: Tensor, estimate: Tensor) -> None:
        """The first validation clip and its reconstruction, to hear and to see in TensorBoard."""
        writer = getattr(self.logger, "experiment", None)
        if writer is None or not hasattr(writer, "add_figure"):
            return
        from s4audio.report import clips_figure

        rate = self.model.sample_rate
        clip, estimate = clip.detach().float().cpu(), estimate.detach().float().cpu()
        for name, audio in (("input", clip), ("output", estimate)):
            writer.add_audio(f"valid/{name}", audio[:1].clamp(-1, 1), self.global_step, sample_rate=rate)
        writer.add_figure("valid/clip", clips_figure({"input": clip, "output": estimate}, rate), self.global_step)


def parts(batch: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The clips of a batch, and their labels if it has any."""
    return (batch,) if isinstance(batch, Tensor) else tuple(batch)
