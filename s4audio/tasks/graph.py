"""The losses of a training step and their gradients as CUDA graphs: two launches in place of thousands."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Losses = Callable[..., dict[str, Tensor]]


class LossGraph:
    """The losses of a model for batches of one shape, captured from a first one.

    Capturing runs the model a few times; what it counts (buffers) and draws (random numbers) is put back. The losses lie in
    the same memory every time: the next call overwrites them. Gradients too, so that they cannot be added up over batches.

    Args:
        model: whose parameters get the gradients.
        losses: parts of a batch -> dict of named losses; must not read numbers back from the GPU, nor draw any on the CPU.
        batch: the parts of one, on the GPU.

    Raises:
        RuntimeError: the model does what a graph cannot hold; the message says how to do without.
    """

    def __init__(self, model: nn.Module, losses: Losses, batch: tuple[Tensor, ...]) -> None:
        self.shapes = [part.shape for part in batch]
        device = batch[0].device
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        random_state = torch.cuda.get_rng_state(device)
        # Graphs cannot hold autocast's cache of weights, which lives from step to step.
        autocast = torch.autocast(
            "cuda", torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda"), cache_enabled=False
        )
        try:
            with autocast:
                self.losses: Any = torch.cuda.make_graphed_callables(
                    _Losses(model, losses), tuple(part.clone() for part in batch), allow_unused_input=True
                )
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RuntimeError(
                f"the training step cannot be captured as a CUDA graph: {str(error).splitlines()[0]} "
                "Train with --model.init_args.cuda_graph false."
            ) from error
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(before[name])
        torch.cuda.set_rng_state(random_state, device)

    def __call__(self, *batch: Tensor) -> dict[str, Tensor]:
        """The losses of a batch of those shapes."""
        return self.losses(*batch)


class _Losses(nn.Module):
    """The losses as a module, which is what gives a graph its parameters."""

    def __init__(self, model: nn.Module, losses: Losses) -> None:
        super().__init__()
        self.model, self.losses = model, losses

    def forward(self, *batch: Tensor) -> dict[str, Tensor]:
        return self.losses(*batch)
