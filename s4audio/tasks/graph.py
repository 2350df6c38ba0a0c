"""The losses of a training step and their gradients as one CUDA graph: a launch in place of thousands."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Losses = Callable[..., dict[str, Tensor]]
WARM_UP = 3  # runs before the capture: kernels are compiled and libraries choose theirs


class LossGraph:
    """The losses of a model for batches of one shape, and the gradient of their weighted sum, captured from a first batch.

    Capturing runs the model a few times; what it counts (buffers) and draws (random numbers) is put back. Gradients lie in
    the same memory every time: the next call overwrites them, and they cannot be added up over batches.

    Args:
        model: whose parameters get the gradients.
        losses: parts of a batch -> dict of named losses; must not read numbers back from the GPU, nor draw any on the CPU.
        batch: the parts of one, on the GPU.

    Raises:
        RuntimeError: the model does what a graph cannot hold; the message says how to do without.
    """

    def __init__(self, model: nn.Module, losses: Losses, batch: tuple[Tensor, ...]) -> None:
        self.batch = [part.clone() for part in batch]
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.graph = torch.cuda.CUDAGraph()
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        random_state = torch.cuda.get_rng_state(batch[0].device)
        # Graphs cannot hold autocast's cache of weights, which lives from step to step.
        autocast = torch.autocast(
            "cuda", torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda"), cache_enabled=False
        )
        try:
            with autocast:
                self._capture(losses)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if isinstance(error.__context__, torch.OutOfMemoryError):  # which ends a capture, and that is another error
                raise error.__context__ from None
            raise RuntimeError(
                f"the training step cannot be captured as a CUDA graph: {str(error).splitlines()[0]} "
                "Train with --model.init_args.cuda_graph false."
            ) from error
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(before[name])
        torch.cuda.set_rng_state(random_state, batch[0].device)

    def _capture(self, losses: Losses) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side), warnings.catch_warnings():
            # Of nodes that add up gradients, made on another stream and kept by DistributedDataParallel: none run here.
            warnings.filterwarnings("ignore", "The AccumulateGrad node's stream does not match")
            self.names = list(losses(*self.batch))
            self.given = [1.0] * len(self.names)
            self.weights = torch.ones(len(self.names), device=self.batch[0].device)
            for _ in range(WARM_UP):
                self._run(losses)
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):  # a loader's thread may pin memory meanwhile
            self.values, self.total, self.gradients = self._run(losses)

    def _run(self, losses: Losses) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
        values = torch.stack([loss.float() for loss in losses(*self.batch).values()])
        total = (self.weights * values).sum()
        with torch.autocast("cuda", enabled=False):  # as a backward pass outside of the graph
            gradients = torch.autograd.grad(total, self.parameters, allow_unused=True)
        return values.detach(), total.detach(), mean_over_devices(list(map(laid_out, gradients, self.parameters)))

    def takes(self, batch: tuple[Tensor, ...]) -> bool:
        """Whether a batch has the captured shapes."""
        return [part.shape for part in batch] == [part.shape for part in self.batch]

    def __call__(
        self, batch: tuple[Tensor, ...], weights: Callable[[list[str]], list[float]]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of a batch's losses, whose `backward` gives the parameters their gradients; and the losses."""
        for part, ours in zip(batch, self.batch, strict=True):
            ours.copy_(part, non_blocking=True)
        given = weights(self.names)
        if given != self.given:
            self.weights.copy_(torch.tensor(given), non_blocking=True)
            self.given = given
        self.graph.replay()
        losses = dict(zip(self.names, self.values.clone(), strict=True))
        return with_gradients(self.total.clone(), self.parameters, self.gradients), losses


def with_gradients(total: Tensor, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]) -> Tensor:
    """The total, whose `backward` adds gradients that are there already to those of the parameters."""
    given: Any = _WithGradients.apply(parameters[0], total, parameters, gradients)
    return given


def laid_out(gradient: Tensor | None, parameter: Tensor) -> Tensor | None:
    """The gradient as it would be accumulated: in memory as the parameter is, which fused optimizers take for granted."""
    if gradient is None or gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)


def mean_over_devices(gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Of the devices that train together, by one exchange of all gradients in a row; as they are where one trains alone.

    DistributedDataParallel's own exchange starts from hooks of the backward pass, which a graph and `with_gradients` lack.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return tuple(gradients)
    found = [gradient for gradient in gradients if gradient is not None]
    # In the order of the memory, whatever the strides are: those of a parameter are the same on every device.
    row = torch.cat([gradient.as_strided((gradient.numel(),), (1,)) for gradient in found])
    torch.distributed.all_reduce(row)
    row /= torch.distributed.get_world_size()
    parts = iter(row.split([gradient.numel() for gradient in found]))
    return tuple(g if g is None else next(parts).as_strided(g.shape, g.stride()) for g in gradients)


class _WithGradients(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, total: Tensor, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]
    ) -> Tensor:
        ctx.parameters, ctx.gradients = parameters, gradients
        return total.view_as(total)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, ...]:
        for parameter, ours in zip(ctx.parameters, ctx.gradients, strict=True):
            if ours is not None:
                parameter.grad = ours if parameter.grad is None else parameter.grad + ours
        return None, None, None, None
