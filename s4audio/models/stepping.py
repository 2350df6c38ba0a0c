"""Generation one sample at a time: a frozen SaShiMi as a short list of tensor operations on memory that stays in its place.

`step_of` turns layers into a function of one sample, (B, C) -> (B, C), whose state lies in buffers that it overwrites; no
number is read back and nothing is kept in Python, so that on a GPU a whole frame of samples is one CUDA graph. Each function
is the recurrence of the layer that it is made from, whose `stream` and `forward` a test holds it against.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from s4audio.layers import S4, S4D, Chain, ChannelNorm, FeedForward, GatedBlock, Pooled, Residual
from s4audio.layers.blocks import EPSILON, PooledState
from s4audio.layers.s4 import S4State
from s4audio.ssm import ops
from s4audio.ssm.dplr import real_vector

if ops.fused is not None:  # Triton is installed
    from s4audio.layers import triton_step as fused

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
        *layers, norm, linear = model.layers
        self.layers = step_of(Chain(*layers), state.layers[:-2], length)
        self.logits = step_of(Chain(norm, linear), (None, None), length)
        table, condition = model.embedding.weight.detach(), state.condition[..., 0].clone()
        self.table, self.condition = table, condition
        self.following = table[state.previous] + condition  # (B, d_model), what goes in next
        self.temperature, self.top_p = temperature, top_p
        self.head: Any = None
        if _fuses(self.following) and top_p == 1:
            passed = torch.empty_like(self.following)
            weight = linear.weight.detach()[..., 0].T.contiguous()
            self.head = fused.Head(_affine(norm), weight, linear.bias.detach(), table, condition, passed)
        self.period, self.length = model.hop_length, length
        self.graph: torch.cuda.CUDAGraph | None = None

    @torch.inference_mode()
    def __call__(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Uniform numbers in [0, 1) -> the codes that they draw, and the log2 of the codes' probability; each (n, B)."""
        if not uniform.is_cuda:
            return self._run_on_one_thread(uniform)
        begun = uniform[: -self.length % self.period]  # of a frame of which there is a part already
        made = [self._run(begun)] if len(begun) else []
        for frame in uniform[len(begun) :].split(self.period):
            if len(frame):
                made.append(self._replay(frame) if len(frame) == self.period else self._run(frame))
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
        u = self.layers(self.following, t)
        if self.head is not None:
            return fused.draw(u, uniform, self.head, self.following, self.temperature, EPSILON)
        log_p = self.logits(u, t).log_softmax(-1)
        p = log_p.exp() if self.temperature == 1 else (log_p / self.temperature).softmax(-1)
        if self.top_p < 1:
            p, order = p.sort(dim=-1, descending=True)
            p = p * (p.cumsum(-1) - p < self.top_p)
        cdf = p.cumsum(-1)
        threshold = uniform.unsqueeze(-1) * cdf[:, -1:]
        place = torch.searchsorted(cdf, threshold, right=True).clamp_max(cdf.shape[-1] - 1)  # (B, 1)
        code = order.gather(-1, place) if self.top_p < 1 else place
        torch.add(self.table[code[:, 0]], self.condition, out=self.following)
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
        return _in_a_row(list(_steps_of(list(module), state, length)))
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


def _linear(weight: Tensor, bias: Any) -> Step:
    """u weight^T + bias; transposed once, which is what a product of one row would wait for."""
    matrix, offset = weight.detach().T.contiguous(), bias.detach()
    return lambda u, t: torch.addmm(offset, u, matrix)


def _steps_of(modules: list[Any], states: Sequence[Any], length: int) -> Iterator[Step]:
    """Those of modules in a row; pairs of blocks that follow each other are one, where they are fused."""
    place = 0
    while place < len(modules):
        end = place
        while end + 1 < len(modules) and _is_pair(modules[end], modules[end + 1], states[end]):
            end += 2
        if end > place:
            yield _step_of_pairs(modules[place:end], states[place:end])
        else:
            yield step_of(modules[place], states[place], length)
            end += 1
        place = end


def _fuses(u: Tensor) -> bool:
    """Whether samples like u (B, C) go through the fused kernels."""
    return ops.fuses(u) and fused.takes(u)


def _is_pair(block: nn.Module, following: nn.Module, state: Any) -> bool:
    """Whether the two are what fused kernels step as one."""
    if not (isinstance(block, GatedBlock) and isinstance(following, FeedForward)):
        return False
    layer: Any = block.inner[1]
    wide: Any = following.inner[1]
    return not isinstance(layer, S4) and wide.out_channels == 2 * layer.d_model and _fuses(state[1].x[..., 0].real)


def _step_of_pairs(modules: list[Any], states: Sequence[Any]) -> Step:
    blocks, others = modules[::2], modules[1::2]
    systems = [_frozen(block.inner[1], of[1]) for block, of in zip(blocks, states[::2], strict=True)]

    def stacked(tensors: Iterable[Tensor]) -> Tensor:
        return torch.stack([tensor.detach() for tensor in tensors]).contiguous()

    def parts(index: int) -> Tensor:
        """(P, …, 2, H, N/2): real and imaginary parts of one of the systems' tensors."""
        return stacked(torch.view_as_real(system[index].resolve_conj()).movedim(-1, -3) for system in systems)

    def linear(layers: list[Any]) -> tuple[Tensor, Tensor]:
        return stacked(layer.weight[..., 0].T for layer in layers), stacked(layer.bias for layer in layers)

    norms = [(block.inner[0], other.inner[0]) for block, other in zip(blocks, others, strict=True)]
    z = parts(2)
    pairs = fused.Pairs(
        stacked(torch.stack([_affine(norm) for norm in of]) for of in norms),
        parts(0), parts(1), stacked(block.inner[1].D for block in blocks),
        *linear([block.inner[3] for block in blocks]), *linear([other.inner[1] for other in others]),
        *linear([other.inner[4] for other in others]), z, z.new_empty(z.shape[1], 2 * z.shape[3]),
    )  # fmt: skip
    return lambda u, t: fused.through_pairs(u, pairs, EPSILON)


def _affine(norm: ChannelNorm) -> Tensor:
    """(2, C), weight and bias."""
    return torch.stack([norm.weight, norm.bias]).detach()


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
    assert up.bias is not None  # for mypy; nn.ConvTranspose1d has one unless told otherwise
    # Frames as (B, factor, C), so that each sample lies in one piece.
    into = _linear(down.weight.mT.flatten(1), down.bias)
    out = _linear(up.weight.permute(2, 1, 0).flatten(0, 1), up.bias.repeat(factor))
    frame = state.ready.new_zeros(state.ready.shape[0], factor, down.in_channels)
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


def _frozen(module: S4D, state: S4State) -> tuple[Tensor, Tensor, Tensor]:
    """A_bar, conj(2 C B_bar), both (H, N/2), and z (B, H, N/2): x = A_bar x + B_bar u for z = x / B_bar has a product less,
    z = A_bar z + u, and the output is the sum of Re z and Im z times the parts of the second."""
    system: Any = module.system()
    A = torch.exp(system.log_A_bar).to(state.x.dtype)
    C = (2 * (system.C * system.B_bar).conj().resolve_conj()).to(state.x.dtype)
    # A mode that nothing drives stays as it is: at nothing.
    return A, C, torch.where(system.B_bar == 0, 0, state.x / system.B_bar).contiguous()


def _step_of_s4d(module: S4D, state: S4State) -> Step:
    A, C, z = _frozen(module, state)
    D, readout = module.D.detach(), torch.view_as_real(C).flatten(-2)  # (H, N)
    both = torch.view_as_real(z).flatten(-2)  # (B, H, N), the same memory as z
    re = both[..., ::2]

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
