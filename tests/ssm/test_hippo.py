"""Of hippo.py and init.py."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import expm
from scipy.special import eval_legendre

from s4audio.ssm import INITS, hippo, initial_system
from tests.ssm.systems import error

HIPPO = {"legs": hippo.legs, "fout": hippo.fout}


def load(name: str) -> dict[str, np.ndarray]:
    with np.load(Path(__file__).parent / "golden" / f"{name}.npz") as file:
        return dict(file)


def with_conjugate(half: torch.Tensor) -> np.ndarray:
    return torch.cat([half, half.conj()]).numpy()


@pytest.mark.parametrize("d_state", [8, 16, 64])
@pytest.mark.parametrize("name", HIPPO)
def test_matrices_equal_the_golden_ones(name, d_state):
    golden = load("hippo_nplr")
    tolerance = {"legs": 1e-15, "fout": 1e-7}[name]  # the source has FouT's P in float32: 1.7e-8
    for value, letter in zip(HIPPO[name](d_state), "ABP", strict=True):
        assert error(value, golden[f"{name}{d_state}_{letter}"]) < (1e-15 if letter != "P" else tolerance)


@pytest.mark.parametrize("d_state", [8, 16, 64])
@pytest.mark.parametrize("name", HIPPO)
def test_diagonal_form_equals_the_golden_one_up_to_phases(name, d_state):
    golden = load("hippo_nplr")
    Lambda, B, P = hippo.diagonalize(*HIPPO[name](d_state))
    key = f"{name}{d_state}"
    # The source has eigenvectors of a float32 FouT; a mode or its conjugate: both describe the pair.
    order, wanted_order = (np.argsort(np.abs(w.imag)) for w in (Lambda.numpy(), golden[f"{key}_Lambda_half"]))
    tolerance = {"legs": 1e-11, "fout": 1e-7}[name]
    pairs = {
        "Lambda_half": (lambda w: w.real + 1j * np.abs(w.imag), Lambda.numpy()),
        "Pc": (np.abs, P.numpy()),
        "Bc": (np.abs, B.numpy()),
    }
    for letter, (invariant, value) in pairs.items():
        assert error(invariant(value)[order], invariant(golden[f"{key}_{letter}"])[wanted_order]) < tolerance
    product = (P.conj() * B).numpy()[order]
    wanted = (golden[f"{key}_Pc"].conj() * golden[f"{key}_Bc"])[wanted_order]
    flipped = np.sign(Lambda.imag.numpy()[order]) != np.sign(golden[f"{key}_Lambda_half"].imag[wanted_order])
    assert error(product, np.where(flipped, wanted.conj(), wanted)) < tolerance


@pytest.mark.parametrize("t", [0.01, 0.3, 2.0])
def test_legs_measures_with_scaled_legendre_polynomials(t):
    """The impulse response exp(t A) B is e^-t L_n(e^-t), L_n the orthonormal shifted Legendre polynomials."""
    A, B, _ = hippo.legs(12)
    decay = math.exp(-t)
    wanted = [decay * math.sqrt(2 * n + 1) * eval_legendre(n, 2 * decay - 1) for n in range(12)]
    assert error(expm(t * A.numpy()) @ B.numpy(), wanted) < 1e-10


def test_fout_remembers_a_window_of_two_units_of_time():
    """A constant input is the state e_0, the mean. Once the input stops it falls in a straight line and then is gone.

    A and B are half of the paper's, whose window is one unit. Tolerance: the Fourier series is cut off at 32 terms.
    """
    A, B, _ = (w.numpy() for w in hippo.fout(64))
    mean = np.eye(64)[0]
    assert error(A @ mean, -B) < 1e-15
    for t in (0.5, 1.0, 1.5):
        assert abs(mean @ expm(t * A) @ mean - (1 - t / 2)) < 0.005
    for t in (2.1, 3.0):
        assert np.abs(expm(t * A) @ mean).max() < 0.02


@pytest.mark.parametrize("d_state", [2, 4, 6, 16, 64])
@pytest.mark.parametrize("name", HIPPO)
def test_A_plus_the_low_rank_term_is_normal(name, d_state):
    A, _, P = (w.numpy() for w in HIPPO[name](d_state))
    normal = A + np.outer(P, P)
    assert error(normal @ normal.T, normal.T @ normal) < 1e-14


@pytest.mark.parametrize("d_state", [2, 4, 6, 10, 16, 64])
@pytest.mark.parametrize("name", HIPPO)
def test_diagonal_form_is_the_same_system(name, d_state):
    """Same transfer functions B^* (s - A)^-1 B, P^* (s - A)^-1 B, P^* (s - A)^-1 P: no change of basis alters them."""
    A, B, P = (w.numpy() for w in HIPPO[name](d_state))
    Lambda, B_half, P_half = (with_conjugate(w) for w in hippo.diagonalize(*HIPPO[name](d_state)))
    full = np.diag(Lambda) - np.outer(P_half, P_half.conj())
    for s in (0.5, 1 + 3j, 20j, 0.1 + 100j):
        for left, left_half, right, right_half in (
            (B, B_half, B, B_half),
            (P, P_half, B, B_half),
            (P, P_half, P, P_half),
        ):
            wanted = left @ np.linalg.solve(s * np.eye(d_state) - A, right)
            value = left_half.conj() @ np.linalg.solve(s * np.eye(d_state) - full, right_half)
            assert abs(value - wanted) < 1e-12 * abs(wanted)


def test_legs_has_the_eigenvalues_minus_1_to_minus_N():
    Lambda, _, P = (with_conjugate(w) for w in hippo.diagonalize(*hippo.legs(8)))
    values = np.linalg.eigvals(np.diag(Lambda) - np.outer(P, P.conj()))
    assert error(np.sort(values.real), -np.arange(8.0, 0, -1)) < 1e-10
    assert np.abs(values.imag).max() < 1e-9


def test_fout_has_the_frequencies_of_the_fourier_series():
    Lambda, _, _ = hippo.diagonalize(*hippo.fout(16))
    assert error(np.sort(np.abs(Lambda.imag.numpy())), math.pi * np.arange(8)) < 1e-14


@pytest.mark.parametrize(
    "init, file",
    [(i, f"s4d_{i}_zoh") for i in ("lin", "inv", "legs", "real")]
    + [("fout", "dplr_fout_bilinear"), ("legs", "dplr_legs_zoh")],
)
def test_inits_equal_the_golden_ones(init, file):
    A, B, P = initial_system(init, 16)
    golden = load(f"{file}_L1024")
    order, wanted_order = (np.argsort(np.abs(w.imag) - w.real) for w in (A.numpy(), golden["A"][0]))
    tolerance = 3e-6  # the source rounds to float32 and floors real and imaginary parts at 1e-4
    value, wanted = A.numpy()[order], golden["A"][0][wanted_order]
    assert np.abs(value.real - wanted.real).max() < 1.01e-4
    assert np.abs(np.abs(value.imag) - np.abs(wanted.imag)).max() < 1.01e-4
    unclipped = np.abs(golden["B"][0].imag[wanted_order]) < 2
    assert unclipped.sum() >= 5
    assert error(np.abs(B.numpy()[order][unclipped]), np.abs(golden["B"][0][wanted_order][unclipped])) < tolerance
    if "P" in golden:
        assert error(np.abs(P.numpy()[order]), np.abs(golden["P"][0, 0][wanted_order])) < tolerance


@pytest.mark.parametrize("d_state", [2, 4, 10, 64])
@pytest.mark.parametrize("init", INITS)
def test_every_init_gives_half_the_modes_and_none_grows(init, d_state):
    A, B, P = initial_system(init, d_state)
    for value in (A, B) if P is None else (A, B, P):
        assert value.shape == (d_state // 2,) and value.dtype == torch.complex128 and value.isfinite().all()
    full = np.diag(with_conjugate(A))
    if P is not None:
        full = full - np.outer(with_conjugate(P), with_conjugate(P).conj())
    assert np.linalg.eigvals(full).real.max() < 1e-12


def test_lin_has_evenly_spaced_frequencies():
    A, B, P = initial_system("lin", 6)
    assert error(A, np.array([-0.5, -0.5 + 3.141592653589793j, -0.5 + 6.283185307179586j])) < 1e-15
    assert B.tolist() == [1, 1, 1] and P is None


def test_inv_has_the_frequencies_of_its_formula():
    A, B, P = initial_system("inv", 4)  # 4 / pi (4 / (2n + 1) - 1)
    assert error(A, np.array([-0.5 + 12 / math.pi * 1j, -0.5 + 4 / (3 * math.pi) * 1j])) < 1e-15
    assert B.tolist() == [1, 1] and P is None


def test_real_has_no_frequencies():
    A, B, P = initial_system("real", 6)
    assert A.tolist() == [-1, -2, -3] and B.tolist() == [1, 1, 1] and P is None


def test_unknown_init():
    with pytest.raises(ValueError, match="init is 'hippo'; choose one of legs,"):
        initial_system("hippo", 8)


@pytest.mark.parametrize("d_state", [-2, 0, 1, 7])
@pytest.mark.parametrize("init", INITS)
def test_odd_or_empty_d_state(init, d_state):
    with pytest.raises(ValueError, match=f"d_state is {d_state}; it must be even and at least 2"):
        initial_system(init, d_state)
