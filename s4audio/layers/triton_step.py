"""One sample through many blocks as one CUDA kernel, for generation a few clips at a time.

A step of a block is a dozen operations on a few hundred numbers, each of which takes longer to launch than to run. Here one
program takes one clip through a whole row of blocks. What a Linear reads is passed through memory between two barriers,
since every thread needs all of it. `draw` does the same for the end of a step: the last norm, the logits, a code, and its
embedding.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

CLIPS = 128  # at most: every program reads all weights, and with more clips products of matrices read them less often
CHANNELS = 512  # at most
NUMBERS = 8192  # of a weight matrix that a program asks for at a time; it waits for memory so many times less often


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
    passed: Tensor  # (B, 2 H), what a Linear reads


def takes(u: Tensor) -> bool:
    """Whether the kernels take a sample u (B, C)."""
    return u.dtype == torch.float32 and u.shape[0] <= CLIPS and u.shape[1] <= CHANNELS


def through_pairs(u: Tensor, pairs: Pairs, epsilon: float) -> Tensor:
    """(B, H) -> (B, H), and the states one sample further."""
    y = torch.empty_like(u)
    H, modes = pairs.z.shape[-2:]
    C = triton.next_power_of_2(H)
    with torch.cuda.device_of(u):
        _pairs[(len(u),)](
            u.contiguous(), y, *pairs, len(pairs.D), len(u), epsilon, H, modes, C=C, N=triton.next_power_of_2(modes),
            K=_rows(H, C), num_warps=16,
        )  # fmt: skip
    return y


def _rows(inputs: int, outputs: int) -> int:
    """How many rows of a weight (inputs, outputs) a program asks for at a time."""
    return min(triton.next_power_of_2(inputs), max(1, NUMBERS // outputs))


class Head(NamedTuple):
    """The end of a step, and the beginning of the next; float32."""

    norm: Tensor  # (2, H)
    weight: Tensor  # (H, levels), transposed
    bias: Tensor  # (levels,)
    table: Tensor  # (levels, H), the codes' embeddings
    condition: Tensor  # (B, H), added to them
    passed: Tensor  # (B, H), what the Linear reads


def draw(
    u: Tensor, uniform: Tensor, head: Head, following: Tensor, temperature: float, epsilon: float
) -> tuple[Tensor, Tensor]:
    """Codes (B,) that uniform numbers draw, and their log-probabilities (B,); `following` (B, H) gets their embeddings."""
    code = torch.empty(len(u), dtype=torch.long, device=u.device)
    log_p = torch.empty(len(u), device=u.device)
    H, levels = head.weight.shape
    with torch.cuda.device_of(u):
        _draw[(len(u),)](
            u.contiguous(), uniform.contiguous(), *head, code, log_p, following, temperature, epsilon, H, levels,
            C=triton.next_power_of_2(H), LEVELS=triton.next_power_of_2(levels), K=_rows(H, triton.next_power_of_2(levels)),
            num_warps=16,
        )  # fmt: skip
    return code, log_p


@triton.jit
def _norm(u, weight, bias, h, exists, channels, epsilon):
    mean = tl.sum(u, 0) / channels
    centred = tl.where(exists, u - mean, 0.0)
    scale = 1 / tl.sqrt(tl.sum(centred * centred, 0) / channels + epsilon)
    return centred * scale * tl.load(weight + h, exists, 0.0) + tl.load(bias + h, exists, 0.0)


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
    modes, C: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    b, h, n = tl.program_id(0), tl.arange(0, C), tl.arange(0, N)
    exists = h < channels
    tile, in_tile = h[:, None] * modes + n[None, :], exists[:, None] & (n < modes)[None, :]
    size, passed = channels * modes, passed + b * 2 * channels
    v = tl.load(u + b * channels + h, exists, 0.0)
    for p in range(num_pairs):
        norm = norms + p * 4 * channels
        s = _norm(v, norm, norm + channels, h, exists, channels, epsilon)
        a, c, state = A + p * 2 * size + tile, C_ + p * 2 * size + tile, z + (p * batch + b) * 2 * size + tile
        a_re, a_im = tl.load(a, in_tile, 0.0), tl.load(a + size, in_tile, 0.0)
        z_re, z_im = tl.load(state, in_tile, 0.0), tl.load(state + size, in_tile, 0.0)
        new_re, new_im = a_re * z_re - a_im * z_im + s[:, None], a_re * z_im + a_im * z_re
        tl.store(state, new_re, in_tile)
        tl.store(state + size, new_im, in_tile)
        read = tl.load(c, in_tile, 0.0) * new_re + tl.load(c + size, in_tile, 0.0) * new_im
        s = tl.sum(read, 1) + s * tl.load(D + p * channels + h, exists, 0.0)
        _pass(passed, h, exists, _gelu(s))
        value, opening = _two_products(passed, channels, gate + p * 2 * channels * channels, 2 * channels, h, exists, C, K)
        value += tl.load(gate_bias + p * 2 * channels + h, exists, 0.0)
        opening += tl.load(gate_bias + (p * 2 + 1) * channels + h, exists, 0.0)
        v += value * tl.sigmoid(opening)
        _pass(passed, h, exists, _norm(v, norm + 2 * channels, norm + 3 * channels, h, exists, channels, epsilon))
        low, high = _two_products(passed, channels, wide + p * 2 * channels * channels, 2 * channels, h, exists, C, K)
        low = _gelu(low + tl.load(wide_bias + p * 2 * channels + h, exists, 0.0))
        high = _gelu(high + tl.load(wide_bias + (p * 2 + 1) * channels + h, exists, 0.0))
        tl.debug_barrier()
        tl.store(passed + h, low, exists)
        tl.store(passed + channels + h, high, exists)
        tl.debug_barrier()
        v += _product(passed, 2 * channels, back + p * 2 * channels * channels, channels, h, exists, C, K)
        v += tl.load(back_bias + p * channels + h, exists, 0.0)
    tl.store(y + b * channels + h, v, exists)


@triton.jit
def _draw(
    u, uniform, norm, weight, bias, table, condition, passed, code, log_p, following, temperature, epsilon, channels, levels,
    C: tl.constexpr, LEVELS: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    b, h, l = tl.program_id(0), tl.arange(0, C), tl.arange(0, LEVELS)
    exists, level = h < channels, l < levels
    v = tl.load(u + b * channels + h, exists, 0.0)
    _pass(passed + b * channels, h, exists, _norm(v, norm, norm + channels, h, exists, channels, epsilon))
    logits = _product(passed + b * channels, channels, weight, levels, l, level, LEVELS, K)
    logits = tl.where(level, logits + tl.load(bias + l, level, 0.0), -float("inf"))
    logits -= tl.max(logits, 0)
    cdf = tl.cumsum(tl.exp(logits / temperature), 0)
    threshold = tl.load(uniform + b) * tl.max(cdf, 0)
    drawn = tl.minimum(tl.sum((cdf <= threshold).to(tl.int32), 0), levels - 1)
    tl.store(code + b, drawn.to(tl.int64))
    tl.store(log_p + b, tl.sum(tl.where(l == drawn, logits, 0.0), 0) - tl.log(tl.sum(tl.exp(logits), 0)))
    embedded = tl.load(table + drawn * channels + h, exists, 0.0) + tl.load(condition + b * channels + h, exists, 0.0)
    tl.store(following + b * channels + h, embedded, exists)
