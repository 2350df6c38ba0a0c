"""HiPPO matrices and their normal-plus-low-rank form, in float64, at initialization time only.

Source: Gu et al. 2020, "HiPPO: recurrent memory with optimal polynomial projections"; Gu et al. 2022, "How to train
your HiPPO" (FouT); Gu et al. 2022, "Efficiently modeling long sequences with structured state spaces" (appendix C, the
normal-plus-low-rank form).
"""

import math

import torch
from torch import Tensor


def legs(d_state: int) -> tuple[Tensor, Tensor, Tensor]:
    """HiPPO-LegS as real A (N, N), B (N,) and the low-rank P (N,) with A + P P^T normal."""
    n = torch.arange(d_state, dtype=torch.float64)
    root = torch.sqrt(2 * n + 1)
    A = -torch.tril(torch.outer(root, root), diagonal=-1) - torch.diag(n + 1)
    return A, root, torch.sqrt(n + 0.5)


def fout(d_state: int) -> tuple[Tensor, Tensor, Tensor]:
    """HiPPO-FouT (truncated Fourier) as real A (N, N), B (N,) and the low-rank P (N,) with A + P P^T normal.

    In the convention of the public S4 code, half of the paper's A and B: the window is two units of time long.
    """
    frequency = math.pi * torch.arange(d_state // 2, dtype=torch.float64)
    rotation = torch.stack([torch.zeros_like(frequency), frequency], dim=-1).flatten()[1:]
    B = torch.zeros(d_state, dtype=torch.float64)
    B[0::2] = math.sqrt(2)
    B[0] = 1
    A = torch.diag(rotation, -1) - torch.diag(rotation, 1) - torch.outer(B, B)
    return A, B, B.clone()


def diagonalize(A: Tensor, B: Tensor, P: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The diagonal-plus-low-rank form of a normal-plus-low-rank system, one of each conjugate pair.

    Args:
        A: (N, N) real, N even, with A + P P^T = -c I + skew-symmetric.
        B: (N,) real.
        P: (N,) real.

    Returns:
        Lambda, B, P, each (N/2,) complex, in the unitary eigenbasis V of A + P P^T: A = V (Lambda - P P^*) V^*. The
        phase of each mode is arbitrary; conj(P) B is not.
    """
    normal = A + torch.outer(P, P)
    # -i times a skew-symmetric matrix is Hermitian: eigh gives orthogonal eigenvectors and real frequencies, ascending.
    frequency, V = torch.linalg.eigh((normal - normal.T) * -0.5j)
    half = A.shape[0] // 2
    decay = torch.diagonal(normal).mean()
    if not frequency.is_meta and frequency[half - 1].abs() < 1e-9:  # a meta tensor, in `checkpoint.load`, is only a shape
        # A double zero frequency (FouT): eigh returns any two vectors of the plane; a conjugate pair must span it.
        plane = V[:, half - 1 : half + 1]
        real_basis = torch.linalg.eigh((plane @ plane.conj().T).real).eigenvectors[:, -2:]
        V[:, half - 1] = torch.complex(real_basis[:, 1], real_basis[:, 0]) / math.sqrt(2)
    V = V[:, :half]
    to_basis = V.conj().T
    return torch.complex(decay.expand(half), frequency[:half]), to_basis @ B.to(V.dtype), to_basis @ P.to(V.dtype)
