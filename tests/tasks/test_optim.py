"""Parameter groups by name, and the schedule."""

import copy

import pytest
import torch

from s4audio import S4, S4D, CausalAutoencoder
from s4audio.tasks.optim import one_cycle, parameter_groups, warmup_cosine


def names_in(group, model) -> set[str]:
    ids = {id(p) for p in group["params"]}
    return {name.rsplit(".", 1)[-1] for name, p in model.named_parameters() if id(p) in ids}


@pytest.mark.parametrize("copied", [False, True])
def test_dynamics_get_their_own_rate_and_no_decay(copied):
    model = torch.nn.ModuleList([CausalAutoencoder(8000), S4D(2, 4), S4(2, 4)])
    model = copy.deepcopy(model) if copied else model
    rest, dynamics = parameter_groups(model, lr=0.01, ssm_lr=5e-4, weight_decay=0.1)
    assert names_in(dynamics, model) == {"log_dt", "log_A_real", "A_imag", "B", "P"}
    assert {"C", "D", "weight", "bias"} == names_in(rest, model)
    assert (rest["lr"], rest["weight_decay"]) == (0.01, 0.1)
    assert (dynamics["lr"], dynamics["weight_decay"]) == (5e-4, 0.0)
    assert len(rest["params"]) + len(dynamics["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize("ssm_lr", [0.0, 0.0011, 0.01])
def test_a_large_rate_for_the_dynamics_is_refused(ssm_lr):
    with pytest.raises(ValueError, match=f"ssm_lr is {ssm_lr}"):
        parameter_groups(S4D(2, 4), 0.01, ssm_lr, 0.0)


def test_schedule_rises_falls_and_ends():
    factor = warmup_cosine(warmup_steps=10, decay_steps=110)
    assert [factor(step) for step in (0, 4, 9, 10)] == [0.1, 0.5, 1.0, 1.0]
    assert factor(60) == pytest.approx(0.5) and factor(110) == factor(1000) == pytest.approx(0)
    assert warmup_cosine(0, None)(10**6) == 1.0


def test_one_cycle_is_that_of_torch():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1.0, total_steps=101, pct_start=30 / 101, cycle_momentum=False
    )
    ours = one_cycle(warmup_steps=29, decay_steps=100)
    for step in range(101):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(ours(step), abs=1e-9)
        optimizer.step()
        if step < 100:
            schedule.step()
    assert ours(29) == 1 and ours(100) == pytest.approx(1 / 250_000) == pytest.approx(ours(1000))


def test_one_cycle_wants_an_end():
    with pytest.raises(ValueError, match="one_cycle rises over warmup_steps 10 and falls until decay_steps None"):
        one_cycle(10, None)


def test_the_largest_rate_for_the_dynamics_is_taken():
    assert parameter_groups(S4D(2, 4), 0.01, 1e-3, 0.0)[1]["lr"] == 1e-3
