"""Generation one sample at a time: a frozen SaShiMi as a short list of tensor operations on memory that stays in its place.

`step_of` turns layers into a function of one sample, (B, C) -> (B, C), whose state lies in buffers that it overwrites; no
number is read back and nothing is kept in Python, so that on a GPU a whole frame of samples is one CUDA graph. Each function
is the recurrence of the layer that it is made from, whose `stream` and `forward` a test holds it against.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from s4audio.layers import S4, S4D, Chain, ChannelNorm, Pooled, Residual
from s4audio.layers.blocks import EPSILON, PooledState
from s4audio.layers.s4 import S4State
from s4audio.ssm.dplr import real_vector

Step = Callable[[Tensor, int], Tensor]  # a sample (B, C) and its number since the start, of which frames are told
FEW_CLIPS = 16  # at most, on a CPU


class Stepper:
    """Draws the codes of a SaShiMi from uniform numbers, one sample after the other.

    Args:
        model: whose weights and systems are those of now.
        state: from where it goes on; it is copied.
        length: samples before that, of which the first frame may be incomplete.
        temperature: what the logits are divided by.
        top_p: as of `generate`.
    """

    def __init__(self, model: Any, state: Any, length: int, temperature: float, top_p: float) -> None:
        self.layers = step_of(model.layers, state.layers, length)
        self.table, self.condition = model.embedding.weight.detach(), state.condition[..., 0].clone()
        self.conditional = model.num_classes > 0
        self.previous = state.previous.clone()
        self.temperature, self.top_p = temperature, top_p
        self.period, self.length = math.prod(model.pools), length
        self.graph: torch.cuda.CUDAGraph | None = None

    @torch.inference_mode()
    def __call__(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Uniform numbers in [0, 1) -> the codes that they draw, and the log2 of the codes' probability; each (n, B)."""
        if not uniform.is_cuda:
            return self._run_on_one_thread(uniform)
        begun = min(-self.length % self.period, len(uniform))  # to the end of a frame that has begun
        end = begun + (len(uniform) - begun) // self.period * self.period
        made = [self._run(part) for part in (uniform[:begun],) if len(part)]
        made += [self._replay(frame) for frame in uniform[begun:end].split(self.period) if len(frame)]
        made += [self._run(part) for part in (uniform[end:],) if len(part)]
        codes, log2_p = zip(*made, strict=True)
        return torch.cat(codes), torch.cat(log2_p)

    def _run_on_one_thread(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Of operations as small as those of a few clips, threads would only wait for each other."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1 if uniform.shape[1] <= FEW_CLIPS else threads)
        try:
            return self._run(uniform)
        finally:
            torch.set_num_threads(threads)

    def _run(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        codes, log_p = zip(*(self._draw(u, t) for t, u in enumerate(uniform.unbind(), self.length)), strict=True)
        self.length += len(uniform)
        return torch.stack(codes), torch.stack(log_p) / math.log(2)

    def _draw(self, uniform: Tensor, t: int) -> tuple[Tensor, Tensor]:
        """The code (B,) of sample t, and the natural logarithm of its probability under the model."""
        u = F.embedding(self.previous, self.table)
        logits = self.layers(u + self.condition if self.conditional else u, t)
        log_p = logits.log_softmax(-1)
        p = log_p.exp() if self.temperature == 1 else (log_p / self.temperature).softmax(-1)
        if self.top_p < 1:
            p, order = p.sort(dim=-1, descending=True)
            p = p * (p.cumsum(-1) - p < self.top_p)
        cdf = p.cumsum(-1)
        threshold = uniform.unsqueeze(-1) * cdf[:, -1:]
        place = torch.searchsorted(cdf, threshold, right=True).clamp_max(cdf.shape[-1] - 1)  # (B, 1)
        code = order.gather(-1, place) if self.top_p < 1 else place
        self.previous.copy_(code[:, 0])
        return code[:, 0], log_p.gather(-1, code)[:, 0]

    def _replay(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """A whole frame of samples, as one launch."""
        if self.graph is None:
            return self._capture(uniform)
        self.uniform.copy_(uniform)
        self.graph.replay()
        self.length += self.period
        return self.codes.clone(), self.log2_p.clone()

    def _capture(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """The first frame runs as it is, on a stream of its own, which warms libraries up; then the next is captured."""
        self.uniform = uniform.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            made = self._run(self.uniform)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):  # which runs nothing
            self.codes, self.log2_p = self._run(self.uniform)
        self.length -= self.period
        return made


def step_of(module: nn.Module, state: Any, length: int) -> Step:
    """One sample through a module, going on from the state that `stream` left after `length` samples.

    Raises:
        TypeError: there is no step for this kind of module.
    """
    if isinstance(module, Chain):
        steps = [step_of(part, of, length) for part, of in zip(module.parts(), state, strict=True)]
        return _in_a_row([step for step in steps if step is not None])
    if isinstance(module, Residual):
        inner = step_of(module.inner, state, length)
        return lambda u, t: u + inner(u, t)
    if isinstance(module, Pooled):
        return _step_of_pooled(module, state, length)
    if isinstance(module, S4D):
        return _step_of_s4(module, state) if isinstance(module, S4) else _step_of_s4d(module, state)
    if isinstance(module, ChannelNorm):
        weight, bias = module.weight.detach(), module.bias.detach()
        return lambda u, t: F.layer_norm(u, u.shape[-1:], weight, bias, EPSILON)
    if isinstance(module, nn.Conv1d) and module.kernel_size == (1,):
        return _linear(module.weight[..., 0], module.bias)
    if isinstance(module, nn.GELU):
        return lambda u, t: F.gelu(u)
    if isinstance(module, nn.GLU):
        return lambda u, t: F.glu(u, -1)
    if isinstance(module, nn.Dropout | nn.Identity):
        return lambda u, t: u
    raise TypeError(f"{module} has no step of its own; write one in stepping.py.")


def _linear(weight: Tensor, bias: Tensor | None) -> Step:
    """u weight^T + bias; transposed once, which is what a product of one row would wait for."""
    matrix, offset = weight.detach().T.contiguous(), bias
    assert offset is not None
    return lambda u, t: torch.addmm(offset, u, matrix)


def _in_a_row(steps: list[Step]) -> Step:
    def step(u: Tensor, t: int) -> Tensor:
        for each in steps:
            u = each(u, t)
        return u

    return step


def _step_of_pooled(module: Pooled, state: PooledState, length: int) -> Step:
    factor, begun = module.factor, length % module.factor
    inner = step_of(module.inner, state.inner, length // factor)
    down, up = module.down.conv, module.up.conv
    # Frames as (B, factor, C), so that each sample lies in one piece.
    into = _linear(down.weight.mT.flatten(1), down.bias)
    out = _linear(up.weight.permute(2, 1, 0).flatten(0, 1), up.bias.repeat(factor))  # type: ignore[union-attr]
    frame = state.ready.new_zeros(state.ready.shape[0], factor, module.down.conv.in_channels)
    ready = frame.clone()
    frame[:, :begun] = state.down.kept.mT
    ready[:, begun:] = state.ready.mT
    flat, places, coming = frame.flatten(1), frame.unbind(1), ready.unbind(1)

    def step(u: Tensor, t: int) -> Tensor:
        k = t % factor
        places[k].copy_(u)
        u = u + coming[k]
        if k == factor - 1:
            ready.copy_(out(inner(into(flat, t), t // factor), t).view_as(ready))
        return u

    return step


def _step_of_s4d(module: S4D, state: S4State) -> Step:
    """x = A_bar x + B_bar u and y = 2 Re(C x) + D u, on z = x / B_bar: one product less."""
    system: Any = module.system()
    A, D = torch.exp(system.log_A_bar).to(state.x.dtype), module.D.detach()
    C = 2 * (system.C * system.B_bar).to(state.x.dtype)
    # A mode that nothing drives stays as it is: at nothing.
    z = torch.where(system.B_bar == 0, 0, state.x / system.B_bar).contiguous()
    parts = torch.view_as_real(z)  # (B, H, N/2, 2)
    re, readout = parts[..., 0], torch.view_as_real(C.conj().resolve_conj()).flatten(-2)  # (H, N)
    both = parts.flatten(-2)

    def step(u: Tensor, t: int) -> Tensor:
        z.mul_(A)
        re.add_(u.unsqueeze(-1))
        return torch.addcmul((both * readout).sum(-1), u, D)

    return step


def _step_of_s4(module: S4, state: S4State) -> Step:
    """The same on the dense real matrix, channel by channel: its eigenvectors would cost all digits of float32."""
    system: Any = module.system()
    dtype, D = module.D.dtype, module.D.detach()
    A, B = system.A_bar.mT.to(dtype).contiguous(), system.B_bar.to(dtype).unsqueeze(1)
    C = 2 * real_vector(system.C.conj()).to(dtype).unsqueeze(1)  # (H, 1, N)
    x = torch.cat([state.x.real, state.x.imag], dim=-1).transpose(0, 1).contiguous()  # (H, B, N)

    def step(u: Tensor, t: int) -> Tensor:
        x.copy_(torch.baddbmm(u.T.unsqueeze(-1) * B, x, A))
        return torch.addcmul((x * C).sum(-1).T, u, D)

    return step
