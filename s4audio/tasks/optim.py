"""Optimizer parameter groups and learning-rate schedule of models with state-space layers."""

import math
from collections.abc import Callable
from typing import Any

from torch import nn

from s4audio.layers import S4D

SSM_PARAMETERS = ("log_dt", "log_A_real", "A_imag", "B", "P")  # of every S4D and S4 layer, by name


def parameter_groups(model: nn.Module, lr: float, ssm_lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for an optimizer: the dynamics of the state spaces, at ssm_lr without decay, and everything else.

    The dynamics sit in exponents: a step that is right for a weight matrix changes what a layer remembers by orders of
    magnitude, and decay would pull every time constant to the same value.

    Raises:
        ValueError: ssm_lr is above 1e-3, or not positive.

    Source: Gu et al. 2022, "How to train your HiPPO", appendix on hyper-parameters.
    """
    if not 0 < ssm_lr <= 1e-3:
        raise ValueError(f"ssm_lr is {ssm_lr}; wanted above 0 and at most 1e-3, beyond which state spaces diverge.")
    dynamics = {
        id(parameter)
        for layer in model.modules()
        if isinstance(layer, S4D)
        for name, parameter in layer.named_parameters(recurse=False)
        if name in SSM_PARAMETERS
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if id(p) not in dynamics], "lr": lr, "weight_decay": weight_decay},
        {"params": [p for p in trained if id(p) in dynamics], "lr": ssm_lr, "weight_decay": 0.0},
    ]


def warmup_cosine(warmup_steps: int, decay_steps: int | None) -> Callable[[int], float]:
    """The learning rate's factor at each step: a linear rise, then a half cosine down to 0 at decay_steps, or constant.

    decay_steps is a number of its own, not the length of the run: a run that stops half way and goes on later then sees the
    same schedule as one that never stopped.
    """

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        if decay_steps is None:
            return 1.0
        progress = min(1.0, (step - warmup_steps) / max(1, decay_steps - warmup_steps))
        return 0.5 * (1 + math.cos(math.pi * progress))

    return factor


def one_cycle(warmup_steps: int, decay_steps: int | None) -> Callable[[int], float]:
    """Half a cosine from 1/25 up to 1 at warmup_steps, and another down to 1/250,000 at decay_steps.

    Raises:
        ValueError: there is no decay_steps, or it is not after the warm-up.

    Source: Smith and Topin 2018, "Super-convergence"; the ends are those of torch.optim.lr_scheduler.OneCycleLR.
    """
    if decay_steps is None or not 0 < warmup_steps < decay_steps:
        raise ValueError(
            f"one_cycle rises over warmup_steps {warmup_steps} and falls until decay_steps {decay_steps}; wanted 0 < "
            "warmup_steps < decay_steps."
        )

    def between(first: float, last: float, share: float) -> float:
        return last + (first - last) * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))

    def factor(step: int) -> float:
        if step < warmup_steps:
            return between(1 / 25, 1.0, step / warmup_steps)
        return between(1.0, 1 / 250_000, (step - warmup_steps) / (decay_steps - warmup_steps))

    return factor


SCHEDULES = {"cosine": warmup_cosine, "one_cycle": one_cycle}
