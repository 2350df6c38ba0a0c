"""From the continuous system x' = A x + B u to the recurrence x_k = A_bar x_{k-1} + B_bar u_k.

Every scheme stands here once, in two forms with the same name:

* `DIAGONAL[name](z, B, dt, alpha)` for a diagonal A, elementwise on z = dt A. It returns log A_bar, not A_bar: powers
  taken from the logarithm keep their digits (5e-5 against 3e-6 in float32, over a chunk).
* `DENSE[name](Z, resolvent, B, dt, alpha)` for a matrix A, on Z = dt A, where resolvent(alpha) is (I - alpha Z)^-1: whoever
  knows more of Z than its numbers inverts it better than a solver.

| name                 | A_bar                             | B_bar                          |
| -------------------- | --------------------------------- | ------------------------------ |
| bilinear             | (I - Z/2)^-1 (I + Z/2)            | (I - Z/2)^-1 dt B              |
| generalized_bilinear | (I - alpha Z)^-1 (I + (1-alpha) Z)| (I - alpha Z)^-1 dt B          |
| zoh                  | exp(Z)                            | A^-1 (exp(Z) - I) B            |
| dirac                | exp(Z)                            | dt B                           |
| async                | exp(Z gap)                        | A^-1 (exp(Z) - I) B            |

`async` is zoh for one unit of time; the caller raises its A_bar to the power `gap`, the interval since the last sample
in units of dt (Z gap is linear in the logarithm, so this is exact). With a gap of 1/m throughout, its kernel is that of zoh
at steps of dt/m through a moving sum of m samples, since A^-1 (exp(Z) - I) = sum_{j<m} exp(Z j/m) A^-1 (exp(Z/m) - I): it
hears no detail below m samples.

Source: Gu et al. 2022, "Efficiently modeling long sequences with structured state spaces" (bilinear, zoh); Zhang et al.
2007, "Performance recovery in digital implementation of analogue systems" (generalized bilinear); Schöne et al. 2024,
"Scalable event-by-event processing of neuromorphic sensory signals with deep state-space models" (dirac, async).
"""

from collections.abc import Callable

import torch
from torch import Tensor

Resolvent = Callable[[float], Tensor]

SQUARINGS = 20  # of a matrix exponential, for norms of dt A up to 2^19: S4 of 64 states has that at dt = 80, of 256 at 5
DISCRETIZATIONS = ("bilinear", "generalized_bilinear", "zoh", "dirac", "async")


def check_discretization(name: str, alpha: float) -> None:
    """Refuse an unknown scheme, or an alpha with which poles could leave the unit circle.

    Raises:
        ValueError: `name` is not in DISCRETIZATIONS, or alpha is outside [0.5, 1].
    """
    if name not in DISCRETIZATIONS:
        raise ValueError(f"discretization is {name!r}; choose one of {', '.join(DISCRETIZATIONS)}.")
    if not 0.5 <= alpha <= 1.0:
        raise ValueError(
            f"alpha is {alpha}; the generalized bilinear transform is stable from 0.5 (bilinear) to 1 (backward Euler)."
        )


def expm1_ratio(z: Tensor) -> Tensor:
    """(exp(z) - 1) / z elementwise, without the digits that exp(z) - 1 loses near z = 0; there its series, 1 + z / 2."""
    at_zero = z == 0
    nonzero = torch.where(at_zero, torch.ones_like(z), z)
    return torch.where(at_zero, 1 + z / 2, torch.expm1(nonzero) / nonzero)


def _bilinear_diagonal(z: Tensor, B: Tensor, dt: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    explicit, implicit = (1 - alpha) * z, -alpha * z
    # A pole exactly at zero (z = -1 / (1 - alpha)) has no logarithm; move it by one rounding error.
    tiny = torch.finfo(z.real.dtype).eps
    explicit = torch.where(explicit == -1, explicit + tiny, explicit)
    return torch.log1p(explicit) - torch.log1p(implicit), dt * B / (1 + implicit)


def _zoh_diagonal(z: Tensor, B: Tensor, dt: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    return z, dt * B * expm1_ratio(z)


def _dirac_diagonal(z: Tensor, B: Tensor, dt: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    return z, dt * B


def _bilinear_dense(Z: Tensor, resolvent: Resolvent, B: Tensor, dt: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    inverse = resolvent(alpha)
    eye = torch.eye(Z.shape[-1], dtype=Z.dtype, device=Z.device)
    # (I - alpha Z)^-1 (I + (1 - alpha) Z), without a product
    return (inverse - (1 - alpha) * eye) / alpha, (inverse @ (dt * B).unsqueeze(-1)).squeeze(-1)


def matrix_expm1(Z: Tensor, squarings: int = SQUARINGS) -> Tensor:
    """exp(Z) - I of matrices (H, N, N) float64: a Taylor polynomial of Z / 2^squarings, then E <- E^2 + 2 E, which squares
    I + E without losing the digits of a small E. Norms of Z may be 2^(squarings - 1), beyond which it overflows.

    torch.matrix_exp looks at the numbers to choose how often to square, which a CUDA graph cannot hold, and its gradient is
    the exponential of matrices of twice the size: forward and backward it takes more than twice as long. This one keeps
    some 30 matrices for each of Z for its gradient.

    Source: Higham 2008, "Functions of matrices", chapter 10.
    """
    E = _expm1_of_small(Z / 2**squarings)
    for _ in range(squarings):
        E = torch.baddbmm(E, E, E, beta=2)
    return E


def _expm1_of_small(X: Tensor) -> Tensor:
    """exp(X) - I of matrices (H, N, N) float64, norm at most 1/2: a polynomial by Paterson and Stockmeyer's scheme."""
    X2 = torch.bmm(X, X)
    X4 = torch.bmm(X2, X2)
    powers = torch.stack([torch.eye(X.shape[-1], dtype=X.dtype, device=X.device).expand_as(X), X, X2, torch.bmm(X2, X)])
    # 1 / k!, and 0 for the I of exp(X) - I; made where X is, since a CUDA graph cannot copy from the CPU's memory.
    inverses = torch.cumprod(1 / torch.arange(1, 16, dtype=torch.float64, device=X.device), 0)
    weights = torch.nn.functional.pad(inverses, (1, 0)).view(4, 4).to(X.dtype)
    parts = (weights @ powers.flatten(1)).unflatten(1, X.shape)
    E = parts[3]
    for block in (2, 1, 0):
        E = torch.baddbmm(parts[block], E, X4)
    return E


def _zoh_dense(Z: Tensor, resolvent: Resolvent, B: Tensor, dt: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    # exp([[Z, dt B], [0, 0]]) = [[exp(Z), A^-1 (exp(Z) - I) B], [0, 1]]: no inverse of A, which may be singular. While E
    # goes to E^2 + 2 E the last column v goes to E v + 2 v: products of N x N matrices, since N + 1 fills no tiles.
    augmented = torch.nn.functional.pad(torch.cat([Z, (dt * B).unsqueeze(-1)], dim=-1), (0, 0, 0, 1))
    start = _expm1_of_small(augmented / 2**SQUARINGS)
    E, v = start[..., :-1, :-1].contiguous(), start[..., :-1, -1:].contiguous()
    for _ in range(SQUARINGS):
        v, E = torch.baddbmm(v, E, v, beta=2), torch.baddbmm(E, E, E, beta=2)
    return _plus_identity(E), v.squeeze(-1)


def _dirac_dense(Z: Tensor, resolvent: Resolvent, B: Tensor, dt: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    return matrix_exp(Z), dt * B


def matrix_exp(Z: Tensor, squarings: int = SQUARINGS) -> Tensor:
    """exp(Z) of matrices (H, N, N) float64, as `matrix_expm1`."""
    return _plus_identity(matrix_expm1(Z, squarings))


def _plus_identity(Z: Tensor) -> Tensor:
    return Z + torch.eye(Z.shape[-1], dtype=Z.dtype, device=Z.device)


DIAGONAL: dict[str, Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]] = {
    "bilinear": lambda z, B, dt, alpha: _bilinear_diagonal(z, B, dt, 0.5),
    "generalized_bilinear": _bilinear_diagonal,
    "zoh": _zoh_diagonal,
    "dirac": _dirac_diagonal,
    "async": _zoh_diagonal,
}

DENSE: dict[str, Callable[[Tensor, Resolvent, Tensor, Tensor, float], tuple[Tensor, Tensor]]] = {
    "bilinear": lambda Z, resolvent, B, dt, alpha: _bilinear_dense(Z, resolvent, B, dt, 0.5),
    "generalized_bilinear": _bilinear_dense,
    "zoh": _zoh_dense,
    "dirac": _dirac_dense,
    "async": _zoh_dense,
}
