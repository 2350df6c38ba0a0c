"""S4D: the diagonal state space, from parameters to a discrete system."""

from typing import NamedTuple

import torch
from torch import Tensor

from s4audio.ssm.discretize import DIAGONAL, check_discretization


class DiagonalSystem(NamedTuple):
    """x_k = exp(log_A_bar) x_{k-1} + B_bar u_k, y_k = 2 Re(C x_k), one channel a row."""

    log_A_bar: Tensor  # (H, N/2) complex128; per unit of gap where there is one a sample
    B_bar: Tensor  # (H, N/2) complex, or (H, N) real for real modes
    C: Tensor  # like B_bar
    gap: Tensor | None = None  # (L,) or (batch, L): the interval before each sample, for a time-varying system


def diagonal_system(
    A: Tensor,
    B: Tensor,
    C: Tensor,
    dt: Tensor,
    discretization: str = "zoh",
    rate: float = 1.0,
    alpha: float = 0.5,
    gap: float | Tensor = 1.0,
) -> DiagonalSystem:
    """Discretizes a diagonal system; gradients reach all four tensors.

    Args:
        A: (H, N/2) complex, one of each conjugate pair; or (H, N) real modes.
        B: like A.
        C: like A. The output is 2 Re(C x), for real modes too.
        dt: (H, 1) or (H,) step size.
        discretization: one of DISCRETIZATIONS.
        rate: training sample rate / target sample rate; multiplies dt.
        alpha: of the generalized bilinear transform, in [0.5, 1].
        gap: of `async` only: the interval before each sample in units of dt; a number, or (L,) or (batch, L).

    Raises:
        ValueError: shapes that do not fit, an unknown scheme, alpha or gap that the scheme cannot take.

    Source: Gu et al. 2022, "On the parameterization and initialization of diagonal state space models".
    """
    check_discretization(discretization, alpha)
    per_sample = check_gap(gap, discretization)
    if A.dim() != 2 or B.shape[-1] != A.shape[-1] or C.shape[-1] != A.shape[-1]:
        raise ValueError(
            f"A, B and C must be (H, modes) with equal modes; got {tuple(A.shape)}, {tuple(B.shape)}, {tuple(C.shape)}."
        )
    dtype = torch.promote_types(torch.promote_types(A.dtype, B.dtype), C.dtype)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    dt = dt.reshape(-1, 1).double() * rate
    z = dt * A.to(torch.complex128)
    log_A_bar, B_bar = DIAGONAL[discretization](z, B.to(torch.complex128), dt, alpha)
    if not dtype.is_complex:
        B_bar = B_bar.real
    if isinstance(gap, (int, float)):
        log_A_bar = log_A_bar * gap
    B_bar = B_bar.to(wide).to(dtype)
    return DiagonalSystem(log_A_bar, B_bar, C.to(dtype).expand_as(B_bar), per_sample)


def check_gap(gap: float | Tensor, discretization: str) -> Tensor | None:
    """The gap if it is a tensor, that is one a sample, else None.

    Raises:
        ValueError: a gap with another scheme than async, a negative gap, or a tensor that is not (L,) or (batch, L).
    """
    if isinstance(gap, Tensor) and gap.dim() == 0:
        raise ValueError(
            "gap is a tensor without dimensions; give a number, or one interval per sample: (L,) or (batch, L)."
        )
    if not isinstance(gap, Tensor):
        if gap != 1.0 and discretization != "async":
            raise ValueError(f"gap is {gap} with discretization {discretization!r}; only 'async' takes intervals.")
        if gap < 0:
            raise ValueError(f"gap is {gap}; an interval cannot be negative.")
        return None
    if discretization != "async":
        raise ValueError(
            f"gap is a tensor with discretization {discretization!r}; only 'async' takes one interval per sample."
        )
    if gap.dim() > 2:
        raise ValueError(f"gap has shape {tuple(gap.shape)}; wanted (L,) or (batch, L).")
    return gap
