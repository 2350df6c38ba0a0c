"""One sample through many blocks as one CUDA kernel, for generation a few clips at a time.

A step of a block is a dozen operations on a few hundred numbers, each of which takes longer to launch than to run. Here one
program takes one clip through a whole row of blocks. What a Linear reads, of which every thread needs all, is passed through
memory between two barriers, unless the program holds the whole weight. `draw` does the same for the end of a step: the last
norm, the logits, a code, and its embedding.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

CLIPS = 128  # at most: every program reads all weights, and with more clips products of matrices read them less often
CHANNELS = 512  # at most
WHOLE = 2048  # numbers of a state up to which a program keeps whole weights in registers, asked for before it needs them
ROWS, NUMBERS = 64, 16384  # at most, of a larger weight that it asks for at a time


class Pairs(NamedTuple):
    """P pairs of a GatedBlock of an S4D and a FeedForward of H channels, and the states of B clips; float32."""

    norms: Tensor  # (P, 2, 2, H), weight and bias of both
    A: Tensor  # (P, 2, H, N/2), of z = A z + u: real and imaginary part
    C: Tensor  # (P, 2, H, N/2), of y = sum(C z): 2 Re C, -2 Im C
    D: Tensor  # (P, H)
    gate: Tensor  # (P, H, 2 H), transposed
    gate_bias: Tensor  # (P, 2 H)
    wide: Tensor  # (P, H, 2 H), transposed
    wide_bias: Tensor  # (P, 2 H)
    back: Tensor  # (P, 2 H, H), transposed
    back_bias: Tensor  # (P, H)
    z: Tensor  # (P, B, 2, H, N/2), which a step overwrites
    passed: Tensor  # (B, 2 H), room for what a Linear reads


def takes(u: Tensor) -> bool:
    """Whether the kernels take a sample u (B, C)."""
    return u.dtype == torch.float32 and u.shape[0] <= CLIPS and u.shape[1] <= CHANNELS


def through_pairs(u: Tensor, pairs: Pairs, epsilon: float) -> Tensor:
    """(B, H) -> (B, H), and the states one sample further."""
    y = torch.empty_like(u)
    H, modes = pairs.z.shape[-2:]
    C, N = triton.next_power_of_2(H), triton.next_power_of_2(modes)
    with torch.cuda.device_of(u):
        _pairs[(len(u),)](
            u.contiguous(), y, *pairs, len(pairs.D), len(u), epsilon, H, modes, C=C, N=N, K=_rows(H, C),
            WHOLE=C * N <= WHOLE, num_warps=_warps(C * N),
        )  # fmt: skip
    return y


def _warps(numbers: int) -> int:
    """Of a program whose state has so many numbers: more read faster, and wait for each other longer.

    Measured on an H100 at 64, 128 and 256 channels of 32 modes (evaluation/bench/NOTES.md); beyond, so that registers do.
    """
    return 4 if numbers <= 4096 else 8 if numbers <= 8192 else 16


def _rows(inputs: int, outputs: int) -> int:
    """How many rows of a weight (inputs, outputs) a program asks for at a time."""
    return min(triton.next_power_of_2(inputs), ROWS, max(1, NUMBERS // outputs))


class Head(NamedTuple):
    """The end of a step, and the beginning of the next; float32."""

    norm: Tensor  # (2, H)
    weight: Tensor  # (H, levels), transposed
    bias: Tensor  # (levels,)
    table: Tensor  # (levels, H), the codes' embeddings
    condition: Tensor  # (B, H), added to them
    passed: Tensor  # (B, H), room for what the Linear reads


def draw(
    u: Tensor, uniform: Tensor, head: Head, following: Tensor, temperature: float, epsilon: float
) -> tuple[Tensor, Tensor]:
    """Codes (B,) that uniform numbers draw, and their log-probabilities (B,); `following` (B, H) gets their embeddings."""
    code = torch.empty(len(u), dtype=torch.long, device=u.device)
    log_p = torch.empty(len(u), device=u.device)
    H, levels = head.weight.shape
    C, wide = triton.next_power_of_2(H), triton.next_power_of_2(levels)
    with torch.cuda.device_of(u):
        _draw[(len(u),)](
            u.contiguous(), uniform.contiguous(), *head, code, log_p, following, temperature, epsilon, H, levels,
            C=C, LEVELS=wide, K=_rows(H, wide), WHOLE=C * wide <= NUMBERS, num_warps=4,
        )  # fmt: skip
    return code, log_p


@triton.jit
def _norm(u, weight, bias, exists, channels, epsilon):
    mean = tl.sum(u, 0) / channels
    centred = tl.where(exists, u - mean, 0.0)
    scale = 1 / tl.sqrt(tl.sum(centred * centred, 0) / channels + epsilon)
    return centred * scale * weight + bias


@triton.jit
def _gelu(u):
    return 0.5 * u * (1 + tl.erf(u * 0.7071067811865476))


@triton.jit
def _pass(passed, index, exists, u):
    """Writes u where every thread will read all of it, after whoever still reads what was there."""
    tl.debug_barrier()
    tl.store(passed + index, u, exists)
    tl.debug_barrier()


@triton.jit
def _product(passed, inputs, weight, stride, out, exists, C: tl.constexpr, K: tl.constexpr):
    """(C,) products of what was passed with the columns `out` of a weight (inputs, stride)."""
    total = tl.zeros([K, C], tl.float32)
    for first in range(0, inputs, K):
        k = first + tl.arange(0, K)
        u = tl.load(passed + k, k < inputs, 0.0)
        place, mask = weight + k[:, None] * stride + out[None, :], (k < inputs)[:, None] & exists[None, :]
        total += u[:, None] * tl.load(place, mask, 0.0)
    return tl.sum(total, 0)


@triton.jit
def _two_products(passed, inputs, weight, stride, out, exists, C: tl.constexpr, K: tl.constexpr):
    """The same with the columns `out` and those half a row further on, which are read together."""
    first_total, second_total = tl.zeros([K, C], tl.float32), tl.zeros([K, C], tl.float32)
    for first in range(0, inputs, K):
        k = first + tl.arange(0, K)
        u = tl.load(passed + k, k < inputs, 0.0)[:, None]
        place = weight + k[:, None] * stride + out[None, :]
        mask = (k < inputs)[:, None] & exists[None, :]
        first_total += u * tl.load(place, mask, 0.0)
        second_total += u * tl.load(place + stride // 2, mask, 0.0)
    return tl.sum(first_total, 0), tl.sum(second_total, 0)


@triton.jit
def _pairs(
    u, y, norms, A, C_, D, gate, gate_bias, wide, wide_bias, back, back_bias, z, passed, num_pairs, batch, epsilon, channels,
    modes, C: tl.constexpr, N: tl.constexpr, K: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    b, h, n = tl.program_id(0), tl.arange(0, C), tl.arange(0, N)
    exists = h < channels
    tile, in_tile = h[:, None] * modes + n[None, :], exists[:, None] & (n < modes)[None, :]
    size, square, passed = channels * modes, 2 * channels * channels, passed + b * 2 * channels
    both, across = h[:, None] * 2 * channels + h[None, :], h[:, None] * channels + h[None, :]
    in_square = exists[:, None] & exists[None, :]
    v = tl.load(u + b * channels + h, exists, 0.0)
    for p in range(num_pairs):
        # Whatever does not depend on v is asked for before it is needed: nothing is read ahead across a barrier.
        norm, biases = norms + p * 4 * channels, p * 2 * channels + h
        weight, bias = tl.load(norm + h, exists, 0.0), tl.load(norm + channels + h, exists, 0.0)
        a, c, state = A + p * 2 * size + tile, C_ + p * 2 * size + tile, z + (p * batch + b) * 2 * size + tile
        a_re, a_im = tl.load(a, in_tile, 0.0), tl.load(a + size, in_tile, 0.0)
        z_re, z_im = tl.load(state, in_tile, 0.0), tl.load(state + size, in_tile, 0.0)
        c_re, c_im = tl.load(c, in_tile, 0.0), tl.load(c + size, in_tile, 0.0)
        if WHOLE:
            gate_value = tl.load(gate + p * square + both, in_square, 0.0)
            gate_opening = tl.load(gate + p * square + channels + both, in_square, 0.0)
        skip = tl.load(D + p * channels + h, exists, 0.0)
        value_bias = tl.load(gate_bias + biases, exists, 0.0)
        opening_bias = tl.load(gate_bias + channels + biases, exists, 0.0)
        next_weight = tl.load(norm + 2 * channels + h, exists, 0.0)
        next_bias = tl.load(norm + 3 * channels + h, exists, 0.0)
        low_bias = tl.load(wide_bias + biases, exists, 0.0)
        high_bias = tl.load(wide_bias + channels + biases, exists, 0.0)
        last_bias = tl.load(back_bias + p * channels + h, exists, 0.0)
        s = _norm(v, weight, bias, exists, channels, epsilon)
        new_re, new_im = a_re * z_re - a_im * z_im + s[:, None], a_re * z_im + a_im * z_re
        if C * N < 512:  # as many threads as a program may have: several then hold each number, and all must have read it
            tl.debug_barrier()
        tl.store(state, new_re, in_tile)
        tl.store(state + size, new_im, in_tile)
        s = _gelu(tl.sum(c_re * new_re + c_im * new_im, 1) + s * skip)
        if WHOLE:
            wide_low = tl.load(wide + p * square + both, in_square, 0.0)
            wide_high = tl.load(wide + p * square + channels + both, in_square, 0.0)
            value, opening = tl.sum(s[:, None] * gate_value, 0), tl.sum(s[:, None] * gate_opening, 0)
        else:
            _pass(passed, h, exists, s)
            value, opening = _two_products(passed, channels, gate + p * square, 2 * channels, h, exists, C, K)
        v += (value + value_bias) * tl.sigmoid(opening + opening_bias)
        s = _norm(v, next_weight, next_bias, exists, channels, epsilon)
        if WHOLE:
            back_low = tl.load(back + p * square + across, in_square, 0.0)
            back_high = tl.load(back + p * square + channels * channels + across, in_square, 0.0)
            low, high = tl.sum(s[:, None] * wide_low, 0), tl.sum(s[:, None] * wide_high, 0)
        else:
            _pass(passed, h, exists, s)
            low, high = _two_products(passed, channels, wide + p * square, 2 * channels, h, exists, C, K)
        low, high = _gelu(low + low_bias), _gelu(high + high_bias)
        if WHOLE:
            v += tl.sum(low[:, None] * back_low + high[:, None] * back_high, 0)
        else:
            tl.debug_barrier()
            tl.store(passed + h, low, exists)
            tl.store(passed + channels + h, high, exists)
            tl.debug_barrier()
            v += _product(passed, 2 * channels, back + p * square, channels, h, exists, C, K)
        v += last_bias
    tl.store(y + b * channels + h, v, exists)


@triton.jit
def _draw(
    u, uniform, norm, weight, bias, table, condition, passed, code, log_p, following, temperature, epsilon, channels, levels,
    C: tl.constexpr, LEVELS: tl.constexpr, K: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    b, h, l = tl.program_id(0), tl.arange(0, C), tl.arange(0, LEVELS)
    exists, level = h < channels, l < levels
    v = tl.load(u + b * channels + h, exists, 0.0)
    norm_weight, norm_bias = tl.load(norm + h, exists, 0.0), tl.load(norm + channels + h, exists, 0.0)
    if WHOLE:
        both = h[:, None] * levels + l[None, :]
        to_levels = tl.load(weight + both, exists[:, None] & level[None, :], 0.0)
    level_bias, threshold = tl.load(bias + l, level, 0.0), tl.load(uniform + b)
    added = tl.load(condition + b * channels + h, exists, 0.0)
    s = _norm(v, norm_weight, norm_bias, exists, channels, epsilon)
    if WHOLE:
        logits = tl.sum(s[:, None] * to_levels, 0)
    else:
        _pass(passed + b * channels, h, exists, s)
        logits = _product(passed + b * channels, channels, weight, levels, l, level, LEVELS, K)
    logits = tl.where(level, logits + level_bias, -float("inf"))
    logits -= tl.max(logits, 0)
    cdf = tl.cumsum(tl.exp(logits / temperature), 0)
    threshold *= tl.max(cdf, 0)
    drawn = tl.minimum(tl.sum((cdf <= threshold).to(tl.int32), 0), levels - 1)
    tl.store(code + b, drawn.to(tl.int64))
    tl.store(log_p + b, tl.sum(tl.where(l == drawn, logits, 0.0), 0) - tl.log(tl.sum(tl.exp(logits), 0)))
    tl.store(following + b * channels + h, tl.load(table + drawn * channels + h, exists, 0.0) + added, exists)
