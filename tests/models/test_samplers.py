"""The solvers against closed forms: a linear differential equation, and the flow from one Gaussian to another."""

import math

import pytest
import torch

from s4audio.models.samplers import LOG_ODDS, euler, flow_times, heun, multistep


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
    [(euler, 50, 0.1), (heun, 12, 0.05), (heun, 50, 0.003), (multistep, 12, 0.05), (multistep, 50, 0.004)],
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


def test_loud_and_faint_come_out_at_their_level_as_with_even_steps_they_do_not():
    """Normal data of levels from 40 dB below the noise to 40 above, as what a clip has in common; exact is level * noise."""
    level = 10 ** (torch.arange(-40, 50, 10, dtype=torch.float64) / 20)

    def velocity(x: torch.Tensor, t: float) -> torch.Tensor:
        return (t * level**2 - (1 - t)) / ((1 - t) ** 2 + (t * level) ** 2) * x

    def error_db(times: list[float]) -> torch.Tensor:
        return 20 * torch.log10(multistep(velocity, torch.ones_like(level), times) / level)

    assert error_db(flow_times(32))[:-1].abs().max() < 0.4 and error_db(flow_times(16))[:-1].abs().max() < 0.75
    even = error_db([k / 16 for k in range(17)])
    assert even[0] < -15 and even[-2] < -7


def test_silence_comes_out_silent():
    """Where all data is 0 the velocity is -x / (1 - t): multistep follows it exactly, heun leaves a hiss."""

    def velocity(x: torch.Tensor, t: float) -> torch.Tensor:
        return -x / max(1 - t, 1e-3)

    noise, times = torch.linspace(-3, 3, 61, dtype=torch.float64), flow_times(8)
    assert multistep(velocity, noise, times).abs().max() < 1e-12
    assert heun(velocity, noise, times).abs().max() > 1e-3


@pytest.mark.parametrize("start", [0.0, 0.001, 0.7])
def test_times_are_even_in_the_log_of_signal_over_noise(start):
    times = torch.tensor(flow_times(10, start), dtype=torch.float64)
    assert times[0] == start and times[-1] == 1 and len(times) == 11
    steps = times[1:-1].logit().diff()
    torch.testing.assert_close(steps, steps[:1].expand(8))
    first = max(torch.tensor(start).logit().item(), LOG_ODDS[0]) + steps[0].item() / 2
    assert times[1].logit().item() == pytest.approx(first, abs=1e-5)
    assert times[-2].logit().item() == pytest.approx(LOG_ODDS[1] - steps[0].item() / 2, abs=1e-5)


@pytest.mark.parametrize("start", [0.0, 0.5, 0.9995, 1.0])
@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_few_times_and_late_ones_do_not_fall(num_steps, start):
    times = flow_times(num_steps, start)
    assert len(times) == num_steps + 1 and times == sorted(times) and times[0] == start and times[-1] == 1


def test_no_steps_are_refused():
    with pytest.raises(ValueError, match="num_steps is 0; wanted a whole number, at least 1"):
        flow_times(0)


def test_multistep_refuses_to_go_back_and_stays_where_times_do():
    velocity, x = gaussian_velocity(1.5, 0.4), torch.linspace(-3, 3, 61, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"the times fall from 1\.0 to 0\.5; multistep only goes on to data"):
        multistep(velocity, x, [1.0, 0.5])
    assert torch.equal(multistep(velocity, x, [1.0, 1.0]), x)
    twice, once = (multistep(velocity, x, times) for times in ([0.0, 0.5, 0.5, 1.0], [0.0, 0.5, 1.0]))
    assert torch.equal(twice, once)
