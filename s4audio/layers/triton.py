"""ChannelNorm, fused for CUDA: one reading and one writing forward, two readings and one writing backward.

PyTorch takes seven passes and twenty, since the channels of a sample do not lie side by side. A program holds all channels
of a few samples in registers, so that only the input is kept for the gradient: mean and deviation are computed again.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

CHANNELS = 1024  # at most, in a program
NUMBERS = 8192  # in a program's tile
PROGRAMS = 1056  # of the gradient, eight for each multiprocessor of an H100; each writes sums of its own


def takes(u: Tensor) -> bool:
    """Whether the kernels take u (B, C, L)."""
    return u.dtype in (torch.float32, torch.float16, torch.bfloat16) and u.shape[1] <= CHANNELS


def _tiling(u: Tensor) -> tuple[int, int, int]:
    """Channels, padded to a power of two, samples of a tile, and tiles."""
    batch, channels, length = u.shape
    C = triton.next_power_of_2(channels)
    samples = min(max(8, NUMBERS // C), max(16, triton.next_power_of_2(length)), 128)
    return C, samples, batch * triton.cdiv(length, samples)


def _rows(u: Tensor) -> Tensor:
    return u if u.stride(-1) == 1 else u.contiguous()


@torch.library.custom_op("s4audio::channel_norm", mutates_args=())
def channel_norm(u: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """Normalizes u (B, C, L) over C, then scales and shifts by weight and bias (C,) float32; in u's dtype."""
    u, y = _rows(u), torch.empty(u.shape, dtype=u.dtype, device=u.device)
    C, samples, tiles = _tiling(u)
    with torch.cuda.device_of(u):
        _norm[(tiles,)](
            u, y, weight, bias, *u.stride()[:2], *y.stride()[:2], u.shape[1], u.shape[2], EPSILON=epsilon, C=C, T=samples
        )
    return y


@channel_norm.register_fake
def _(u, weight, bias, epsilon):
    return torch.empty(u.shape, dtype=u.dtype, device=u.device)


@torch.library.custom_op("s4audio::channel_norm_backward", mutates_args=())
def _channel_norm_backward(dy: Tensor, u: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    dy, u = _rows(dy), _rows(u)
    du = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    C, samples, tiles = _tiling(u)
    programs = min(tiles, PROGRAMS)
    partial = torch.empty(2, programs, u.shape[1], dtype=torch.float32, device=u.device)
    _norm_gradient[(programs,)](
        dy, u, du, partial, weight, *dy.stride()[:2], *u.stride()[:2], *du.stride()[:2], u.shape[1], u.shape[2], tiles,
        EPSILON=epsilon, C=C, T=samples,
    )  # fmt: skip
    dweight, dbias = partial.sum(1).to(weight.dtype).unbind()
    return du, dweight, dbias.clone()


@_channel_norm_backward.register_fake
def _(dy, u, weight, epsilon):
    du = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    return du, torch.empty_like(weight), torch.empty_like(weight)


def _keep(ctx, inputs, output):
    u, weight, _, ctx.epsilon = inputs
    ctx.save_for_backward(u, weight)


def _gradient(ctx, dy):
    return *_channel_norm_backward(dy, *ctx.saved_tensors, ctx.epsilon), None


def _refuse_second_derivatives(ctx, *gradients):
    raise RuntimeError("the fused ChannelNorm has no second derivatives; take them within s4audio.backend('chunk').")


channel_norm.register_autograd(_gradient, setup_context=_keep)
_channel_norm_backward.register_autograd(_refuse_second_derivatives)


@triton.jit
def _tile(u, index, u_b, u_c, channels, length, C: tl.constexpr, T: tl.constexpr):
    """Where tile `index` of u lies, and which of its numbers exist."""
    num_tiles = tl.cdiv(length, T)
    b, t = (index // num_tiles).to(tl.int64), (index % num_tiles) * T + tl.arange(0, T)
    c = tl.arange(0, C)
    return u + b * u_b + c.to(tl.int64)[:, None] * u_c + t[None, :], (c < channels)[:, None] & (t < length)[None, :]


@triton.jit
def _normalized(u, mask, channels, EPSILON: tl.constexpr):
    """The tile with mean 0 and deviation 1 in every sample, and 1 / the deviation."""
    mean = tl.sum(u, 0) / channels
    centred = tl.where(mask, u - mean[None, :], 0)
    scale = 1 / tl.sqrt(tl.sum(centred * centred, 0) / channels + EPSILON)
    return centred * scale[None, :], scale


@triton.jit
def _norm(
    u, y, weight, bias, u_b, u_c, y_b, y_c, channels, length, EPSILON: tl.constexpr, C: tl.constexpr, T: tl.constexpr
):  # fmt: skip
    at, mask = _tile(u, tl.program_id(0), u_b, u_c, channels, length, C, T)
    normalized, _ = _normalized(tl.load(at, mask=mask, other=0).to(tl.float32), mask, channels, EPSILON)
    c = tl.arange(0, C)
    w, b = tl.load(weight + c, mask=c < channels, other=0), tl.load(bias + c, mask=c < channels, other=0)
    at, _ = _tile(y, tl.program_id(0), y_b, y_c, channels, length, C, T)
    tl.store(at, normalized * w[:, None] + b[:, None], mask=mask)


@triton.jit
def _norm_gradient(
    dy, u, du, partial, weight, dy_b, dy_c, u_b, u_c, du_b, du_c, channels, length, tiles,
    EPSILON: tl.constexpr, C: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Tiles one after the other, a program's sums over them kept in registers: the same gradients every time."""
    c, program, programs = tl.arange(0, C), tl.program_id(0), tl.num_programs(0)
    w = tl.load(weight + c, mask=c < channels, other=0)[:, None]
    dweight, dbias = tl.zeros((C,), tl.float32), tl.zeros((C,), tl.float32)
    for index in range(program, tiles, programs):
        at, mask = _tile(u, index, u_b, u_c, channels, length, C, T)
        normalized, scale = _normalized(tl.load(at, mask=mask, other=0).to(tl.float32), mask, channels, EPSILON)
        at, _ = _tile(dy, index, dy_b, dy_c, channels, length, C, T)
        g = tl.load(at, mask=mask, other=0).to(tl.float32)
        dweight += tl.sum(g * normalized, 1)
        dbias += tl.sum(g, 1)
        g *= w
        along = tl.sum(g * normalized, 0) / channels
        g = (g - tl.sum(g, 0)[None, :] / channels - normalized * along[None, :]) * scale[None, :]
        at, _ = _tile(du, index, du_b, du_c, channels, length, C, T)
        tl.store(at, g, mask=mask)
    at = partial + program * channels + c
    tl.store(at, dweight, mask=c < channels)
    tl.store(at + programs * channels, dbias, mask=c < channels)
