"""What lies around the engine in a block, fused for CUDA: ChannelNorm; GELU and dropout; and a gated Linear's end, from its
bias to the norm after the shortcut.

PyTorch takes a pass over memory for each of them, and seven forward and twenty backward for the norm, since the channels of
a sample do not lie side by side. Here each is one reading and one writing. A program holds all channels of a few samples in
registers, so that only inputs are kept for the gradient: the rest is computed again.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

CHANNELS = 1024  # at most, in a program
NUMBERS = 8192  # in a program's tile
PROGRAMS = 1056  # of the gradient, eight for each multiprocessor of an H100; each writes sums of its own
WARPS = 16  # of the gated gradient, which holds three tiles
BLOCK = 2048  # numbers of a program that treats each alone


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


# ------------------------------------------------------------------------------------------------ GELU and dropout


@torch.library.custom_op("s4audio::gelu", mutates_args=())
def gelu(u: Tensor, keep: Tensor | None) -> Tensor:
    """GELU of u (B, C, L), times keep (B, C) float32: dropout of whole channels."""
    u = u.contiguous()
    y = torch.empty_like(u)
    with torch.cuda.device_of(u):
        _gelu[(triton.cdiv(u.numel(), BLOCK),)](
            u, u if keep is None else keep, y, u.numel(), u.shape[2], keep is not None, BLOCK
        )
    return y


@gelu.register_fake
def _(u, keep):
    return torch.empty(u.shape, dtype=u.dtype, device=u.device)


@torch.library.custom_op("s4audio::gelu_backward", mutates_args=())
def _gelu_backward(dy: Tensor, u: Tensor, keep: Tensor | None) -> Tensor:
    dy, u = dy.contiguous(), u.contiguous()
    du = torch.empty_like(u)
    given = u if keep is None else keep
    _gelu_gradient[(triton.cdiv(u.numel(), BLOCK),)](dy, u, given, du, u.numel(), u.shape[2], keep is not None, BLOCK)
    return du


@_gelu_backward.register_fake
def _(dy, u, keep):
    return torch.empty(u.shape, dtype=u.dtype, device=u.device)


def _keep_gelu(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gelu_chain(ctx, dy):
    return _gelu_backward(dy, *ctx.saved_tensors), None


gelu.register_autograd(_gelu_chain, setup_context=_keep_gelu)


@triton.jit
def _gelu(u, keep, y, size, length, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(u + i, mask=i < size, other=0).to(tl.float32)
    x *= 0.5 * (1 + tl.erf(x * 0.7071067811865476))
    if MASKED:
        x *= tl.load(keep + i // length, mask=i < size, other=0)
    tl.store(y + i, x, mask=i < size)


@triton.jit
def _gelu_gradient(dy, u, keep, du, size, length, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(u + i, mask=i < size, other=0).to(tl.float32)
    g = tl.load(dy + i, mask=i < size, other=0).to(tl.float32)
    if MASKED:
        g *= tl.load(keep + i // length, mask=i < size, other=0)
    density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
    tl.store(du + i, g * (0.5 * (1 + tl.erf(x * 0.7071067811865476)) + x * density), mask=i < size)


# ------------------------------------------------------------------------------------------------ the end of a gated Linear


@torch.library.custom_op("s4audio::gated", mutates_args=())
def gated(
    v: Tensor, bias: Tensor, u: Tensor, keep: Tensor | None, weight: Tensor | None, shift: Tensor | None, epsilon: float
) -> Tensor:
    """norm(u + keep GLU(v + bias)), or without the norm.

    Args:
        v: (B, 2 C, L).
        bias: (2 C,) float32.
        u: (B, C, L), the shortcut.
        keep: (B, C) float32, dropout of whole channels; None without.
        weight: (C,) float32, of a ChannelNorm; None without one.
        shift: (C,) float32, its bias.
        epsilon: its.

    Returns:
        (B, C, L) in u's dtype.
    """
    v, u = _rows(v), _rows(u)
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    C, samples, tiles = _tiling(u)
    given = (bias if part is None else part for part in (keep, weight, shift))
    with torch.cuda.device_of(u):
        _gated[(tiles,)](
            v, bias, u, *given, y, *v.stride()[:2], *u.stride()[:2], *y.stride()[:2], u.shape[1], u.shape[2],
            MASKED=keep is not None, NORM=weight is not None, EPSILON=epsilon, C=C, T=samples, num_warps=8,
        )  # fmt: skip
    return y


@gated.register_fake
def _(v, bias, u, keep, weight, shift, epsilon):
    return torch.empty(u.shape, dtype=u.dtype, device=u.device)


@torch.library.custom_op("s4audio::gated_backward", mutates_args=())
def _gated_backward(
    dy: Tensor, v: Tensor, bias: Tensor, u: Tensor, keep: Tensor | None, weight: Tensor | None, shift: Tensor | None,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dy, v, u = _rows(dy), _rows(v), _rows(u)
    dv, du = (torch.empty(part.shape, dtype=part.dtype, device=part.device) for part in (v, u))
    C, samples, tiles = _tiling(u)
    programs = min(tiles, PROGRAMS)
    partial = torch.empty(2 if weight is None else 4, programs, u.shape[1], dtype=torch.float32, device=u.device)
    given = (bias if part is None else part for part in (keep, weight))
    _gated_gradient[(programs,)](
        dy, v, bias, u, *given, dv, du, partial, *dy.stride()[:2], *v.stride()[:2], *u.stride()[:2], *dv.stride()[:2],
        *du.stride()[:2], u.shape[1], u.shape[2], tiles, MASKED=keep is not None, NORM=weight is not None,
        EPSILON=epsilon, C=C, T=samples, num_warps=WARPS,
    )  # fmt: skip
    sums = partial.sum(1)
    dbias = sums[:2].flatten().to(bias.dtype)
    if weight is None:
        return dv, dbias, du, bias.new_empty(0), bias.new_empty(0)
    return dv, dbias, du, sums[2].to(weight.dtype).clone(), sums[3].to(weight.dtype).clone()


@_gated_backward.register_fake
def _(dy, v, bias, u, keep, weight, shift, epsilon):
    dv, du = (torch.empty(part.shape, dtype=part.dtype, device=part.device) for part in (v, u))
    return dv, torch.empty_like(bias), du, *(bias.new_empty(0 if weight is None else len(weight)) for _ in range(2))


def _keep_gated(ctx, inputs, output):
    *tensors, ctx.epsilon = inputs
    ctx.save_for_backward(*tensors)


def _gated_chain(ctx, dy):
    dv, dbias, du, dweight, dshift = _gated_backward(dy, *ctx.saved_tensors, ctx.epsilon)
    of_norm = (None, None) if ctx.saved_tensors[4] is None else (dweight, dshift)
    return dv, dbias, du, None, *of_norm, None


gated.register_autograd(_gated_chain, setup_context=_keep_gated)
for _gradient_of in (_gelu_backward, _gated_backward):
    _gradient_of.register_autograd(_refuse_second_derivatives)


@triton.jit
def _gate(v, v_c, bias, exists, channels, C: tl.constexpr):
    """a = v + bias of a tile, and the sigmoid of what gates it, which lies `channels` further on."""
    c = tl.arange(0, C)
    of_a = tl.load(bias + c, mask=c < channels, other=0)
    of_b = tl.load(bias + channels + c, mask=c < channels, other=0)
    a = tl.load(v, mask=exists, other=0).to(tl.float32) + of_a[:, None]
    b = tl.load(v + tl.cast(channels, tl.int64) * v_c, mask=exists, other=0).to(tl.float32) + of_b[:, None]
    return a, 1 / (1 + tl.exp(-b))


@triton.jit
def _share_kept(keep, index, channels, length, MASKED: tl.constexpr, C: tl.constexpr, T: tl.constexpr):
    """What dropout makes of the channels of tile `index`, (C, 1) or 1."""
    if MASKED:
        b, c = (index // tl.cdiv(length, T)).to(tl.int64), tl.arange(0, C)
        return tl.load(keep + b * channels + c, mask=c < channels, other=0)[:, None]
    else:
        return 1.0


@triton.jit
def _gated(
    v, bias, u, keep, weight, shift, y, v_b, v_c, u_b, u_c, y_b, y_c, channels, length,
    MASKED: tl.constexpr, NORM: tl.constexpr, EPSILON: tl.constexpr, C: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    index, c = tl.program_id(0), tl.arange(0, C)
    at, exists = _tile(v, index, v_b, v_c, channels, length, C, T)
    a, gate = _gate(at, v_c, bias, exists, channels, C)
    at, _ = _tile(u, index, u_b, u_c, channels, length, C, T)
    s = tl.load(at, mask=exists, other=0).to(tl.float32)
    s += a * gate * _share_kept(keep, index, channels, length, MASKED, C, T)
    if NORM:
        s, _ = _normalized(s, exists, channels, EPSILON)
        w, b = tl.load(weight + c, mask=c < channels, other=0), tl.load(shift + c, mask=c < channels, other=0)
        s = s * w[:, None] + b[:, None]
    at, _ = _tile(y, index, y_b, y_c, channels, length, C, T)
    tl.store(at, s, mask=exists)


@triton.jit
def _gated_gradient(
    dy, v, bias, u, keep, weight, dv, du, partial, dy_b, dy_c, v_b, v_c, u_b, u_c, dv_b, dv_c, du_b, du_c, channels, length,
    tiles, MASKED: tl.constexpr, NORM: tl.constexpr, EPSILON: tl.constexpr, C: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """As `_norm_gradient`, and from there back through the gate; sums of the bias's two halves first, then the norm's."""
    c, program, programs = tl.arange(0, C), tl.program_id(0), tl.num_programs(0)
    of_a, of_b = tl.zeros((C,), tl.float32), tl.zeros((C,), tl.float32)
    of_weight, of_shift = tl.zeros((C,), tl.float32), tl.zeros((C,), tl.float32)
    for index in range(program, tiles, programs):
        at, exists = _tile(dy, index, dy_b, dy_c, channels, length, C, T)
        g = tl.load(at, mask=exists, other=0).to(tl.float32)
        at, _ = _tile(v, index, v_b, v_c, channels, length, C, T)
        a, gate = _gate(at, v_c, bias, exists, channels, C)
        share = _share_kept(keep, index, channels, length, MASKED, C, T)
        if NORM:
            at, _ = _tile(u, index, u_b, u_c, channels, length, C, T)
            s = tl.load(at, mask=exists, other=0).to(tl.float32) + a * gate * share
            normalized, scale = _normalized(s, exists, channels, EPSILON)
            of_weight += tl.sum(g * normalized, 1)
            of_shift += tl.sum(g, 1)
            g *= tl.load(weight + c, mask=c < channels, other=0)[:, None]
            along = tl.sum(g * normalized, 0) / channels
            g = (g - tl.sum(g, 0)[None, :] / channels - normalized * along[None, :]) * scale[None, :]
        at, _ = _tile(du, index, du_b, du_c, channels, length, C, T)
        tl.store(at, g, mask=exists)
        g *= gate * share
        of_gate = g * a * (1 - gate)
        at, _ = _tile(dv, index, dv_b, dv_c, channels, length, C, T)
        tl.store(at, g, mask=exists)
        tl.store(at + tl.cast(channels, tl.int64) * dv_c, of_gate, mask=exists)
        of_a += tl.sum(g, 1)
        of_b += tl.sum(of_gate, 1)
    at = partial + program * channels + c
    tl.store(at, of_a, mask=c < channels)
    tl.store(at + programs * channels, of_b, mask=c < channels)
    if NORM:
        tl.store(at + 2 * programs * channels, of_weight, mask=c < channels)
        tl.store(at + 3 * programs * channels, of_shift, mask=c < channels)
