"""The definition of correct: each operation in its most literal form. Slow and hungry on purpose; tests and benchmarks
hold the engine against it, in float64: sample by sample in float32 it rounds 10 to 50 times more than the engine.

* `run`: the recurrence, sample by sample.
* `vandermonde_kernel`: the SSM kernel of S4D as a sum of powers.
* `dense_kernel`: the SSM kernel of DPLR S4 by multiplying the state again and again.
* `cauchy_kernel`: the SSM kernel of DPLR S4 from its truncated generating function (Cauchy sums and Woodbury).
* `fft_convolution`: causal convolution with a kernel as long as the signal.

Source: Gu et al. 2022, "Efficiently modeling long sequences with structured state spaces", algorithm 1 and appendix C.
"""

import torch
from torch import Tensor

from s4audio.ssm.diagonal import DiagonalSystem
from s4audio.ssm.dplr import DPLRSystem, real_matrix, real_vector


def run(system: DiagonalSystem | DPLRSystem, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """y (B, H, L) and the final state (H, B, S) from u (B, H, L) and the state x (H, B, S)."""
    outputs = []
    for k in range(u.shape[-1]):
        gap = None if system.gap is None else system.gap[..., k]
        y, x = step(system, u[..., k], x, gap)
        outputs.append(y)
    return torch.stack(outputs, dim=-1) if outputs else torch.zeros_like(u), x


def step(system: DiagonalSystem | DPLRSystem, u: Tensor, x: Tensor, gap: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """One sample: y (B, H) and the next state from u (B, H), the state x (H, B, S) and the interval () or (B,)."""
    interval = torch.ones((), device=u.device) if gap is None else gap.to(u.device)
    u = u.transpose(0, 1).unsqueeze(-1)  # (H, B, 1)
    if isinstance(system, DPLRSystem):
        A_bar = system.A_bar.unsqueeze(1)  # (H, 1 or B, N, N)
        if gap is not None:
            generator = system.dt.unsqueeze(-1) * real_matrix(system.Lambda, system.P)
            A_bar = torch.matrix_exp(generator.unsqueeze(1) * interval.double().reshape(-1, 1, 1))
        x = (A_bar.to(u.dtype) @ x.unsqueeze(-1)).squeeze(-1) + system.B_bar.to(u.dtype).unsqueeze(1) * u
        y = (2 * real_vector(system.C.conj()).to(u.dtype).unsqueeze(1) * x).sum(-1)
        return y.transpose(0, 1), x
    A_bar = torch.exp(system.log_A_bar.unsqueeze(1) * interval.double().reshape(-1, 1))  # (H, 1 or B, N/2)
    if not system.C.is_complex():
        x = A_bar.real.to(u.dtype) * x + system.B_bar.to(u.dtype).unsqueeze(1) * u
        return (2 * system.C.to(u.dtype).unsqueeze(1) * x).sum(-1).transpose(0, 1), x
    complex_dtype = u.dtype.to_complex()
    z = torch.complex(*x.chunk(2, dim=-1))
    z = A_bar.to(complex_dtype) * z + system.B_bar.to(complex_dtype).unsqueeze(1) * u
    y = 2 * (system.C.to(complex_dtype).unsqueeze(1) * z).real.sum(-1)
    return y.transpose(0, 1), torch.cat([z.real, z.imag], dim=-1)


def vandermonde_kernel(system: DiagonalSystem, length: int) -> Tensor:
    """K_l = 2 Re(C A_bar^l B_bar), (H, L), through the (H, N/2, L) Vandermonde matrix in the parameters' precision."""
    dtype = system.C.dtype.to_complex() if not system.C.is_complex() else system.C.dtype
    l = torch.arange(length, dtype=system.C.real.dtype, device=system.C.device)
    vandermonde = torch.exp(system.log_A_bar.to(dtype).unsqueeze(-1) * l)
    return 2 * torch.einsum("hn,hnl->hl", (system.C * system.B_bar).to(dtype), vandermonde).real


def dense_kernel(system: DPLRSystem, length: int) -> Tensor:
    """K_l = 2 Re(C A_bar^l B_bar), (H, L) float64, one power after the other."""
    C, v, taps = 2 * real_vector(system.C.conj()), system.B_bar, []
    for _ in range(length):
        taps.append((C * v).sum(-1))
        v = (system.A_bar @ v.unsqueeze(-1)).squeeze(-1)
    return torch.stack(taps, dim=-1)


def cauchy_kernel(system: DPLRSystem, length: int) -> Tensor:
    """K_l = 2 Re(C A_bar^l B_bar), (H, L) float64, by the truncated generating function.

    With C_tilde = C (I - A_bar^L), sum_l K_l z^l over l < L is C_tilde (I - A_bar z)^-1 B_bar at the roots of unity z;
    for the bilinear family that is dt C_tilde [(1 - z) I - s A]^-1 B, s = dt (alpha + (1 - alpha) z): a diagonal minus
    rank one, inverted by Woodbury into four Cauchy sums. The roots come from cos and sin in float64, and nothing is
    divided by 1 + z, which is zero at the Nyquist frequency.

    Raises:
        ValueError: the scheme is not of the bilinear family, or a pole is exactly at zero and so on the unit circle.
    """
    if system.alpha is None:
        raise ValueError("the Cauchy kernel exists for the bilinear family only; use dense_kernel for this scheme.")
    eye = torch.eye(system.A_bar.shape[-1], dtype=torch.float64, device=system.A_bar.device)
    C = 2 * real_vector(system.C.conj())
    truncated = (C.unsqueeze(-2) @ (eye - torch.linalg.matrix_power(system.A_bar, length))).squeeze(-2)
    re, im = truncated.chunk(2, dim=-1)
    C_tilde = _with_conjugate(torch.complex(re, -im) / 2)  # (H, N)
    Lambda, P, B = (_with_conjugate(p.to(torch.complex128)) for p in (system.Lambda, system.P, system.B))
    turn = -2 * torch.pi / length * torch.arange(length // 2 + 1, dtype=torch.float64, device=C.device)
    z = torch.complex(torch.cos(turn), torch.sin(turn))
    s = system.dt * (system.alpha + (1 - system.alpha) * z)  # (H, L/2 + 1)
    denominator = (1 - z) - s.unsqueeze(1) * Lambda.unsqueeze(-1)  # (H, N, L/2 + 1)
    if (denominator == 0).any():
        raise ValueError("a pole of A is exactly at zero, where the Cauchy kernel divides by zero; damp it a little.")
    resolvent = 1 / denominator

    def cauchy(left: Tensor, right: Tensor) -> Tensor:
        return torch.einsum("hn,hnl->hl", left * right, resolvent)

    correction = cauchy(C_tilde, P) * s * cauchy(P.conj(), B) / (1 + s * cauchy(P.conj(), P))
    return torch.fft.irfft(system.dt * (cauchy(C_tilde, B) - correction), n=length)


def fft_convolution(u: Tensor, K: Tensor) -> Tensor:
    """Causal convolution y_k = sum_l K_l u_{k-l} of u (B, H, L) with K (H, L), through a zero-padded FFT."""
    length = u.shape[-1]
    size = fast_fft_length(2 * length - 1)
    return torch.fft.irfft(torch.fft.rfft(u, n=size) * torch.fft.rfft(K.to(u.dtype), n=size), n=size)[..., :length]


def fast_fft_length(minimum: int) -> int:
    """The smallest even size >= minimum whose only prime factors are 2, 3 and 5."""
    size = minimum + minimum % 2
    while True:
        rest = size
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return size
        size += 2


def _with_conjugate(half: Tensor) -> Tensor:
    return torch.cat([half, half.conj()], dim=-1)
