"""What every training has in common: AdamW with a group for the dynamics, a schedule, CUDA graphs, and finite numbers."""

from abc import abstractmethod
from typing import Any

import lightning
import torch
from torch import Tensor, nn

from s4audio.tasks.graph import Losses, LossGraph
from s4audio.tasks.optim import SCHEDULES, parameter_groups


class DivergenceError(RuntimeError):
    """A loss stopped being a number."""


class TrainingTask(lightning.LightningModule):
    """Trains a model with AdamW; a task says by which losses.

    Args:
        model: what is trained, saved and scored.
        lr: learning rate of everything but the state spaces' dynamics.
        ssm_lr: learning rate of the dynamics, at most 1e-3.
        weight_decay: of everything but the dynamics.
        betas: AdamW's.
        schedule: of the learning rates, one of SCHEDULES.
        warmup_steps: of a rise of the learning rates.
        decay_steps: the step at which they have come down again; None keeps them.
        cuda_graph: on a GPU, capture the losses and their gradients once and replay them, where batches have one shape
            and gradients are neither accumulated nor scaled; else, and elsewhere, it changes nothing.
        compile: have torch.compile fuse the model's small operations; it takes a minute or so at the start.

    Raises:
        ValueError: ssm_lr is not in (0, 1e-3], or a schedule that does not exist or does not take these steps.
    """

    best_score = "valid/loss"  # which says what model is the best
    higher_is_better = False

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        ssm_lr: float,
        weight_decay: float,
        betas: tuple[float, float],
        schedule: str,
        warmup_steps: int,
        decay_steps: int | None,
        cuda_graph: bool,
        compile: bool,
    ) -> None:
        super().__init__()
        # Refuses wrong rates now, not after the data is read.
        parameter_groups(model, lr, ssm_lr, weight_decay)
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule is {schedule!r}; choose one of {', '.join(SCHEDULES)}.")
        self.rates = SCHEDULES[schedule](warmup_steps, decay_steps)
        self.model: Any = model
        self.lr, self.ssm_lr, self.weight_decay, self.betas = lr, ssm_lr, weight_decay, betas
        self.cuda_graph, self.compile_losses = cuda_graph, compile
        self.graph: LossGraph | None = None
        self.unchecked: tuple[Any, ...] | None = None  # the last step's loss, on its way to the CPU

    @abstractmethod
    def losses(self, *batch: Tensor) -> dict[str, Tensor]:
        """Named losses and scores of a batch, for the gradient."""

    @abstractmethod
    def weights(self, names: list[str], step: int | None) -> list[float]:
        """Of the named losses in a training step's total; of scores that are no losses, 0. None is the last step."""

    @property
    def scored_model(self) -> Any:
        """The model that is scored and saved."""
        return self.model

    def configure_optimizers(self) -> Any:
        """AdamW over two parameter groups, and the schedule."""
        groups = parameter_groups(self.model, self.lr, self.ssm_lr, self.weight_decay)
        scaled = self.trainer.precision == "16-mixed"  # a fused optimizer unscales gradients itself, after they are clipped
        fused = next(self.parameters()).is_cuda and not scaled
        optimizer = torch.optim.AdamW(groups, betas=self.betas, fused=fused or None)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.rates)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """As the trainer's own, which refuses a fused optimizer in mixed precision, also where no gradient is scaled."""
        if gradient_clip_val and gradient_clip_algorithm == "value":
            nn.utils.clip_grad_value_(self.model.parameters(), gradient_clip_val)
        elif gradient_clip_val:
            nn.utils.clip_grad_norm_(self.model.parameters(), gradient_clip_val)

    def on_fit_start(self) -> None:
        losses: Any = self.losses
        self._losses: Losses = torch.compile(losses, dynamic=False) if self.compile_losses else losses
        self.graph = self.unchecked = None

    def on_fit_end(self) -> None:
        self.graph = None  # its memory, and that of weights which may move

    def total_and_losses(self, *batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The total that a step descends, and the losses in it; from a CUDA graph where there is one."""
        step = self.global_step
        trainer = self.trainer
        safe = trainer.accumulate_grad_batches == 1 and trainer.world_size == 1 and trainer.precision != "16-mixed"
        if self.graph is None and self.cuda_graph and batch[0].is_cuda and safe:
            self.graph = LossGraph(self.model, self._losses, batch)
        if safe and self.graph is not None and self.graph.takes(batch):
            return self.graph(batch, lambda names: self.weights(names, step))
        losses = self._losses(*batch)
        return self.total_loss(losses, step), losses

    def total_loss(self, losses: dict[str, Tensor], step: int | None = None) -> Tensor:
        """The weighted sum, with the weights of that training step, or their final ones."""
        weights = self.weights(list(losses), step)
        return torch.stack([weight * loss for weight, loss in zip(weights, losses.values(), strict=True)]).sum()

    def mean_over_devices(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """The losses of the whole step where several devices share its batch; each device gets the same."""
        if self.trainer.world_size == 1:
            return losses
        stacked = torch.stack([loss.detach().float() for loss in losses.values()])
        means: Any = self.trainer.strategy.reduce(stacked, reduce_op="mean")
        return dict(zip(losses, means.unbind(), strict=True))

    def check_finite(self, total: Tensor, losses: dict[str, Tensor]) -> None:
        """Refuse to go on with a loss that is no number; on a GPU at the next step, since to look now would be to wait.

        Raises:
            DivergenceError: names the loss and the step.
        """
        if not total.is_cuda:
            self._refuse(bool(torch.isfinite(total)), total, losses, self.global_step)
            return
        if self.unchecked is not None:
            finite, copied, *told = self.unchecked
            copied.synchronize()
            self._refuse(bool(finite), *told)
        finite = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(torch.isfinite(total), non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        self.unchecked = finite, copied, total.detach(), losses, self.global_step

    def _refuse(self, finite: bool, total: Tensor, losses: dict[str, Tensor], step: int) -> None:
        if not finite:
            culprit = next((name for name, loss in losses.items() if not torch.isfinite(loss)), "sum")
            raise DivergenceError(
                f"the {culprit} loss is {float(losses.get(culprit, total))} at step {step}. The last checkpoint "
                "is from before; try a smaller lr or ssm_lr, more warmup_steps, or trainer.gradient_clip_val 1.0."
            )
