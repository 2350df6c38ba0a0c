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
    check(A, B, C, dt, discretization, alpha, gap)
    dtype = torch.promote_types(torch.promote_types(A.dtype, B.dtype), C.dtype)
    dt = dt.reshape(-1, 1).double() * rate
    z = dt * A.to(torch.complex128)
    log_A_bar, B_bar = DIAGONAL[discretization](z, B.to(torch.complex128), dt, alpha)
    if not dtype.is_complex:
        B_bar = B_bar.real
    per_sample = gap if isinstance(gap, Tensor) else None
    if per_sample is None:
        log_A_bar = log_A_bar * float(gap)
    return DiagonalSystem(log_A_bar, B_bar.to(dtype), C.to(dtype), per_sample)


def check(A: Tensor, B: Tensor, C: Tensor, dt: Tensor, discretization: str, alpha: float, gap: float | Tensor) -> None:
    """Refuse what `diagonal_system` cannot discretize, with a ValueError."""
    check_discretization(discretization, alpha)
    check_gap(gap, discretization)
    check_shapes(dt, A=A, B=B, C=C)


def check_gap(gap: float | Tensor, discretization: str) -> None:
    """Refuse intervals that the scheme cannot take.

    Raises:
        ValueError: a gap with another scheme than async, a negative gap, or a tensor that is not (L,) or (batch, L).
    """
    if isinstance(gap, Tensor):
        if discretization != "async":
            raise ValueError(f"gap is a tensor with discretization {discretization!r}; only 'async' takes one per sample.")
        if gap.dim() not in (1, 2):
            raise ValueError(f"gap has shape {tuple(gap.shape)}; wanted a number, or one per sample: (L,) or (batch, L).")
        smallest = gap.detach().min().item() if gap.numel() else 0.0
    else:
        if gap != 1.0 and discretization != "async":
            raise ValueError(f"gap is {gap} with discretization {discretization!r}; only 'async' takes intervals.")
        smallest = float(gap)
    if not smallest >= 0:  # nan neither
        raise ValueError(f"gap is {smallest:g}; an interval cannot be negative.")


def check_shapes(dt: Tensor, **parameters: Tensor) -> None:
    """Refuse parameters that are not all (H, modes), and a dt that is not (H, 1) or (H,).

    Raises:
        ValueError: they differ.
    """
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    channels = len(next(iter(parameters.values())))
    if any(p.dim() != 2 for p in parameters.values()) or len(set(shapes.values())) != 1:
        found = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"{', '.join(shapes)} must all be (H, modes); got {found}.")
    if tuple(dt.shape) not in ((channels, 1), (channels,)):
        raise ValueError(
            f"dt has shape {tuple(dt.shape)}; wanted ({channels}, 1) or ({channels},), one step size a channel."
        )
