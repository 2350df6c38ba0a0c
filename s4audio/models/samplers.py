"""Solvers of dx/dt = velocity(x, t) from the first of some times to the last; those of `euler` and `heun` may fall, too.

They call a network many times with arguments of one shape: on a GPU, `replayed` does that in a launch each.
"""

import functools
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from numbers import Integral

import torch
from torch import Tensor

Velocity = Callable[[Tensor, float], Tensor]
Solver = Callable[[Velocity, Tensor, Sequence[float]], Tensor]
LOG_ODDS = (-5.0, 6.0)  # of times: below, all is noise but for what is 43 dB above it; beyond, it is 52 dB down


def euler(velocity: Velocity, x: Tensor, times: Sequence[float]) -> Tensor:
    """x at the last time; one velocity a step, an error that falls with the step."""
    for t, after in pairwise(times):
        x = x + (after - t) * velocity(x, t)
    return x


def heun(velocity: Velocity, x: Tensor, times: Sequence[float]) -> Tensor:
    """x at the last time; two velocities a step, an error that falls with the square of the step.

    Source: Karras et al. 2022, "Elucidating the design space of diffusion-based generative models", algorithm 1.
    """
    for t, after in pairwise(times):
        v = velocity(x, t)
        x = x + 0.5 * (after - t) * (v + velocity(x + (after - t) * v, after))
    return x


def multistep(velocity: Velocity, x: Tensor, times: Sequence[float]) -> Tensor:
    """x at the last time of a flow from noise to data; one velocity a step, an error that falls with the square of the step.

    A velocity at x = (1 - t) noise + t data says where the data is, x + (1 - t) velocity. That changes slowly where the
    velocity itself does not, as of what is faint, or silent; a step goes to where the last two of them lead.

    Raises:
        ValueError: the times fall.

    Source: Lu et al. 2022, "DPM-Solver++: fast solver for guided sampling of diffusion probabilistic models", its 2M.
    """
    before, span_before = None, math.inf
    for t, after in pairwise(times):
        if after < t:
            raise ValueError(f"the times fall from {t} to {after}; multistep only goes on to data, and heun goes back too.")
        if after == t:  # as close to data as numbers are
            continue
        data = x + (1 - t) * velocity(x, t)
        span = _log_odds(after) - _log_odds(t)  # in which the data is taken to change evenly
        ahead = data
        if before is not None and span < math.inf:
            ahead = data + 0.5 * span / span_before * (data - before)
        kept = (1 - after) / (1 - t)  # of x; the rest of it is data
        x = kept * x + (after - kept * t) * ahead
        before, span_before = data, span
    return x


def _log_odds(t: float) -> float:
    """log(t / (1 - t)), with both ends."""
    return -math.inf if t == 0 else math.inf if t == 1 else math.log(t / (1 - t))


def flow_times(num_steps: int, start: float = 0.0) -> list[float]:
    """num_steps + 1 times from `start` to 1, and between them even in log(t / (1 - t)), half the log of signal over noise.

    What all of a clip has in common, its loudness say, takes shape while nearly all is noise, and what is faint when nearly
    none is. Of 16 steps of `multistep`, even ones lose 8 dB of what is 30 dB above the noise, and 17 of what is 40 below;
    these 0.3 and 0.7.

    Raises:
        ValueError: num_steps is below 1.

    Source: Lu et al. 2022, "DPM-Solver++"; LOG_ODDS are ours, by the closed form for normal data, which the tests have.

    Example:
        >>> [round(t, 2) for t in flow_times(4)]
        [0.0, 0.04, 0.62, 0.98, 1.0]
    """
    if not isinstance(num_steps, Integral) or num_steps < 1:
        raise ValueError(f"num_steps is {num_steps!r}; wanted a whole number, at least 1, usually 4 to 50.")
    lowest, highest = LOG_ODDS
    lowest = min(max(lowest, _log_odds(start)), highest)
    width = (highest - lowest) / max(1, num_steps - 1)
    between = [1 / (1 + math.exp(-(lowest + (step + 0.5) * width))) for step in range(num_steps - 1)]
    return [start, *(max(start, t) for t in between), 1.0]


def replayed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same function of tensors (and Nones) of shapes that stay; on a GPU it is captured as a CUDA graph, and replayed.

    Whatever else it depends on must stay where it is in memory, and it must not read numbers back from the GPU.
    """
    captured: list[tuple[list[Tensor | None], torch.cuda.CUDAGraph, Tensor]] = []

    def call(*arguments: Tensor | None) -> Tensor:
        device = next(argument.device for argument in arguments if argument is not None)
        if device.type != "cuda":
            return function(*arguments)
        with torch.cuda.device(device):
            if not captured:
                captured.append(_captured(function, arguments))
            inputs, graph, output = captured[0]
            for ours, given in zip(inputs, arguments, strict=True):
                if ours is not None and given is not None:
                    ours.copy_(given)
            graph.replay()
            return output.clone()

    return call


def _captured(
    function: Callable[..., Tensor], arguments: Sequence[Tensor | None]
) -> tuple[list[Tensor | None], torch.cuda.CUDAGraph, Tensor]:
    """Inputs, graph and output."""
    inputs = [None if argument is None else argument.clone() for argument in arguments]
    function(*inputs)  # compiles kernels and makes what frozen layers keep
    graph = torch.cuda.CUDAGraph()
    stream = _capture_stream(torch.cuda.current_device())
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):  # a loader may pin memory meanwhile
        output = function(*inputs)
    return inputs, graph, output


@functools.cache
def _capture_stream(device: int) -> torch.cuda.Stream:
    """Torch's own is of the first device that it ever captured on, and cuBLAS keeps a workspace for each stream."""
    return torch.cuda.Stream(device)
