"""Composition: modules in a row (`Chain`) and around a shortcut (`Residual`), which stream if their parts do.

A module streams if it has `initial_state(batch_size)`, `stream(u, state)` and, optionally, `step(u, state)`; or if it acts
on every sample alone (POINTWISE). Everything is (batch, channels, length).
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from s4audio.layers.conv import CausalConv1d, CausalConvTranspose1d, ConvState
from s4audio.layers.s4 import S4D
from s4audio.ssm import ops

if ops.fused is not None:  # Triton is installed
    from s4audio.layers import triton as fused

EPSILON = 1e-5  # of a norm, added to the variance


class ChannelNorm(nn.Module):
    """Layer normalization over the channels of each sample, so that no sample hears another.

    Source: Ba et al. 2016, "Layer normalization".
    """

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))

    def forward(self, u: Tensor) -> Tensor:
        """(B, C, L) -> (B, C, L), in the precision of u; of half precision it is computed in float32."""
        if u.dim() != 3 or u.shape[1] != len(self.weight):
            raise ValueError(f"u has shape {tuple(u.shape)}; wanted (batch, {len(self.weight)}, length).")
        if ops.fuses(u) and fused.takes(u):
            return fused.channel_norm(u, self.weight, self.bias, EPSILON)
        exact = u if u.dtype == torch.float64 else u.float()
        variance, mean = torch.var_mean(exact, dim=1, correction=0, keepdim=True)
        y = (exact - mean) * torch.rsqrt(variance + EPSILON) * self.weight.unsqueeze(-1) + self.bias.unsqueeze(-1)
        return y.to(u.dtype)


POINTWISE = (ChannelNorm, nn.GELU, nn.GLU, nn.Dropout, nn.Dropout1d, nn.Identity)


class Chain(nn.Sequential):
    """nn.Sequential that can also stream; its state is the tuple of its modules' states (None for pointwise ones)."""

    def initial_state(self, batch_size: int) -> tuple:
        """The state before the first sample."""
        return tuple(module.initial_state(batch_size) if _streams(self, module) else None for module in self.parts())

    def parts(self) -> Iterator[Any]:
        """The modules; each has the streaming methods or is pointwise, which `_streams` tells."""
        return iter(self)

    def stream(self, u: Tensor, state: tuple) -> tuple[Tensor, tuple]:
        """A block of any length, zero included, through every module."""
        after = []
        for module, before in zip(self.parts(), state, strict=True):
            if _streams(self, module):
                u, before = module.stream(u, before)
            else:
                u = _pointwise(module, u)
            after.append(before)
        return u, tuple(after)

    def step(self, u: Tensor, state: tuple) -> tuple[Tensor, tuple]:
        """One sample; every module that sees one sample and has a recurrence of its own uses that."""
        after = []
        for module, before in zip(self.parts(), state, strict=True):
            if not _streams(self, module):
                u = _pointwise(module, u)
            elif hasattr(module, "step") and u.shape[-1] == 1:
                u, before = module.step(u, before)
            else:
                u, before = module.stream(u, before)
            after.append(before)
        return u, tuple(after)


class Residual(nn.Module):
    """u + inner(u), for an inner module that keeps the shape."""

    def __init__(self, *inner: nn.Module) -> None:
        super().__init__()
        self.inner = Chain(*inner)

    def forward(self, u: Tensor) -> Tensor:
        """(B, C, L) -> (B, C, L)"""
        return u + self.inner(u)

    def initial_state(self, batch_size: int) -> tuple:
        """The inner module's state before the first sample."""
        return self.inner.initial_state(batch_size)

    def stream(self, u: Tensor, state: tuple) -> tuple[Tensor, tuple]:
        """A block of any length."""
        y, state = self.inner.stream(u, state)
        return u + y, state

    def step(self, u: Tensor, state: tuple) -> tuple[Tensor, tuple]:
        """One sample."""
        y, state = self.inner.step(u, state)
        return u + y, state


class FeedForward(Residual):
    """Norm -> Linear to `expand` times the channels -> GELU -> Linear back, around a shortcut; samples do not mix."""

    def __init__(self, d_model: int, expand: int = 2, dropout: float = 0.0) -> None:
        wide = expand * d_model
        super().__init__(
            ChannelNorm(d_model), nn.Conv1d(d_model, wide, 1), nn.GELU(), nn.Dropout(dropout), nn.Conv1d(wide, d_model, 1)
        )


class S4Block(Residual):
    """Norm -> state space -> GELU -> dropout -> Linear -> norm, around a shortcut; without `mix`, the first three only.

    Args:
        ssm: the state-space layer, S4D or S4.
        dropout: probability.
        mix: whether a Linear mixes the channels, followed by a second norm. Reference system 5 does, system 1 does not.
        spectral: divide the Linear by its spectral norm, in place of the second norm, which would undo it (system 2).

    Source: reference systems 1, 2 and 5; Gu et al. 2022, "Efficiently modeling long sequences with structured state spaces".
    """

    def __init__(self, ssm: S4D, dropout: float = 0.0, mix: bool = True, spectral: bool = False) -> None:
        width = ssm.d_model
        linear = nn.Conv1d(width, width, 1)
        last = [spectral_norm(linear)] if spectral else [linear, ChannelNorm(width)]
        super().__init__(ChannelNorm(width), ssm, nn.GELU(), *([nn.Dropout(dropout), *last] if mix else []))


class PostNormBlock(Chain):
    """S4D -> GELU -> dropout -> Linear -> GLU -> dropout, around a shortcut, and then the norm.

    Dropout takes whole channels of a sequence.

    Source: Gu et al. 2022, "On the parameterization and initialization of diagonal state space models"; the public code's
    example for sequential CIFAR-10 is made of these.
    """

    def __init__(self, ssm: S4D, dropout: float = 0.0) -> None:
        width = ssm.d_model
        mixing = nn.Conv1d(width, 2 * width, 1), nn.GLU(dim=1)
        super().__init__(Residual(ssm, nn.GELU(), nn.Dropout1d(dropout), *mixing, nn.Dropout1d(dropout)), ChannelNorm(width))

    def forward(self, u: Tensor) -> Tensor:
        """(B, C, L) -> (B, C, L)"""
        if not (ops.fuses(u) and fused.takes(u)):
            return super().forward(u)
        residual: Any = self[0]
        norm: Any = self[1]
        ssm, _, dropout, linear, *_ = residual.inner
        return _fused_gated(ssm(u), u, linear, dropout.p if self.training else 0.0, norm)


class GatedBlock(Residual):
    """Norm -> S4D -> GELU -> Linear -> GLU, around a shortcut: the block of the audio models.

    Source: Gu et al. 2022, "On the parameterization and initialization of diagonal state space models" (the GLU mixing).
    """

    def __init__(self, ssm: S4D) -> None:
        width = ssm.d_model
        super().__init__(ChannelNorm(width), ssm, nn.GELU(), nn.Conv1d(width, 2 * width, 1), nn.GLU(dim=1))

    def forward(self, u: Tensor) -> Tensor:
        """(B, C, L) -> (B, C, L)"""
        norm, ssm, *_ = self.inner
        return self.mix(ssm(norm(u)), u)

    @torch.no_grad()
    def begin_as_shortcut(self) -> None:
        """Has the block return what it is given until training gives it more to say: the half that GLU lets through is 0."""
        linear: Any = self.inner[3]
        for parameter in (linear.weight, linear.bias):
            parameter[: len(parameter) // 2] = 0

    def mix(self, y: Tensor, u: Tensor) -> Tensor:
        """u + GLU(Linear(GELU(y))), with y what the S4D makes of u; both (B, C, L)."""
        _, _, gelu, linear, glu = self.inner
        if ops.fuses(u) and fused.takes(u):
            return _fused_gated(y, u, linear, 0.0, None)
        return u + glu(linear(gelu(y)))


class ModulatedBlock(nn.Module):
    """GatedBlock whose norm is scaled and shifted, channel by channel, by what an embedding says; at first not at all.

    Args:
        ssm: the state-space layer.
        d_embedding: size of the embedding.

    Source: Perez et al. 2018, "FiLM"; Peebles and Xie 2023, "Scalable diffusion models with transformers" (adaptive norm).
    """

    def __init__(self, ssm: S4D, d_embedding: int) -> None:
        super().__init__()
        self.block = GatedBlock(ssm)
        self.modulation = nn.Linear(d_embedding, 2 * ssm.d_model)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, u: Tensor, embedding: Tensor) -> Tensor:
        """(B, C, L) and (B, d_embedding) -> (B, C, L)"""
        norm, ssm, *_ = self.block.inner
        scale, shift = self.modulation(embedding).unsqueeze(-1).chunk(2, dim=1)
        return self.block.mix(ssm(norm(u) * (1 + scale) + shift), u)


class PooledState(NamedTuple):
    """What `Pooled` remembers between blocks."""

    down: ConvState  # samples of an incomplete frame
    inner: tuple
    ready: Tensor  # (B, d_model, samples) that come out with the samples to come, at most a frame of them


class Pooled(nn.Module):
    """u plus what inner modules make of it at 1/factor of its rate, one frame late, so that no sample hears the future.

    A convolution makes a frame of every `factor` samples, and a transposed one, a frame later, samples again: sample t hears
    the frames that end before its own begins, by way of the inner modules, and itself.

    Args:
        d_model: channels outside.
        d_inner: channels inside.
        factor: samples in a frame.
        inner: modules of d_inner channels that stream.

    Source: Goel et al. 2022, "It's raw! Audio generation with state-space models".
    """

    def __init__(self, d_model: int, d_inner: int, factor: int, *inner: nn.Module) -> None:
        super().__init__()
        self.down = CausalConv1d(d_model, d_inner, factor, factor)
        self.inner = Chain(*inner)
        self.up = CausalConvTranspose1d(d_inner, d_model, factor, factor)
        self.factor = factor

    def forward(self, u: Tensor) -> Tensor:
        """(B, d_model, L) -> (B, d_model, L)"""
        y = self.up(self.inner(self.down(u)))
        return u + F.pad(y, (self.factor, 0))[..., : u.shape[-1]]

    def initial_state(self, batch_size: int) -> PooledState:
        """The state before the first sample; no frame is complete that the first ones could hear."""
        ready = self.down.conv.weight.new_zeros(batch_size, self.down.conv.in_channels, self.factor)
        return PooledState(self.down.initial_state(batch_size), self.inner.initial_state(batch_size), ready)

    def stream(self, u: Tensor, state: PooledState) -> tuple[Tensor, PooledState]:
        """A block of any length; none of it waits for a frame to be complete."""
        frames, down = self.down.stream(u, state.down)
        inner, ready = state.inner, state.ready
        if frames.shape[-1]:
            y, inner = self.inner.stream(frames, inner)
            ready = torch.cat([ready, self.up(y)], dim=-1)
        length = u.shape[-1]
        return u + ready[..., :length], PooledState(down, inner, ready[..., length:].clone())


def _fused_gated(y: Tensor, u: Tensor, linear: Any, dropout: float, norm: Any) -> Tensor:
    """GELU -> dropout -> Linear -> GLU -> dropout of y, plus u, and the norm if there is one."""
    first, second = (_share_kept(y, dropout) if dropout else None for _ in range(2))
    v = nn.functional.conv1d(fused.gelu(y, first), linear.weight)
    of_norm = (None, None) if norm is None else (norm.weight, norm.bias)
    return fused.gated(v, linear.bias, u, second, *of_norm, EPSILON)


def _share_kept(y: Tensor, dropout: float) -> Tensor:
    """(B, C) float32: what Dropout1d multiplies the channels of y by."""
    return nn.functional.dropout(torch.ones(y.shape[:2], device=y.device), dropout)


def _pointwise(module: nn.Module, u: Tensor) -> Tensor:
    """module(u), also for a length of zero, which torch's convolutions refuse."""
    return module(u) if u.shape[-1] else module(u.new_zeros(*u.shape[:-1], 1))[..., :0]


def _streams(chain: nn.Module, module: nn.Module) -> bool:
    """Whether the module carries a state; False if it acts on every sample alone.

    Raises:
        RuntimeError: it does neither.
    """
    if hasattr(module, "stream"):
        return True
    if isinstance(module, POINTWISE) or (isinstance(module, nn.Conv1d) and module.kernel_size == module.stride == (1,)):
        return False
    if isinstance(module, nn.BatchNorm1d) and not module.training:  # then it scales by what it has counted
        return False
    name = next(name for name, child in chain.named_children() if child is module)
    raise RuntimeError(f"module {name} of the chain, {module}, mixes samples and has no state to carry; it cannot stream.")
