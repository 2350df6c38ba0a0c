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

Backward in time, for the second half of the channels of a layer that runs both ways, the same kernels take the chunks from
the end and the operators mirrored (REVERSE), and add to the y and du that are there: nothing is turned over in memory.

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
FILL = 512  # programs wanted: four for each multiprocessor of an H100
WALKERS = 264  # programs of a gradient, each with sums of its own: as many as an H100 runs at a time
CHAIN = 64  # rows of a program that chains segments, each of them a sequence or a group of its segments
BLOCK = 512  # numbers that a program sums over programs
SMALL = 2**22  # numbers of input below which launching kernels costs more than running them
OPTIONS = {"num_warps": 4, "num_stages": 3}
INTERPRETED = bool(triton.knobs.runtime.interpret)  # TRITON_INTERPRET=1: the kernels run in Python, on the CPU
IN_PYTHON = tl.constexpr(INTERPRETED)  # the same for kernels
ROUNDS = tl.constexpr(1 + 2.0**-11 / 1.44)  # tensor cores cut TF32 off after 10 bits; with it they round, on average


class Precision(NamedTuple):
    """How an input's dtype is multiplied, and in chunks of how many samples: shorter ones where a factor has two parts."""

    forward: str
    backward: str  # of SMALL numbers or more; of fewer as forward
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


def cut(u: Tensor, groups: int = 1) -> Cut:
    """The cut for an input (B, H, L), whose segments are chained in so many groups side by side.

    Segments are as long as still gives FILL programs: they cost a second reading. And the shorter, the more of them are
    chained one by one: the two take the same time at about half the square root of a group's chunks.
    """
    batch, channels, length = u.shape
    T = min(PRECISION[u.dtype].T, max(16, triton.next_power_of_2(length)))
    num_chunks, rest = divmod(length, T)
    shortest = math.isqrt(num_chunks // (4 * groups))
    rows = batch if batch < LANES else LANES * triton.cdiv(batch, LANES)  # with those that are empty
    span = max(1, rows * num_chunks * channels // (LANES * FILL), shortest)
    num_segments = max(1, triton.cdiv(num_chunks, span))
    return Cut(T, num_chunks, rest, max(1, triton.cdiv(num_chunks, num_segments)), num_segments)


def _groups(batch: int, dense: bool) -> int:
    """Groups of a sequence's segments that are chained side by side: as many as make CHAIN rows; of a dense carry, one."""
    return 1 if dense else max(1, CHAIN // triton.next_power_of_2(batch))


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
    if not runs_on(u):
        where = "a GPU that is not NVIDIA's, or older than Ampere," if u.is_cuda else f"the {u.device.type},"
        return f"u is on {where} and its kernels multiply bfloat16 and TF32 in CUDA"
    return None


def runs_on(tensor: Tensor) -> bool:
    """Whether kernels run where the tensor is: on NVIDIA's GPUs from Ampere on, which multiply bfloat16 and TF32."""
    if INTERPRETED or not tensor.is_cuda:
        return INTERPRETED
    return not torch.version.hip and torch.cuda.get_device_properties(tensor.device).major >= 8


def convolve(system: DiagonalSystem | DPLRSystem, u: Tensor, D: Tensor | None = None) -> Tensor:
    """y (B, H, L) in u's dtype from u (B, H, L) and silence before it.

    A system of 2 H channels runs forward in time in the first H and backward in the others; y is their sum. The skip term
    D (H,) costs nothing: it is added to the kernel's first tap.
    """
    return _run(system, u, None, D, False)[0]


def run(system: DiagonalSystem | DPLRSystem, u: Tensor, x: Tensor, D: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """y and the final state (H, B, S) from u and the state x (H, B, S) float32, one way; the rest as `convolve`."""
    return _run(system, u, x, D, True)


def _run(
    system: DiagonalSystem | DPLRSystem, u: Tensor, x: Tensor | None, D: Tensor | None, final: bool
) -> tuple[Tensor, Tensor]:
    shape = cut(u)
    if isinstance(system, DPLRSystem):
        K, P, Q, carry, *_ = dense_operators(system.A_bar, system.B_bar, chunk.dense_readouts(system), shape.T)
        if D is not None:
            K = K + torch.nn.functional.pad(D.float().unsqueeze(-1), (0, shape.T - 1, 0, K.shape[0] - D.shape[0]))
        carry_rest = chunk.carry_over(system, shape.rest).re if shape.rest else carry.detach()
        y, after, _ = walk(u, x, K, P, Q, carry, carry_rest, _trains(u, x, K, P, Q), final)
        return y, after
    D = None if D is None else D.float()
    log_A_bar, B, C = (
        torch.view_as_real(v.resolve_conj())
        for v in (system.log_A_bar, system.B_bar.to(torch.complex64), system.C.to(torch.complex64))
    )
    if x is not None and not system.C.is_complex():
        x = torch.cat([x, torch.zeros_like(x)], dim=-1)
    if C.shape[1] <= MODES:
        operators = diagonal_operators(log_A_bar, B, C, D, shape.T, shape.rest)
        y, after, _ = walk(u, x, *operators, _trains(u, x, *operators), final)
    else:
        y, after = _run_in_parts(u, x, log_A_bar, B, C, D, shape, final)
    return y, after if system.C.is_complex() else after.chunk(2, dim=-1)[0]


def _run_in_parts(
    u: Tensor, x: Tensor | None, log_A_bar: Tensor, B: Tensor, C: Tensor, D: Tensor | None, shape: Cut, final: bool
) -> tuple[Tensor, Tensor]:
    """A diagonal system is the sum of systems of some of its modes each."""
    outputs: list[Tensor] = []
    states: list[tuple[Tensor, ...]] = []
    parts = list(zip(*(v.split(MODES, dim=1) for v in (log_A_bar, B, C)), strict=True))
    halves = None if x is None else [v.split(MODES, dim=-1) for v in x.chunk(2, dim=-1)]
    for index, part in enumerate(parts):
        operators = diagonal_operators(*part, None if outputs else D, shape.T, shape.rest)
        before = None if halves is None else torch.cat([half[index] for half in halves], dim=-1)
        y, after, _ = walk(u, before, *operators, _trains(u, x, *operators), final)
        outputs.append(y)
        states.append(after.chunk(2, dim=-1))
    y = torch.stack(outputs).sum(0, dtype=torch.float32).to(u.dtype)
    return y, torch.cat([torch.cat(half, dim=-1) for half in zip(*states, strict=True)], dim=-1)


def _trains(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


# ------------------------------------------------------------------------------------------------ discretization of S4D


def discretizes(A: Tensor, B: Tensor, C: Tensor, dt: Tensor) -> bool:
    """Whether `diagonal_system` takes these parameters: complex64 and float32."""
    return all(v.dtype == torch.complex64 for v in (A, B, C)) and dt.dtype == torch.float32


def diagonal_system(
    A: Tensor, B: Tensor, C: Tensor, dt: Tensor, discretization: str, rate: float, alpha: float, gap: float | Tensor
) -> DiagonalSystem:
    """diagonal.diagonal_system, which takes PyTorch 23 small kernels and its gradient 42, in one each."""
    A, B = (torch.view_as_real(v.resolve_conj()) for v in (A, B))
    log_A_bar, B_bar = map(torch.view_as_complex, discretize(A, B, dt.reshape(-1), discretization, rate, alpha))
    if isinstance(gap, Tensor):
        return DiagonalSystem(log_A_bar, B_bar, C, gap)
    return DiagonalSystem(log_A_bar if gap == 1 else log_A_bar * float(gap), B_bar, C)


@torch.library.custom_op("s4audio::discretize", mutates_args=())
def discretize(A: Tensor, B: Tensor, dt: Tensor, discretization: str, rate: float, alpha: float) -> tuple[Tensor, Tensor]:
    """The formulas of discretize.py in float64.

    Args:
        A: (H, modes, 2) float32, real and imaginary part.
        B: (H, modes, 2) float32.
        dt: (H,) float32.
        discretization: one of DISCRETIZATIONS.
        rate: multiplies dt.
        alpha: of the generalized bilinear transform.

    Returns:
        log A_bar (H, modes, 2) float64 and B_bar (H, modes, 2) float32.
    """
    A, B, dt = A.contiguous(), B.contiguous(), dt.contiguous()
    log_A_bar, B_bar = torch.empty_like(A, dtype=torch.float64), torch.empty_like(B)
    with torch.cuda.device_of(A):
        _discretize[(len(A),)](A, B, dt, log_A_bar, B_bar, **_scheme(A, discretization, rate, alpha))
    return log_A_bar, B_bar


@discretize.register_fake
def _(A, B, dt, discretization, rate, alpha):
    log_A_bar = torch.empty_like(A, dtype=torch.float64, memory_format=torch.contiguous_format)
    return log_A_bar, torch.empty_like(B, memory_format=torch.contiguous_format)


def _scheme(A: Tensor, discretization: str, rate: float, alpha: float) -> dict[str, Any]:
    """What the two kernels of a discretization have in common; its numbers as constants, since arguments are float32."""
    if discretization == "bilinear":
        alpha = 0.5
    modes = A.shape[1]
    N = max(16, triton.next_power_of_2(modes))
    return {"modes": modes, "SCHEME": SCHEMES[discretization], "RATE": float(rate), "ALPHA": float(alpha), "N": N}


SCHEMES = {"bilinear": "bilinear", "generalized_bilinear": "bilinear", "zoh": "zoh", "async": "zoh", "dirac": "dirac"}


@torch.library.custom_op("s4audio::discretize_backward", mutates_args=())
def _discretize_backward(
    dlog: Tensor, dB_bar: Tensor, A: Tensor, B: Tensor, dt: Tensor, discretization: str, rate: float, alpha: float
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = [v.contiguous() for v in (dlog, dB_bar, A, B, dt)]
    dA, dB, ddt = (torch.empty_like(v) for v in tensors[2:])
    _discretize_gradient[(len(A),)](*tensors, dA, dB, ddt, **_scheme(A, discretization, rate, alpha))
    return dA, dB, ddt


@_discretize_backward.register_fake
def _(dlog, dB_bar, A, B, dt, discretization, rate, alpha):
    return tuple(torch.empty_like(v, memory_format=torch.contiguous_format) for v in (A, B, dt))


def _keep_continuous(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3])
    ctx.scheme = inputs[3:]


def _discretize_chain(ctx, dlog, dB_bar):
    return *_discretize_backward(dlog, dB_bar, *ctx.saved_tensors, *ctx.scheme), None, None, None


discretize.register_autograd(_discretize_chain, setup_context=_keep_continuous)


@triton.jit
def _pair(pointer, h, n, modes):
    """Entries n of channel h of a contiguous (H, modes, 2): real and imaginary parts."""
    at = pointer + (h * modes + n) * 2
    return tl.load(at, mask=n < modes, other=0), tl.load(at + 1, mask=n < modes, other=0)


@triton.jit
def _store_pair(pointer, h, n, modes, value):
    at = pointer + (h * modes + n) * 2
    tl.store(at, value[0], mask=n < modes)
    tl.store(at + 1, value[1], mask=n < modes)


@triton.jit
def _times(a, b):
    return a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]


@triton.jit
def _times_conj(a, b):
    """a conj(b), which is what a gradient a becomes on its way through a product with b."""
    return a[0] * b[0] + a[1] * b[1], a[1] * b[0] - a[0] * b[1]


@triton.jit
def _inverse(a):
    square = a[0] * a[0] + a[1] * a[1]
    return a[0] / square, -a[1] / square


@triton.jit
def _exp(a):
    magnitude = tl.exp(a[0])
    return magnitude * tl.cos(a[1]), magnitude * tl.sin(a[1])


@triton.jit
def _log(a):
    """log a in float64; Triton has no arctangent: a first guess within 0.004, then sin(angle - guess) twice."""
    x, y = a
    size = tl.sqrt(x * x + y * y)
    small, large = tl.minimum(tl.abs(x), tl.abs(y)), tl.maximum(tl.abs(x), tl.abs(y))
    ratio = small / large
    angle = ratio * (1.0584 - 0.273 * ratio)
    angle = tl.where(tl.abs(y) > tl.abs(x), 1.5707963267948966 - angle, angle)
    angle = tl.where(x < 0, 3.141592653589793 - angle, angle)
    angle = tl.where(y < 0, -angle, angle)
    for _ in range(2):
        sine = (y * tl.cos(angle) - x * tl.sin(angle)) / size
        angle += sine * (1 + sine * sine / 6)
    return tl.log(size), angle


@triton.jit
def _expm1_ratio(z):
    """(exp(z) - 1) / z and its derivative, by their series to z^6 near zero."""
    near = z[0] * z[0] + z[1] * z[1] < 1e-4
    far_z = tl.where(near, 1, z[0]), tl.where(near, 0, z[1])
    inverse, E = _inverse(far_z), _exp(far_z)
    ratio = _times((E[0] - 1, E[1]), inverse)
    slope = _times((E[0] - ratio[0], E[1] - ratio[1]), inverse)
    zero = tl.zeros_like(z[0])
    series, of_slope = (zero + 1 / 5040, zero), (zero + 6 / 5040, zero)
    factorial = 5040
    for k in tl.static_range(5, -1, -1):
        factorial = factorial // (k + 2)
        series = _times(series, z)
        series = series[0] + 1 / factorial, series[1]
        if k > 0:
            of_slope = _times(of_slope, z)
            of_slope = of_slope[0] + k / factorial, of_slope[1]
    return (
        (tl.where(near, series[0], ratio[0]), tl.where(near, series[1], ratio[1])),
        (tl.where(near, of_slope[0], slope[0]), tl.where(near, of_slope[1], slope[1])),
    )


@triton.jit
def _continuous(A, B, dt, h, n, modes, RATE: tl.constexpr):
    """A, B, dt and z = dt A of a channel, float64."""
    a, b = _pair(A, h, n, modes), _pair(B, h, n, modes)
    step = tl.load(dt + h).to(tl.float64) * RATE
    a, b = (a[0].to(tl.float64), a[1].to(tl.float64)), (b[0].to(tl.float64), b[1].to(tl.float64))
    return a, b, step, (step * a[0], step * a[1])


@triton.jit
def _bilinear_factors(z, ALPHA: tl.constexpr):
    """1 + (1 - alpha) z, a pole exactly at zero moved by one rounding error, and 1 / (1 - alpha z)."""
    explicit = 1 + (1 - ALPHA) * z[0], (1 - ALPHA) * z[1]
    explicit = tl.where((explicit[0] == 0) & (explicit[1] == 0), 2.220446049250313e-16, explicit[0]), explicit[1]
    return explicit, _inverse((1 - ALPHA * z[0], -ALPHA * z[1]))


@triton.jit
def _discretize(
    A, B, dt, log_A_bar, B_bar, modes, SCHEME: tl.constexpr, RATE: tl.constexpr, ALPHA: tl.constexpr, N: tl.constexpr
):  # fmt: skip
    """One channel a program, as in all kernels of parameters; what limits them is to be launched."""
    h, n = tl.program_id(0).to(tl.int64), tl.arange(0, N)
    a, b, step, z = _continuous(A, B, dt, h, n, modes, RATE)
    log, gain = z, (tl.zeros_like(z[0]) + 1, tl.zeros_like(z[0]))  # B_bar = dt B gain
    if SCHEME == "zoh":
        gain, _ = _expm1_ratio(z)
    if SCHEME == "bilinear":
        explicit, gain = _bilinear_factors(z, ALPHA)
        log = _log(_times(explicit, gain))
    _store_pair(log_A_bar, h, n, modes, log)
    b = _times(b, gain)
    _store_pair(B_bar, h, n, modes, (step * b[0], step * b[1]))


@triton.jit
def _discretize_gradient(
    dlog, dB_bar, A, B, dt, dA, dB, ddt, modes,
    SCHEME: tl.constexpr, RATE: tl.constexpr, ALPHA: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    h, n = tl.program_id(0).to(tl.int64), tl.arange(0, N)
    a, b, step, z = _continuous(A, B, dt, h, n, modes, RATE)
    g_log, g = _pair(dlog, h, n, modes), _pair(dB_bar, h, n, modes)
    g = g[0].to(tl.float64), g[1].to(tl.float64)
    gain, slope = (tl.zeros_like(z[0]) + 1, tl.zeros_like(z[0])), (tl.zeros_like(z[0]), tl.zeros_like(z[0]))
    g_z = g_log
    if SCHEME == "zoh":
        gain, slope = _expm1_ratio(z)
    if SCHEME == "bilinear":
        explicit, gain = _bilinear_factors(z, ALPHA)
        inverse = _inverse(explicit)
        slope = _times(gain, gain)
        slope = ALPHA * slope[0], ALPHA * slope[1]
        log_slope = (1 - ALPHA) * inverse[0] + ALPHA * gain[0], (1 - ALPHA) * inverse[1] + ALPHA * gain[1]
        g_z = _times_conj(g_log, log_slope)
    of_B, of_step, through = _times_conj(g, gain), _times_conj(g, _times(b, gain)), _times_conj(g, _times(b, slope))
    _store_pair(dB, h, n, modes, (step * of_B[0], step * of_B[1]))
    g_z = g_z[0] + step * through[0], g_z[1] + step * through[1]
    _store_pair(dA, h, n, modes, (step * g_z[0], step * g_z[1]))
    of_step = of_step[0] + _times_conj(g_z, a)[0]
    tl.store(ddt + h, RATE * tl.sum(tl.where(n < modes, of_step, 0), 0))


# ------------------------------------------------------------------------------------------------ operators of S4D


@torch.library.custom_op("s4audio::diagonal_operators", mutates_args=())
def diagonal_operators(
    log_A_bar: Tensor, B: Tensor, C: Tensor, D: Tensor | None, T: int, rest: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The operators of chunk.diagonal_operators, in one kernel.

    Args:
        log_A_bar: (H, modes, 2) float64, real and imaginary part.
        B: (H, modes, 2) float32, discretized.
        C: (H, modes, 2) float32.
        D: float32, added to the first tap of the first channels, as many as it has.
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
        skip = 0 if D is None else D.shape[0]
        _operators[(H,)](
            log_A_bar, B, C, B if D is None else D.contiguous(), K, P, Q, carry, carry_rest, skip, rest, modes, T, N
        )
    return K, P, Q, carry, carry_rest


@diagonal_operators.register_fake
def _(log_A_bar: Tensor, B: Tensor, C: Tensor, D: Tensor | None, T: int, rest: int):
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
    log_A_bar, B, C, D, T, rest = inputs
    ctx.save_for_backward(log_A_bar, B, C)
    ctx.skip, ctx.T, ctx.rest = 0 if D is None else D.shape[0], T, rest


def _operators_gradient(ctx, dK, *gradients):
    dD = dK[: ctx.skip, 0] if ctx.skip else None
    return *_diagonal_operators_backward(dK, *gradients, *ctx.saved_tensors, ctx.T, ctx.rest), dD, None, None


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
def _operators(
    log_A_bar, B, C, D, K, P, Q, carry, carry_rest, skip, rest, modes, T: tl.constexpr, N: tl.constexpr
):  # fmt: skip
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
    taps = 2 * tl.sum(C_re[None, :] * p_re - C_im[None, :] * p_im, 1)
    tl.store(K + h * T + t, taps + tl.load(D + h + t, mask=(t == 0) & (h < skip), other=0))
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
    log_gradient = log_re + through_T[0] + through_rest[0], log_im + through_T[1] + through_rest[1]
    _store_pair(dlog, h, n, modes, log_gradient)
    _store_pair(dB, h, n, modes, (b_re, b_im))
    _store_pair(dC, h, n, modes, (2 * c_re, 2 * c_im))


@triton.jit
def _carry_gradient(dcarry, log, exponent, h, n, modes, N: tl.constexpr):
    """What the gradient of A_bar^exponent says of log A_bar, float64."""
    E = _power(log, tl.zeros((N,), tl.float64) + exponent)
    re = tl.load(dcarry + h * 2 * modes + n, mask=n < modes, other=0)
    im = tl.load(dcarry + (h * 2 + 1) * modes + n, mask=n < modes, other=0)
    to_log = _times_conj((re, im), E)
    return exponent * to_log[0], exponent * to_log[1]


# ------------------------------------------------------------------------------------------------ operators of S4


@torch.library.custom_op("s4audio::fused_dense_operators", mutates_args=())
def dense_operators(A: Tensor, B: Tensor, C: Tensor, T: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The operators of chunk.dense_operators, by the same doubling; but for the squares of A in one kernel.

    Args:
        A: (H, S, S) float64, S at most 2 MODES.
        B: (H, S) float64.
        C: (H, R, S) float64, R readouts of the same states.
        T: samples of a chunk, a power of two.

    Returns:
        K (R H, T), P (R H, T, S) and Q (R H, S, T) float32, and the carry (R H, S, S) float64; for the gradient, Q's
        transpose (R H, T, S) and the powers A^1, A^2, A^4, … (levels, H, S, S) float32.
    """
    A, B, C = A.contiguous(), B.contiguous(), C.contiguous()
    (H, R, S), levels = C.shape, T.bit_length() - 1
    squares = A.new_empty(levels + 1, H, S, S)
    squares[0].copy_(A)
    for level in range(levels):
        torch.bmm(squares[level], squares[level], out=squares[level + 1])
    K, P, Q, QT, powers = _empty_dense(C, T)
    with torch.cuda.device_of(A):
        _dense_rows[(H,)](squares, torch.bmm(C, A), B, C, K, P, Q, QT, powers, H, S, **_dense_constants(C, T))
    return K, P, Q, squares[levels].mT.repeat(R, 1, 1), QT, powers


def _empty_dense(C: Tensor, T: int) -> tuple[Tensor, ...]:
    H, R, S = C.shape
    shapes = (R * H, T), (R * H, T, S), (R * H, S, T), (R * H, T, S), (T.bit_length() - 1, H, S, S)
    return tuple(C.new_empty(shape, dtype=torch.float32) for shape in shapes)


def _dense_constants(C: Tensor, T: int) -> dict[str, int]:
    N = max(16, triton.next_power_of_2(C.shape[2]))
    return {"R": C.shape[1], "T": T, "LEVELS": T.bit_length() - 1, "N": N, "num_warps": 8}  # with 4, registers spill


@dense_operators.register_fake
def _(A, B, C, T):
    (H, R, S), (K, P, Q, QT, powers) = C.shape, _empty_dense(C, T)
    return K, P, Q, A.new_empty(R * H, S, S), QT, powers


@torch.library.custom_op("s4audio::fused_dense_operators_backward", mutates_args=())
def _dense_operators_backward(
    dK: Tensor, dP: Tensor, dQ: Tensor, dcarry: Tensor, P: Tensor, QT: Tensor, powers: Tensor, C: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dK, dP, dQ, dcarry, C = (v.contiguous() for v in (dK, dP, dQ, dcarry, C))
    (H, _, S), T = C.shape, P.shape[1]
    of_P, of_QT, of_A = P.new_empty(H, T, S), torch.empty_like(QT), P.new_empty(2, H, S, S)
    dA, dB, dC = C.new_empty(H, S, S), C.new_empty(H, S), torch.empty_like(C)
    _dense_rows_gradient[(H,)](
        dK, dP, dQ, dcarry, P, QT, powers, C, of_P, of_QT, of_A, dA, dB, dC, H, S, **_dense_constants(C, T)
    )
    return dA, dB, dC


@_dense_operators_backward.register_fake
def _(dK, dP, dQ, dcarry, P, QT, powers, C):
    H, _, S = C.shape
    return C.new_empty(H, S, S), C.new_empty(H, S), torch.empty_like(C, memory_format=torch.contiguous_format)


def _keep_dense(ctx, inputs, output):
    _, P, _, _, QT, powers = output
    ctx.save_for_backward(P, QT, powers, inputs[2])
    ctx.set_materialize_grads(False)  # QT and powers have none


def _dense_gradient(ctx, dK, dP, dQ, dcarry, _, __):
    P, QT, powers, C = ctx.saved_tensors
    S = C.shape[2]
    wanted = P.shape[:2], P.shape, (len(P), S, P.shape[1]), (len(P), S, S)
    given = (dK, dP, dQ, dcarry)
    gradients = [P.new_zeros(shape) if g is None else g for g, shape in zip(given, wanted, strict=True)]
    return *_dense_operators_backward(*gradients, P, QT, powers, C), None


dense_operators.register_autograd(_dense_gradient, setup_context=_keep_dense)


@triton.jit
def _tile(matrix, row, count, column, S, M: tl.constexpr, N: tl.constexpr):
    """Where `count` rows of a matrix of S columns lie, from `row` and `column` on, as (M, N), and what of it exists."""
    i, n = tl.arange(0, M), column + tl.arange(0, N)
    return matrix + (row + i)[:, None] * S + n[None, :], (i < count)[:, None] & (n < S)[None, :]


@triton.jit
def _rows_of(matrix, row, count, S, M: tl.constexpr, N: tl.constexpr):
    return _tile(matrix, row, count, 0, S, M, N)


@triton.jit
def _tile_of_level(matrix, row, level: tl.constexpr, column, S, N: tl.constexpr):
    """As `_tile` for 2^level rows, in a tile of at least the 16 that tensor cores take."""
    w: tl.constexpr = 1 << level
    M: tl.constexpr = 16 if level < 4 else 1 << level
    return _tile(matrix, row, w, column, S, M, N)


@triton.jit
def _rows_of_level(matrix, row, level: tl.constexpr, S, N: tl.constexpr):
    return _tile_of_level(matrix, row, level, 0, S, N)


@triton.jit
def _exact(a, b):
    """The product of two float32 matrices, as good as float32 is. The first has 32 rows at most: of 64, three TF32 products
    become `wgmma`, which Triton 3.6 compiles to wrong numbers and wrong addresses.
    """
    return _product(_factor(a, "tf32x3"), _factor(b, "tf32x3"))


@triton.jit
def _dense_rows(
    squares, first, B, C, K, P, Q, QT, powers, channels, S,
    R: tl.constexpr, T: tl.constexpr, LEVELS: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """A channel a program; the rows it has made so far are in memory, which its own barrier makes good to read."""
    h, n, t = tl.program_id(0).to(tl.int64), tl.arange(0, N), tl.arange(0, T)
    b = tl.load(B + h * S + n, mask=n < S, other=0).to(tl.float32)
    for r in tl.static_range(R):
        channel = (r * channels + h) * T * S
        tl.store(P + channel + (T - 1) * S + n, b, mask=n < S)  # the latest sample has decayed least
        tl.store(QT + channel + n, tl.load(first + (h * R + r) * S + n, mask=n < S, other=0).to(tl.float32), mask=n < S)
    tl.debug_barrier()
    for level in tl.static_range(LEVELS):
        at, mask = _rows_of(squares + (level * channels + h) * S * S, 0, S, S, N, N)
        power = tl.load(at, mask=mask, other=0).to(tl.float32)
        at, mask = _rows_of(powers + (level * channels + h) * S * S, 0, S, S, N, N)
        tl.store(at, power, mask=mask)
        at, mask = _rows_of_level(P + h * T * S, T - (1 << level), level, S, N)
        p = _exact(tl.load(at, mask=mask, other=0), tl.trans(power))
        for r in tl.static_range(R):
            at, mask = _rows_of_level(P + (r * channels + h) * T * S, T - (2 << level), level, S, N)
            tl.store(at, p, mask=mask)
            at, mask = _rows_of_level(QT + (r * channels + h) * T * S, 0, level, S, N)
            q = _exact(tl.load(at, mask=mask, other=0), power)
            tl.store(at + (S << level), q, mask=mask)
        tl.debug_barrier()
    at, mask = _rows_of(P + h * T * S, 0, T, S, T, N)
    p = tl.load(at, mask=mask, other=0)
    for r in tl.static_range(R):
        c = tl.load(C + (h * R + r) * S + n, mask=n < S, other=0).to(tl.float32)
        tl.store(K + (r * channels + h) * T + T - 1 - t, tl.sum(p * c[None, :], 1))
        at, mask = _rows_of(QT + (r * channels + h) * T * S, 0, T, S, T, N)
        q = tl.trans(tl.load(at, mask=mask, other=0))
        at, mask = _rows_of(Q + (r * channels + h) * T * S, 0, S, T, N, T)
        tl.store(at, q, mask=mask)


@triton.jit
def _dense_rows_gradient(
    dK, dP, dQ, dcarry, P, QT, powers, C, of_P, of_QT, of_A, dA, dB, dC, channels, S,
    R: tl.constexpr, T: tl.constexpr, LEVELS: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Back through the doublings. The gradient of the power at hand goes from one half of of_A to the other, 32 rows at a
    time.
    """
    h, n, t = tl.program_id(0).to(tl.int64), tl.arange(0, N), tl.arange(0, T)
    a, g = tl.zeros((N, N), tl.float32), tl.zeros((T, N), tl.float32)
    at, mask = _rows_of(P + h * T * S, 0, T, S, T, N)
    p = tl.load(at, mask=mask, other=0)
    for r in tl.static_range(R):
        channel = r * channels + h
        k = tl.load(dK + channel * T + T - 1 - t)[:, None]
        c = tl.load(C + (h * R + r) * S + n, mask=n < S, other=0).to(tl.float32)
        tl.store(dC + (h * R + r) * S + n, tl.sum(k * p, 0), mask=n < S)
        at, mask = _rows_of(dP + channel * T * S, 0, T, S, T, N)
        g += tl.load(at, mask=mask, other=0) + k * c[None, :]
        at, mask = _rows_of(dQ + channel * T * S, 0, S, T, N, T)
        q = tl.trans(tl.load(at, mask=mask, other=0))
        at, mask = _rows_of(of_QT + channel * T * S, 0, T, S, T, N)
        tl.store(at, q, mask=mask)
        at, mask = _rows_of(dcarry + channel * S * S, 0, S, S, N, N)
        a += tl.trans(tl.load(at, mask=mask, other=0).to(tl.float32))  # the carry is A^T transposed
    at, mask = _rows_of(of_P + h * T * S, 0, T, S, T, N)
    tl.store(at, g, mask=mask)
    at, mask = _rows_of(of_A + h * S * S, 0, S, S, N, N)
    tl.store(at, a, mask=mask)
    tl.debug_barrier()
    for level in tl.static_range(LEVELS - 1, -1, -1):
        at, mask = _rows_of(powers + (level * channels + h) * S * S, 0, S, S, N, N)
        power = tl.load(at, mask=mask, other=0)
        before = of_A + ((LEVELS - 1 - level) % 2 * channels + h) * S * S
        after = of_A + ((LEVELS - level) % 2 * channels + h) * S * S
        for half in tl.range(2 if N == 64 else 1, num_stages=1):
            _gradient_of_square(
                before, after, half, P, QT, powers, of_P, of_QT, channels, h, S, R, T, level, N, 32 if N == 64 else N
            )
        at, mask = _rows_of_level(of_P + h * T * S, T - (2 << level), level, S, N)
        later, early = tl.load(at, mask=mask, other=0), tl.load(at + (S << level), mask=mask, other=0)
        tl.store(at + (S << level), early + _exact(later, power), mask=mask)
        for r in tl.static_range(R):
            at, mask = _rows_of_level(of_QT + (r * channels + h) * T * S, 0, level, S, N)
            early, later = tl.load(at, mask=mask, other=0), tl.load(at + (S << level), mask=mask, other=0)
            tl.store(at, early + _exact(later, tl.trans(power)), mask=mask)
        tl.debug_barrier()
    at, mask = _rows_of(of_A + (LEVELS % 2 * channels + h) * S * S, 0, S, S, N, N)
    a = tl.load(at, mask=mask, other=0)
    tl.store(dB + h * S + n, tl.load(of_P + h * T * S + (T - 1) * S + n, mask=n < S, other=0), mask=n < S)
    at, mask = _rows_of(powers + h * S * S, 0, S, S, N, N)
    power = tl.load(at, mask=mask, other=0)
    for r in tl.static_range(R):  # Q begins with C A
        q = tl.load(of_QT + (r * channels + h) * T * S + n, mask=n < S, other=0)
        c = tl.load(C + (h * R + r) * S + n, mask=n < S, other=0).to(tl.float32)
        a += c[:, None] * q[None, :]
        of_C = dC + (h * R + r) * S + n
        tl.store(of_C, tl.load(of_C, mask=n < S, other=0) + tl.sum(power * q[None, :], 1), mask=n < S)
    at, mask = _rows_of(dA + h * S * S, 0, S, S, N, N)
    tl.store(at, a, mask=mask)


@triton.jit
def _gradient_of_square(
    before, after, half, P, QT, powers, of_P, of_QT, channels, h, S,
    R: tl.constexpr, T: tl.constexpr, level: tl.constexpr, N: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """G rows of the gradient of A^w, w = 2^level: from that of its square, and from the rows of P and Q that it made."""
    at, mask = _rows_of(powers + (level * channels + h) * S * S, 0, S, S, N, N)
    power = tl.load(at, mask=mask, other=0)
    at, rows = _rows_of(before, half * G, S - half * G, S, G, N)
    a = _exact(tl.load(at, mask=rows, other=0), tl.trans(power))
    at, mask = _tile(powers + (level * channels + h) * S * S, 0, S, half * G, S, N, G)
    columns = tl.load(at, mask=mask, other=0)
    at, mask = _rows_of(before, 0, S, S, N, N)
    a += _exact(tl.trans(columns), tl.load(at, mask=mask, other=0))
    at, mask = _tile_of_level(of_P + h * T * S, T - (2 << level), level, half * G, S, G)
    later = tl.load(at, mask=mask, other=0)
    at, mask = _rows_of_level(P + h * T * S, T - (1 << level), level, S, N)
    a += _exact(tl.trans(later), tl.load(at, mask=mask, other=0))
    for r in tl.static_range(R):
        at, mask = _tile_of_level(QT + (r * channels + h) * T * S, 0, level, half * G, S, G)
        early = tl.load(at, mask=mask, other=0)
        at, mask = _rows_of_level(of_QT + (r * channels + h) * T * S, 1 << level, level, S, N)
        a += _exact(tl.trans(early), tl.load(at, mask=mask, other=0))
    at, rows = _rows_of(after, half * G, S - half * G, S, G, N)
    tl.store(at, a, mask=rows)


# ------------------------------------------------------------------------------------------------ the walk


@torch.library.custom_op("s4audio::walk", mutates_args=())
def walk(
    u: Tensor, x: Tensor | None, K: Tensor, P: Tensor, Q: Tensor, carry: Tensor, carry_rest: Tensor, keep: bool, final: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The recurrence of chunk.py over a whole batch.

    Args:
        u: (B, H, L) float32, float16 or bfloat16.
        x: (H, B, S) float32, the state before the first sample; None for silence.
        K: (H, T) float32, the kernel's first taps; T is that of `cut`. As all that follows and the states it may have 2 H
            channels, of which the last H run backwards in time.
        P: (H, T, S) float32.
        Q: (H, S, T) float32.
        carry: over T samples, float64: (H, 2, S / 2) the diagonal, or (H, S, S) a matrix applied from the right.
        carry_rest: the same over the samples after the last whole chunk.
        keep: whether the states are needed for a gradient.
        final: whether the last state is wanted.

    Returns:
        y (B, H, L) in u's dtype; the state after the last sample (H, B, S), if wanted; and, if kept, the states before each
        chunk (B, H, M, S), but not a first one that is silence, in bfloat16 if that is how they are multiplied.
    """
    with torch.cuda.device_of(u):
        K, P, Q, carry, carry_rest = (v.contiguous() for v in (K, P, Q, carry, carry_rest))
        return _walk(_rows(u), None if x is None else x.contiguous(), K, P, Q, carry, carry_rest, keep, final)


def _walk(
    u: Tensor, x: Tensor | None, K: Tensor, P: Tensor, Q: Tensor, carry: Tensor, carry_rest: Tensor, keep: bool, final: bool
) -> tuple[Tensor, Tensor, Tensor]:
    y, last, X = _empty_walk(u, x, P, keep, final)
    for channels in _directions(u, K):
        operators = [v[channels] for v in (K, P, Q, carry, carry_rest)]
        states = None if x is None else x[channels], last[channels] if final else None
        _walk_one_way(u, y, X[:, channels], *states, operators, keep, channels.start is not None)
    return y, last, X


def _directions(u: Tensor, K: Tensor) -> tuple[slice, ...]:
    """The channels that run forward in time and, if there are twice as many as u has, those that run backwards."""
    H = u.shape[1]
    return (slice(H),) if len(K) == H else (slice(H), slice(H, None))


def _walk_one_way(
    u: Tensor,
    y: Tensor,
    X: Tensor,
    x: Tensor | None,
    last: Tensor | None,
    operators: list[Tensor],
    keep: bool,
    reverse: bool,
) -> None:
    """Writes y, X and last; reversed in time, adds to y."""
    K, P, Q, carry, carry_rest = operators
    batch, channels, length = u.shape
    shape = cut(u, _groups(batch, carry.shape[-1] == P.shape[-1]))
    S, T = P.shape[-1], shape.T
    common = _constants(S, T, carry, PRECISION[u.dtype].forward) | {"REVERSE": reverse}
    strides = u.stride(0), u.stride(1), y.stride(0), y.stride(1), X.stride(0), X.stride(1)
    skipped = int(x is None)  # the first state is not kept
    if shape.num_chunks:
        tiles = (triton.cdiv(batch * shape.num_segments, LANES), channels)
        first = length - T if reverse else 0
        starts = x
        if shape.num_segments > 1:
            sums = K.new_empty(channels, batch * shape.num_segments, S)
            _sums[(triton.cdiv(batch * (shape.num_segments - 1), LANES), channels)](
                u, sums, P, carry, u.stride(0), u.stride(1), batch, shape.num_segments, shape.span, shape.num_chunks, first,
                S, 1, BACK=False, **common,
            )  # fmt: skip
            starts = _chain(sums, x, carry, shape, batch, back=False)
        x = K.new_empty(channels, batch, S) if shape.rest else last
        _forward[tiles](
            u, y, X, *_given(starts, K), *_given(x, K), K, P, Q, carry, *strides, batch, shape.num_segments, shape.span,
            shape.num_chunks, first, T, -skipped, KEEP=keep, **common,
        )  # fmt: skip
    if shape.rest:
        first = 0 if reverse else shape.num_chunks * T
        _forward[(triton.cdiv(batch, LANES), channels)](
            u, y, X, *_given(x, K), *_given(last, K), K, P, Q, carry_rest, *strides, batch, 1, 1, 1, first, shape.rest,
            shape.num_chunks - skipped, KEEP=keep, **common,
        )  # fmt: skip


def _given(v: Tensor | None, other: Tensor) -> tuple[Tensor, bool]:
    """A pointer for a kernel, and whether it is one."""
    return other if v is None else v, v is not None


def _programs(lanes: int, channels: int) -> tuple[int, int]:
    """Programs of a channel and the tiles of lanes that each walks, one after the other; each writes sums of its own."""
    tiles = triton.cdiv(lanes, LANES)
    programs = triton.cdiv(tiles, max(1, tiles * channels // WALKERS))
    return programs, triton.cdiv(tiles, programs)


def _constants(S: int, T: int, carry: Tensor, product: str) -> dict[str, Any]:
    """What the kernels of a walk have in common."""
    N = max(16, triton.next_power_of_2(S // 2))
    return {"modes": S // 2, "R": LANES, "T": T, "N": N, "DENSE": carry.shape[-1] == S, "PRODUCT": product, **OPTIONS}


def _rows(v: Tensor) -> Tensor:
    """v, or a copy, such that the samples of a sequence lie one after the other."""
    return v if v.stride(-1) == 1 else v.contiguous()


def _empty_walk(u: Tensor, x: Tensor | None, P: Tensor, keep: bool, final: bool) -> tuple[Tensor, Tensor, Tensor]:
    batch, length = u.shape[0], u.shape[2]
    channels, T, S = P.shape
    num_states = -(-length // T) - int(x is None) if keep else 0
    kept = torch.bfloat16 if u.dtype == torch.bfloat16 else torch.float32
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    return y, P.new_empty(channels, batch if final else 0, S), u.new_empty(batch, channels, num_states, S, dtype=kept)


@walk.register_fake
def _(u, x, K, P, Q, carry, carry_rest, keep, final):
    return _empty_walk(u, x, P, keep, final)


def _chain(sums: Tensor, x: Tensor | None, carry: Tensor, shape: Cut, batch: int, back: bool) -> Tensor:
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
    N, groups = max(16, triton.next_power_of_2(S // 2)), _groups(batch, dense)
    rows = LANES if dense else CHAIN
    _starts[(triton.cdiv(batch * groups, rows), channels)](
        sums, *_given(x, sums), starts, over_span, over_last, batch, shape.num_segments, shape.span, shape.last_span, S // 2,
        BACK=back, R=rows, N=N, DENSE=dense, GROUPS=groups,
    )  # fmt: skip
    return starts


@torch.library.custom_op("s4audio::walk_backward", mutates_args=())
def _walk_backward(
    dy: Tensor, dlast: Tensor | None, u: Tensor, X: Tensor, K: Tensor, P: Tensor, Q: Tensor, carry: Tensor,
    carry_rest: Tensor, had_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of u, of the state before the first sample, if there was one, and of the operators."""
    u, dy, K, P, Q, carry, carry_rest = _rows(u), _rows(dy), *(v.contiguous() for v in (K, P, Q, carry, carry_rest))
    dlast = None if dlast is None else dlast.contiguous()
    du, before = _empty_walk_gradients(u, P, had_state)
    H, S, size_A = u.shape[1], P.shape[-1], carry[0].numel()
    shape = cut(u, _groups(u.shape[0], size_A == S * S))
    body = _programs(u.shape[0] * shape.num_segments, H)[0] if shape.num_chunks else 0
    rest = _programs(u.shape[0], H)[0] if shape.rest else 0
    sizes = shape.T * shape.T, shape.T * S, S * shape.T, size_A
    partial = tuple(K.new_empty(len(K), body + rest, size) for size in sizes)
    for channels in _directions(u, K):
        operators = [v[channels] for v in (K, P, Q, carry, carry_rest)]
        states = None if dlast is None else dlast[channels], before[channels] if had_state else None
        own = [v[channels] for v in partial]
        _walk_back_one_way(dy, u, X[:, channels], du, *states, own, operators, channels.start is not None)
    dK, dcarry, dcarry_rest = (torch.empty_like(v) for v in (K, carry, carry_rest))
    if body + rest == 1:  # what the only program wrote is the sum
        dP, dQ, summed = partial[1].view_as(P), partial[2].view_as(Q), size_A
    else:
        dP, dQ, summed = torch.empty_like(P), torch.empty_like(Q), size_A + 2 * shape.T * S
    _totals[(1 + triton.cdiv(summed, BLOCK), len(K))](
        *partial, dK, dP, dQ, dcarry, dcarry_rest, body, body + rest, summed, S, size_A, T=shape.T, BLOCK=BLOCK
    )
    return du, before, dK, dP, dQ, dcarry, dcarry_rest


def _empty_walk_gradients(u: Tensor, P: Tensor, had_state: bool) -> tuple[Tensor, Tensor]:
    du = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    return du, P.new_empty(P.shape[0], u.shape[0] if had_state else 0, P.shape[-1])


def _walk_back_one_way(
    dy: Tensor, u: Tensor, X: Tensor, du: Tensor, dlast: Tensor | None, before: Tensor | None, partial: list[Tensor],
    operators: list[Tensor], reverse: bool,
) -> None:  # fmt: skip
    """Writes du, before (the gradient of the state before the first sample) and partial; reversed in time, adds to du."""
    K, P, Q, carry, carry_rest = operators
    batch, channels, length = u.shape
    shape = cut(u, _groups(batch, carry.shape[-1] == P.shape[-1]))
    S, T = P.shape[-1], shape.T
    precision = PRECISION[u.dtype]
    product = precision.forward if u.numel() < SMALL else precision.backward
    common = _constants(S, T, carry, product) | {"REVERSE": reverse}
    body, body_tiles = _programs(batch * shape.num_segments, channels) if shape.num_chunks else (0, 0)
    rest, rest_tiles = _programs(batch, channels) if shape.rest else (0, 0)
    strides = tuple(stride for v in (u, dy, du, X) for stride in v.stride()[:2])
    skipped = int(before is None)  # the first state was silence, and not kept
    if shape.rest:
        gradient = K.new_empty(channels, batch, S) if shape.num_chunks else before
        first = 0 if reverse else shape.num_chunks * T
        _backward[(rest, channels)](
            u, dy, du, X, *_given(dlast, K), *_given(gradient, K), *partial, K, P, Q, carry_rest, *strides, batch,
            rest_tiles, 1, 1, 1, first, shape.rest, shape.num_chunks - skipped, body, body + rest, **common,
        )  # fmt: skip
        dlast = gradient
    if shape.num_chunks:
        ends, first = dlast, length - T if reverse else 0
        if shape.num_segments > 1:
            sums = K.new_empty(channels, batch * shape.num_segments, S)
            _sums[(triton.cdiv(batch * (shape.num_segments - 1), LANES), channels)](
                dy, sums, Q, carry, dy.stride(0), dy.stride(1), batch, shape.num_segments, shape.span, shape.num_chunks,
                first, 1, T, BACK=True, **common,
            )  # fmt: skip
            ends = _chain(sums, dlast, carry, shape, batch, back=True)
        _backward[(body, channels)](
            u, dy, du, X, *_given(ends, K), *_given(before, K), *partial, K, P, Q, carry, *strides, batch, body_tiles,
            shape.num_segments, shape.span, shape.num_chunks, first, T, -skipped, 0, body + rest, **common,
        )  # fmt: skip


@_walk_backward.register_fake
def _(dy, dlast, u, X, K, P, Q, carry, carry_rest, had_state):
    of_operators = (torch.empty_like(v, memory_format=torch.contiguous_format) for v in (K, P, Q, carry, carry_rest))
    return *_empty_walk_gradients(u, P, had_state), *of_operators


def _refuse_second_derivatives(ctx, *gradients):
    raise RuntimeError("the fused engine has no second derivatives; take them within s4audio.backend('chunk').")


_GRADIENTS = _discretize_backward, _diagonal_operators_backward, _dense_operators_backward, _walk_backward
for _gradient in _GRADIENTS:
    _gradient.register_autograd(_refuse_second_derivatives)


def _keep_walk(ctx, inputs, output):
    u, x, K, P, Q, carry, carry_rest, _, ctx.final = inputs
    ctx.save_for_backward(u, output[2], K, P, Q, carry, carry_rest)
    ctx.had_state = x is not None
    ctx.set_materialize_grads(False)  # zeros would be written and read


def _walk_gradient(ctx, dy, dlast, _):
    if dy is None:
        dy = torch.zeros_like(ctx.saved_tensors[0])
    du, dx, *of_operators = _walk_backward(dy, dlast if ctx.final else None, *ctx.saved_tensors, ctx.had_state)
    return du, dx if ctx.had_state else None, *of_operators, None, None


walk.register_autograd(_walk_gradient, setup_context=_keep_walk)


@triton.jit
def _factor(a, PRODUCT: tl.constexpr):
    """a as a factor of products: its high and its low part, in TF32 or in bfloat16, or itself twice.

    By hand, not by `input_precision="tf32x3"`, which splits anew for every product and guards each number against infinity.
    """
    if PRODUCT == "tf32x3":
        a = a.to(tl.float32)
        high = ((a.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        return high, (a - high) * ROUNDS
    else:
        if PRODUCT == "bf16x3":
            a = a.to(tl.float32)
            high = _rounded(a)
            return high, _rounded(a - high.to(tl.float32))
        else:
            high = a.to(tl.bfloat16)
            return high, high


@triton.jit
def _rounded(a):
    """float32 as bfloat16, two numbers by one instruction, where the compiler's own conversion is mostly one for each.

    Not "pure", so that it stays where it is: behind a change of layout every warp would convert what another one has too.
    """
    if IN_PYTHON:
        return a.to(tl.bfloat16)
    else:
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [a], dtype=tl.bfloat16, is_pure=False, pack=2
        )


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
def _product(a, b):
    """a b, of factors in TF32, as good as float32 is."""
    product = tl.dot(a[1], b[0], input_precision="tf32")
    product = tl.dot(a[0], b[1], product, input_precision="tf32")
    return tl.dot(a[0], b[0], product, input_precision="tf32")


@triton.jit
def _dot(a, b, sum, PRODUCT: tl.constexpr):
    """sum + a b, of factors; the product of two low parts is left out."""
    if PRODUCT == "tf32x3":  # added outside of the tensor cores, which cut sums off: over many chunks that adds up
        return sum + _product(a, b)
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
        return _factor(rr, "tf32x3"), _factor(ri, "tf32x3"), _factor(ir, "tf32x3"), _factor(ii, "tf32x3")
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
        re, im = _factor(re, "tf32x3"), _factor(im, "tf32x3")
        return _product(re, A[0]) + _product(im, A[2]), _product(re, A[1]) + _product(im, A[3])
    else:
        return re * A[0] - im * A[1], re * A[1] + im * A[0]


@triton.jit(do_not_specialize=COUNTS)
def _sums(
    v, sums, operator, carry, v_b, v_h, batch, num_segments, span, num_chunks, first, o_t, o_n, modes, BACK: tl.constexpr,
    R: tl.constexpr, T: tl.constexpr, N: tl.constexpr, DENSE: tl.constexpr, PRODUCT: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """What each segment but the last adds to the state: from u by P, or backwards in time from dy by Q transposed."""
    h = tl.program_id(1).to(tl.int64)
    lane = tl.program_id(0) * R + tl.arange(0, R)
    t, n = tl.arange(0, T), tl.arange(0, N)
    others = num_segments - 1
    b, segment = (lane // others).to(tl.int64), lane % others
    if BACK:
        segment += 1
    is_lane, is_mode = lane < batch * others, (n < modes)[None, :] & (t < T)[:, None]
    place = _places(t, T, REVERSE)[:, None]
    o_re, o_im = _halves(operator + h * T * 2 * modes, place, n[None, :], o_t, o_n, modes * o_n, is_mode)
    o_re, o_im = _factor(o_re, PRODUCT), _factor(o_im, PRODUCT)
    A = _load_carry(carry, h, n, modes, BACK, DENSE)
    rows = v + (b * v_b + h * v_h + first)[:, None] + t[None, :]
    re, im = tl.zeros((R, N), tl.float32), tl.zeros((R, N), tl.float32)
    for step in range(span):
        m = segment * span + step
        if BACK:
            m = segment * span + span - 1 - step
        is_chunk = is_lane & (m < num_chunks)
        V = _factor(
            tl.load(rows + _shift(m, T, REVERSE)[:, None], mask=is_chunk[:, None] & (t < T)[None, :], other=0), PRODUCT
        )
        new_re, new_im = _advance(re, im, A, DENSE)
        re = tl.where(is_chunk[:, None], _dot(V, o_re, new_re, PRODUCT), re)
        im = tl.where(is_chunk[:, None], _dot(V, o_im, new_im, PRODUCT), im)
    at = sums + ((h * batch + b) * num_segments + segment)[:, None] * 2 * modes + n[None, :]
    mask = is_lane[:, None] & (n < modes)[None, :]
    tl.store(at, re, mask=mask)
    tl.store(at + modes, im, mask=mask)


@triton.jit(do_not_specialize=COUNTS)
def _starts(
    sums, x, GIVEN: tl.constexpr, starts, over_span, over_last, batch, num_segments, span, last_span, modes,
    BACK: tl.constexpr, R: tl.constexpr, N: tl.constexpr, DENSE: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Chains the segments. Limited by the latency of its steps: num_segments, or 2 num_segments / GROUPS in a row.

    A row of a program is a sequence, or a group of its segments. Groups are walked twice side by side: from zero, to learn
    what each adds, which the row of the group after it does; and from their true starts, which the rows find by doubling.
    """
    h, row, n = tl.program_id(1).to(tl.int64), tl.arange(0, R), tl.arange(0, N)
    b = (tl.program_id(0) * (R // GROUPS) + row // GROUPS).to(tl.int64)
    group, size = row % GROUPS, tl.cdiv(num_segments, GROUPS)
    first = group * size
    mask = (b < batch)[:, None] & (n < modes)[None, :]
    re, im = tl.zeros((R, N), tl.float32), tl.zeros((R, N), tl.float32)
    if GIVEN:
        re, im = _halves(x, (h * batch + b)[:, None], n[None, :], 2 * modes, 1, modes, mask)
    if DENSE:
        A = _load_carry(over_span, h, n, modes, False, DENSE)
        A_last = _load_carry(over_last, h, n, modes, False, DENSE)
    else:
        A = _diagonal_power(over_span, span, h, n, modes, BACK, N)
        A_last = _diagonal_power(over_last, last_span, h, n, modes, BACK, N)
    at = (h * batch + b)[:, None] * num_segments * 2 * modes + n[None, :]
    if GROUPS > 1:
        add_re, add_im = tl.zeros((R, N), tl.float32), tl.zeros((R, N), tl.float32)
        for step in range(size):
            add_re, add_im = _next_start(
                add_re, add_im, sums + at, A, A_last, first - size + step, num_segments, modes, mask, BACK, DENSE
            )
        over = _exact_power(over_span, span * size, h, n, modes, N)
        over_first = _as_carry(over, BACK)
        if BACK:  # the first group begins with the last segment, which may be shorter
            over_first = _diagonal_power(over_span, last_span + span * (size - 1), h, n, modes, BACK, N)
        # Row 0 of a sequence begins with x; the others add up what the groups before them add, 1, 2, 4, … rows away.
        through_re, through_im = _advance(re, im, over_first, DENSE)
        second = (group == 1)[:, None]
        add_re, add_im = tl.where(second, add_re + through_re, add_re), tl.where(second, add_im + through_im, add_im)
        distance = 1
        while distance < GROUPS:
            away = tl.broadcast_to(tl.maximum(row - distance, 0)[:, None], (R, N))
            far_re, far_im = tl.gather(add_re, away, 0), tl.gather(add_im, away, 0)
            far_re, far_im = _advance(far_re, far_im, _as_carry(over, BACK), DENSE)
            reaches = (group > distance)[:, None]
            add_re, add_im = tl.where(reaches, add_re + far_re, add_re), tl.where(reaches, add_im + far_im, add_im)
            over = over[0] * over[0] - over[1] * over[1], 2 * over[0] * over[1]
            distance *= 2
        begins = (group == 0)[:, None]
        re, im = tl.where(begins, re, add_re), tl.where(begins, im, add_im)
    for step in range(size):
        segment = num_segments - 1 - first - step if BACK else first + step
        here = mask & (first + step < num_segments)[:, None]
        tl.store(starts + at + segment[:, None] * 2 * modes, re, mask=here)
        tl.store(starts + at + segment[:, None] * 2 * modes + modes, im, mask=here)
        re, im = _next_start(re, im, sums + at, A, A_last, first + step, num_segments, modes, mask, BACK, DENSE)


@triton.jit
def _next_start(
    re, im, sums, A, A_last, step, num_segments, modes, mask, BACK: tl.constexpr, DENSE: tl.constexpr
):  # fmt: skip
    """The states after one more segment, number `step` in the order of the walk; nobody asks for those after the last."""
    segment = step
    if BACK:
        segment = num_segments - 1 - step
    here = mask & ((step >= 0) & (step < num_segments - 1))[:, None]
    z_re = tl.load(sums + segment[:, None] * 2 * modes, mask=here, other=0)
    z_im = tl.load(sums + segment[:, None] * 2 * modes + modes, mask=here, other=0)
    new_re, new_im = _advance(re, im, A, DENSE)
    if BACK:
        far_re, far_im = _advance(re, im, A_last, DENSE)
        new_re, new_im = tl.where((step == 0)[:, None], far_re, new_re), tl.where((step == 0)[:, None], far_im, new_im)
    return new_re + z_re, new_im + z_im


@triton.jit
def _exact_power(carry, exponent, h, n, modes, N: tl.constexpr):
    """The diagonal carry to a power, by squaring in float64: real and imaginary part."""
    a = tl.load(carry + h * 2 * modes + n, mask=n < modes, other=0)
    b = tl.load(carry + (h * 2 + 1) * modes + n, mask=n < modes, other=0)
    re, im = tl.full((N,), 1, tl.float64), tl.zeros((N,), tl.float64)
    while exponent > 0:
        odd = exponent % 2 == 1
        re, im = tl.where(odd, re * a - im * b, re), tl.where(odd, re * b + im * a, im)
        a, b = a * a - b * b, 2 * a * b
        exponent = exponent // 2
    return re, im


@triton.jit
def _as_carry(power, CONJUGATE: tl.constexpr):
    """A diagonal power as `_advance` takes it: float32, of the adjoint if conjugate."""
    re, im = power[0].to(tl.float32)[None, :], power[1].to(tl.float32)[None, :]
    if CONJUGATE:
        im = -im
    return re, im, im, re


@triton.jit
def _diagonal_power(carry, exponent, h, n, modes, CONJUGATE: tl.constexpr, N: tl.constexpr):
    return _as_carry(_exact_power(carry, exponent, h, n, modes, N), CONJUGATE)


@triton.jit(do_not_specialize=COUNTS)
def _forward(
    u, y, X, starts, START: tl.constexpr, last, LAST: tl.constexpr, K, P, Q, carry, u_b, u_h, y_b, y_h, X_b, X_h, batch,
    num_segments, span, num_chunks, first, valid, first_chunk, modes, KEEP: tl.constexpr,
    R: tl.constexpr, T: tl.constexpr, N: tl.constexpr, DENSE: tl.constexpr, PRODUCT: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Output and states from the states at the start of each segment. One reading of u, one writing of y and of X."""
    h = tl.program_id(1).to(tl.int64)
    lane = tl.program_id(0) * R + tl.arange(0, R)
    t, n = tl.arange(0, T), tl.arange(0, N)
    b, segment = (lane // num_segments).to(tl.int64), lane % num_segments
    is_lane, is_mode, is_sample = lane < batch * num_segments, n < modes, t < valid
    toeplitz, p, q = _load_operators(K, P, Q, h, t, n, valid, modes, T, PRODUCT, REVERSE)
    A = _load_carry(carry, h, n, modes, False, DENSE)
    is_state = is_lane[:, None] & is_mode[None, :]
    re, im = tl.zeros((R, N), tl.float32), tl.zeros((R, N), tl.float32)
    if START:
        re, im = _halves(starts, (h * batch * num_segments + lane)[:, None], n[None, :], 2 * modes, 1, modes, is_state)
    u_rows = u + (b * u_b + h * u_h + first)[:, None] + t[None, :]
    y_rows = y + (b * y_b + h * y_h + first)[:, None] + t[None, :]
    X_rows = X + (b * X_b + h * X_h)[:, None] + n[None, :]
    for step in range(span):
        m = segment * span + step
        is_chunk = is_lane & (m < num_chunks)
        here = is_chunk[:, None] & is_sample[None, :]
        shift = _shift(m, T, REVERSE)[:, None]
        U = _factor(tl.load(u_rows + shift, mask=here, other=0), PRODUCT)
        if KEEP:
            at, mask = _kept(X_rows, first_chunk + m, is_chunk, is_mode, modes)
            tl.store(at, re, mask=mask)
            tl.store(at + modes, im, mask=mask)
        Y = _dot(U, toeplitz, tl.zeros((R, T), tl.float32), PRODUCT)
        Y = _dot(_factor(im, PRODUCT), q[1], _dot(_factor(re, PRODUCT), q[0], Y, PRODUCT), PRODUCT)
        if REVERSE:
            Y += tl.load(y_rows + shift, mask=here, other=0).to(tl.float32)
        tl.store(y_rows + shift, Y, mask=here)
        new_re, new_im = _advance(re, im, A, DENSE)
        re = tl.where(is_chunk[:, None], _dot(U, p[0], new_re, PRODUCT), re)
        im = tl.where(is_chunk[:, None], _dot(U, p[1], new_im, PRODUCT), im)
    if LAST:
        at = last + (h * batch + b)[:, None] * 2 * modes + n[None, :]
        is_last = is_state & (segment == num_segments - 1)[:, None]
        tl.store(at, re, mask=is_last)
        tl.store(at + modes, im, mask=is_last)


@triton.jit
def _kept(X_rows, row, is_chunk, is_mode, modes):
    """Where the states before a chunk are kept; silence before the first, row -1, is not."""
    return X_rows + (row * 2 * modes)[:, None], (is_chunk & (row >= 0))[:, None] & is_mode[None, :]


@triton.jit
def _places(t, valid, REVERSE: tl.constexpr):
    """Where the samples of a chunk, in the order of memory, stand in the recurrence."""
    if REVERSE:
        t = valid - 1 - t
    return t


@triton.jit
def _shift(m, T: tl.constexpr, REVERSE: tl.constexpr):
    """Samples from the first chunk of the recurrence to chunk m."""
    if REVERSE:
        m = -m
    return m * T


@triton.jit
def _load_operators(
    K, P, Q, h, t, n, valid, modes, T: tl.constexpr, PRODUCT: tl.constexpr, REVERSE: tl.constexpr
):  # fmt: skip
    """toeplitz(K) (T, T), P as (T, N) twice and Q as (N, T) twice; for a chunk of fewer samples the last rows of P."""
    place, is_sample = _places(t, valid, REVERSE), t < valid
    l = place[None, :] - place[:, None]
    toeplitz = tl.load(K + h * T + l, mask=l >= 0, other=0)
    p_mask, q_mask = (n < modes)[None, :] & is_sample[:, None], (n < modes)[:, None] & is_sample[None, :]
    p = _halves(P + h * T * 2 * modes, T - valid + place[:, None], n[None, :], 2 * modes, 1, modes, p_mask)
    q = _halves(Q + h * T * 2 * modes, n[:, None], place[None, :], T, 1, modes * T, q_mask)
    p, q = (_factor(p[0], PRODUCT), _factor(p[1], PRODUCT)), (_factor(q[0], PRODUCT), _factor(q[1], PRODUCT))
    return _factor(toeplitz, PRODUCT), p, q


@triton.jit(do_not_specialize=COUNTS)
def _backward(
    u, dy, du, X, ends, END: tl.constexpr, before, BEFORE: tl.constexpr, of_K, of_P, of_Q, of_A, K, P, Q, carry, u_b, u_h,
    dy_b, dy_h, du_b, du_h, X_b, X_h, batch, tiles, num_segments, span, num_chunks, first, valid, first_chunk, first_partial,
    num_partials, modes,
    R: tl.constexpr, T: tl.constexpr, N: tl.constexpr, DENSE: tl.constexpr, PRODUCT: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """All gradients, from those of the states at the end of each segment. One reading of u, dy and X, one writing of du.

    Five products of T x T or T x S a chunk; at N = 64 the three sums of T x T and T x S fill 96 registers of a thread.
    """
    h = tl.program_id(1).to(tl.int64)
    t, n = tl.arange(0, T), tl.arange(0, N)
    is_mode, is_sample = n < modes, t < valid
    toeplitz, p, q = _load_operators(K, P, Q, h, t, n, valid, modes, T, PRODUCT, REVERSE)
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
        g_re, g_im = tl.zeros((R, N), tl.float32), tl.zeros((R, N), tl.float32)
        if END:
            row = (h * batch * num_segments + lane)[:, None]
            g_re, g_im = _halves(ends, row, n[None, :], 2 * modes, 1, modes, is_state)
        u_rows = u + (b * u_b + h * u_h + first)[:, None] + t[None, :]
        dy_rows = dy + (b * dy_b + h * dy_h + first)[:, None] + t[None, :]
        du_rows = du + (b * du_b + h * du_h + first)[:, None] + t[None, :]
        X_rows = X + (b * X_b + h * X_h)[:, None] + n[None, :]
        for step in range(span):
            m = segment * span + span - 1 - step
            is_chunk = is_lane & (m < num_chunks)
            here = is_chunk[:, None] & is_sample[None, :]
            shift = _shift(m, T, REVERSE)[:, None]
            U = _factor(tl.load(u_rows + shift, mask=here, other=0), PRODUCT)
            G = _factor(tl.load(dy_rows + shift, mask=here, other=0), PRODUCT)
            at, mask = _kept(X_rows, first_chunk + m, is_chunk, is_mode, modes)
            x_re, x_im = tl.load(at, mask=mask, other=0), tl.load(at + modes, mask=mask, other=0)
            g = _factor(g_re, PRODUCT), _factor(g_im, PRODUCT)
            x = _factor(x_re, PRODUCT), _factor(x_im, PRODUCT)
            dU = _dot(G, _transposed(toeplitz), tl.zeros((R, T), tl.float32), PRODUCT)
            dU = _dot(g[1], _transposed(p[1]), _dot(g[0], _transposed(p[0]), dU, PRODUCT), PRODUCT)
            if REVERSE:
                dU += tl.load(du_rows + shift, mask=here, other=0).to(tl.float32)
            tl.store(du_rows + shift, dU, mask=here)
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
        if BEFORE:
            at = before + (h * batch + b)[:, None] * 2 * modes + n[None, :]
            is_first = is_state & (segment == 0)[:, None]
            tl.store(at, g_re, mask=is_first)
            tl.store(at + modes, g_im, mask=is_first)
    S, program = 2 * modes, h * num_partials + first_partial + tl.program_id(0)
    # Row i of W turned by i to the left: its sum over rows is then the gradient of K, whose taps are W's diagonals.
    place = _places(t, valid, REVERSE)
    l = place[None, :] - place[:, None]
    tl.store(of_K + program * T * T + t[:, None] * T + (l + T) % T, tl.where(l >= 0, W, 0))
    row = (place + T - valid) % T  # rows of the last chunk's P are the last of P
    at, mask = of_P + program * T * S + row[:, None] * S + n[None, :], (t < T)[:, None] & is_mode[None, :]
    tl.store(at, dp_re, mask=mask)
    tl.store(at + modes, dp_im, mask=mask)
    at = of_Q + program * T * S + n[None, :] * T + ((place + T) % T)[:, None]
    tl.store(at, dq_re, mask=mask)
    tl.store(at + modes * T, dq_im, mask=mask)
    if DENSE:
        at, mask = of_A + program * S * S + n[:, None] * S + n[None, :], is_mode[:, None] & is_mode[None, :]
        tl.store(at, a_rr, mask=mask)
        tl.store(at + modes, a_ri, mask=mask)
        tl.store(at + modes * S, a_ir, mask=mask)
        tl.store(at + modes * S + modes, a_ii, mask=mask)
    else:
        tl.store(of_A + program * S + n, tl.sum(a_re, 0), mask=is_mode)
        tl.store(of_A + program * S + modes + n, tl.sum(a_im, 0), mask=is_mode)


@triton.jit(do_not_specialize=["body", "num_partials", "summed"])
def _totals(
    of_K, of_P, of_Q, of_A, dK, dP, dQ, dcarry, dcarry_rest, body, num_partials, summed, S, size_A,
    T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradients of a channel's operators, summed over its programs in their order: `body` of them, then the rest's.

    Of the numbers of carry, P and Q, in this order, the first `summed`.
    """
    h, block = tl.program_id(1).to(tl.int64), tl.program_id(0)
    t, first = tl.arange(0, T), h * num_partials
    if block == 0:
        W = tl.zeros((T, T), tl.float32)
        for program in range(num_partials):
            W += tl.load(of_K + (first + program) * T * T + t[:, None] * T + t[None, :])
        tl.store(dK + h * T + t, tl.sum(W, 0))
    else:
        i = (block - 1) * BLOCK + tl.arange(0, BLOCK)
        is_A, p = i < size_A, i - size_A
        q = p - T * S
        is_P, is_Q = ~is_A & (q < 0) & (i < summed), (q >= 0) & (i < summed)
        of_body, of_rest = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
        for program in range(num_partials):
            row = first + program
            value = tl.load(of_A + row * size_A + i, mask=is_A, other=0)
            value += tl.load(of_P + row * T * S + p, mask=is_P, other=0)
            value += tl.load(of_Q + row * T * S + q, mask=is_Q, other=0)
            if program < body:
                of_body += value
            else:
                of_rest += value
        tl.store(dP + h * T * S + p, of_body + of_rest, mask=is_P)
        tl.store(dQ + h * T * S + q, of_body + of_rest, mask=is_Q)
        tl.store(dcarry + h * size_A + i, of_body, mask=is_A)
        tl.store(dcarry_rest + h * size_A + i, of_rest, mask=is_A)
