import math
import re

import mpmath
import numpy as np
import pytest
import torch
from scipy.linalg import expm
from scipy.signal import cont2discrete

from s4audio.ssm import DISCRETIZATIONS, diagonal_system, dplr_system, kernel
from s4audio.ssm.discretize import DENSE, DIAGONAL, expm1_ratio, matrix_exp, matrix_expm1
from s4audio.ssm.dplr import real_matrix, resolvent
from tests.ssm.systems import ALPHA, FAMILIES, discretize, error, full_matrices, parameters


def channel(system, h: int) -> tuple[np.ndarray, np.ndarray]:
    """A_bar and B_bar of channel h in the coordinates of `full_matrices`: [x, conj x], or x for real modes."""
    if hasattr(system, "log_A_bar"):
        A_bar, B_bar = torch.exp(system.log_A_bar[h]).numpy(), system.B_bar[h].numpy()
        if not system.C.is_complex():
            return np.diag(A_bar), B_bar
        return np.diag(np.concatenate([A_bar, A_bar.conj()])), np.concatenate([B_bar, B_bar.conj()])
    eye = np.eye(system.C.shape[-1])
    to_full = np.block([[eye, 1j * eye], [eye, -1j * eye]])  # [Re x, Im x] -> [x, conj x]
    return to_full @ system.A_bar[h].numpy() @ np.linalg.inv(to_full), to_full @ system.B_bar[h].numpy()


def complex_numbers(smallest: float) -> list[complex]:
    """With real part <= 0, every magnitude from the smallest to 10, in seven directions."""
    magnitudes = np.geomspace(smallest, 10, 26)
    return [complex(-r * abs(math.cos(a)), r * math.sin(a)) for r in magnitudes for a in np.linspace(-1.57, 1.57, 7)]


def test_both_forms_know_every_scheme():
    assert set(DIAGONAL) == set(DENSE) == set(DISCRETIZATIONS)


@pytest.mark.parametrize("kind, init", FAMILIES)
@pytest.mark.parametrize(
    "discretization, method, alpha",
    [
        ("bilinear", "bilinear", 0.5),
        ("generalized_bilinear", "gbt", 0.5),
        ("generalized_bilinear", "gbt", 0.75),
        ("generalized_bilinear", "gbt", 1.0),
        ("zoh", "zoh", 0.5),
    ],
)
def test_systems_equal_scipy_cont2discrete(kind, init, discretization, method, alpha):
    values = parameters(kind, init)
    system = discretize(values, discretization, alpha=alpha)
    for h in range(len(values["dt"])):
        A, B, C = full_matrices(values, h)
        dt = values["dt"][h].item()
        A_bar, B_bar, *_ = cont2discrete((A, B[:, None], C[None], np.zeros((1, 1))), dt, method, alpha)
        assert error(channel(system, h)[0], A_bar) < 1e-13
        assert error(channel(system, h)[1], B_bar[:, 0]) < 1e-13


@pytest.mark.parametrize("gap", [0.0, 0.3, 1.0, 7.5])
@pytest.mark.parametrize("kind, init", FAMILIES)
def test_async_equals_expm_over_the_gap_and_zoh_over_a_unit(kind, init, gap):
    values = parameters(kind, init)
    system = discretize(values, "async", gap=gap)
    for h in range(len(values["dt"])):
        A, B, C = full_matrices(values, h)
        dt = values["dt"][h].item()
        zoh = cont2discrete((A, B[:, None], C[None], np.zeros((1, 1))), dt, "zoh")
        assert error(channel(system, h)[0], expm(dt * gap * A)) < 1e-13
        assert error(channel(system, h)[1], zoh[1][:, 0]) < 1e-13


@pytest.mark.parametrize("kind, init", FAMILIES)
def test_async_of_a_tenth_of_a_unit_is_zoh_through_a_moving_sum_of_ten_samples(kind, init):
    """Which is why it cannot tell neighbouring samples apart."""
    values, length = parameters(kind, init), 40
    finer = kernel(discretize(values | {"dt": values["dt"] / 10}, "zoh"), length + 9)
    assert error(kernel(discretize(values, "async", gap=0.1), length), finer.unfold(-1, 10, 1).sum(-1)) < 1e-10


@pytest.mark.parametrize("kind, init", FAMILIES)
def test_dirac_equals_expm_and_adds_dt_B(kind, init):
    values = parameters(kind, init)
    system = discretize(values, "dirac")
    for h in range(len(values["dt"])):
        A, B, _ = full_matrices(values, h)
        dt = values["dt"][h].item()
        assert error(channel(system, h)[0], expm(dt * A)) < 1e-13
        assert error(channel(system, h)[1], dt * B) < 1e-15


@pytest.mark.parametrize("discretization", DISCRETIZATIONS)
def test_diagonal_form_equals_dense_form_of_a_diagonal_matrix(discretization):
    z = torch.tensor(complex_numbers(1e-3), dtype=torch.complex128)
    B, dt = torch.randn_like(z), torch.tensor([0.01], dtype=torch.float64)
    log_A_bar, B_bar = DIAGONAL[discretization](z, B, dt, ALPHA)
    Z = torch.diag(z)[None]
    inverse = lambda alpha: torch.linalg.inv(torch.eye(len(z)) - alpha * Z)  # noqa: E731
    A_bar_dense, B_bar_dense = DENSE[discretization](Z, inverse, B[None], dt, ALPHA)
    assert error(torch.diag(torch.exp(log_A_bar)), A_bar_dense[0]) < 1e-13
    assert error(B_bar, B_bar_dense[0]) < 1e-13


@pytest.mark.parametrize("dt", [1e-6, 1e-3, 0.1, 5.0])
def test_matrix_exponential_keeps_the_digits_of_small_and_of_stiff_systems(dt):
    values = parameters("dplr", "legs", d_state=16)
    Z = dt * real_matrix(values["A"], values["P"])
    E = matrix_expm1(Z)
    with mpmath.workdps(40):
        exact = mpmath.expm(mpmath.matrix(Z[0].tolist())) - mpmath.eye(Z.shape[-1])
        assert error(E[0], torch.tensor(exact.tolist(), dtype=torch.float64)) < 1e-14
    assert error(E, expm(Z.numpy()) - np.eye(Z.shape[-1])) < 1e-9  # where scipy's has lost digits to the 1


@pytest.mark.parametrize("d_state, dt, gap", [(64, 0.1, 3000.0), (64, 1e-3, 1e6), (256, 0.1, 1000.0)])
def test_a_long_gap_is_bridged_in_one_step(d_state, dt, gap):
    values = parameters("dplr", "legs", 1, d_state) | {"dt": torch.full((1, 1), dt, dtype=torch.float64)}
    A_bar = discretize(values, "async", gap=gap).A_bar
    wanted = torch.matrix_exp(dt * gap * real_matrix(values["A"], values["P"]))
    assert (A_bar - wanted).abs().max() < 1e-8


def test_matrix_exponential_has_the_gradient_of_torchs():
    Z = torch.randn(3, 5, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn_like(Z)
    ours, theirs = (torch.autograd.grad((f(Z) * weight).sum(), Z)[0] for f in (matrix_exp, torch.matrix_exp))
    assert error(ours, theirs) < 1e-13


@pytest.mark.parametrize("discretization", [name for name in DISCRETIZATIONS if name != "generalized_bilinear"])
@pytest.mark.parametrize("kind", ["diagonal", "dplr"])
def test_alpha_concerns_only_the_generalized_bilinear(discretization, kind):
    values = parameters(kind, "legs")
    one, other = (discretize(values, discretization, alpha=alpha) for alpha in (0.5, 1.0))
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


@pytest.mark.parametrize("kind, init", FAMILIES)
@pytest.mark.parametrize("discretization", DISCRETIZATIONS)
def test_poles_stay_inside_the_unit_circle(discretization, kind, init):
    values = parameters(kind, init, d_state=16)
    values["dt"] = torch.tensor([[1e-6], [1.0], [1e3]], dtype=torch.float64)  # far too small to far too large
    system = discretize(values, discretization, alpha=ALPHA)
    for h in range(3):
        assert np.abs(np.linalg.eigvals(channel(system, h)[0])).max() < 1


@pytest.mark.parametrize("alpha", [0.5, 0.75, 1.0])
def test_log_A_bar_of_the_bilinear_family_keeps_its_digits_near_zero(alpha):
    numbers = complex_numbers(1e-12)
    z = torch.tensor(numbers, dtype=torch.complex128)
    log_A_bar, _ = DIAGONAL["generalized_bilinear"](z, z, torch.ones(1), alpha)
    with mpmath.workdps(50):
        for value, number in zip(log_A_bar.tolist(), numbers, strict=True):
            wanted = mpmath.log((1 + (1 - mpmath.mpf(alpha)) * number) / (1 - mpmath.mpf(alpha) * number))
            turns = round(float((value - wanted).imag) / (2 * math.pi))  # any branch of the logarithm will do
            assert abs(value - 2j * mpmath.pi * turns - wanted) < 2e-15 * abs(wanted), number


def test_expm1_ratio_keeps_its_digits_near_zero():
    numbers = complex_numbers(1e-16)
    with mpmath.workdps(50):
        wanted = [complex(mpmath.expm1(number) / number) for number in numbers]
    value = expm1_ratio(torch.tensor(numbers, dtype=torch.complex128))
    assert np.abs(value.numpy() / np.array(wanted) - 1).max() < 2e-15
    assert expm1_ratio(torch.zeros(1, dtype=torch.complex128)).item() == 1


@pytest.mark.parametrize("z", [-1.0, -1e-3, -1e-6, 1e-3j, -1e-3 + 1e-3j])
def test_expm1_ratio_has_the_derivative_of_its_series(z):
    variable = torch.tensor(z, dtype=torch.complex128, requires_grad=True)
    expm1_ratio(variable).real.backward()
    wanted = sum((k - 1) * z ** (k - 2) / math.factorial(k) for k in range(2, 25))
    # Autograd takes exp(z) / z - expm1(z) / z^2, of which about 1e-16 / |z| is rounding.
    assert abs(variable.grad.item().conjugate() - wanted) < 1e-10 * abs(wanted)


def test_expm1_ratio_has_its_derivative_at_zero():
    variable = torch.zeros((), dtype=torch.complex128, requires_grad=True)
    expm1_ratio(variable).real.backward()
    assert variable.grad.item() == pytest.approx(0.5)


@pytest.mark.parametrize("real_modes", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_pole_exactly_at_zero_is_a_delay_of_nothing(dtype, real_modes):
    """Bilinear with z = -2 has A_bar = 0, which has no logarithm: K = 2 C B_bar, 0, 0, ... and finite gradients."""
    kind = dtype if real_modes else dtype.to_complex()
    A = torch.full((1, 1), -20.0, dtype=kind, requires_grad=True)
    dt = torch.full((1, 1), 0.1, dtype=torch.float64, requires_grad=True)
    assert (A * dt).item() == -2
    B = torch.full((1, 1), 3.0, dtype=kind)
    K = kernel(diagonal_system(A, B, B, dt, "bilinear"), 200)
    wanted = torch.zeros(1, 200, dtype=dtype)
    wanted[0, 0] = 2 * 3 * 0.1 * 3 / (1 + 1)
    torch.testing.assert_close(K, wanted, rtol=1e-6, atol=1e-14)
    # K_1 = 2 C A_bar B_bar: near the pole A_bar = (z + 2) / 4, so that dK_1 / dA = 2 C B_bar dt / 4.
    gradient_A, gradient_dt = torch.autograd.grad(K[0, 1], [A, dt], retain_graph=True)
    assert gradient_A.real.item() == pytest.approx(0.9 * 0.1 / 4, rel=1e-5)
    assert gradient_dt.item() == pytest.approx(0.9 * -20 / 4, rel=1e-5)
    K.square().sum().backward()
    assert A.grad.isfinite().all() and dt.grad.isfinite().all()


def test_the_real_init_at_dt_one_tenth_has_a_finite_kernel_and_gradient():
    values = parameters("diagonal", "real", H=1, d_state=64)
    values["A"] = torch.complex(-torch.arange(1.0, 33).double(), torch.zeros(32).double()).unsqueeze(0).requires_grad_()
    values["dt"] = torch.full((1, 1), 0.1, dtype=torch.float64)
    assert ((values["A"] * values["dt"]) == -2).sum() == 1
    K = kernel(discretize(values, "bilinear"), 300)
    K.square().sum().backward()
    assert K.isfinite().all() and values["A"].grad.isfinite().all()


@pytest.mark.parametrize("kind, init", FAMILIES)
@pytest.mark.parametrize("discretization", DISCRETIZATIONS)
def test_rate_multiplies_dt(discretization, kind, init):
    values = parameters(kind, init)
    by_rate = discretize(values, discretization, alpha=ALPHA, rate=0.5)
    by_dt = discretize({**values, "dt": values["dt"] / 2}, discretization, alpha=ALPHA)
    assert torch.equal(by_rate[0], by_dt[0]) and torch.equal(by_rate[1], by_dt[1])
    as_is = discretize(values, discretization, alpha=ALPHA)
    assert error(by_rate[0], as_is[0]) > 1e-3


@pytest.mark.parametrize("kind", ["diagonal", "dplr"])
def test_dt_may_be_a_vector(kind):
    values = parameters(kind, "legs")
    vector = discretize({**values, "dt": values["dt"].squeeze(-1)}, "zoh")
    assert torch.equal(vector[0], discretize(values, "zoh")[0])


@pytest.mark.parametrize("kind", ["diagonal", "dplr"])
class TestErrors:
    def test_unknown_discretization(self, kind):
        with pytest.raises(ValueError, match="discretization is 'euler'; choose one of bilinear,"):
            discretize(parameters(kind, "legs"), "euler")

    @pytest.mark.parametrize("alpha", [0.49, 1.01, -1.0, float("nan")])
    def test_alpha_out_of_range(self, kind, alpha):
        with pytest.raises(ValueError, match=f"alpha is {alpha}; .* from 0.5 .* to 1"):
            discretize(parameters(kind, "legs"), "generalized_bilinear", alpha=alpha)

    @pytest.mark.parametrize("discretization", [name for name in DISCRETIZATIONS if name != "async"])
    def test_gap_with_another_scheme_than_async(self, kind, discretization):
        with pytest.raises(ValueError, match=f"gap is 2.0 with discretization '{discretization}'; only 'async'"):
            discretize(parameters(kind, "legs"), discretization, gap=2.0)
        with pytest.raises(ValueError, match=f"gap is a tensor with discretization '{discretization}'; only 'async'"):
            discretize(parameters(kind, "legs"), discretization, gap=torch.ones(5))

    @pytest.mark.parametrize("gap", [-0.5, np.float32(-0.5), torch.tensor([1, -0.5]), torch.tensor([[1.0], [-0.5]])])
    def test_negative_gap(self, kind, gap):
        with pytest.raises(ValueError, match=r"gap is -0\.5; an interval cannot be negative"):
            discretize(parameters(kind, "legs"), "async", gap=gap)

    @pytest.mark.parametrize("shape", [(), (2, 3, 5)])
    def test_gap_of_the_wrong_shape(self, kind, shape):
        message = rf"gap has shape {re.escape(str(shape))}; wanted .* \(L,\) or \(batch, L\)"
        with pytest.raises(ValueError, match=message):
            discretize(parameters(kind, "legs"), "async", gap=torch.ones(shape))

    @pytest.mark.parametrize("letter", ["A", "B", "C"])
    def test_parameters_of_different_shapes(self, kind, letter):
        values = parameters(kind, "legs")
        for wrong in (values[letter][:, :3], values[letter][:2], values[letter][:1], values[letter][0]):
            shape = re.escape(str(tuple(wrong.shape)))
            with pytest.raises(ValueError, match=rf"must all be \(H, modes\); got .*{letter} {shape}"):
                discretize({**values, letter: wrong}, "zoh")

    def test_parameters_without_channels(self, kind):
        values = {name: value[0] for name, value in parameters(kind, "legs").items()}
        with pytest.raises(ValueError, match=r"must all be \(H, modes\); got A \(4,\)"):
            discretize(values, "zoh")

    @pytest.mark.parametrize("shape", [(), (1,), (2, 1), (1, 1), (3, 4), (1, 3)])
    def test_dt_of_the_wrong_shape(self, kind, shape):
        with pytest.raises(ValueError, match=rf"dt has shape {re.escape(str(shape))}; wanted \(3, 1\) or \(3,\)"):
            discretize({**parameters(kind, "legs"), "dt": torch.ones(shape)}, "zoh")


@pytest.mark.parametrize("number", [np.float32(0.5), np.float64(0.5), np.int64(2), 2])
@pytest.mark.parametrize("kind", ["diagonal", "dplr"])
def test_any_kind_of_number_is_a_gap(kind, number):
    values = parameters(kind, "legs")
    one, other = (discretize(values, "async", gap=gap) for gap in (number, float(number)))
    assert torch.equal(one[0], other[0]) and one.gap is None


def test_dplr_with_a_real_A():
    A = -torch.ones(2, 4)
    with pytest.raises(ValueError, match=r"A is torch.float32; such a system takes complex modes"):
        dplr_system(A, A, A, A, torch.ones(2, 1))


@pytest.mark.parametrize("alpha", [0.5, 0.8, 1.0])
def test_resolvent_is_the_inverse(alpha):
    values = parameters("dplr", "legs", 3, 64)
    Z = values["dt"].unsqueeze(-1) * real_matrix(values["A"], values["P"])
    identity = torch.eye(64, dtype=torch.float64)
    assert (
        error(resolvent(values["A"], values["P"], values["dt"], alpha) @ (identity - alpha * Z), identity.expand(3, -1, -1))
        < 1e-12
    )


def test_nothing_is_left_of_a_state_after_a_gap_of_any_length():
    A_bar = discretize(parameters("dplr", "legs"), "async", gap=1e7).A_bar
    assert torch.isfinite(A_bar).all() and A_bar.abs().max() < 1e-12
