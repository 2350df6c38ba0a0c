"""The engine holds to the recurrence of reference.py, which test_reference.py holds to oracles of its own."""

from functools import cache

import numpy as np
import pytest
import scipy.linalg
import scipy.signal
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from s4audio.ssm import DISCRETIZATIONS, backend, chunk, kernel, run
from s4audio.ssm.chunk import Carry
from tests.ssm.systems import ALPHA, FAMILIES, cast, discretize, error, parameters, random_state

LENGTHS = (1, 2, 3, 63, 64, 65, 128, 1000)
KINDS = [("diagonal", "legs"), ("dplr", "legs"), ("real modes", "real")]  # one family for each form of the carry
FLOAT32 = 5e-6  # measured at 1,000 samples over all families and schemes: 5e-7 in y, 1.4e-6 in the state


def run_reference(system, u: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    with backend("reference"):
        return run(system, u, state)


def run_engine(system, u: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    with backend("chunk"):
        return run(system, u, state)


@pytest.fixture(params=[(1, 16), (2, 2), (4, 16)], ids=["T=1", "T=2 in pairs", "T=4"])
def many_chunks(request, monkeypatch) -> None:
    """Short chunks, or groups of two chunks: scans of scans of groups, with a rest at each level, on a few samples."""
    longest, group = request.param
    monkeypatch.setattr(chunk, "GROUP", group)
    monkeypatch.setattr(chunk, "chunk_length", lambda length: min(longest, 1 << (length.bit_length() - 1)))


@cache
def recurrence(kind: str, init: str, discretization: str, lengths: tuple[int, ...] = LENGTHS):
    """Parameters, u (4, H, max length), the states before (4, H, modes), y, and the state after each of the lengths.

    Row 0 starts from zero, the others from a random state.
    """
    torch.manual_seed(0)
    values = parameters(kind, init)
    system = discretize(values, discretization, alpha=ALPHA)
    u = torch.randn(4, 3, max(lengths), dtype=torch.float32).double()
    state = before = random_state(system, 4) * torch.tensor([0.0, 1, 1, 1]).reshape(4, 1, 1)
    outputs, after, position = [], {}, 0
    for length in sorted(lengths):
        y, state = run_reference(system, u[..., position:length], state)
        outputs.append(y)
        after[length], position = state, length
    return values, u, before, torch.cat(outputs, dim=-1), after


def check_against_recurrence(kind, init, discretization, length, lengths=LENGTHS, float32=FLOAT32):
    values, u, before, y, after = recurrence(kind, init, discretization, lengths)
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, float32)):
        system = discretize(values, discretization, dtype, alpha=ALPHA)
        inputs = cast(u[..., :length], dtype)
        # batch 1 from nothing, batch 3 from a carried state
        y_1, state_1 = run_engine(system, inputs[:1])
        assert error(y_1, y[:1, :, :length]) < tolerance
        assert error(state_1, after[length][:1]) < tolerance
        y_3, state_3 = run_engine(system, inputs[1:], cast(before[1:], dtype))
        assert error(y_3, y[1:, :, :length]) < tolerance
        assert error(state_3, after[length][1:]) < tolerance
        assert y_1.dtype == y_3.dtype == dtype


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kind, init", FAMILIES)
@pytest.mark.parametrize("discretization", DISCRETIZATIONS)
def test_engine_equals_recurrence(discretization, kind, init, length):
    check_against_recurrence(kind, init, discretization, length)


@pytest.mark.parametrize(
    "kind, init, discretization",
    [("diagonal", "lin", "zoh"), ("dplr", "legs", "bilinear"), ("real modes", "real", "zoh")],
)
def test_engine_equals_recurrence_with_long_chunks_and_a_rest(kind, init, discretization):
    assert chunk.chunk_length(4096 + 37) == 128
    check_against_recurrence(kind, init, discretization, 4096 + 37, lengths=(4096 + 37,))


@pytest.mark.parametrize("kind, init", FAMILIES)
@pytest.mark.parametrize("discretization", ["bilinear", "zoh"])
def test_engine_equals_recurrence_with_many_chunks(discretization, kind, init, many_chunks):
    check_against_recurrence(kind, init, discretization, 1000)


@pytest.mark.parametrize("kind, init", FAMILIES)
@pytest.mark.parametrize("discretization", DISCRETIZATIONS)
def test_impulse_through_the_engine_is_the_kernel(discretization, kind, init):
    system = discretize(parameters(kind, init), discretization, alpha=ALPHA)
    with backend("reference"):
        wanted = kernel(system, 333)
    with backend("chunk"):
        # The reference's Cauchy kernel of FouT is good to 1e-10 (test_reference.py), the others to 1e-13.
        assert error(kernel(system, 333), wanted) < (1e-10 if init == "fout" else 1e-12)


# Chunks


def test_chunk_length_is_a_power_of_two_within_the_length():
    for length in [*range(1, 300), 4095, 4096, 90_000, 10**7]:
        T = chunk.chunk_length(length)
        assert 1 <= T <= length and T & (T - 1) == 0


def random_carry(form: str, H: int, modes: int, dtype: torch.dtype = torch.float64) -> Carry:
    """A carry of norm just below one, over `modes` complex modes or 2 * modes real numbers."""
    if form == "matrix":
        return Carry(torch.linalg.qr(torch.randn(H, 2 * modes, 2 * modes, dtype=dtype)).Q * 0.98, None)
    if form == "real":
        return Carry(1.96 * torch.rand(H, 2 * modes, dtype=dtype) - 0.98, None)
    A = torch.polar(torch.full((H, modes), 0.98, dtype=dtype), 7 * torch.rand(H, modes, dtype=dtype))
    return Carry(A.real.clone(), A.imag.clone())


def as_matrix(A: Carry, h: int) -> np.ndarray:
    """The carry of channel h as the matrix that a row [Re x, Im x] is multiplied with from the right."""
    if A.is_matrix:
        return A.re[h].numpy()
    if A.im is None:
        return np.diag(A.re[h].numpy())
    re, im = np.diag(A.re[h].numpy()), np.diag(A.im[h].numpy())
    return np.block([[re, im], [-im, re]])


CARRIES = ("complex", "real", "matrix")


@pytest.mark.parametrize("num_chunks", [1, 2, 15, 16, 17, 47, 48, 49, 100, 16 * 48, 16 * 51 + 5])
@pytest.mark.parametrize("form", CARRIES)
def test_scan_equals_naive_loop(form, num_chunks):
    A = random_carry(form, H=2, modes=3)
    Z, x = torch.randn(2, 3, num_chunks, 6, dtype=torch.float64), torch.randn(2, 3, 6, dtype=torch.float64)
    X, last = chunk.scan(A, Z, x)
    state = x.numpy()
    for m in range(num_chunks):
        assert error(X[:, :, m], state) < 1e-12
        state = np.stack([state[h] @ as_matrix(A, h) for h in range(2)]) + Z[:, :, m].numpy()
    assert error(last, state) < 1e-12


@pytest.mark.parametrize("form", CARRIES)
def test_carry_squared_and_adjoint_are_those_of_its_matrix(form):
    A = random_carry(form, H=2, modes=3)
    for h in range(2):
        matrix = as_matrix(A, h)
        assert error(as_matrix(A.squared(), h), matrix @ matrix) < 1e-15
        assert error(as_matrix(A.adjoint(), h), matrix.T) < 1e-15


def test_toeplitz_equals_scipy():
    K = torch.randn(2, 8, dtype=torch.float64)
    for h in range(2):
        assert error(chunk.toeplitz(K)[h], scipy.linalg.toeplitz(K[h], np.zeros(8)).T) == 0


# Time-varying systems


def intervals(form: str, length: int) -> Tensor:
    """Zero, short and long intervals; the longest are many times dt."""
    shape = (length,) if form == "(L,)" else (3, length)
    return 3 * torch.rand(shape).double() * (torch.rand(shape) > 0.1)


@pytest.mark.parametrize("length", [1, 2, 127, 128, 129, 300])
@pytest.mark.parametrize("form", ["(L,)", "(batch, L)"])
@pytest.mark.parametrize("kind, init", FAMILIES)
def test_engine_equals_recurrence_over_varying_gaps(kind, init, form, length):
    values = parameters(kind, init, H=2, d_state=4)
    gap = intervals(form, length)
    system = discretize(values, "async", gap=gap)
    u, state = torch.randn(3, 2, length).double(), random_state(system, 3)
    wanted = run_reference(system, u, state)
    for value, target in zip(run_engine(system, u, state), wanted, strict=True):
        assert error(value, target) < 1e-11
    system = discretize(values, "async", torch.float32, gap=gap)
    for value, target in zip(run_engine(system, u.float(), cast(state, torch.float32)), wanted, strict=True):
        assert error(value, target) < FLOAT32


def test_length_300_is_more_than_two_segments():
    assert chunk.SEGMENT < 150


@pytest.mark.parametrize("kind, init", FAMILIES)
@pytest.mark.parametrize("name", ["chunk", "reference"])
def test_a_number_as_gap_is_a_gap_of_that_number_everywhere(name, kind, init):
    values = parameters(kind, init, H=2, d_state=4)
    u = torch.randn(2, 2, 150).double()
    state = random_state(discretize(values, "zoh"), 2)
    for number in (0.0, 0.25, 1.0, 3.0):
        with backend(name):
            wanted = run(discretize(values, "async", gap=number), u, state)
            for gap in (torch.full((150,), number), torch.full((2, 150), number).double()):
                for value, target in zip(run(discretize(values, "async", gap=gap), u, state), wanted, strict=True):
                    assert error(value, target) < 1e-11
            if number == 1.0:
                for value, target in zip(run(discretize(values, "zoh"), u, state), wanted, strict=True):
                    assert error(value, target) < 1e-12


def test_an_integer_gap_is_a_gap():
    values = parameters("diagonal", "lin")
    u = torch.randn(1, 3, 20).double()
    wanted = run(discretize(values, "async", gap=2.0), u)[0]
    assert error(run(discretize(values, "async", gap=2), u)[0], wanted) == 0
    assert error(run(discretize(values, "async", gap=torch.full((20,), 2)), u)[0], wanted) < 1e-12


# Carried state


@pytest.mark.parametrize(
    "cuts", [(0,), (1,), (63,), (64,), (65,), (500,), (699,), (700,), (1, 2, 3, 100, 101), (64, 65, 193)]
)
@pytest.mark.parametrize("kind, init", FAMILIES)
def test_pieces_with_the_state_carried_equal_the_whole(kind, init, cuts):
    system = discretize(parameters(kind, init), "zoh")
    u, state = torch.randn(2, 3, 700).double(), random_state(system, 2)
    y, final = run_engine(system, u, state)
    pieces = []
    for piece in u.tensor_split(cuts, dim=-1):
        y_piece, state = run_engine(system, piece, state)
        pieces.append(y_piece)
    assert error(torch.cat(pieces, dim=-1), y) < 1e-12
    assert error(state, final) < 1e-12


@pytest.mark.parametrize("cut", [0, 1, 128, 200, 256, 299])
@pytest.mark.parametrize("kind, init", KINDS)
def test_pieces_of_a_varying_system_equal_the_whole(kind, init, cut):
    values = parameters(kind, init, H=2, d_state=4)
    gap, u = intervals("(batch, L)", 300), torch.randn(3, 2, 300).double()
    y, final = run_engine(discretize(values, "async", gap=gap), u)
    y_1, state = run_engine(discretize(values, "async", gap=gap[:, :cut]), u[..., :cut])
    y_2, state = run_engine(discretize(values, "async", gap=gap[:, cut:]), u[..., cut:], state)
    assert error(torch.cat([y_1, y_2], dim=-1), y) < 1e-12
    assert error(state, final) < 1e-12


@pytest.mark.parametrize("gap", [1.0, torch.ones(0), torch.ones(2, 0)])
@pytest.mark.parametrize("name", ["chunk", "reference"])
@pytest.mark.parametrize("kind, init", KINDS)
def test_length_zero_gives_nothing_and_keeps_the_state(kind, init, name, gap):
    system = discretize(parameters(kind, init), "async", gap=gap)
    state = random_state(system, 2)
    with backend(name):
        y, final = run(system, torch.zeros(2, 3, 0, dtype=torch.float64), state)
    assert y.shape == (2, 3, 0) and torch.equal(final, state)


def test_strides_of_u_do_not_matter():
    system = discretize(parameters("diagonal", "lin"), "zoh")
    u = torch.randn(2, 3, 200).double()
    wanted = run_engine(system, u)[0]
    assert torch.equal(run_engine(system, u.permute(2, 1, 0).contiguous().permute(2, 1, 0))[0], wanted)
    assert torch.equal(run_engine(system, u.repeat_interleave(2, dim=-1)[..., ::2])[0], wanted)
    expanded = u[:1].expand(2, -1, -1)
    assert error(run_engine(system, expanded)[0], wanted[:1].expand(2, -1, -1)) < 1e-15


def test_channels_and_rows_do_not_mix():
    system = discretize(parameters("dplr", "legs"), "zoh")
    u = torch.randn(2, 3, 200).double()
    y, _ = run_engine(system, u)
    changed = u.clone()
    changed[1, 2] = 0
    differs = (run_engine(system, changed)[0] != y).any(-1)
    assert differs.tolist() == [[False] * 3, [False, False, True]]


# Long runs


@pytest.mark.parametrize("init", ["fout", "lin"])
@pytest.mark.parametrize("discretization", ["bilinear", "zoh"])
def test_ninety_thousand_samples_equal_scipy_lfilter(discretization, init):
    """The poles one by one through scipy's filter, in float64. Measured in float32: undamped 7e-7, lin 3e-7."""
    values = parameters("diagonal", init, d_state=16)
    u = torch.randn(1, 3, 90_000, dtype=torch.float32).double()
    wanted, final = np.zeros(u.shape), np.zeros((1, 3, 8), complex)
    for h in range(3):
        dt, A, B, C = (values[name][h].numpy() for name in ("dt", "A", "B", "C"))
        A_bar, B_bar = (np.exp(dt * A), B * np.expm1(dt * A) / A)
        if discretization == "bilinear":
            A_bar, B_bar = (1 + dt * A / 2) / (1 - dt * A / 2), dt * B / (1 - dt * A / 2)
        for n in range(8):
            states = scipy.signal.lfilter([B_bar[n]], [1, -A_bar[n]], u[0, h].numpy())
            wanted[0, h] += 2 * (C[n] * states).real
            final[0, h, n] = states[-1]
    y, state = run_engine(discretize(values, discretization), u)
    assert error(y, wanted) < 1e-10
    assert error(state, final) < 1e-10
    y, state = run_engine(discretize(values, discretization, torch.float32), u.float())
    assert error(y, wanted) < 2e-6
    assert error(state, final) < 2e-6


@pytest.mark.parametrize("kind, init", [("dplr", "fout"), ("dplr", "legs"), ("real modes", "real")])
def test_ninety_thousand_samples_in_float32_stay_near_float64(kind, init):
    values = parameters(kind, init, d_state=16)
    u = torch.randn(1, 3, 90_000, dtype=torch.float32)
    wanted, final = run_engine(discretize(values, "zoh"), u.double())
    y, state = run_engine(discretize(values, "zoh", torch.float32), u)
    assert error(y, wanted) < 2e-6
    assert error(state, final) < 1e-5  # FouT's zero mode sums up; it hardly reaches y


# Gradients


def differentiable(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone().requires_grad_() for name, value in values.items()}


@pytest.mark.parametrize("length", [1, 3, 27])
@pytest.mark.parametrize("kind, init", [*KINDS, ("dplr", "fout")])
@pytest.mark.parametrize("discretization", ["bilinear", "zoh"])
def test_gradients_equal_finite_differences(discretization, kind, init, length, monkeypatch):
    """27 samples are 13 chunks in 6 groups in 3 groups of groups; a sample and a chunk are left over."""
    monkeypatch.setattr(chunk, "GROUP", 2)
    monkeypatch.setattr(chunk, "chunk_length", lambda length: min(2, length))
    values = differentiable(parameters(kind, init, H=1, d_state=4))
    state = random_state(discretize(values, discretization), 2).requires_grad_()
    u = torch.randn(2, 1, length, dtype=torch.float64, requires_grad=True)

    def both_outputs(u, state, *parameters):
        return run_engine(discretize(dict(zip(values, parameters, strict=True)), discretization), u, state)

    assert gradcheck(both_outputs, (u, state, *values.values()))


@pytest.mark.parametrize("num_chunks", [1, 2, 7, 13])
@pytest.mark.parametrize("form", CARRIES)
def test_scan_has_first_and_second_derivatives(form, num_chunks, monkeypatch):
    monkeypatch.setattr(chunk, "GROUP", 2)
    A = random_carry(form, H=2, modes=1)
    Z = torch.randn(2, 1, num_chunks, 2, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 1, 2, dtype=torch.float64, requires_grad=True)
    inputs = (A.re.requires_grad_(), None if A.im is None else A.im.requires_grad_(), Z, x)

    def scan(re, im, Z, x):
        return chunk.scan(Carry(re, im), Z, x)

    assert gradcheck(scan, inputs)
    assert gradgradcheck(scan, inputs)


@pytest.mark.parametrize("T", [1, 2, 4, 8])
def test_dense_operators_are_powers_and_have_first_and_second_derivatives(T):
    A = 0.5 * torch.randn(2, 3, 3, dtype=torch.float64)
    B, C = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 2, 3, dtype=torch.float64)
    K, P, Q, A_T, _ = chunk._dense_operators(A, B, C, T, True)
    for j in range(T):
        power = torch.linalg.matrix_power(A, j)
        torch.testing.assert_close(P[:, T - 1 - j], (power @ B.unsqueeze(-1))[..., 0])
        torch.testing.assert_close(Q[:, :, j], C @ A @ power)
        torch.testing.assert_close(K[..., j], (C @ power @ B.unsqueeze(-1))[..., 0])
    torch.testing.assert_close(A_T, torch.linalg.matrix_power(A, T).mT)
    inputs = [v.requires_grad_() for v in (A, B, C)]

    def operators(A, B, C):
        return chunk._dense_operators(A, B, C, T, True)[:4]

    assert gradcheck(operators, inputs)
    assert gradgradcheck(operators, inputs)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(chunk._dense_operators, (*inputs, T, True), test_utils=tests)


def gradients(name: str, values: dict, discretization: str, u: Tensor, state: Tensor, weights: tuple, **options):
    """The gradients of a random sum over y and the final state, by letter."""
    leaves = differentiable({**values, "u": u, "state": state, **options})
    options = {"alpha": ALPHA, **{option: leaves[option] for option in options}}
    with backend(name):
        system = discretize({letter: leaves[letter] for letter in values}, discretization, u.dtype, **options)
        y, final = run(system, leaves["u"], leaves["state"])
    loss = (y * weights[0]).sum() + (final * weights[1]).sum().real
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


@pytest.mark.parametrize("kind, init", FAMILIES)
@pytest.mark.parametrize("discretization", DISCRETIZATIONS)
def test_gradients_equal_those_of_the_recurrence(discretization, kind, init):
    values = parameters(kind, init)
    u = torch.randn(2, 3, 150).double()
    state = random_state(discretize(values, discretization), 2)
    weights = (torch.randn_like(u), torch.randn_like(state))
    wanted = gradients("reference", values, discretization, u, state, weights)
    found = gradients("chunk", values, discretization, u, state, weights)
    for letter, gradient in wanted.items():
        assert error(found[letter], gradient) < 1e-10, letter


@pytest.mark.parametrize("form", ["(L,)", "(batch, L)"])
@pytest.mark.parametrize("kind, init", KINDS)
def test_gradients_over_varying_gaps_equal_those_of_the_recurrence(kind, init, form):
    values = parameters(kind, init, H=2, d_state=4)
    gap, u = intervals(form, 140), torch.randn(3, 2, 140).double()
    state = random_state(discretize(values, "zoh"), 3)
    weights = (torch.randn_like(u), torch.randn_like(state))
    wanted = gradients("reference", values, "async", u, state, weights, gap=gap)
    found = gradients("chunk", values, "async", u, state, weights, gap=gap)
    assert "gap" in wanted
    for letter, gradient in wanted.items():
        assert error(found[letter], gradient) < 1e-10, letter


@pytest.mark.parametrize("kind, init", KINDS)
def test_gradients_in_float32_are_near_those_in_float64(kind, init):
    """Through 20,000 samples, so that groups of chunks and their rest take part."""
    values = parameters(kind, init)
    u = torch.randn(1, 3, 20_001, dtype=torch.float32).double()
    state = random_state(discretize(values, "zoh"), 1)
    weights = (torch.randn_like(u), torch.randn_like(state))
    wanted = gradients("chunk", values, "zoh", u, state, weights)
    single = (cast(w, torch.float32) for w in (u, state))
    found = gradients("chunk", values, "zoh", *single, tuple(cast(w, torch.float32) for w in weights))
    for letter, gradient in wanted.items():
        assert error(found[letter], gradient) < 1e-4, letter


@pytest.mark.parametrize("kind, init", KINDS)
def test_only_what_asks_for_a_gradient_gets_one(kind, init):
    values = parameters(kind, init)
    system = discretize(values, "zoh")
    u = torch.randn(1, 3, 200).double()
    y, state = run_engine(system, u)
    assert not y.requires_grad and not state.requires_grad
    C = values["C"].clone().requires_grad_()
    y, state = run_engine(discretize({**values, "C": C}, "zoh"), u)
    assert y.requires_grad and not state.requires_grad
    y.square().sum().backward()
    assert C.grad.abs().min() > 0
