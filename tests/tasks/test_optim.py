"""Parameter groups by name, and the schedule."""

import copy

import pytest
import torch

from s4audio import S4, S4D, CausalAutoencoder
from s4audio.tasks.optim import parameter_groups, warmup_cosine


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
