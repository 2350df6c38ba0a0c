import numpy as np
import pytest
import torch

from s4audio.ssm import (
    BACKENDS,
    DISCRETIZATIONS,
    backend,
    chunk,
    diagonal_system,
    kernel,
    ops,
    poles,
    reference,
    run,
    step,
    zero_state,
)
from tests.ssm.systems import ALPHA, FAMILIES, cast, discretize, error, parameters, random_state

KINDS = [("diagonal", "legs"), ("dplr", "legs"), ("real modes", "real")]
DEVICE, AUTO = ("cuda", "triton") if torch.cuda.is_available() and ops.fused else ("cpu", "chunk")
DOUBLE = [name for name in BACKENDS if name != "triton"]  # those that take float64; tests/ssm/test_triton.py tests the other
HALF = {torch.bfloat16: 2**-8, torch.float16: 2**-11}  # half a unit in the last place


@pytest.fixture
def called(monkeypatch) -> list[str]:
    """The implementations that ran, in order."""
    names = []
    for module in filter(None, (reference, chunk, ops.fused)):
        name, real = module.__name__.rpartition(".")[-1], module.run
        monkeypatch.setattr(module, "run", lambda *args, name=name, real=real: names.append(name) or real(*args))
    return names


def run_anything() -> None:
    values = {name: value.to(DEVICE) for name, value in parameters("diagonal", "lin").items()}
    run(discretize(values, "zoh", torch.float32), torch.ones(1, 3, 4, device=DEVICE))


# Backends


def test_auto_is_the_default_and_is_the_engine(called):
    run_anything()
    with backend("auto"):
        run_anything()
    assert ops._backend == "auto"
    assert called == [AUTO, AUTO]


@pytest.mark.parametrize("name", [*DOUBLE[1:], *(["triton"] if ops.fused else [])])
def test_backend_chooses_the_implementation(called, name):
    with backend(name):
        run_anything()
    assert called == [name]


def test_backends_nest(called):
    with backend("reference"):
        with backend("chunk"):
            run_anything()
        run_anything()
    run_anything()
    assert called == ["chunk", "reference", AUTO]


def test_backend_is_restored_after_an_exception(called):
    with pytest.raises(KeyError), backend("reference"):
        raise KeyError
    run_anything()
    assert called == [AUTO]


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend is 'cuda'; choose one of auto, reference, chunk, triton"), backend("cuda"):
        pass


# One map


@pytest.mark.parametrize("name", DOUBLE)
@pytest.mark.parametrize("kind, init", FAMILIES)
@pytest.mark.parametrize("discretization", DISCRETIZATIONS)
def test_steps_equal_run_equal_kernel(discretization, kind, init, name):
    system = discretize(parameters(kind, init), discretization, alpha=ALPHA)
    u, state = torch.randn(2, 3, 20).double(), random_state(system, 2)
    with backend(name):
        y, final = run(system, u, state)
        from_zero, _ = run(system, u)
        K = kernel(system, 20)
    outputs = []
    for sample in u.split(1, dim=-1):
        output, state = step(system, sample, state)
        outputs.append(output)
    assert error(torch.cat(outputs, dim=-1), y) < 1e-11
    assert error(state, final) < 1e-11
    tolerance = 1e-10 if init == "fout" else 1e-12  # the Cauchy kernel of FouT, see test_reference.py
    assert error(reference.fft_convolution(u, K), from_zero) < tolerance


@pytest.mark.parametrize("name", DOUBLE)
@pytest.mark.parametrize("kind, init", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kernel_has_the_precision_of_the_parameters(dtype, kind, init, name):
    values = parameters(kind, init)
    with backend(name):
        K = kernel(discretize(values, "zoh", dtype), 100)
        assert K.dtype == dtype and K.shape == (3, 100)
        assert error(K, kernel(discretize(values, "zoh"), 100)) < (1e-5 if dtype == torch.float32 else 1e-15)


@pytest.mark.parametrize("kind, init", KINDS)
def test_kernel_gradients_do_not_depend_on_the_backend(kind, init):
    found = {}
    for name in DOUBLE:
        torch.manual_seed(0)
        values = {letter: value.requires_grad_() for letter, value in parameters(kind, init, d_state=6).items()}
        weights = torch.arange(270.0).sin().reshape(3, 90)
        with backend(name):
            loss = (kernel(discretize(values, "bilinear"), 90) * weights).sum()
        found[name] = torch.autograd.grad(loss, list(values.values()))
    for name in DOUBLE:
        for gradient, wanted in zip(found[name], found["reference"], strict=True):
            assert error(gradient, wanted) < 1e-10


@pytest.mark.parametrize("name", DOUBLE)
@pytest.mark.parametrize("kind, init", KINDS)
def test_halving_dt_by_the_rate_equals_half_the_dt(kind, init, name):
    values = parameters(kind, init)
    u = torch.randn(2, 3, 100).double()
    with backend(name):
        y, state = run(discretize(values, "bilinear", rate=0.5), u)
        y_half, state_half = run(discretize({**values, "dt": values["dt"] / 2}, "bilinear"), u)
    assert torch.equal(y, y_half) and torch.equal(state, state_half)


@pytest.mark.parametrize("name", DOUBLE)
@pytest.mark.parametrize("kind, init", KINDS)
def test_an_empty_batch_gives_an_empty_batch(kind, init, name):
    system = discretize(parameters(kind, init), "zoh")
    with backend(name):
        y, state = run(system, torch.zeros(0, 3, 200))
    assert y.shape == (0, 3, 200) and state.shape == (0, *system.C.shape)


# State


@pytest.mark.parametrize("kind, init", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_state_is_the_zero_state(dtype, kind, init):
    system = discretize(parameters(kind, init), "zoh")
    zero = zero_state(system, 2, dtype)
    assert zero.shape == (2, *system.C.shape) and not zero.any()
    assert zero.dtype == (dtype if kind == "real modes" else dtype.to_complex())
    u = torch.randn(2, 3, 10, dtype=dtype)
    (y, state), (wanted, wanted_state) = run(system, u, zero), run(system, u)
    assert torch.equal(y, wanted) and torch.equal(state, wanted_state)
    assert state.dtype == zero.dtype


@pytest.mark.parametrize("name", DOUBLE)
@pytest.mark.parametrize("kind, init", KINDS)
def test_inputs_are_left_as_they_are(kind, init, name):
    system = discretize(parameters(kind, init), "zoh")
    u, state = torch.randn(2, 3, 130).double(), random_state(system, 2)
    before = [w.clone() for w in (u, state, *(p for p in system if isinstance(p, torch.Tensor)))]
    with backend(name):
        run(system, u, state)
        step(system, u[..., :1], state)
    after = [u, state, *(p for p in system if isinstance(p, torch.Tensor))]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


# Precision


@pytest.mark.parametrize("name", DOUBLE)
@pytest.mark.parametrize("kind, init", KINDS)
@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_is_rounded_in_and_out_only(dtype, kind, init, name):
    system = discretize(parameters(kind, init), "zoh", torch.float32)
    u = torch.randn(2, 3, 200).to(dtype)
    with backend(name):
        y, state = run(system, u)
        wanted, wanted_state = run(system, u.float())
    assert y.dtype == dtype
    assert torch.equal(state, wanted_state)
    assert (y.float() - wanted).abs().max() <= HALF[dtype] * wanted.abs().max()
    y, state = step(system, u[..., :1], wanted_state)
    wanted, wanted_state = step(system, u[..., :1].float(), wanted_state)
    assert y.dtype == dtype and torch.equal(y, wanted.to(dtype)) and torch.equal(state, wanted_state)


@pytest.mark.parametrize("name", DOUBLE)
@pytest.mark.parametrize("kind, init", KINDS)
def test_the_precision_of_u_decides_not_that_of_the_parameters(kind, init, name):
    values = parameters(kind, init)
    u = torch.randn(2, 3, 100)
    with backend(name):
        y, state = run(discretize(values, "zoh", torch.float64), u)
        assert y.dtype == torch.float32 and state.real.dtype == torch.float32
        y, state = run(discretize(values, "zoh", torch.float32), u.double())
        assert y.dtype == torch.float64 and state.real.dtype == torch.float64
        y, state = run(discretize(values, "zoh"), u, random_state(discretize(values, "zoh"), 2))
        assert y.dtype == torch.float32 and state.real.dtype == torch.float32


@pytest.mark.parametrize("name", DOUBLE)
@pytest.mark.parametrize("kind, init", KINDS)
def test_autocast_changes_nothing(kind, init, name):
    values = {letter: cast(value, torch.float32).requires_grad_() for letter, value in parameters(kind, init).items()}
    u, leaves = torch.randn(2, 3, 200), list(values.values())
    found = []
    for enabled in (False, True):
        with backend(name), torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            system = discretize(values, "bilinear", torch.float32)
            y, state = run(system, u)
            y_step, state_step = step(system, u[..., :1], state)
            K = kernel(system, 70)
        gradients = torch.autograd.grad(y.square().sum() + state.abs().sum() + K.square().sum(), leaves)
        found.append([y, state, y_step, state_step, K, *gradients])
    for value, wanted in zip(*found, strict=True):
        assert value.dtype == wanted.dtype and torch.equal(value, wanted)


# Errors


@pytest.mark.parametrize("operation", [run, lambda system, u: step(system, u, None)])
@pytest.mark.parametrize("kind, init", KINDS)
@pytest.mark.parametrize("shape", [(3, 1), (1, 2, 1), (1, 3, 1, 1)])
def test_u_of_the_wrong_shape(operation, kind, init, shape):
    system = discretize(parameters(kind, init), "zoh")
    with pytest.raises(ValueError, match=r"u has shape \(.*\); wanted \(batch, 3, length\)"):
        operation(system, torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool])
def test_u_that_is_not_real(dtype):
    with pytest.raises(ValueError, match=f"u is {dtype}; wanted a real floating-point tensor"):
        run(discretize(parameters("diagonal", "lin"), "zoh"), torch.zeros(1, 3, 5, dtype=dtype))


@pytest.mark.parametrize("operation", [run, step])
@pytest.mark.parametrize("kind, init", KINDS)
def test_state_of_the_wrong_shape_or_kind(operation, kind, init):
    system = discretize(parameters(kind, init), "zoh")
    u, state = torch.zeros(2, 3, 1).double(), random_state(system, 2)
    for wrong in (state[:1], state[:, :2], state[..., :3], state[0]):
        with pytest.raises(ValueError, match=r"state is torch.* \(.*\); wanted a .* tensor of shape \(2, 3, "):
            operation(system, u, wrong)
    wrong, wanted = (state + 0j, "real") if kind == "real modes" else (state.real, "complex")
    with pytest.raises(ValueError, match=f"wanted a {wanted} tensor of shape"):
        operation(system, u, wrong)


@pytest.mark.parametrize("name", DOUBLE)
@pytest.mark.parametrize("kind, init", KINDS)
@pytest.mark.parametrize("shape", [(4,), (6,), (2, 4), (0,)])
def test_as_many_gaps_as_samples(kind, init, name, shape):
    system = discretize(parameters(kind, init), "async", gap=torch.ones(shape))
    with pytest.raises(ValueError, match=f"the system has {shape[-1]} intervals and u has 5 samples"), backend(name):
        run(system, torch.zeros(2, 3, 5))


@pytest.mark.parametrize("name", DOUBLE)
@pytest.mark.parametrize("kind, init", KINDS)
@pytest.mark.parametrize("rows, batch_size", [(2, 1), (2, 3), (1, 2)])
def test_as_many_rows_of_gaps_as_of_u(kind, init, name, rows, batch_size):
    system = discretize(parameters(kind, init), "async", gap=torch.ones(rows, 5))
    message = f"intervals for {rows} sequences and u is a batch of {batch_size}"
    with backend(name), pytest.raises(ValueError, match=message):
        run(system, torch.zeros(batch_size, 3, 5))


@pytest.mark.parametrize("kind, init", KINDS)
def test_step_of_a_varying_system(kind, init):
    system = discretize(parameters(kind, init), "async", gap=torch.tensor([3.0]))
    with pytest.raises(ValueError, match="varies in time and has no step of its own; use run"):
        step(system, torch.zeros(2, 3, 1), random_state(system, 2))


@pytest.mark.parametrize("length", [0, 2])
@pytest.mark.parametrize("kind, init", KINDS)
def test_step_takes_one_sample(kind, init, length):
    system = discretize(parameters(kind, init), "zoh")
    with pytest.raises(ValueError, match=f"u has {length} samples; a step takes one"):
        step(system, torch.zeros(2, 3, length), zero_state(system, 2, torch.float32))


@pytest.mark.parametrize("name", DOUBLE)
@pytest.mark.parametrize("kind, init", KINDS)
@pytest.mark.parametrize("length", [0, -1])
def test_kernel_without_taps(length, kind, init, name):
    system = discretize(parameters(kind, init), "zoh")
    with pytest.raises(ValueError, match=f"length is {length}; a kernel has at least one tap"), backend(name):
        kernel(system, length)


@pytest.mark.parametrize("name", DOUBLE)
@pytest.mark.parametrize("kind, init", KINDS)
def test_kernel_of_a_varying_system(kind, init, name):
    system = discretize(parameters(kind, init), "async", gap=torch.ones(5))
    with pytest.raises(ValueError, match="varies in time and has no kernel; use run"), backend(name):
        kernel(system, 5)


# Poles


def test_poles_of_a_diagonal_system_are_those_of_the_continuous_one_within_the_band():
    A, dt = torch.tensor([[-0.5 + 3j, -2.0 + 100j, -1.0 - 7j]], dtype=torch.complex128), torch.tensor([[0.01]])
    ones = torch.ones_like(A)
    frequency, decay = poles(diagonal_system(A, ones, ones, dt.double(), "zoh"))
    torch.testing.assert_close(frequency, A.imag.abs() * 0.01 / (2 * torch.pi))
    torch.testing.assert_close(decay, -1 / (0.01 * A.real))


def test_a_frequency_beyond_the_band_folds_back():
    A = torch.tensor([[-0.1 + 2j * torch.pi * 0.7]], dtype=torch.complex128)
    frequency, _ = poles(diagonal_system(A, A, A, torch.ones(1, 1, dtype=torch.float64), "zoh"))
    torch.testing.assert_close(frequency, torch.tensor([[0.3]], dtype=torch.float64))


@pytest.mark.parametrize("discretization", DISCRETIZATIONS)
def test_poles_of_s4_are_the_eigenvalues_of_its_matrix(discretization):
    system = discretize(parameters("dplr", "legs"), discretization)
    frequency, decay = poles(system)
    wanted = torch.from_numpy(np.linalg.eigvals(system.A_bar.numpy()))
    sizes, angles = (-1 / decay).exp(), 2 * torch.pi * frequency
    for row, (size, angle) in enumerate(zip(sizes, angles, strict=True)):
        got = sorted(zip(size.tolist(), angle.tolist(), strict=True))
        expected = sorted(zip(wanted[row].abs().tolist(), wanted[row].angle().abs().tolist(), strict=True))
        np.testing.assert_allclose(np.sort([g[0] for g in got]), np.sort([e[0] for e in expected]), rtol=1e-9)
        np.testing.assert_allclose(np.sort([g[1] for g in got]), np.sort([e[1] for e in expected]), rtol=1e-7, atol=1e-9)


def test_an_undamped_pole_rings_for_ever():
    A = torch.tensor([[1j]], dtype=torch.complex128)
    assert poles(diagonal_system(A, A, A, torch.ones(1, 1, dtype=torch.float64), "bilinear"))[1].item() == float("inf")


def test_a_mode_that_grows_never_decays():
    A = torch.tensor([[0.1 + 1j]], dtype=torch.complex128)
    assert poles(diagonal_system(A, A, A, torch.ones(1, 1, dtype=torch.float64), "zoh"))[1].item() == float("inf")
