"""S4: the diagonal-plus-low-rank state space, from parameters to a discrete system.

The full state is [x, conj(x)] with A = diag([Lambda, conj(Lambda)]) - [P, conj(P)] [P, conj(P)]^*. On the stored half x
this is linear over the reals, A x = Lambda x - P 2 Re(P^* x), so here it is an ordinary real N x N matrix that acts on
[Re x, Im x]: half the size of the complex matrix, and no complex product on the way to the engine.
"""

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from s4audio.ssm.diagonal import check_gap, check_shapes
from s4audio.ssm.discretize import DENSE, SQUARINGS, check_discretization, matrix_exp


class DPLRSystem(NamedTuple):
    """[Re x, Im x]_k = A_bar [Re x, Im x]_{k-1} + B_bar u_k, y_k = 2 Re(C x_k), one channel a row.

    C may have twice the rows, of which the last H share the matrices of the first: a system that runs both ways.
    """

    A_bar: Tensor  # (H, N, N) float64
    B_bar: Tensor  # (H, N) float64
    C: Tensor  # (H, N/2) complex
    Lambda: Tensor  # (H, N/2) complex: the parameters, for the Cauchy kernel and for gaps
    P: Tensor  # (H, N/2) complex
    B: Tensor  # (H, N/2) complex
    dt: Tensor  # (H, 1) float64, times rate
    alpha: float | None  # of the bilinear family; None for the exponential schemes
    gap: Tensor | None = None  # (L,) or (batch, L): the interval before each sample, for a time-varying system


def dplr_system(
    A: Tensor,
    P: Tensor,
    B: Tensor,
    C: Tensor,
    dt: Tensor,
    discretization: str = "bilinear",
    rate: float = 1.0,
    alpha: float = 0.5,
    gap: float | Tensor = 1.0,
) -> DPLRSystem:
    """Discretizes a diagonal-plus-low-rank system in float64; gradients reach all five tensors.

    Args:
        A: (H, N/2) complex: the diagonal Lambda of the half whose conjugate is implied.
        P: (H, N/2) complex, the low-rank term: A_full = diag(Lambda) - P P^*.
        B: (H, N/2) complex.
        C: (H, N/2) complex. The output is 2 Re(C x).
        dt: (H, 1) or (H,) step size.
        discretization: one of DISCRETIZATIONS.
        rate: training sample rate / target sample rate; multiplies dt.
        alpha: of the generalized bilinear transform, in [0.5, 1].
        gap: of `async` only: the interval before each sample in units of dt; a number, or (L,) or (batch, L).

    Raises:
        ValueError: shapes that do not fit, an unknown scheme, alpha or gap that the scheme cannot take.

    Source: Gu et al. 2022, "Efficiently modeling long sequences with structured state spaces".
    """
    check_discretization(discretization, alpha)
    check_gap(gap, discretization)
    check_shapes(dt, A=A, P=P, B=B, C=C)
    for name, parameter in (("A", A), ("P", P), ("B", B), ("C", C)):
        if not parameter.is_complex():
            raise ValueError(f"{name} is {parameter.dtype}; such a system takes complex modes, one of each conjugate pair.")
    dt = dt.reshape(-1, 1).double() * rate
    Z = dt.unsqueeze(-1) * real_matrix(A, P)
    A_bar, B_bar = DENSE[discretization](Z, partial(resolvent, A, P, dt), real_vector(B), dt, alpha)
    per_sample = gap if isinstance(gap, Tensor) else None
    if per_sample is None and gap != 1.0:
        A_bar = matrix_exp(Z * float(gap), SQUARINGS + max(0, math.frexp(gap)[1]))
    family = {"bilinear": 0.5, "generalized_bilinear": alpha}
    return DPLRSystem(A_bar, B_bar, C, A, P, B, dt, family.get(discretization), per_sample)


def real_vector(v: Tensor) -> Tensor:
    """[Re v, Im v] of (..., N/2) complex as (..., N) float64."""
    return torch.cat([v.real, v.imag], dim=-1).double()


def real_diagonal(Lambda: Tensor) -> Tensor:
    """The real (H, N, N) float64 matrix of x -> Lambda x, acting on [Re x, Im x]."""
    re, im = torch.diag_embed(Lambda.real.double()), torch.diag_embed(Lambda.imag.double())
    return torch.cat([torch.cat([re, -im], dim=-1), torch.cat([im, re], dim=-1)], dim=-2)


def real_matrix(Lambda: Tensor, P: Tensor) -> Tensor:
    """The real (H, N, N) float64 matrix of x -> Lambda x - P 2 Re(P^* x), acting on [Re x, Im x]."""
    p = real_vector(P)
    return real_diagonal(Lambda) - 2 * p.unsqueeze(-1) * p.unsqueeze(-2)


def resolvent(Lambda: Tensor, P: Tensor, dt: Tensor, alpha: float) -> Tensor:
    """(I - alpha dt A)^-1 of A = `real_matrix(Lambda, P)`, dt (H, 1), by Sherman and Morrison's formula.

    With M = I - alpha dt Lambda, A's low rank adds 2 alpha dt p p^T to it. Never singular: Re Lambda <= 0, so that M and
    its inverse have a positive real part and the denominator is at least 1.
    """
    m = 1 / (1 - alpha * dt * Lambda.to(torch.complex128))  # (H, N/2), M^-1
    P = P.to(torch.complex128)
    left, right = real_vector(m * P), real_vector(m.conj() * P)  # M^-1 p and p^T M^-1
    weight = 2 * alpha * dt
    scale = weight / (1 + weight * (real_vector(P) * left).sum(-1, keepdim=True))  # (H, 1)
    return real_diagonal(m) - scale.unsqueeze(-1) * left.unsqueeze(-1) * right.unsqueeze(-2)
