"""The engine of chunk.py, fused for CUDA: the same recurrence and the same operators in a handful of Triton kernels.

A lane is a segment of a sequence, `span` chunks of T samples. A program walks R lanes of one channel side by side, from
several sequences or segments, with their states in registers: rows of small matrix products with the channel's operators,

    Y = U toeplitz(K) + X Q        X' = X A_T + U P        per chunk; a row is a lane

If the sequences are enough to fill the GPU, a sequence is one lane and `_forward` is all that runs: u is read once and y
written once. Otherwise they are cut into segments: `_sums` finds what each segment adds to the state (it reads u once more),
`_starts` chains the segments, and `_forward` begins every segment at its true state. The gradient is the same walk backwards
in time (`_backward`); for the gradients of Q and A_T the states at the start of each chunk are kept, S / T of the size of u.
What a program adds to the gradients of the operators stays in registers until its end, and is summed over programs in a
fixed order: the same gradients every time.

The samples after the last whole chunk are a chunk of their own with the last rows of P and their own carry, `rest`.

Sums and states are float32. Products of float32 are three TF32 products forward (2^-22: values as exact as float32 is) and
three bfloat16 products backward ("bf16x3": each factor is split into a high and a low part of 8 bits, 2^-17), which take
half the time and half the registers; below SMALL numbers of input, where time does not matter, backward too is TF32. float16
splits into two bfloat16 numbers without a rest, and bfloat16 is one product. S4's dense carry is TF32 always.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from s4audio.ssm import chunk
from s4audio.ssm.diagonal import DiagonalSystem
from s4audio.ssm.dplr import DPLRSystem

MODES = 32  # modes whose operators a program can hold; a diagonal system of more is walked in parts that add up
LANES = 16  # rows of a program's products: the fewest that tensor cores take, since registers are what runs out
FILL = 1584  # programs wanted: twelve for each multiprocessor of an H100
SMALL = 2**22  # numbers of input below which launching kernels costs more than running them
OPTIONS = {"num_warps": 4, "num_stages": 3}
INTERPRETED = bool(triton.knobs.runtime.interpret)  # TRITON_INTERPRET=1: the kernels run in Python, on the CPU


class Precision(NamedTuple):
    """How an input's dtype is multiplied, and in chunks of how many samples: shorter ones where a factor has two parts."""

    forward: str
    backward: str
    T: int


PRECISION = {
    torch.float32: Precision("tf32x3", "bf16x3", 32),
    torch.float16: Precision("bf16x3", "bf16x3", 32),
    torch.bfloat16: Precision("bf16", "bf16", 64),
}


class Cut(NamedTuple):
    """How sequences are cut into chunks and segments."""

    T: int  # samples of a chunk
    num_chunks: int  # whole chunks of a sequence
    rest: int  # samples after them
    span: int  # chunks of a segment
    num_segments: int  # of a sequence; the last may be shorter

    @property
    def last_span(self) -> int:
        """Chunks of the last segment."""
        return self.num_chunks - (self.num_segments - 1) * self.span


def cut(u: Tensor) -> Cut:
    """The cut for an input (B, H, L).

    Segments are as long as still gives FILL programs: they cost a second reading. And not shorter than half the square root
    of the chunks, since they are chained one by one.
    """
    batch, channels, length = u.shape
    T = min(PRECISION[u.dtype].T, max(16, triton.next_power_of_2(length)))
    num_chunks, rest = divmod(length, T)
    span = max(1, batch * num_chunks * channels // (LANES * FILL), math.isqrt(num_chunks) // 2)
    span = min(span, max(1, num_chunks))
    return Cut(T, num_chunks, rest, span, max(1, triton.cdiv(num_chunks, span)))


def refusal(system: DiagonalSystem | DPLRSystem, u: Tensor) -> str | None:
    """Why these kernels cannot run the system on u; None if they can."""
    if system.gap is not None:
        return "the system has one gap per sample, and its kernels are for systems that do not vary in time"
    if u.dtype not in PRECISION:
        return f"u is {u.dtype}, and its kernels take float32, float16 and bfloat16"
    if isinstance(system, DPLRSystem) and system.C.shape[-1] > MODES:
        states = 2 * system.C.shape[-1]
        return f"the system is diagonal plus low-rank with {states} states, and its kernels take at most {2 * MODES}"
    if u.shape[1] > 65535 or u.shape[2] >= 2**30:
        return f"u has {u.shape[1]} channels of {u.shape[2]} samples, and its kernels count to 65535 and to 2^30"
    if INTERPRETED:
        return None
    if not u.is_cuda or torch.version.hip:
        return f"u is on the {'AMD GPU' if u.is_cuda else u.device.type}, and its kernels need CUDA"
    if torch.cuda.get_device_properties(u.device).major < 8:
        return "this GPU is older than NVIDIA's Ampere, and its kernels multiply bfloat16 and TF32"
    return None


def run(system: DiagonalSystem | DPLRSystem, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """y (B, H, L) in u's dtype and the final state (H, B, S) from u (B, H, L) and the state x (H, B, S) float32."""
    shape = cut(u)
    if isinstance(system, DPLRSystem):
        K, P, Q, carry = dense_operators(system, shape.T)
        y, after, _ = walk(u, x, K, P, Q, carry, chunk.carry_over(system, shape.rest).re, _trains(u, x, K, P, Q))
        return y, after
    log_A_bar, B, C = (
        torch.view_as_real(v) for v in (system.log_A_bar, system.B_bar.to(torch.complex64), system.C.to(torch.complex64))
    )
    if not system.C.is_complex():
        x = torch.cat([x, torch.zeros_like(x)], dim=-1)
    if C.shape[1] <= MODES:
        operators = diagonal_operators(log_A_bar, B, C, shape.T, shape.rest)
        y, x, _ = walk(u, x, *operators, _trains(u, x, *operators))
    else:
        y, x = _run_in_parts(u, x, log_A_bar, B, C, shape)
    return y, x if system.C.is_complex() else x.chunk(2, dim=-1)[0]


def _run_in_parts(u: Tensor, x: Tensor, log_A_bar: Tensor, B: Tensor, C: Tensor, shape: Cut) -> tuple[Tensor, Tensor]:
    """A diagonal system is the sum of systems of some of its modes each."""
    outputs, states = [], []
    parts = zip(
        *(v.split(MODES, dim=1) for v in (log_A_bar, B, C)),
        *(v.split(MODES, dim=-1) for v in x.chunk(2, dim=-1)),
        strict=True,
    )
    for part in parts:
        operators = diagonal_operators(*part[:3], shape.T, shape.rest)
        y, after, _ = walk(u, torch.cat(part[3:], dim=-1), *operators, _trains(u, x, *operators))
        outputs.append(y)
        states.append(after.chunk(2, dim=-1))
    y = torch.stack(outputs).sum(0, dtype=torch.float32).to(u.dtype)
    return y, torch.cat([torch.cat(half, dim=-1) for half in zip(*states, strict=True)], dim=-1)


def dense_operators(system: DPLRSystem, T: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """K (H, T), P (H, T, S), Q (H, S, T) float32 and the carry (H, S, S) float64 of a chunk."""
    operators = chunk.dense_operators(system, T, torch.float32)
    return operators.toeplitz[:, 0], operators.P, operators.Q, operators.A_T.re


def _trains(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


# ------------------------------------------------------------------------------------------------ operators of S4D


@torch.library.custom_op("s4audio::diagonal_operators", mutates_args=())
def diagonal_operators(
    log_A_bar: Tensor, B: Tensor, C: Tensor, T: int, rest: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The operators of chunk.diagonal_operators, in one kernel.

    Args:
        log_A_bar: (H, modes, 2) float64, real and imaginary part.
        B: (H, modes, 2) float32, discretized.
        C: (H, modes, 2) float32.
        T: samples of a chunk.
        rest: samples of the short chunk at the end.

    Returns:
        K (H, T), P (H, T, S) and Q (H, S, T) float32; the carries over T and over `rest` samples, (H, 2, modes) float64.
    """
    log_A_bar, B, C = log_A_bar.contiguous(), B.contiguous(), C.contiguous()
    K, P, Q, carry, carry_rest = _empty_operators(log_A_bar, B, T)
    H, modes, _ = B.shape
    N = max(16, triton.next_power_of_2(modes))
    with torch.cuda.device_of(B):  # Triton launches on the current device; backward, autograd has made it the tensors'
        _operators[(H,)](log_A_bar, B, C, K, P, Q, carry, carry_rest, rest, modes, T, N)
    return K, P, Q, carry, carry_rest


@diagonal_operators.register_fake
def _(log_A_bar: Tensor, B: Tensor, C: Tensor, T: int, rest: int):
    return _empty_operators(log_A_bar, B, T)


def _empty_operators(log_A_bar: Tensor, B: Tensor, T: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    H, modes, _ = B.shape
    K, P, Q = B.new_empty(H, T), B.new_empty(H, T, 2 * modes), B.new_empty(H, 2 * modes, T)
    return K, P, Q, log_A_bar.new_empty(H, 2, modes), log_A_bar.new_empty(H, 2, modes)


@torch.library.custom_op("s4audio::diagonal_operators_backward", mutates_args=())
def _diagonal_operators_backward(
    dK: Tensor, dP: Tensor, dQ: Tensor, dcarry: Tensor, dcarry_rest: Tensor,
    log_A_bar: Tensor, B: Tensor, C: Tensor, T: int, rest: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    log_A_bar, B, C = log_A_bar.contiguous(), B.contiguous(), C.contiguous()
    gradients = [g.contiguous() for g in (dK, dP, dQ, dcarry, dcarry_rest)]
    dlog, dB, dC = torch.empty_like(log_A_bar), torch.empty_like(B), torch.empty_like(C)
    H, modes, _ = B.shape
    N = max(16, triton.next_power_of_2(modes))
    _operators_backward[(H,)](*gradients, log_A_bar, B, C, dlog, dB, dC, rest, modes, T, N)
    return dlog, dB, dC


@_diagonal_operators_backward.register_fake
def _(dK, dP, dQ, dcarry, dcarry_rest, log_A_bar, B, C, T, rest):
    return tuple(torch.empty_like(v, memory_format=torch.contiguous_format) for v in (log_A_bar, B, C))


def _keep_parameters(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3])
    ctx.T, ctx.rest = inputs[3:]


def _operators_gradient(ctx, *gradients):
    return *_diagonal_operators_backward(*gradients, *ctx.saved_tensors, ctx.T, ctx.rest), None, None


diagonal_operators.register_autograd(_operators_gradient, setup_context=_keep_parameters)


@triton.jit
def _power(log_A_bar, exponent):
    """exp(exponent * log_A_bar) in float64, real and imaginary part."""
    magnitude = tl.exp(log_A_bar[0] * exponent)
    angle = log_A_bar[1] * exponent
    return magnitude * tl.cos(angle), magnitude * tl.sin(angle)


@triton.jit
def _powers(log_A_bar, exponents):
    """As `_power` for a tile of them, in float32: the angle, which may be thousands of turns, is reduced in float64."""
    magnitude = tl.exp((log_A_bar[0] * exponents).to(tl.float32))
    turns = log_A_bar[1] * exponents * 0.15915494309189535  # 1 / (2 pi)
    angle = ((turns - tl.floor(turns + 0.5)) * 6.283185307179586).to(tl.float32)
    return magnitude * tl.cos(angle), magnitude * tl.sin(angle)


@triton.jit
def _pair(pointer, h, n, modes):
    """Entries n of channel h of a contiguous (H, modes, 2): real and imaginary parts."""
    at = pointer + (h * modes + n) * 2
    return tl.load(at, mask=n < modes, other=0), tl.load(at + 1, mask=n < modes, other=0)


@triton.jit
def _operators(log_A_bar, B, C, K, P, Q, carry, carry_rest, rest, modes, T: tl.constexpr, N: tl.constexpr):
    """One channel a program."""
    h = tl.program_id(0).to(tl.int64)
    t, n = tl.arange(0, T), tl.arange(0, N)
    log = _pair(log_A_bar, h, n, modes)
    B_re, B_im = _pair(B, h, n, modes)
    C_re, C_im = _pair(C, h, n, modes)
    wide = (log[0][None, :], log[1][None, :])
    known = (n < modes)[None, :] & (t < T)[:, None]
    re, im = _powers(wide, t.to(tl.float64)[:, None])
    p_re, p_im = re * B_re[None, :] - im * B_im[None, :], re * B_im[None, :] + im * B_re[None, :]  # A_bar^t B_bar
    at = P + (h * T + T - 1 - t[:, None]) * 2 * modes + n[None, :]
    tl.store(at, p_re, mask=known)
    tl.store(at + modes, p_im, mask=known)
    tl.store(K + h * T + t, 2 * tl.sum(C_re[None, :] * p_re - C_im[None, :] * p_im, 1))
    re, im = _powers(wide, (t + 1).to(tl.float64)[:, None])
    at = Q + (h * 2 * modes + n[None, :]) * T + t[:, None]
    tl.store(at, 2 * (re * C_re[None, :] - im * C_im[None, :]), mask=known)
    tl.store(at + modes * T, -2 * (re * C_im[None, :] + im * C_re[None, :]), mask=known)
    _store_carry(carry, log, T, h, n, modes, N)
    _store_carry(carry_rest, log, rest, h, n, modes, N)


@triton.jit
def _store_carry(out, log, exponent, h, n, modes, N: tl.constexpr):
    re, im = _power(log, tl.zeros((N,), tl.float64) + exponent)
    tl.store(out + h * 2 * modes + n, re, mask=n < modes)
    tl.store(out + (h * 2 + 1) * modes + n, im, mask=n < modes)


@triton.jit
def _times_conj(a, b):
    """a conj(b), which is what a gradient a becomes on its way through a product with b."""
    return a[0] * b[0] + a[1] * b[1], a[1] * b[0] - a[0] * b[1]


@triton.jit
def _operators_backward(
    dK, dP, dQ, dcarry, dcarry_rest, log_A_bar, B, C, dlog, dB, dC, rest, modes, T: tl.constexpr, N: tl.constexpr
):  # fmt: skip
    """One channel a program."""
    h = tl.program_id(0).to(tl.int64)
    t, n = tl.arange(0, T), tl.arange(0, N)
    log = _pair(log_A_bar, h, n, modes)
    b, c = _pair(B, h, n, modes), _pair(C, h, n, modes)
    wide = (log[0][None, :], log[1][None, :])
    b_wide, c_wide = (b[0][None, :], b[1][None, :]), (2 * c[0][None, :], 2 * c[1][None, :])
    known = (n < modes)[None, :] & (t < T)[:, None]
    # P = A_bar^t B and K = Re(2C A_bar^t B)
    E = _powers(wide, t.to(tl.float64)[:, None])
    at = dP + (h * T + T - 1 - t[:, None]) * 2 * modes + n[None, :]
    g = (tl.load(at, mask=known, other=0), tl.load(at + modes, mask=known, other=0))
    k = tl.load(dK + h * T + t)[:, None]
    through_c = _times_conj((k, tl.zeros_like(k)), c_wide)
    g = (g[0] + through_c[0], g[1] + through_c[1])  # of A_bar^t B
    to_E = _times_conj(g, b_wide)
    to_log = _times_conj(to_E, E)
    to_b = _times_conj(g, E)
    E_b = (E[0] * b_wide[0] - E[1] * b_wide[1], E[0] * b_wide[1] + E[1] * b_wide[0])
    to_c = _times_conj((k, tl.zeros_like(k)), E_b)
    factor = t.to(tl.float32)[:, None]
    log_re, log_im = tl.sum(factor * to_log[0], 0), tl.sum(factor * to_log[1], 0)
    b_re, b_im = tl.sum(to_b[0], 0), tl.sum(to_b[1], 0)
    c_re, c_im = tl.sum(to_c[0], 0), tl.sum(to_c[1], 0)
    # Q = 2C A_bar^(t+1), conjugated
    E = _powers(wide, (t + 1).to(tl.float64)[:, None])
    at = dQ + (h * 2 * modes + n[None, :]) * T + t[:, None]
    g = (tl.load(at, mask=known, other=0), -tl.load(at + modes * T, mask=known, other=0))
    to_c = _times_conj(g, E)
    c_re += tl.sum(to_c[0], 0)
    c_im += tl.sum(to_c[1], 0)
    to_log = _times_conj(_times_conj(g, c_wide), E)
    log_re += tl.sum((factor + 1) * to_log[0], 0)
    log_im += tl.sum((factor + 1) * to_log[1], 0)
    through_T = _carry_gradient(dcarry, log, T, h, n, modes, N)
    through_rest = _carry_gradient(dcarry_rest, log, rest, h, n, modes, N)
    at, mask = (h * modes + n) * 2, n < modes
    tl.store(dlog + at, log_re + through_T[0] + through_rest[0], mask=mask)
    tl.store(dlog + at + 1, log_im + through_T[1] + through_rest[1], mask=mask)
    tl.store(dB + at, b_re, mask=mask)
    tl.store(dB + at + 1, b_im, mask=mask)
    tl.store(dC + at, 2 * c_re, mask=mask)
    tl.store(dC + at + 1, 2 * c_im, mask=mask)


@triton.jit
def _carry_gradient(dcarry, log, exponent, h, n, modes, N: tl.constexpr):
    """What the gradient of A_bar^exponent says of log A_bar, float64."""
    E = _power(log, tl.zeros((N,), tl.float64) + exponent)
    re = tl.load(dcarry + h * 2 * modes + n, mask=n < modes, other=0)
    im = tl.load(dcarry + (h * 2 + 1) * modes + n, mask=n < modes, other=0)
    to_log = _times_conj((re, im), E)
    return exponent * to_log[0], exponent * to_log[1]


# ------------------------------------------------------------------------------------------------ the walk


@torch.library.custom_op("s4audio::walk", mutates_args=())
def walk(
    u: Tensor, x: Tensor, K: Tensor, P: Tensor, Q: Tensor, carry: Tensor, carry_rest: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The recurrence of chunk.py over a whole batch.

    Args:
        u: (B, H, L) float32, float16 or bfloat16.
        x: (H, B, S) float32, the state before the first sample.
        K: (H, T) float32, the kernel's first taps; T is that of `cut`.
        P: (H, T, S) float32.
        Q: (H, S, T) float32.
        carry: over T samples, float64: (H, 2, S / 2) the diagonal, or (H, S, S) a matrix applied from the right.
        carry_rest: the same over the samples after the last whole chunk.
        keep: whether the states are needed for a gradient.

    Returns:
        y (B, H, L) in u's dtype, the state after the last sample (H, B, S), and, if kept, the states before each chunk
        (B, H, M, S), in bfloat16 if that is how they are multiplied.
    """
    with torch.cuda.device_of(u):
        x, K, P, Q, carry, carry_rest = (v.contiguous() for v in (x, K, P, Q, carry, carry_rest))
        return _walk(_rows(u), x, K, P, Q, carry, carry_rest, keep)


def _walk(
    u: Tensor, x: Tensor, K: Tensor, P: Tensor, Q: Tensor, carry: Tensor, carry_rest: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    y, last, X = _empty_walk(u, x, P, keep)
    batch, channels, length = u.shape
    shape = cut(u)
    S = P.shape[-1]
    common = _constants(S, shape.T, carry, PRECISION[u.dtype].forward)
    if shape.num_chunks:
        tiles = (triton.cdiv(batch * shape.num_segments, LANES), channels)
        if shape.num_segments > 1:
            sums = x.new_empty(channels, batch * shape.num_segments, S)
            _sums[tiles](
                u, sums, P, carry, u.stride(0), u.stride(1), batch, shape.num_segments, shape.span, shape.num_chunks, S, 1,
                BACK=False, **common,
            )  # fmt: skip
            x = _chain(sums, x, carry, shape, batch, back=False)
        _forward[tiles](
            u, y, X, x, last, K, P, Q, carry, u.stride(0), u.stride(1), y.stride(0), y.stride(1), batch,
            shape.num_segments, shape.span, shape.num_chunks, 0, shape.T, X.stride(1), 0,
            KEEP=keep, **common,
        )  # fmt: skip
        x = last
    if shape.rest:
        after = torch.empty_like(last)
        _forward[(triton.cdiv(batch, LANES), channels)](
            u, y, X, x, after, K, P, Q, carry_rest, u.stride(0), u.stride(1), y.stride(0), y.stride(1), batch,
            1, 1, 1, shape.num_chunks * shape.T, shape.rest, X.stride(1), shape.num_chunks,
            KEEP=keep, **common,
        )  # fmt: skip
        last = after
    return y, last, X


def _programs(lanes: int, channels: int) -> tuple[int, int]:
    """Programs of a channel and the tiles of lanes that each walks, one after the other; each writes sums of its own."""
    tiles = triton.cdiv(lanes, LANES)
    each = max(1, tiles * channels // FILL)
    return triton.cdiv(tiles, each), each


def _constants(S: int, T: int, carry: Tensor, product: str) -> dict[str, Any]:
    """What the kernels of a walk have in common."""
    N = max(16, triton.next_power_of_2(S // 2))
    return {"modes": S // 2, "R": LANES, "T": T, "N": N, "DENSE": carry.shape[-1] == S, "PRODUCT": product, **OPTIONS}


def _rows(v: Tensor) -> Tensor:
    """v, or a copy, such that the samples of a sequence lie one after the other."""
    return v if v.stride(-1) == 1 else v.contiguous()


def _empty_walk(u: Tensor, x: Tensor, P: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    batch, channels, length = u.shape
    S = P.shape[-1]
    num_states = -(-length // P.shape[1]) if keep else 0
    kept = torch.bfloat16 if u.dtype == torch.bfloat16 else torch.float32
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    return y, x.new_empty(channels, batch, S), u.new_empty(batch, channels, num_states, S, dtype=kept)


@walk.register_fake
def _(u, x, K, P, Q, carry, carry_rest, keep):
    return _empty_walk(u, x, P, keep)


def _chain(sums: Tensor, x: Tensor, carry: Tensor, shape: Cut, batch: int, back: bool) -> Tensor:
    """The state at the start of each segment (or, backwards, its gradient at the end), laid out as `sums`."""
    channels, S = sums.shape[0], sums.shape[-1]
    starts = torch.empty_like(sums)
    dense = carry.shape[-1] == S
    over_span = over_last = carry
    if dense:
        over_span = torch.linalg.matrix_power(carry, shape.span)
        over_last = torch.linalg.matrix_power(carry, shape.last_span) if back else over_span
        if back:
            over_span, over_last = over_span.mT.contiguous(), over_last.mT.contiguous()
    N = max(16, triton.next_power_of_2(S // 2))
    _starts[(triton.cdiv(batch, LANES), channels)](
        sums, x, starts, over_span, over_last, batch, shape.num_segments, shape.span, shape.last_span, S // 2,
        BACK=back, R=LANES, N=N, DENSE=dense,
    )  # fmt: skip
    return starts


@torch.library.custom_op("s4audio::walk_backward", mutates_args=())
def _walk_backward(
    dy: Tensor, dlast: Tensor, u: Tensor, X: Tensor, K: Tensor, P: Tensor, Q: Tensor, carry: Tensor, carry_rest: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    u, dy, K, P, Q, carry, carry_rest = _rows(u), _rows(dy), *(v.contiguous() for v in (K, P, Q, carry, carry_rest))
    du = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    batch, channels, length = u.shape
    shape = cut(u)
    S, T = P.shape[-1], shape.T
    dense = carry.shape[-1] == S
    exact = u.dtype == torch.float32 and u.numel() < SMALL
    common = _constants(S, T, carry, PRECISION[u.dtype].forward if exact else PRECISION[u.dtype].backward)
    body, body_tiles = _programs(batch * shape.num_segments, channels) if shape.num_chunks else (0, 0)
    tail, tail_tiles = _programs(batch, channels) if shape.rest else (0, 0)
    size_A = S * S if dense else S
    partial = dlast.new_empty(channels, body + tail, T * T + 2 * T * S + size_A)
    gradient = dlast.contiguous()
    if shape.rest:
        before = torch.empty_like(gradient)
        _backward[(tail, channels)](
            u, dy, du, X, gradient, before, partial, K, P, Q, carry_rest, u.stride(0), u.stride(1), dy.stride(0),
            dy.stride(1), du.stride(0), du.stride(1), batch, tail_tiles, 1, 1, 1, shape.num_chunks * T, shape.rest,
            X.stride(1), shape.num_chunks, body, body + tail, **common,
        )  # fmt: skip
        gradient = before
    if shape.num_chunks:
        ends = gradient
        if shape.num_segments > 1:
            sums = dlast.new_empty(channels, batch * shape.num_segments, S)
            _sums[(triton.cdiv(batch * shape.num_segments, LANES), channels)](
                dy, sums, Q, carry, dy.stride(0), dy.stride(1), batch, shape.num_segments, shape.span, shape.num_chunks,
                1, T, BACK=True, **common,
            )  # fmt: skip
            ends = _chain(sums, gradient, carry, shape, batch, back=True)
        before = torch.empty_like(gradient)
        _backward[(body, channels)](
            u, dy, du, X, ends, before, partial, K, P, Q, carry, u.stride(0), u.stride(1), dy.stride(0), dy.stride(1),
            du.stride(0), du.stride(1), batch, body_tiles, shape.num_segments, shape.span, shape.num_chunks, 0, T,
            X.stride(1), 0, 0, body + tail, **common,
        )  # fmt: skip
        gradient = before
    first, second, third = T * T, T * T + T * S, T * T + 2 * T * S
    total = partial[..., :third].sum(1) if body + tail > 1 else partial[:, 0, :third]
    dK = total[:, :first].unflatten(1, (T, T)).sum(1)
    # Copies: what an operation returns must not share memory, and of one channel these slices are contiguous already.
    dP, dQ = total[:, first:second].clone().unflatten(1, (T, S)), total[:, second:].clone().unflatten(1, (S, T))
    dA = [partial[:, part, third:].sum(1).to(carry.dtype).view(carry.shape) for part in (slice(body), slice(body, None))]
    return du, gradient, dK, dP, dQ, dA[0], dA[1]


@_walk_backward.register_fake
def _(dy, dlast, u, X, K, P, Q, carry, carry_rest):
    du = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    return du, *(torch.empty_like(v, memory_format=torch.contiguous_format) for v in (dlast, K, P, Q, carry, carry_rest))


def _refuse_second_derivatives(ctx, *gradients):
    raise RuntimeError("the fused engine has no second derivatives; take them within s4audio.backend('chunk').")


for _gradient in (_diagonal_operators_backward, _walk_backward):
    _gradient.register_autograd(_refuse_second_derivatives)


def _keep_walk(ctx, inputs, output):
    u, _, K, P, Q, carry, carry_rest, keep = inputs
    ctx.save_for_backward(u, output[2], K, P, Q, carry, carry_rest)
    ctx.set_materialize_grads(False)  # zeros for X would be written and never read


def _walk_gradient(ctx, dy, dlast, _):
    u, X, K = ctx.saved_tensors[:3]
    if dy is None:
        dy = torch.zeros_like(u)
    if dlast is None:
        dlast = K.new_zeros(u.shape[1], u.shape[0], X.shape[-1])
    return *_walk_backward(dy, dlast, *ctx.saved_tensors), None


walk.register_autograd(_walk_gradient, setup_context=_keep_walk)


@triton.jit
def _factor(a, PRODUCT: tl.constexpr):
    """a as a factor of products: itself, or its high and its low part in bfloat16; one part alone stands twice."""
    if PRODUCT == "tf32x3":
        a = a.to(tl.float32)
        return a, a
    else:
        high = a.to(tl.bfloat16)
        if PRODUCT == "bf16x3":
            return high, (a.to(tl.float32) - high.to(tl.float32)).to(tl.bfloat16)
        else:
            return high, high


@triton.jit
def _transposed(a):
    return tl.trans(a[0]), tl.trans(a[1])


# Counts that change from call to call: a stream of blocks of many lengths must not compile a kernel for each.
COUNTS = [
    "batch",
    "tiles",
    "num_segments",
    "span",
    "last_span",
    "num_chunks",
    "first_chunk",
    "first_partial",
    "num_partials",
]


@triton.jit
def _dot(a, b, sum, PRODUCT: tl.constexpr):
    """sum + a b, of factors; the product of two low parts is left out."""
    if PRODUCT == "tf32x3":
        return tl.dot(a[0], b[0], sum, input_precision="tf32x3")
    else:
        if PRODUCT == "bf16x3":
            sum = tl.dot(a[1], b[0], sum)
            sum = tl.dot(a[0], b[1], sum)
        return tl.dot(a[0], b[0], sum)


@triton.jit
def _halves(pointer, rows, columns, row_stride, column_stride, half, mask):
    """Real and imaginary part of an operator or of states; the imaginary part lies `half` numbers on."""
    at = pointer + rows * row_stride + columns * column_stride
    return tl.load(at, mask=mask, other=0), tl.load(at + half, mask=mask, other=0)


@triton.jit
def _load_carry(carry, h, n, modes, TRANSPOSED: tl.constexpr, DENSE: tl.constexpr):
    """The carry as float32: the diagonal's two parts, or the four blocks of the matrix; of its adjoint if transposed."""
    if DENSE:
        base, mask = carry + h * 4 * modes * modes, (n < modes)[:, None] & (n < modes)[None, :]
        S, rows, columns = 2 * modes, n[:, None], n[None, :]
        if TRANSPOSED:
            rows, columns = n[None, :], n[:, None]
        rr = tl.load(base + rows * S + columns, mask=mask, other=0).to(tl.float32)
        ri = tl.load(base + rows * S + columns + modes, mask=mask, other=0).to(tl.float32)
        ir = tl.load(base + (rows + modes) * S + columns, mask=mask, other=0).to(tl.float32)
        ii = tl.load(base + (rows + modes) * S + columns + modes, mask=mask, other=0).to(tl.float32)
        if TRANSPOSED:
            ri, ir = ir, ri
        return rr, ri, ir, ii
    else:
        re = tl.load(carry + h * 2 * modes + n, mask=n < modes, other=0).to(tl.float32)[None, :]
        im = tl.load(carry + (h * 2 + 1) * modes + n, mask=n < modes, other=0).to(tl.float32)[None, :]
        if TRANSPOSED:
            im = -im
        return re, im, im, re  # the last two are not used


@triton.jit
def _advance(re, im, A, DENSE: tl.constexpr):
    """The states x A. In float32 whatever the input: its rounding would come back in every later chunk."""
    if DENSE:
        new_re = tl.dot(im, A[2], tl.dot(re, A[0], input_precision="tf32x3"), input_precision="tf32x3")
        new_im = tl.dot(im, A[3], tl.dot(re, A[1], input_precision="tf32x3"), input_precision="tf32x3")
        return new_re, new_im
    else:
        return re * A[0] - im * A[1], re * A[1] + im * A[0]


@triton.jit(do_not_specialize=COUNTS)
def _sums(
    v, sums, operator, carry, v_b, v_h, batch, num_segments, span, num_chunks, o_t, o_n, modes,
    BACK: tl.constexpr, R: tl.constexpr, T: tl.constexpr, N: tl.constexpr, DENSE: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """What each segment adds to the state: from u by P, or backwards in time from dy by Q transposed. One reading of v."""
    h = tl.program_id(1).to(tl.int64)
    lane = tl.program_id(0) * R + tl.arange(0, R)
    t, n = tl.arange(0, T), tl.arange(0, N)
    b, segment = (lane // num_segments).to(tl.int64), lane % num_segments
    is_lane, is_mode = lane < batch * num_segments, (n < modes)[None, :] & (t < T)[:, None]
    o_re, o_im = _halves(operator + h * T * 2 * modes, t[:, None], n[None, :], o_t, o_n, modes * o_n, is_mode)
    o_re, o_im = _factor(o_re, PRODUCT), _factor(o_im, PRODUCT)
    A = _load_carry(carry, h, n, modes, BACK, DENSE)
    rows = v + (b * v_b + h * v_h)[:, None] + t[None, :]
    re, im = tl.zeros((R, N), tl.float32), tl.zeros((R, N), tl.float32)
    for step in range(span):
        m = segment * span + step
        if BACK:
            m = segment * span + span - 1 - step
        is_chunk = is_lane & (m < num_chunks)
        V = _factor(tl.load(rows + (m * T)[:, None], mask=is_chunk[:, None] & (t < T)[None, :], other=0), PRODUCT)
        new_re, new_im = _advance(re, im, A, DENSE)
        re = tl.where(is_chunk[:, None], _dot(V, o_re, new_re, PRODUCT), re)
        im = tl.where(is_chunk[:, None], _dot(V, o_im, new_im, PRODUCT), im)
    at = sums + (h * batch * num_segments + lane)[:, None] * 2 * modes + n[None, :]
    mask = is_lane[:, None] & (n < modes)[None, :]
    tl.store(at, re, mask=mask)
    tl.store(at + modes, im, mask=mask)


@triton.jit(do_not_specialize=COUNTS)
def _starts(
    sums, x, starts, over_span, over_last, batch, num_segments, span, last_span, modes,
    BACK: tl.constexpr, R: tl.constexpr, N: tl.constexpr, DENSE: tl.constexpr,
):  # fmt: skip
    """Chains the segments; R sequences a program. Limited by the latency of num_segments steps, whose loads do not wait."""
    h = tl.program_id(1).to(tl.int64)
    b, n = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64), tl.arange(0, N)
    mask = (b < batch)[:, None] & (n < modes)[None, :]
    re, im = _halves(x, (h * batch + b)[:, None], n[None, :], 2 * modes, 1, modes, mask)
    if DENSE:
        A = _load_carry(over_span, h, n, modes, False, DENSE)
        A_last = _load_carry(over_last, h, n, modes, False, DENSE)
    else:
        A = _diagonal_power(over_span, span, h, n, modes, BACK, N)
        A_last = _diagonal_power(over_last, last_span, h, n, modes, BACK, N)
    first = (h * batch + b)[:, None] * num_segments
    for step in range(num_segments):
        segment = num_segments - 1 - step if BACK else step
        at = (first + segment) * 2 * modes + n[None, :]
        tl.store(starts + at, re, mask=mask)
        tl.store(starts + at + modes, im, mask=mask)
        z_re, z_im = tl.load(sums + at, mask=mask, other=0), tl.load(sums + at + modes, mask=mask, other=0)
        if BACK and not DENSE:
            is_last = segment == num_segments - 1
            now = (tl.where(is_last, A_last[0], A[0]), tl.where(is_last, A_last[1], A[1]), A[2], A[3])
            re, im = _advance(re, im, now, DENSE)
        elif BACK:
            is_last = segment == num_segments - 1
            far_re, far_im = _advance(re, im, A_last, DENSE)
            re, im = _advance(re, im, A, DENSE)
            re, im = tl.where(is_last, far_re, re), tl.where(is_last, far_im, im)
        else:
            re, im = _advance(re, im, A, DENSE)
        re += z_re
        im += z_im


@triton.jit
def _diagonal_power(carry, exponent, h, n, modes, CONJUGATE: tl.constexpr, N: tl.constexpr):
    """The diagonal carry to a power, by squaring in float64."""
    a = tl.load(carry + h * 2 * modes + n, mask=n < modes, other=0)
    b = tl.load(carry + (h * 2 + 1) * modes + n, mask=n < modes, other=0)
    re, im = tl.full((N,), 1, tl.float64), tl.zeros((N,), tl.float64)
    while exponent > 0:
        odd = exponent % 2 == 1
        re, im = tl.where(odd, re * a - im * b, re), tl.where(odd, re * b + im * a, im)
        a, b = a * a - b * b, 2 * a * b
        exponent = exponent // 2
    if CONJUGATE:
        im = -im
    re, im = re.to(tl.float32)[None, :], im.to(tl.float32)[None, :]
    return re, im, im, re


@triton.jit(do_not_specialize=COUNTS)
def _forward(
    u, y, X, starts, last, K, P, Q, carry, u_b, u_h, y_b, y_h, batch, num_segments, span, num_chunks, first, valid, X_h,
    first_chunk, modes,
    KEEP: tl.constexpr, R: tl.constexpr, T: tl.constexpr, N: tl.constexpr, DENSE: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """Output and states from the states at the start of each segment. One reading of u, one writing of y and of X."""
    h, channels = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    lane = tl.program_id(0) * R + tl.arange(0, R)
    t, n = tl.arange(0, T), tl.arange(0, N)
    b, segment = (lane // num_segments).to(tl.int64), lane % num_segments
    is_lane, is_mode, is_sample = lane < batch * num_segments, n < modes, t < valid
    toeplitz, p, q = _load_operators(K, P, Q, h, t, n, valid, modes, T, PRODUCT)
    A = _load_carry(carry, h, n, modes, False, DENSE)
    is_state = is_lane[:, None] & is_mode[None, :]
    re, im = _halves(starts, (h * batch * num_segments + lane)[:, None], n[None, :], 2 * modes, 1, modes, is_state)
    u_rows = u + (b * u_b + h * u_h + first)[:, None] + t[None, :]
    y_rows = y + (b * y_b + h * y_h + first)[:, None] + t[None, :]
    X_rows = X + ((b * channels + h) * X_h)[:, None] + n[None, :]
    for step in range(span):
        m = segment * span + step
        is_chunk = is_lane & (m < num_chunks)
        here = is_chunk[:, None] & is_sample[None, :]
        U = _factor(tl.load(u_rows + (m * T)[:, None], mask=here, other=0), PRODUCT)
        if KEEP:
            at, mask = X_rows + ((first_chunk + m) * 2 * modes)[:, None], is_chunk[:, None] & is_mode[None, :]
            tl.store(at, re, mask=mask)
            tl.store(at + modes, im, mask=mask)
        Y = _dot(U, toeplitz, tl.zeros((R, T), tl.float32), PRODUCT)
        Y = _dot(_factor(im, PRODUCT), q[1], _dot(_factor(re, PRODUCT), q[0], Y, PRODUCT), PRODUCT)
        tl.store(y_rows + (m * T)[:, None], Y, mask=here)
        new_re, new_im = _advance(re, im, A, DENSE)
        re = tl.where(is_chunk[:, None], _dot(U, p[0], new_re, PRODUCT), re)
        im = tl.where(is_chunk[:, None], _dot(U, p[1], new_im, PRODUCT), im)
    at = last + (h * batch + b)[:, None] * 2 * modes + n[None, :]
    is_last = is_state & (segment == num_segments - 1)[:, None]
    tl.store(at, re, mask=is_last)
    tl.store(at + modes, im, mask=is_last)


@triton.jit
def _load_operators(K, P, Q, h, t, n, valid, modes, T: tl.constexpr, PRODUCT: tl.constexpr):
    """toeplitz(K) (T, T), P as (T, N) twice and Q as (N, T) twice; for a chunk of fewer samples the last rows of P."""
    l = t[None, :] - t[:, None]
    toeplitz = tl.load(K + h * T + l, mask=l >= 0, other=0)
    is_mode = (n < modes)[None, :]
    p = _halves(
        P + h * T * 2 * modes, T - valid + t[:, None], n[None, :], 2 * modes, 1, modes, is_mode & (t < valid)[:, None]
    )
    q = _halves(Q + h * T * 2 * modes, n[:, None], t[None, :], T, 1, modes * T, (n < modes)[:, None] & (t < valid)[None, :])
    p, q = (_factor(p[0], PRODUCT), _factor(p[1], PRODUCT)), (_factor(q[0], PRODUCT), _factor(q[1], PRODUCT))
    return _factor(toeplitz, PRODUCT), p, q


@triton.jit(do_not_specialize=COUNTS)
def _backward(
    u, dy, du, X, ends, before, partial, K, P, Q, carry, u_b, u_h, dy_b, dy_h, du_b, du_h, batch, tiles, num_segments,
    span, num_chunks, first, valid, X_h, first_chunk, first_partial, num_partials, modes,
    R: tl.constexpr, T: tl.constexpr, N: tl.constexpr, DENSE: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """All gradients, from those of the states at the end of each segment. One reading of u, dy and X, one writing of du.

    Five products of T x T or T x S a chunk; at N = 64 the three sums of T x T and T x S fill 96 registers of a thread.
    """
    h, channels = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    t, n = tl.arange(0, T), tl.arange(0, N)
    is_mode, is_sample = n < modes, t < valid
    toeplitz, p, q = _load_operators(K, P, Q, h, t, n, valid, modes, T, PRODUCT)
    A = _load_carry(carry, h, n, modes, True, DENSE)
    W = tl.zeros((T, T), tl.float32)
    dp_re, dp_im = tl.zeros((T, N), tl.float32), tl.zeros((T, N), tl.float32)
    dq_re, dq_im = (
        tl.zeros((T, N), tl.float32),
        tl.zeros((T, N), tl.float32),
    )  # transposed: T rows fill a warp group, N do not
    if DENSE:
        a_rr, a_ri = tl.zeros((N, N), tl.float32), tl.zeros((N, N), tl.float32)
        a_ir, a_ii = tl.zeros((N, N), tl.float32), tl.zeros((N, N), tl.float32)
    else:
        a_re, a_im = tl.zeros((R, N), tl.float32), tl.zeros((R, N), tl.float32)
    for tile in range(tiles):
        lane = (tl.program_id(0) * tiles + tile) * R + tl.arange(0, R)
        b, segment = (lane // num_segments).to(tl.int64), lane % num_segments
        is_lane = lane < batch * num_segments
        is_state = is_lane[:, None] & is_mode[None, :]
        g_re, g_im = _halves(ends, (h * batch * num_segments + lane)[:, None], n[None, :], 2 * modes, 1, modes, is_state)
        u_rows = u + (b * u_b + h * u_h + first)[:, None] + t[None, :]
        dy_rows = dy + (b * dy_b + h * dy_h + first)[:, None] + t[None, :]
        du_rows = du + (b * du_b + h * du_h + first)[:, None] + t[None, :]
        X_rows = X + ((b * channels + h) * X_h)[:, None] + n[None, :]
        for step in range(span):
            m = segment * span + span - 1 - step
            is_chunk = is_lane & (m < num_chunks)
            here = is_chunk[:, None] & is_sample[None, :]
            U = _factor(tl.load(u_rows + (m * T)[:, None], mask=here, other=0), PRODUCT)
            G = _factor(tl.load(dy_rows + (m * T)[:, None], mask=here, other=0), PRODUCT)
            at, mask = X_rows + ((first_chunk + m) * 2 * modes)[:, None], is_chunk[:, None] & is_mode[None, :]
            x_re, x_im = tl.load(at, mask=mask, other=0), tl.load(at + modes, mask=mask, other=0)
            g = _factor(g_re, PRODUCT), _factor(g_im, PRODUCT)
            x = _factor(x_re, PRODUCT), _factor(x_im, PRODUCT)
            dU = _dot(G, _transposed(toeplitz), tl.zeros((R, T), tl.float32), PRODUCT)
            dU = _dot(g[1], _transposed(p[1]), _dot(g[0], _transposed(p[0]), dU, PRODUCT), PRODUCT)
            tl.store(du_rows + (m * T)[:, None], dU, mask=here)
            W = _dot(_transposed(U), G, W, PRODUCT)
            dp_re = _dot(_transposed(U), g[0], dp_re, PRODUCT)
            dp_im = _dot(_transposed(U), g[1], dp_im, PRODUCT)
            dq_re = _dot(_transposed(G), x[0], dq_re, PRODUCT)
            dq_im = _dot(_transposed(G), x[1], dq_im, PRODUCT)
            if DENSE:
                a_rr = _dot(_transposed(x[0]), g[0], a_rr, PRODUCT)
                a_ri = _dot(_transposed(x[0]), g[1], a_ri, PRODUCT)
                a_ir = _dot(_transposed(x[1]), g[0], a_ir, PRODUCT)
                a_ii = _dot(_transposed(x[1]), g[1], a_ii, PRODUCT)
            else:
                x_re, x_im = x_re.to(tl.float32), x_im.to(tl.float32)
                a_re += x_re * g_re + x_im * g_im
                a_im += x_re * g_im - x_im * g_re
            new_re, new_im = _advance(g_re, g_im, A, DENSE)
            g_re = tl.where(is_chunk[:, None], _dot(G, _transposed(q[0]), new_re, PRODUCT), g_re)
            g_im = tl.where(is_chunk[:, None], _dot(G, _transposed(q[1]), new_im, PRODUCT), g_im)
        at = before + (h * batch + b)[:, None] * 2 * modes + n[None, :]
        is_first = is_state & (segment == 0)[:, None]
        tl.store(at, g_re, mask=is_first)
        tl.store(at + modes, g_im, mask=is_first)
    S = 2 * modes
    size_A = S * S if DENSE else S
    out = partial + (h * num_partials + first_partial + tl.program_id(0)) * (T * T + 2 * T * S + size_A)
    # Row i of W turned by i to the left: its sum over rows is then the gradient of K, whose taps are W's diagonals.
    l = t[None, :] - t[:, None]
    tl.store(out + t[:, None] * T + (l + T) % T, tl.where(l >= 0, W, 0))
    row = (t + T - valid) % T  # rows of the last chunk's P are the last of P
    at, mask = out + T * T + row[:, None] * S + n[None, :], (t < T)[:, None] & is_mode[None, :]
    tl.store(at, dp_re, mask=mask)
    tl.store(at + modes, dp_im, mask=mask)
    at = out + T * T + T * S + n[None, :] * T + t[:, None]
    tl.store(at, dq_re, mask=mask)
    tl.store(at + modes * T, dq_im, mask=mask)
    out += T * T + 2 * T * S
    if DENSE:
        at, mask = out + n[:, None] * S + n[None, :], is_mode[:, None] & is_mode[None, :]
        tl.store(at, a_rr, mask=mask)
        tl.store(at + modes, a_ri, mask=mask)
        tl.store(at + modes * S, a_ir, mask=mask)
        tl.store(at + modes * S + modes, a_ii, mask=mask)
    else:
        tl.store(out + n, tl.sum(a_re, 0), mask=is_mode)
        tl.store(out + modes + n, tl.sum(a_im, 0), mask=is_mode)
