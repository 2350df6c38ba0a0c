"""Initial state spaces: INITS[name](d_state) -> (A, B, P), each (N/2,) complex128; P is None where there is no low rank.

Of each conjugate pair one is kept: positive frequencies in lin and inv, negative ones in legs and fout, as eigh sorts them.
FouT's modes are undamped, Re A = 0; the layers floor it.

Source: Gu et al. 2022, "On the parameterization and initialization of diagonal state space models" (legs, lin, inv,
real); "How to train your HiPPO" (fout).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from s4audio.ssm import hippo

Init = Callable[[int], tuple[Tensor, Tensor, Tensor | None]]


def legs(d_state: int) -> tuple[Tensor, Tensor, Tensor]:
    """S4-LegS, and without P S4D-LegS: the normal part of HiPPO-LegS."""
    return hippo.diagonalize(*hippo.legs(d_state))


def fout(d_state: int) -> tuple[Tensor, Tensor, Tensor]:
    """S4-FouT: truncated Fourier; its modes are undamped until the low-rank term acts."""
    return hippo.diagonalize(*hippo.fout(d_state))


def lin(d_state: int) -> tuple[Tensor, Tensor, None]:
    """S4D-Lin: A_n = -1/2 + i pi n, evenly spaced frequencies."""
    n = torch.arange(d_state // 2, dtype=torch.float64)
    A = torch.complex(torch.full_like(n, -0.5), math.pi * n)
    return A, torch.ones_like(A), None


def inv(d_state: int) -> tuple[Tensor, Tensor, None]:
    """S4D-Inv: A_n = -1/2 + i N/pi (N / (2n + 1) - 1), the frequencies of LegS in closed form."""
    n = torch.arange(d_state // 2, dtype=torch.float64)
    A = torch.complex(torch.full_like(n, -0.5), d_state / math.pi * (d_state / (2 * n + 1) - 1))
    return A, torch.ones_like(A), None


def real(d_state: int) -> tuple[Tensor, Tensor, None]:
    """S4D-Real: A_n = -(n + 1), pure decays."""
    n = torch.arange(d_state // 2, dtype=torch.float64)
    A = torch.complex(-(n + 1), torch.zeros_like(n))
    return A, torch.ones_like(A), None


INITS: dict[str, Init] = {"legs": legs, "lin": lin, "inv": inv, "real": real, "fout": fout}


def initial_system(init: str, d_state: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """INITS[init](d_state) with the two arguments checked.

    Raises:
        ValueError: an unknown init, or a d_state that is not even and positive.
    """
    if init not in INITS:
        raise ValueError(f"init is {init!r}; choose one of {', '.join(INITS)}.")
    if d_state < 2 or d_state % 2:
        raise ValueError(f"d_state is {d_state}; it must be even and at least 2 (modes are stored as conjugate pairs).")
    return INITS[init](d_state)
