"""What every training has in common: AdamW with a group for the dynamics, a schedule, CUDA graphs, batches that do not fit
into memory, and finite numbers."""

import copy
import math
from abc import abstractmethod
from typing import Any, NamedTuple

import lightning
import torch
from torch import Tensor, nn

from s4audio.tasks.graph import Losses, LossGraph, mean_over_devices, with_gradients
from s4audio.tasks.optim import SCHEDULES, parameter_groups

MOST_SKIPPED = 10  # updates in a row that are left out before a training with on_nan "skip" stops all the same
ADVICE = (
    "Try a smaller lr or ssm_lr, more warmup_steps, or trainer.gradient_clip_val 1.0; on_nan skip leaves out such updates."
)

Batch = tuple[Tensor, ...]
Seen = tuple[Batch, Tensor, dict[str, Tensor]]  # a batch, its total, its losses


class DivergenceError(RuntimeError):
    """A loss, a gradient or a weight stopped being a number; `batches` are those of the step."""

    def __init__(self, message: str, batches: list[Batch] | None = None) -> None:
        super().__init__(message)
        self.batches = batches or []


class Step(NamedTuple):
    """What says whether a training step went well."""

    number: Tensor  # the sum of its losses and the norm of its gradient: finite if all of it is
    parameters: list[nn.Parameter]  # with a gradient
    norms: Tensor  # (parameters,) of their gradients
    seen: list[Seen]
    step: int


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
        on_nan: what a loss or a gradient that is not finite does. `stop` ends the training; on a GPU one step later, since
            to look at once would be to wait. `skip` looks at once, and leaves the update out: weights, buffers, AdamW's
            moments and the average of the weights stay as they were; the step counts, and the schedule and the data move on.
            More than ten such steps in a row stop the training too.
        ema_decay: score and save an exponential moving average of the weights, which keeps this share of itself at each
            step; None does without.

    A batch for which a GPU has no memory is divided into halves, quarters and so on, from then on and without a CUDA graph:
    their gradients add up to that of the mean over the batch. That is the same step for losses that are means over the
    clips, which the STFT's spectral convergence and a VAE's free nats are not quite; dropout and other noise are drawn anew
    for each part, and what a model counts of its batches, it counts of the parts.

    Raises:
        ValueError: ssm_lr is not in (0, 1e-3], ema_decay not in [0, 1), a schedule that does not exist or does not take
            these steps, or on_nan.
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
        on_nan: str,
        ema_decay: float | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= (ema_decay or 0.0) < 1:
            raise ValueError(f"ema_decay is {ema_decay}; wanted at least 0 and below 1.")
        if on_nan not in ("stop", "skip"):
            raise ValueError(f"on_nan is {on_nan!r}; choose stop or skip.")
        # Refuses wrong rates now, not after the data is read.
        parameter_groups(model, lr, ssm_lr, weight_decay)
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule is {schedule!r}; choose one of {', '.join(SCHEDULES)}.")
        self.rates = SCHEDULES[schedule](warmup_steps, decay_steps)
        self.model: Any = model
        self.ema_decay = ema_decay
        self.average: Any = copy.deepcopy(model).requires_grad_(False) if ema_decay else None
        self.lr, self.ssm_lr, self.weight_decay, self.betas = lr, ssm_lr, weight_decay, betas
        self.cuda_graph, self.compile_losses = cuda_graph, compile
        self.graph: LossGraph | None = None
        self.parts = 1  # into which a batch is divided
        self.on_nan, self.skipped, self.skipped_in_a_row = on_nan, 0, 0
        self.why_skipped = ""
        self.news: list[str] = []  # sentences for whoever watches, until they are shown
        self.seen: list[Seen] = []  # since the last step
        self.buffers_before: list[Tensor] = []  # of that step, such as what the model knows of its latent, to skip it
        self.unchecked: tuple[Step, Any] | None = None  # the last step, with its number on its way to the CPU

    @abstractmethod
    def losses(self, *batch: Tensor) -> dict[str, Tensor]:
        """Named losses and scores of a batch, for the gradient."""

    @abstractmethod
    def weights(self, names: list[str], step: int | None) -> list[float]:
        """Of the named losses in a training step's total; of scores that are no losses, 0. None is the last step."""

    @property
    def scored_model(self) -> Any:
        """The model that is scored and saved: the average of the weights, if there is one."""
        return self.average or self.model

    @property
    def networks(self) -> dict[str, nn.Module]:
        """What is trained, by name; the gradient of each is clipped by itself."""
        return {"model": self.model}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Of the optimizer: the parameters of all networks, with their learning rates and weight decay."""
        return parameter_groups(self.model, self.lr, self.ssm_lr, self.weight_decay)

    def configure_optimizers(self) -> Any:
        """AdamW over the parameter groups, and the schedule."""
        groups = self.parameter_groups()
        scaled = self.trainer.precision == "16-mixed"  # a fused optimizer unscales gradients itself, after they are clipped
        fused = next(self.parameters()).is_cuda and not scaled
        optimizer = torch.optim.AdamW(groups, betas=self.betas, fused=fused or None)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.rates)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """A step, and the average of the weights after it; before any callback saves them."""
        skipped = self.skipped
        super().optimizer_step(*args, **kwargs)
        # Not torch's AveragedModel, which waits for the GPU at every step.
        if self.average and self.ema_decay and self.skipped == skipped:
            share = max(1 - self.ema_decay, 9 / (10 + self.global_step))  # the first weights are soon forgotten
            with torch.no_grad():
                torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), share)
                for ours, theirs in zip(self.average.buffers(), self.model.buffers(), strict=True):
                    ours.copy_(theirs)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clips as the trainer's own would, which refuses a fused optimizer in mixed precision also where no gradient is
        scaled; and looks whether losses and gradients are numbers, by the norm that clipping needs.

        The norm before clipping is logged when the logger writes.

        Raises:
            DivergenceError: they are not, and the training is to stop.
        """
        trainer: Any = self.trainer
        every = trainer.log_every_n_steps
        logs = every and (self.global_step + 1) % every == 0
        parameters: list[nn.Parameter] = []
        norms: list[Tensor] = []  # of the gradient of each
        for name, network in self.networks.items():
            own = [parameter for parameter in network.parameters() if parameter.grad is not None]
            if not own:  # it has no part in this step
                continue
            own_norms = torch.stack(torch._foreach_norm([p.grad for p in own if p.grad is not None]))
            norm = torch.linalg.vector_norm(own_norms)
            if gradient_clip_val and gradient_clip_algorithm == "value":
                nn.utils.clip_grad_value_(own, gradient_clip_val)
            elif gradient_clip_val:
                nn.utils.clip_grads_with_norm_(own, gradient_clip_val, norm)
            if logs:
                self.log(f"gradient_norm/{name}", norm)
            parameters, norms = parameters + own, [*norms, own_norms]
        self._check(parameters, torch.cat(norms))

    def on_fit_start(self) -> None:
        losses: Any = self.losses
        self._losses: Losses = torch.compile(losses, dynamic=False) if self.compile_losses else losses
        self.graph = self.unchecked = None
        self.seen = []
        if self.trainer.world_size > 1 and self.trainer.precision != "16-mixed":  # `mean_over_devices` shares gradients
            parallel: Any = self.trainer.strategy.model
            parallel.require_backward_grad_sync = False

    def on_fit_end(self) -> None:
        self.graph = None  # its memory, and that of weights which may move

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["task"] = {name: getattr(self, name) for name in ("parts", "skipped", "skipped_in_a_row")}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for name, value in checkpoint.get("task", {}).items():
            setattr(self, name, value)

    def total_and_losses(self, *batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The total that a step descends, with its gradient, and the losses in it; divides a batch that does not fit.

        Raises:
            torch.OutOfMemoryError: a batch of one does not fit either.
        """
        if self.on_nan == "skip" and not self.seen:
            self.buffers_before = [buffer.clone() for network in self.networks.values() for buffer in network.buffers()]
        total, losses = self._total_and_losses(batch)
        losses = {name: loss.detach() for name, loss in losses.items()}
        self.seen.append((batch, total.detach(), losses))
        return total, losses

    def _total_and_losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        trainer = self.trainer
        if trainer.precision == "16-mixed":  # whose gradients the trainer scales, and so shares, itself
            losses = self._losses(*batch)
            return self.total_loss(losses, self.global_step), losses
        while True:
            try:
                if self._captured(batch):
                    graph: Any = self.graph
                    return graph(batch, lambda names: self.weights(names, self.global_step))
                return self._in_parts(batch)
            except torch.OutOfMemoryError:
                if self.parts >= len(batch[0]) or trainer.world_size > 1:  # the other devices may have had enough
                    raise
            self.parts, self.graph = 2 * self.parts, None  # out of the exception, which holds on to the memory
            torch.cuda.empty_cache()

    def _captured(self, batch: Batch) -> bool:
        """Whether there is a CUDA graph for the batch; captures it from the first."""
        wanted = self.cuda_graph and batch[0].is_cuda and self.parts == self.trainer.accumulate_grad_batches == 1
        if wanted and self.graph is None:
            self.graph = LossGraph(nn.ModuleList(self.networks.values()), self._losses, batch)
        return wanted and self.graph is not None and self.graph.takes(batch)

    def _in_parts(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean of total and losses over the parts of a batch, with its gradient."""
        accumulated = self.trainer.accumulate_grad_batches
        parameters = [p for network in self.networks.values() for p in network.parameters() if p.requires_grad]
        before = [parameter.grad if accumulated > 1 else None for parameter in parameters]
        self.zero_grad()
        total, means = torch.zeros((), device=batch[0].device), dict[str, Tensor]()
        try:
            for part in zip(*(v.chunk(self.parts) for v in batch), strict=True):
                share = len(part[0]) / len(batch[0])
                losses = self._losses(*part)
                loss = share * self.total_loss(losses, self.global_step)
                with torch.autocast(loss.device.type, enabled=False):  # as a backward pass outside of a step
                    (loss / accumulated).backward()
                total = total + loss.detach()
                means = {name: share * value.detach() + means.get(name, 0) for name, value in losses.items()}
            gradients = mean_over_devices([parameter.grad for parameter in parameters])
        finally:
            for parameter, gradient in zip(parameters, before, strict=True):
                parameter.grad = gradient
        return with_gradients(total, parameters, gradients), means

    def total_loss(self, losses: dict[str, Tensor], step: int | None = None) -> Tensor:
        """The weighted sum, with the weights of that training step, or their final ones."""
        weights = self.weights(list(losses), step)
        return torch.stack([weight * loss for weight, loss in zip(weights, losses.values(), strict=True)]).sum()

    def mean_over_devices(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """The losses of the whole step where several devices share its batch; each device gets the same."""
        losses = {name: loss.detach() for name, loss in losses.items()}
        if self.trainer.world_size == 1:
            return losses
        stacked = torch.stack([loss.float() for loss in losses.values()])
        means: Any = self.trainer.strategy.reduce(stacked, reduce_op="mean")
        return dict(zip(losses, means.unbind(), strict=True))

    def check_last_step(self) -> None:
        """Wait for the last step on a GPU, if nobody has looked at it yet.

        Raises:
            DivergenceError: a loss or a gradient was not finite.
        """
        if self.unchecked is not None:
            (step, copied), self.unchecked = self.unchecked, None
            copied.synchronize()
            if not math.isfinite(step.number):
                raise _divergence(step, self)

    def _check(self, parameters: list[nn.Parameter], norms: Tensor) -> None:
        """Of the step that is about to be made; or, on a GPU, of the one before."""
        seen, self.seen = self.seen, []
        numbers = [total for _, total, _ in seen]
        if self.trainer.precision != "16-mixed":  # whose scaler tries how far it can go, and leaves out such steps itself
            numbers.append(torch.linalg.vector_norm(norms))
        number = torch.stack(numbers).sum()
        if self.trainer.world_size > 1:  # all devices leave out an update, or none
            reduced: Any = self.trainer.strategy.reduce(number, reduce_op="sum")
            number = reduced
        step = Step(number, parameters, norms, seen, self.global_step)
        if number.is_cuda and self.on_nan == "stop":
            self.check_last_step()
            number = torch.empty((), dtype=number.dtype, pin_memory=True).copy_(number, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
            self.unchecked = step._replace(number=number), copied
        elif math.isfinite(number):
            self.skipped_in_a_row = 0
        else:
            self._skip(_divergence(step, self))

    def _skip(self, error: DivergenceError) -> None:
        """Leave the update out."""
        if self.on_nan == "stop":
            raise error
        self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
        self.why_skipped = str(error).split(". ")[0]
        if self.skipped_in_a_row > MOST_SKIPPED:
            raise DivergenceError(
                f"{self.skipped_in_a_row} steps in a row were left out; of the last, {error}", error.batches
            )
        self.zero_grad()  # AdamW leaves alone what has no gradient
        buffers = [buffer for network in self.networks.values() for buffer in network.buffers()]
        for buffer, before in zip(buffers, self.buffers_before, strict=True):
            buffer.copy_(before)


def _divergence(step: Step, task: TrainingTask) -> DivergenceError:
    """Says what is not finite: the first such loss, or the gradient that is nearest to the loss."""
    batches = [batch for batch, _, _ in step.seen]
    for batch, total, losses in step.seen:
        if not torch.isfinite(total):
            name, loss = next(((n, v) for n, v in losses.items() if not torch.isfinite(v)), ("sum", total))
            what, batches = f"the {name} loss is {float(loss)}", [batch]
            break
    else:
        names = {id(parameter): name.removeprefix("model.") for name, parameter in task.named_parameters()}
        what = f"the norm of the gradient is {float(torch.linalg.vector_norm(step.norms))}"
        bad = torch.isfinite(step.norms).logical_not().nonzero().flatten().tolist()
        if bad:  # a backward pass comes from the end: what is before it may only have caught it
            others = f" (and of {len(bad) - 1} before it)" if len(bad) > 1 else ""
            what = f"the gradient of {names[id(step.parameters[bad[-1]])]}{others} is {float(step.norms[bad[-1]])}"
    given = "" if all(torch.isfinite(part).all() for batch in batches for part in batch) else ", and so is its batch"
    return DivergenceError(f"{what} at step {step.step}{given}. {ADVICE}", batches)
