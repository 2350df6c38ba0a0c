"""What the tests of s4audio.ssm share: random systems of every family, and a naive oracle in numpy and scipy."""

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from s4audio.ssm import INITS, DiagonalSystem, DPLRSystem, diagonal_system, dplr_system, initial_system

ALPHA = 0.8  # of the generalized bilinear transform, wherever all schemes run
FAMILIES = [
    *[("diagonal", init) for init in INITS],
    *[("dplr", init) for init in INITS if INITS[init](4)[2] is not None],
    ("real modes", "real"),
]
"""Every kind of system with every init that it can take."""


def parameters(kind: str, init: str, H: int = 3, d_state: int = 8) -> dict[str, Tensor]:
    """Parameters of a family, another system in each channel: A, B, C, dt and, for dplr, P.

    Float64, but each number also exists in float32, so that both precisions compute the same system. Undamped modes are
    floored at -1e-4 as in the layers.
    """
    A, B, P = initial_system(init, d_state)

    def random_phases() -> Tensor:
        return torch.polar(0.5 + torch.rand(A.shape).double(), torch.randn(A.shape).double())

    A = torch.complex(A.real.clamp(max=-1e-4), A.imag).expand(H, -1) * (1 + 0.2 * torch.rand(H, 1))
    B = B.expand(H, -1) * random_phases()
    values = {
        "A": A,
        "B": B,
        "C": torch.randn(A.shape, dtype=A.dtype),
        "dt": torch.logspace(-2.5, -0.5, H).unsqueeze(-1),
    }
    if kind == "real modes":
        values = {name: value.real for name, value in values.items()}
    if kind == "dplr":
        values["P"] = P.expand(H, -1) * random_phases()
    return {name: cast(cast(value, torch.float32), torch.float64) for name, value in values.items()}


def cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    """To the real dtype, or to its complex partner."""
    return value.to(dtype.to_complex() if value.is_complex() else dtype)


def discretize(
    values: dict[str, Tensor], discretization: str, dtype: torch.dtype = torch.float64, **options
) -> DiagonalSystem | DPLRSystem:
    """The package's system from parameters in the given precision."""
    values = {name: cast(value, dtype) for name, value in values.items()}
    make = dplr_system if "P" in values else diagonal_system
    return make(**values, discretization=discretization, **options)


def random_state(system: DiagonalSystem | DPLRSystem, batch_size: int) -> Tensor:
    """A float64 state whose numbers also exist in float32."""
    state = torch.randn(batch_size, *system.C.shape, dtype=torch.complex64 if system.C.is_complex() else torch.float32)
    return cast(state, torch.float64)


def error(value: Tensor | np.ndarray, wanted: Tensor | np.ndarray) -> float:
    """max |value - wanted| / max |wanted| (of zeros: max |value|); shapes must be equal; nan exceeds all tolerances."""
    value, wanted = (w.detach().resolve_conj().cpu() if isinstance(w, Tensor) else w for w in (value, wanted))
    value, wanted = np.asarray(value), np.asarray(wanted)
    assert value.shape == wanted.shape, f"{value.shape} is not {wanted.shape}"
    if not value.size:
        return 0.0
    distance = float(np.abs(value - wanted).max() / (np.abs(wanted).max() or 1.0))
    return distance if np.isfinite(distance) else float("inf")


# The oracle: the whole complex matrix with both halves of each pair, scipy's exponential, and a loop in numpy.


def full_matrices(values: dict[str, Tensor], h: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Channel h as A (n, n), B (n,), C (n,) with y = Re(C x): n = N, conjugates included."""
    A, B, C = (values[name][h].numpy() for name in "ABC")
    if not np.iscomplexobj(A):
        return np.diag(A), B, 2 * C
    A, B, C = (np.concatenate([w, w.conj()]) for w in (A, B, C))
    A = np.diag(A)
    if "P" in values:
        P = values["P"][h].numpy()
        P = np.concatenate([P, P.conj()])
        A = A - np.outer(P, P.conj())
    return A, B, C


def discretize_naively(
    A: np.ndarray, B: np.ndarray, dt: float, discretization: str, alpha: float = ALPHA, gap: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """A_bar and B_bar by the table of s4audio.ssm.discretize."""
    n = len(A)
    if discretization in ("bilinear", "generalized_bilinear"):
        alpha = 0.5 if discretization == "bilinear" else alpha
        left = np.eye(n) - alpha * dt * A
        return np.linalg.solve(left, np.eye(n) + (1 - alpha) * dt * A), np.linalg.solve(left, dt * B)
    if discretization == "dirac":
        return scipy.linalg.expm(dt * A), dt * B
    if discretization not in ("zoh", "async"):
        raise NotImplementedError(f"the tests know no formula for {discretization}")
    with_input = np.block([[dt * A, dt * B[:, None]], [np.zeros((1, n + 1))]])  # the held input as one more state
    return scipy.linalg.expm(dt * A * gap), scipy.linalg.expm(with_input)[:n, n]


def run_naively(
    values: dict[str, Tensor], discretization: str, u: Tensor, state: Tensor, gap: Tensor | float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """y (B, H, L) and the final state (B, H, N/2), sample by sample; gap is a number, (L,) or (B, L)."""
    u, state = u.numpy(), state.numpy()
    modes = state.shape[-1]
    y, final = np.zeros(u.shape), np.zeros(state.shape, state.dtype)
    for b, h in np.ndindex(u.shape[:2]):
        A, B, C = full_matrices(values, h)
        dt = values["dt"][h].item()
        x = np.concatenate([state[b, h], state[b, h].conj()]) if np.iscomplexobj(state) else state[b, h]
        row = gap[b] if isinstance(gap, Tensor) and gap.dim() == 2 else gap
        gaps = np.broadcast_to(row, u.shape[2:]).tolist()
        known = {g: discretize_naively(A, B, dt, discretization, gap=g) for g in set(gaps)}
        for k, g in enumerate(gaps):
            A_bar, B_bar = known[g]
            x = A_bar @ x + B_bar * u[b, h, k]
            y[b, h, k] = (C @ x).real
        final[b, h] = x[:modes]
    return y, final
