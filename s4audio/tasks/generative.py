"""The one task that trains every generator: sum the losses that the model names, step, validate, listen."""

from typing import Any

import lightning
import torch
from torch import Tensor, nn

from s4audio.metrics.signal import si_sdr
from s4audio.tasks.graph import LossGraph
from s4audio.tasks.optim import parameter_groups, warmup_cosine


class DivergenceError(RuntimeError):
    """A loss stopped being a number."""


class GenerativeTask(lightning.LightningModule):
    """Trains a generator with AdamW.

    Args:
        model: has `training_losses(audio) -> dict of named losses` and is called with audio to reconstruct it.
        loss_weights: weight of each named loss; 1 for those not listed.
        loss_warmup_steps: of a linear rise of a named loss's weight from 0, such as a VAE's `kl`.
        lr: learning rate of everything but the state spaces' dynamics.
        ssm_lr: learning rate of the dynamics, at most 1e-3.
        weight_decay: of everything but the dynamics.
        betas: AdamW's.
        warmup_steps: of a linear rise of the learning rates.
        decay_steps: the step at which a half cosine brings the learning rates to 0; None keeps them.
        cuda_graph: on a GPU, capture the losses and their gradients once and replay them, where batches have one shape
            and gradients are not accumulated; else, and elsewhere, it changes nothing.
        compile: have torch.compile fuse the model's small operations; it takes a minute or so at the start.

    Raises:
        ValueError: ssm_lr is not in (0, 1e-3].
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
        warmup_steps: int = 0,
        decay_steps: int | None = None,
        cuda_graph: bool = True,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.model: Any = model
        self.loss_weights, self.loss_warmup_steps = loss_weights or {}, loss_warmup_steps or {}
        self.lr, self.ssm_lr, self.weight_decay, self.betas = lr, ssm_lr, weight_decay, betas
        self.warmup_steps, self.decay_steps = warmup_steps, decay_steps
        self.cuda_graph, self.compile_losses = cuda_graph, compile
        self.graph: LossGraph | None = None
        parameter_groups(model, lr, ssm_lr, weight_decay)  # refuses a wrong rate now, not after the data is read

    def configure_optimizers(self) -> Any:
        """AdamW over two parameter groups, and the schedule."""
        groups = parameter_groups(self.model, self.lr, self.ssm_lr, self.weight_decay)
        on_gpu = next(self.parameters()).is_cuda and "mixed" not in str(self.trainer.precision)  # it would refuse to clip
        optimizer = torch.optim.AdamW(groups, betas=self.betas, fused=on_gpu or None)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(self.warmup_steps, self.decay_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_fit_start(self) -> None:
        losses: Any = self.model.training_losses
        self._losses = torch.compile(losses, dynamic=False) if self.compile_losses else losses

    def total_loss(self, losses: dict[str, Tensor], step: int | None = None) -> Tensor:
        """The weighted sum, with the weights of that training step, or their final ones.

        Raises:
            ValueError: a weight or a warm-up is given for a loss that the model does not have.
            DivergenceError: a loss is not a finite number.
        """
        for argument, named in (("loss_weights", self.loss_weights), ("loss_warmup_steps", self.loss_warmup_steps)):
            unknown = set(named) - set(losses)
            if unknown:
                raise ValueError(f"{argument} names {sorted(unknown)}, but the model has the losses {sorted(losses)}.")
        total = torch.stack([self._weight(name, step) * loss for name, loss in losses.items()]).sum()
        if not torch.isfinite(total):
            culprit = next((name for name, loss in losses.items() if not torch.isfinite(loss)), "sum")
            raise DivergenceError(
                f"the {culprit} loss is {float(losses.get(culprit, total))} at step {self.global_step}. The last checkpoint "
                "is from before; try a smaller lr or ssm_lr, more warmup_steps, or trainer.gradient_clip_val 1.0."
            )
        return total

    def _weight(self, name: str, step: int | None) -> float:
        warmup = self.loss_warmup_steps.get(name, 0)
        rise = 1.0 if step is None or step >= warmup else step / warmup
        return rise * self.loss_weights.get(name, 1.0)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """One batch of clips (B, 1, T)."""
        losses = self._training_losses(batch)
        total = self.total_loss(losses, self.global_step)
        self.log_dict({f"train/{name}": loss.detach().clone() for name, loss in losses.items()})
        self.log("train/loss", total.detach())
        return total

    def _training_losses(self, batch: Tensor) -> dict[str, Tensor]:
        if self.graph is None and self.cuda_graph and batch.is_cuda and self.trainer.accumulate_grad_batches == 1:
            self.graph = LossGraph(self.model, self._losses, batch)
        if self.graph is not None and self.graph.shape == batch.shape:
            return self.graph(batch)
        return self._losses(batch)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """The losses and the reconstruction's SI-SDR, averaged over the validation clips."""
        losses = self.model.training_losses(batch)
        estimate = self.model(batch)
        audible = batch.square().mean((1, 2)) > 0  # SI-SDR has no value on silence
        if audible.any():
            score = si_sdr(estimate[audible], batch[audible]).mean()
            self.log("valid/si_sdr_db", score, batch_size=int(audible.sum()), on_epoch=True)
        values = {f"valid/{name}": loss for name, loss in losses.items()}
        self.log_dict({**values, "valid/loss": self.total_loss(losses)}, batch_size=batch.shape[0], on_epoch=True)
        if hasattr(self.model, "active_dimensions"):
            self.log("valid/active_dimensions", float(self.model.active_dimensions(batch)), batch_size=batch.shape[0])
        if batch_idx == 0:
            self._show(batch[0], estimate[0])

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
