"""reference.py against loops, closed forms and definitions that share no code with it."""

import numpy as np
import pytest
import torch

from s4audio.ssm import (
    DISCRETIZATIONS,
    DiagonalSystem,
    backend,
    diagonal_system,
    dplr_system,
    initial_system,
    reference,
    run,
)
from tests.ssm.systems import ALPHA, FAMILIES, discretize, error, parameters, random_state, run_naively

CAUCHY = 1e-10  # FouT's zero mode, floored at -1e-4, has terms of 1e4 / dt at z = 1 that must cancel; LegS has 1e-14
DPLR = [init for kind, init in FAMILIES if kind == "dplr"]


def run_reference(system, u, state=None):
    with backend("reference"):
        return run(system, u, state)


@pytest.mark.parametrize("kind, init", FAMILIES)
@pytest.mark.parametrize("discretization", DISCRETIZATIONS)
def test_recurrence_equals_naive_loop(discretization, kind, init):
    values = parameters(kind, init)
    system = discretize(values, discretization, alpha=ALPHA)
    u, state = torch.randn(2, 3, 40, dtype=torch.float64), random_state(system, 2)
    y, final = run_reference(system, u, state)
    y_wanted, final_wanted = run_naively(values, discretization, u, state)
    assert error(y, y_wanted) < 1e-12
    assert error(final, final_wanted) < 1e-12


@pytest.mark.parametrize("kind, init", FAMILIES)
@pytest.mark.parametrize("form", ["one", "per sample", "per sample and row"])
def test_recurrence_with_gaps_equals_naive_loop(form, kind, init):
    gap = {"one": 2.5, "per sample": 3 * torch.rand(12), "per sample and row": 3 * torch.rand(2, 12)}[form]
    values = parameters(kind, init, H=2, d_state=4)
    system = discretize(values, "async", gap=gap)
    u, state = torch.randn(2, 2, 12, dtype=torch.float64), random_state(system, 2)
    y, final = run_reference(system, u, state)
    y_wanted, final_wanted = run_naively(values, "async", u, state, gap)
    assert error(y, y_wanted) < 1e-12
    assert error(final, final_wanted) < 1e-12


@pytest.mark.parametrize("length", [1, 2, 33])
@pytest.mark.parametrize("kind, init", FAMILIES)
@pytest.mark.parametrize("discretization", DISCRETIZATIONS)
def test_kernels_equal_naive_impulse_response(discretization, kind, init, length):
    values = parameters(kind, init)
    system = discretize(values, discretization, alpha=ALPHA)
    impulse = torch.eye(1, length, dtype=torch.float64).expand(1, 3, -1)
    wanted = run_naively(values, discretization, impulse, torch.zeros(1, *system.C.shape, dtype=system.C.dtype))[0][0]
    if isinstance(system, DiagonalSystem):
        assert error(reference.vandermonde_kernel(system, length), wanted) < 1e-12
        return
    assert error(reference.dense_kernel(system, length), wanted) < 1e-12
    if system.alpha is not None:
        assert error(reference.cauchy_kernel(system, length), wanted) < CAUCHY


@pytest.mark.parametrize("discretization", DISCRETIZATIONS)
@pytest.mark.parametrize("init", ["legs", "lin", "inv", "real"])
def test_vandermonde_equals_dense_without_a_low_rank(init, discretization):
    values = parameters("diagonal", init)
    dense = discretize({**values, "P": torch.zeros_like(values["A"])}, discretization, alpha=ALPHA)
    K = reference.vandermonde_kernel(discretize(values, discretization, alpha=ALPHA), 300)
    assert error(K, reference.dense_kernel(dense, 300)) < 1e-12


@pytest.mark.parametrize("length", [1, 2, 3, 64, 65, 1000])
@pytest.mark.parametrize("init", DPLR)
@pytest.mark.parametrize(
    "discretization, alpha",
    [("bilinear", 0.5), ("generalized_bilinear", 0.5), ("generalized_bilinear", 0.7), ("generalized_bilinear", 1.0)],
)
def test_cauchy_equals_dense(discretization, alpha, init, length):
    system = discretize(parameters("dplr", init, d_state=16), discretization, alpha=alpha)
    assert error(reference.cauchy_kernel(system, length), reference.dense_kernel(system, length)) < CAUCHY


@pytest.mark.parametrize("d_state", [2, 8, 64])
def test_cauchy_refuses_a_pole_exactly_at_zero(d_state):
    """Which FouT has until it is damped."""
    A, B, P = (w.expand(1, -1) for w in initial_system("fout", d_state))
    system = dplr_system(A, P, B, B, torch.full((1, 1), 0.1))
    with pytest.raises(ValueError, match="a pole of A is exactly at zero"):
        reference.cauchy_kernel(system, 50)
    assert reference.dense_kernel(system, 50).isfinite().all()


@pytest.mark.parametrize("discretization", [name for name in DISCRETIZATIONS if "bilinear" not in name])
def test_cauchy_refuses_the_exponential_schemes(discretization):
    system = discretize(parameters("dplr", "legs"), discretization)
    with pytest.raises(ValueError, match="the Cauchy kernel exists for the bilinear family only; use dense_kernel"):
        reference.cauchy_kernel(system, 8)


def test_kernel_of_one_mode_in_closed_form():
    """K_l = 2 Re(C B / A (e^(dt A) - 1) e^(l dt A)), by hand for A = -1 + i pi, dt = 1: e^(dt A) = -1/e."""
    A = torch.tensor([[-1 + 1j * np.pi]], dtype=torch.complex128)
    B, C = torch.tensor([[2 - 1j]]), torch.tensor([[0.5 + 3j]])
    K = reference.vandermonde_kernel(diagonal_system(A, B, C, torch.ones(1, 1), "zoh"), 6)
    first = 2 * ((0.5 + 3j) * (2 - 1j) / (-1 + 1j * np.pi) * (-np.exp(-1) - 1)).real
    assert error(K[0], first * (-np.exp(-1)) ** np.arange(6)) < 1e-14


@pytest.mark.parametrize("length", [1, 2, 3, 100, 257])
def test_fft_convolution_equals_direct_convolution(length):
    u, K = torch.randn(2, 3, length, dtype=torch.float64), torch.randn(3, length, dtype=torch.float64)
    wanted = [[np.convolve(u[b, h], K[h])[:length] for h in range(3)] for b in range(2)]
    assert error(reference.fft_convolution(u, K), wanted) < 1e-13


@pytest.mark.parametrize("kind, init", FAMILIES)
def test_convolution_with_the_kernel_equals_the_recurrence(kind, init):
    system = discretize(parameters(kind, init), "zoh")
    make = reference.vandermonde_kernel if isinstance(system, DiagonalSystem) else reference.dense_kernel
    u = torch.randn(2, 3, 150, dtype=torch.float64)
    assert error(reference.fft_convolution(u, make(system, 150)), run_reference(system, u)[0]) < 1e-12


def test_fast_fft_length_is_the_smallest_even_product_of_2_3_and_5():
    products = sorted(2**a * 3**b * 5**c for a in range(1, 13) for b in range(8) for c in range(6))
    for minimum in [*range(1, 500), 1023, 1025, 4096, 4097]:
        assert reference.fast_fft_length(minimum) == next(p for p in products if p >= minimum)
