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


def effective_windows(clips: Clips) -> float:
    """How many independent windows say as much about a mean as these do: fewer than there are, if those of a clip are alike.

    n / (1 + (w - 1) r), with the windows a clip has, w, and their intraclass correlation, r, over all dimensions together.

    Source: Kish 1965, "Survey sampling", section 5.4; r by one-way analysis of variance.
    """
    n, number = count_windows(clips), len(clips)
    if n == number:
        return float(n)
    vectors, lengths = torch.cat(list(clips)).double(), torch.tensor([len(clip) for clip in clips]).double()
    means = torch.stack([clip.double().mean(0) for clip in clips])
    within = sum((clip.double() - mean).square().sum() for clip, mean in zip(clips, means, strict=True)) / (n - number)
    between = (lengths * (means - vectors.mean(0)).square().sum(1)).sum() / (number - 1)
    typical = (n - lengths.square().sum() / n) / (number - 1)  # windows of a clip, for clips of varying lengths
    alike = ((between - within) / (between + (typical - 1) * within)).nan_to_num(1.0).clamp(0, 1)  # 0 / 0: all the same
    return float(n / (1 + (lengths.square().sum() / n - 1) * alike))
