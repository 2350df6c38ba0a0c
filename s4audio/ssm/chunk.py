"""The engine: one recurrence, cut into chunks, in plain PyTorch on CPU or CUDA; any length, with carried state.

    convolution = chunks = steps

Cut the sequence into M chunks of T samples. With rows as vectors, U (M, T) the input and X the state at the start of
each chunk,

    Z_m = U_m P            what chunk m adds to the state                              (T, S) product
    X_{m+1} = X_m A_T + Z_m    the only sequential part: M = L / T steps on S numbers      `scan`
    Y_m = U_m toeplitz(K) + X_m Q                                                      (T, T) and (S, T) products

costs O(L (T + 2 S)) multiply-adds and O(L) memory: no kernel of length L, no Vandermonde matrix, no FFT, and no complex
number after the operators are made (autocast, torch.compile and export want none). S is the real size of the state:
[Re x, Im x]. The operators of S4D come from the parameters by ordinary autograd, in float64, and are cast last; they are
small.

Source: ours; the chunk-wise form of a linear recurrence is the one of Dao and Gu 2024, "Transformers are SSMs".
"""

from typing import NamedTuple

import torch
from torch import Tensor

from s4audio.ssm.diagonal import DiagonalSystem
from s4audio.ssm.dplr import DPLRSystem, real_matrix, real_vector

GROUP = 16  # chunks that advance side by side in a scan, a power of two; 8 and 32 time the same
SEGMENT = 128  # samples at a time of a time-varying system: bounds the memory of its states
MATRICES = 2**24  # numbers at a time in the matrices of a time-varying DPLR system (128 MiB)


def chunk_length(length: int) -> int:
    """T: a power of two (dense powers come by squaring), at most the length.

    Measured on two cores at N = 10 and 64, forward and backward: 128 wins by 1.2 to 1.4 over 64 and 256 for long inputs,
    where the scan is what costs; 64 wins by 1.15 at 1,024 samples, where making the operators does.
    """
    longest = 128 if length >= 4096 else 64
    return min(longest, 1 << (length.bit_length() - 1))


class Carry(NamedTuple):
    """What a chunk does to a state row [Re x, Im x]: a product with the complex diagonal re + i im, or with a matrix.

    It stays in float64 until it meets the states: its rounding would come back in every later chunk.
    """

    re: Tensor  # (H, N/2); (H, N) for real modes; (H, S, S) for a matrix, applied from the right
    im: Tensor | None  # (H, N/2), None for real modes and for a matrix

    @property
    def is_matrix(self) -> bool:
        return self.re.dim() == 3

    def adjoint(self) -> "Carry":
        """The carry of the gradient: the conjugate diagonal, or the transposed matrix."""
        return Carry(self.re.mT, None) if self.is_matrix else Carry(self.re, None if self.im is None else -self.im)

    def to(self, dtype: torch.dtype) -> "Carry":
        """The same in the states' precision."""
        return Carry(self.re.to(dtype), None if self.im is None else self.im.to(dtype))

    def squared(self) -> "Carry":
        """The carry over twice the length."""
        if self.is_matrix:
            return Carry(torch.bmm(self.re, self.re), None)
        if self.im is None:
            return Carry(self.re * self.re, None)
        return Carry(self.re * self.re - self.im * self.im, 2 * self.re * self.im)


class Operators(NamedTuple):
    """What a chunk of T samples does, per channel."""

    toeplitz: Tensor  # (H, T, T) chunk -> chunk, the kernel's first T taps
    P: Tensor  # (H, T, S) chunk -> state
    Q: Tensor  # (H, S, T) state -> chunk
    A_T: Carry  # state -> state over the chunk


def run(system: DiagonalSystem | DPLRSystem, u: Tensor, x: Tensor, kept: dict | None = None) -> tuple[Tensor, Tensor]:
    """y (B, H, L) and the final state (H, B, S) from u (B, H, L) and the state x (H, B, S), all in one real dtype.

    Operators are looked for in `kept` before they are made, and kept there: one dictionary for one system.
    """
    batch, channels, length = u.shape
    if length == 0:
        return u, x
    if system.gap is not None:
        return run_varying(system, u, x, system.gap)
    T = chunk_length(length)
    num_chunks, rest = divmod(length, T)
    if kept is not None and (T, u.dtype) in kept:
        operators = kept[T, u.dtype]
    elif isinstance(system, DiagonalSystem):
        operators = diagonal_operators(system, T, u.dtype)
    else:
        operators = dense_operators(system, T, u.dtype)
    if kept is not None:
        kept[T, u.dtype] = operators
    whole = u[..., : num_chunks * T].unflatten(-1, (num_chunks, T)).transpose(0, 1).flatten(1, 2)  # (H, B M, T)
    Z = torch.bmm(whole, operators.P).unflatten(1, (batch, num_chunks))  # (H, B, M, S)
    X, x = scan(operators.A_T, Z, x)
    y = torch.bmm(whole, operators.toeplitz).baddbmm_(X.flatten(1, 2), operators.Q)
    y = y.unflatten(1, (batch, num_chunks)).transpose(0, 1).flatten(-2)  # (B, H, M T)
    if rest:
        last = u[..., num_chunks * T :].transpose(0, 1)  # (H, B, rest)
        tail = torch.baddbmm(torch.bmm(last, operators.toeplitz[:, :rest, :rest]), x, operators.Q[..., :rest])
        Z = torch.bmm(last, operators.P[:, T - rest :]).unsqueeze(2)
        _, x = scan(carry_over(system, rest), Z, x)
        y = torch.cat([y, tail.transpose(0, 1)], dim=-1)
    return y, x


def scan(A: Carry, Z: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The states before each chunk, and after the last: X_0 = x, X_{m+1} = X_m A + Z_m.

    Args:
        A: the carry over one chunk.
        Z: (H, B, M, S).
        x: (H, B, S).

    Returns:
        X (H, B, M, S) and the final state (H, B, S).
    """
    return _scan(A.re, A.im, Z, x)


@torch.library.custom_op("s4audio::scan", mutates_args=())
def _scan(re: Tensor, im: Tensor | None, Z: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """`scan`; one operation for torch.compile, since its steps write into each other's memory."""
    X = torch.empty_like(Z, memory_format=torch.contiguous_format)
    return X, _scan_into(X, Carry(re, im), Z, x)


@_scan.register_fake
def _(re: Tensor, im: Tensor | None, Z: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(Z, memory_format=torch.contiguous_format), x.new_empty(x.shape)


def _keep_scan(ctx, inputs, output) -> None:
    re, im, _, _ = inputs
    ctx.save_for_backward(re, im, output[0])


def _scan_gradient(ctx, dX: Tensor, dlast: Tensor):
    """The gradient of a recurrence is the adjoint recurrence, backwards in time: two lines instead of a graph of M nodes."""
    re, im, X = ctx.saved_tensors
    # Lambda_m is the gradient of the state after chunk m: dlast for the last, then dX_{m+1} + Lambda_{m+1} A^*.
    reversed_Lambda, dx = scan(Carry(re, im).adjoint(), dX.flip(2), dlast)
    Lambda = reversed_Lambda.flip(2)
    dre, dim = _carry_gradient(Carry(re, im), X, Lambda)
    return dre.to(re.dtype), None if dim is None else dim.to(re.dtype), Lambda, dx


_scan.register_autograd(_scan_gradient, setup_context=_keep_scan)


def _scan_into(X: Tensor, A: Carry, Z: Tensor, x: Tensor) -> Tensor:
    """Writes the states before each chunk into X and returns the one after the last.

    M steps one by one would be M small operations. Instead groups of chunks advance side by side, twice: once from zero,
    to learn what each group adds, and once from the true states, which a scan over the groups has found.
    """
    num_groups, rest = divmod(Z.shape[2], GROUP)
    if num_groups <= 2:  # too few to gain by it
        num_groups, rest = 0, Z.shape[2]
    A_group, A = A, A.to(Z.dtype)
    if num_groups:
        grouped = Z[:, :, : num_groups * GROUP].unflatten(2, (num_groups, GROUP)).unbind(3)  # GROUP x (H, B, J, S)
        added = grouped[0].clone()
        scratch = torch.empty_like(added)
        for z in grouped[1:]:
            added, scratch = _advance(A, added, z, out=scratch), added
        for _ in range(GROUP.bit_length() - 1):
            A_group = A_group.squared()
        states = X[:, :, : num_groups * GROUP].unflatten(2, (num_groups, GROUP)).unbind(3)
        starts = torch.empty_like(added)
        x = _scan_into(starts, A_group, added, x)
        states[0].copy_(starts)
        for now, following, z in zip(states, states[1:], grouped, strict=False):
            _advance(A, now, z, out=following)
    for m in range(num_groups * GROUP, num_groups * GROUP + rest):
        X[:, :, m] = x
        x = _advance(A, x, Z[:, :, m], out=torch.empty_like(x))
    return x


def _advance(A: Carry, x: Tensor, z: Tensor, out: Tensor) -> Tensor:
    """out = x A + z, for states (H, ..., S)."""
    if A.is_matrix:
        return out.copy_(torch.baddbmm(z.flatten(1, -2), x.flatten(1, -2), A.re).view(out.shape))
    shape = (-1,) + (1,) * (x.dim() - 2) + (A.re.shape[-1],)
    if A.im is None:
        return torch.addcmul(z, x, A.re.view(shape), out=out)
    a, b = A.re.view(shape), A.im.view(shape)
    (x_re, x_im), (z_re, z_im), (out_re, out_im) = x.chunk(2, -1), z.chunk(2, -1), out.chunk(2, -1)
    torch.addcmul(z_re, x_re, a, out=out_re).addcmul_(x_im, b, value=-1)
    torch.addcmul(z_im, x_re, b, out=out_im).addcmul_(x_im, a)
    return out


def _carry_gradient(A: Carry, X: Tensor, Lambda: Tensor) -> tuple[Tensor, Tensor | None]:
    """The gradient of sum(Lambda (X A)) with respect to A."""
    if A.is_matrix:
        return torch.bmm(X.flatten(1, 2).mT, Lambda.flatten(1, 2)), None
    if A.im is None:
        return (X * Lambda).sum((1, 2)), None
    (x_re, x_im), (l_re, l_im) = X.chunk(2, -1), Lambda.chunk(2, -1)
    return (x_re * l_re + x_im * l_im).sum((1, 2)), (x_re * l_im - x_im * l_re).sum((1, 2))


def powers(system: DiagonalSystem, exponents: Tensor) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of A_bar^t, each (H, N/2, len(exponents)) float64, for exponents t."""
    log = system.log_A_bar.unsqueeze(-1)
    magnitude, angle = torch.exp(log.real * exponents), log.imag * exponents
    return magnitude * torch.cos(angle), magnitude * torch.sin(angle)


def carry_over(system: DiagonalSystem | DPLRSystem, length: int) -> Carry:
    """The carry over `length` samples."""
    if isinstance(system, DPLRSystem):
        return Carry(torch.linalg.matrix_power(system.A_bar, length).mT.repeat(_copies(system), 1, 1), None)
    re, im = powers(system, torch.full((1,), length, dtype=torch.float64, device=system.C.device))
    return Carry(re[..., 0], im[..., 0] if system.C.is_complex() else None)


def toeplitz(K: Tensor) -> Tensor:
    """(H, T) -> (H, T, T) with [i, j] = K[j - i], zero below the diagonal."""
    T = K.shape[-1]
    return torch.nn.functional.pad(K, (T - 1, 0)).unfold(-1, T, 1).flip(-2)


def diagonal_operators(system: DiagonalSystem, T: int, dtype: torch.dtype) -> Operators:
    """The operators of S4D, from log A_bar."""
    wide_re, wide_im = powers(system, torch.arange(T + 1, dtype=torch.float64, device=system.C.device))
    re, im = wide_re.to(dtype), wide_im.to(dtype)
    if not system.C.is_complex():
        B, C = system.B_bar.to(dtype).unsqueeze(-1), 2 * system.C.to(dtype).unsqueeze(-1)
        P, Q = re[..., :T] * B, re[..., 1:] * C
        K = (C * P).sum(1)
        return Operators(toeplitz(K), P.flip(-1).mT, Q, Carry(wide_re[..., T], None))
    b_re, b_im = system.B_bar.real.to(dtype).unsqueeze(-1), system.B_bar.imag.to(dtype).unsqueeze(-1)
    c_re, c_im = 2 * system.C.real.to(dtype).unsqueeze(-1), 2 * system.C.imag.to(dtype).unsqueeze(-1)
    P = torch.cat([re * b_re - im * b_im, re * b_im + im * b_re], dim=1)[..., :T]
    Q = torch.cat([re * c_re - im * c_im, -re * c_im - im * c_re], dim=1)[..., 1:]
    K = (torch.cat([c_re, -c_im], dim=1) * P).sum(1)
    return Operators(toeplitz(K), P.flip(-1).mT, Q, Carry(wide_re[..., T], wide_im[..., T]))


def dense_operators(system: DPLRSystem, T: int, dtype: torch.dtype) -> Operators:
    """The operators of DPLR S4, by doubling; channels that share their matrices share the work."""
    copies = _copies(system)
    K, P, Q, A_T, _ = _dense_operators(system.A_bar, system.B_bar, dense_readouts(system), T, dtype == torch.float64)
    if not (system.A_bar.requires_grad or system.B_bar.requires_grad):
        P, A_T = P.detach(), A_T.detach()
    if copies > 1:
        P, A_T = P.repeat(copies, 1, 1), A_T.repeat(copies, 1, 1)
    K, Q = (v.transpose(0, 1).flatten(0, 1) for v in (K, Q))
    return Operators(toeplitz(K), P, Q.mT, Carry(A_T, None))


def dense_readouts(system: DPLRSystem) -> Tensor:
    """2 conj(C) as real vectors (H, R, S) float64: R channels read the same states."""
    return 2 * real_vector(system.C.conj()).unflatten(0, (_copies(system), len(system.A_bar))).transpose(0, 1)


def _copies(system: DPLRSystem) -> int:
    """How many channels share a matrix: 2 if both directions do."""
    return len(system.C) // len(system.A_bar)


@torch.library.custom_op("s4audio::dense_operators", mutates_args=())
def _dense_operators(A: Tensor, B: Tensor, C: Tensor, T: int, exact: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What a chunk of T samples does, for R vectors C that read the same states.

    Args:
        A: (H, S, S) float64.
        B: (H, S) float64.
        C: (H, R, S) float64.
        T: a power of two.
        exact: all in float64; else only the squares of A, whose rounding would come back in every chunk.

    Returns:
        K (H, R, T), P (H, T, S) and Q^T (H, R, T, S) in float32 or float64, the carry A^T transposed (H, S, S) float64, and
        the powers A^1, A^2, A^4, … (levels, H, S, S), for the gradient.

    Rows A^j B of P and C A^(j+1) of Q^T for j < 2w are those for j < w, and the same times A^w. One operation with its
    gradient below: autograd would add up what each power gets from its three uses in as many passes.
    """
    dtype = torch.float64 if exact else torch.float32
    H, R, S = C.shape
    P, Q = A.new_empty(H, T, S, dtype=dtype), A.new_empty(H, R, T, S, dtype=dtype)
    powers = A.new_empty(T.bit_length() - 1, H, S, S, dtype=dtype)
    P[:, T - 1] = B  # the latest sample has decayed least
    Q[:, :, 0] = torch.bmm(C, A)
    for k, power in enumerate(powers):
        w = 2**k
        power.copy_(A)
        P[:, T - 2 * w : T - w] = torch.bmm(P[:, T - w :], power.mT)
        Q[:, :, w : 2 * w] = torch.bmm(Q[:, :, :w].flatten(1, 2), power).unflatten(1, (R, w))
        A = torch.bmm(A, A)
    K = torch.bmm(C.to(dtype), P.mT).flip(-1)
    return K, P, Q, A.mT.contiguous(), powers


@_dense_operators.register_fake
def _(A, B, C, T, exact):
    dtype = torch.float64 if exact else torch.float32
    H, R, S = C.shape
    K, P, Q = (A.new_empty(shape, dtype=dtype) for shape in ((H, R, T), (H, T, S), (H, R, T, S)))
    return K, P, Q, A.new_empty(H, S, S), A.new_empty(T.bit_length() - 1, H, S, S, dtype=dtype)


def _keep_dense(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3], output[1], output[2], output[4])
    ctx.set_materialize_grads(False)  # the powers have none but for second derivatives


def _dense_gradient(
    ctx, dK: Tensor | None, dP: Tensor | None, dQ: Tensor | None, dA_T: Tensor | None, dpowers: Tensor | None
):
    """Backwards through the doublings; dA is the gradient of the power at hand."""
    A, B, C, P, Q, powers = ctx.saved_tensors
    T, dtype = P.shape[1], P.dtype
    C = C.to(dtype)
    dK = Q.new_zeros(Q.shape[:3]) if dK is None else dK.flip(-1)
    dP = torch.zeros_like(P) if dP is None else dP
    dQ = torch.zeros_like(Q) if dQ is None else dQ
    dA_T = torch.zeros_like(A) if dA_T is None else dA_T
    dC = torch.bmm(dK, P)
    dP = torch.baddbmm(dP, dK.mT, C)
    dA = dA_T.mT.to(dtype)
    for k in reversed(range(len(powers))):
        w, power = 2**k, powers[k]
        dP, later_P, early_P = dP[:, w:], dP[:, :w], P[:, T - w :]
        dQ, early_Q, later_Q = dQ[:, :, :w], Q[:, :, :w].flatten(1, 2), dQ[:, :, w:].flatten(1, 2)
        squared = torch.bmm(dA, power.mT) if dpowers is None else torch.baddbmm(dpowers[k], dA, power.mT)
        dA = torch.baddbmm(squared, power.mT, dA)
        dA = torch.baddbmm(torch.baddbmm(dA, later_P.mT, early_P), early_Q.mT, later_Q)
        dP = torch.baddbmm(dP, later_P, power)
        dQ = torch.baddbmm(dQ.flatten(1, 2), later_Q, power.mT).unflatten(1, dQ.shape[1:3])
    dB, dQ = dP[:, 0], dQ[:, :, 0]
    dA = torch.baddbmm(dA, C.mT, dQ)
    dC = torch.baddbmm(dC, dQ, A.to(dtype).mT)
    return dA.to(A.dtype), dB.to(B.dtype), dC.to(A.dtype), None, None


_dense_operators.register_autograd(_dense_gradient, setup_context=_keep_dense)


def run_varying(system: DiagonalSystem | DPLRSystem, u: Tensor, x: Tensor, gap: Tensor) -> tuple[Tensor, Tensor]:
    """`run` for a system with one gap per sample: no two chunks are alike, so the states themselves are scanned."""
    outputs = []
    gaps = gap.reshape(-1, u.shape[-1]).to(u.device).double()  # (1 or B, L)
    segment = SEGMENT
    if isinstance(system, DPLRSystem):
        segment = min(segment, max(1, MATRICES // (gaps.shape[0] * system.A_bar.numel())))
    for part, intervals in zip(u.split(segment, dim=-1), gaps.split(segment, dim=-1), strict=True):
        if isinstance(system, DiagonalSystem):
            y, x = scan_diagonal_states(system, part, x, intervals)
        else:
            y, x = scan_dense_states(system, part, x, intervals)
        outputs.append(y)
    return torch.cat(outputs, dim=-1), x


def scan_diagonal_states(system: DiagonalSystem, u: Tensor, x: Tensor, gap: Tensor) -> tuple[Tensor, Tensor]:
    """Doubling: after step d each state sums its last 2d inputs, decayed over the gaps between; all exponents are <= 0."""
    complex_dtype = u.dtype.to_complex()
    is_complex = system.C.is_complex()
    log = system.log_A_bar[:, None, :, None]  # (H, 1, N/2, 1)
    elapsed = gap.cumsum(-1)[None, :, None, :]  # (1, 1 or B, 1, t)
    states = system.B_bar.to(complex_dtype)[:, None, :, None] * u.transpose(0, 1).unsqueeze(2)  # (H, B, N/2, t)
    d = 1
    while d < u.shape[-1]:
        decay = torch.exp(log * (elapsed[..., d:] - elapsed[..., :-d])).to(complex_dtype)
        states = torch.cat([states[..., :d], states[..., d:] + decay * states[..., :-d]], dim=-1)
        d *= 2
    carried = torch.complex(*x.chunk(2, dim=-1)) if is_complex else x.to(complex_dtype)
    states = states + torch.exp(log * elapsed).to(complex_dtype) * carried.unsqueeze(-1)
    y = 2 * (system.C.to(complex_dtype)[:, None, :, None] * states).real.sum(2)
    last = states[..., -1]
    return y.transpose(0, 1), torch.cat([last.real, last.imag], dim=-1) if is_complex else last.real


def scan_dense_states(system: DPLRSystem, u: Tensor, x: Tensor, gap: Tensor) -> tuple[Tensor, Tensor]:
    """One matrix exponential a gap, all of a segment at once, then the recurrence."""
    generator = system.dt.unsqueeze(-1) * real_matrix(system.Lambda, system.P)  # (H, S, S)
    A_bar = torch.matrix_exp(generator[:, None, None] * gap[None, :, :, None, None]).to(u.dtype)  # (H, 1 or B, t, S, S)
    inputs = system.B_bar.to(u.dtype)[:, None, None] * u.transpose(0, 1).unsqueeze(-1)  # (H, B, t, S)
    states = []
    for k in range(u.shape[-1]):
        x = (A_bar[:, :, k] @ x.unsqueeze(-1)).squeeze(-1) + inputs[:, :, k]
        states.append(x)
    y = torch.einsum("hs,hbts->bht", 2 * real_vector(system.C.conj()).to(u.dtype), torch.stack(states, dim=2))
    return y, x
