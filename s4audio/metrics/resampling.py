"""Sets of clips, and what is drawn from them: always whole clips, since windows of one clip are alike.

A set is a list of clips, each a tensor (windows, d) of embedded windows.
"""

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")

Clips = Sequence[Tensor]  # one (windows, d) for each clip

Z_95 = 1.959964  # standard deviations on either side of the mean that hold 95 % of a normal distribution


class Estimate(NamedTuple):
    """A value with its 95 % confidence interval."""

    value: float
    low: float
    high: float


def jackknife(value: float, *without: Sequence[float]) -> Estimate:
    """The 95 % interval of a value, from its values without each of several equal parts of the data.

    Args:
        value: from all the data.
        without: for each set whose parts are left out on their own, the values without each part.

    Source: Efron and Stein 1981, "The jackknife estimate of variance", which shows that it does not come out too small.
    """
    variance = sum((len(values) - 1) * np.var(values) for values in without)
    margin = Z_95 * float(variance) ** 0.5
    return Estimate(value, value - margin, value + margin)


def shuffled(clips: Sequence[T], seed: int, stream: int = 0) -> list[T]:
    """The clips, or whatever it is, in an order drawn from (seed, stream)."""
    order = np.random.default_rng([seed, stream]).permutation(len(clips))
    return [clips[i] for i in order]


def count_windows(clips: Clips) -> int:
    """Windows of all clips together."""
    return sum(map(len, clips))


def clip_of_window(clips: Clips) -> Tensor:
    """(windows of all clips,) the number of each one's clip."""
    return torch.repeat_interleave(torch.arange(len(clips)), torch.tensor([len(clip) for clip in clips]))
