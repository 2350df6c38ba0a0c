"""The solvers against closed forms: a linear differential equation, and the flow from one Gaussian to another."""

import math

import pytest
import torch

from s4audio.models.samplers import euler, flow_times, heun, multistep


@pytest.mark.parametrize(("solver", "order"), [(euler, 1), (heun, 2)])
def test_the_error_falls_with_the_order_of_the_solver(solver, order):
    """dx/dt = cos(3 t) - 2 x from x(0) = 1, forwards and back."""

    def exact(t: float) -> float:
        return (2 * math.cos(3 * t) + 3 * math.sin(3 * t)) / 13 + (1 - 2 / 13) * math.exp(-2 * t)

    def velocity(x: torch.Tensor, t: float) -> torch.Tensor:
        return math.cos(3 * t) - 2 * x

    for start, stop in ((0.0, 1.0), (1.0, 0.0)):
        errors = []
        for num_steps in (64, 128):
            times = [start + (stop - start) * k / num_steps for k in range(num_steps + 1)]
            x = solver(velocity, torch.full((1,), exact(start), dtype=torch.float64), times)
            errors.append(abs(x.item() - exact(stop)))
        assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.1)


def gaussian_velocity(mean: float, deviation: float):
    """Of x_t = (1 - t) noise + t data with data of this normal distribution: the mean of data - noise, given x_t."""

    def velocity(x: torch.Tensor, t: float | torch.Tensor) -> torch.Tensor:
        variance = (1 - t) ** 2 + (t * deviation) ** 2
        return mean + (t * deviation**2 - (1 - t)) / variance * (x - t * mean)

    return velocity


@pytest.mark.parametrize(
    ("solver", "num_steps", "most"),
    [(euler, 50, 0.1), (heun, 12, 0.03), (heun, 50, 0.002), (multistep, 12, 0.05), (multistep, 50, 0.002)],
)
@pytest.mark.parametrize("start", [0.0, 0.7])
def test_a_flow_between_gaussians_arrives(solver, num_steps, most, start):
    """Its exact solution is x_t = t mean + sqrt((1 - t)^2 + (t deviation)^2) noise."""
    noise = torch.linspace(-3, 3, 61, dtype=torch.float64)
    begun = start * 1.5 + math.hypot(1 - start, start * 0.4) * noise
    made = solver(gaussian_velocity(1.5, 0.4), begun, flow_times(num_steps, start))
    torch.testing.assert_close(made, 1.5 + 0.4 * noise, rtol=0, atol=most)


def test_the_error_of_multistep_falls_with_the_square_of_the_step():
    noise = torch.linspace(-3, 3, 61, dtype=torch.float64)
    errors = [
        (multistep(gaussian_velocity(1.5, 0.4), noise, flow_times(num_steps)) - 1.5 - 0.4 * noise).abs().max()
        for num_steps in (64, 128)
    ]
    assert math.log2(errors[0] / errors[1]) > 1.9


def test_faint_bands_come_out_at_their_level_as_with_even_steps_they_do_not():
    """Normal data of six levels, 0 to -50 dB, like the bands of a sound; the exact solution is level times noise."""
    level = 10 ** (-torch.arange(0, 60, 10, dtype=torch.float64) / 20)

    def velocity(x: torch.Tensor, t: float) -> torch.Tensor:
        return (t * level**2 - (1 - t)) / ((1 - t) ** 2 + (t * level) ** 2) * x

    def error_db(times: list[float]) -> torch.Tensor:
        return 20 * torch.log10(multistep(velocity, torch.ones_like(level), times) / level)

    assert error_db(flow_times(16))[:5].abs().max() < 1.3 and error_db(flow_times(48)).abs().max() < 0.7
    assert error_db([k / 16 for k in range(17)])[4] < -15


def test_silence_comes_out_silent():
    """Where all data is 0 the velocity is -x / (1 - t): multistep follows it exactly, heun leaves a hiss."""

    def velocity(x: torch.Tensor, t: float) -> torch.Tensor:
        return -x / max(1 - t, 1e-3)

    noise, times = torch.linspace(-3, 3, 61, dtype=torch.float64), flow_times(8)
    assert multistep(velocity, noise, times).abs().max() < 1e-12
    assert heun(velocity, noise, times).abs().max() > 1e-2


def test_times_go_from_the_start_to_one_and_slow_down():
    for start in (0.0, 0.7):
        times = torch.tensor(flow_times(10, start), dtype=torch.float64)
        steps = times.diff()
        assert times[0] == pytest.approx(start) and times[-1] == 1 and (steps > 0).all() and (steps.diff() < 0).all()
    with pytest.raises(ValueError, match="num_steps is 0; wanted at least 1"):
        flow_times(0)


def test_multistep_refuses_to_go_back_and_stays_where_times_do():
    velocity, x = gaussian_velocity(1.5, 0.4), torch.linspace(-3, 3, 61, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"the times fall from 1\.0 to 0\.5; multistep only goes on to data"):
        multistep(velocity, x, [1.0, 0.5])
    assert torch.equal(multistep(velocity, x, [1.0, 1.0]), x)
    twice, once = (multistep(velocity, x, times) for times in ([0.0, 0.5, 0.5, 1.0], [0.0, 0.5, 1.0]))
    assert torch.equal(twice, once)
