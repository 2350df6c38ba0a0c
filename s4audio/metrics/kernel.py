"""Kernel audio distance (KAD) with its interval, and the test whether two sets can be told apart.

A set is a list of clips, each (windows, d). Every clip counts once, however many windows it has. Pairs of windows of the
same clip are left out throughout, and where the generated clips are reconstructions of the reference's, so are those of a
clip with its own reconstruction: they are alike, and would make any two sets look different, or the same.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from s4audio.metrics.resampling import Clips, Estimate, clip_of_window, jackknife

BLOCK = 4096  # windows in a block of kernel values: 64 MiB
STEP = 256  # subsets at a time
SCALE = 100.0  # KAD is 100 times the squared discrepancy
BANDWIDTH_RULE = "median distance between windows of different clips of the reference"
FEWEST_SHUFFLES = 20  # with fewer different ones, p cannot come out below 0.05


class Kernel(NamedTuple):
    """The kernel between all clips of two sets; the generated clips come first."""

    means: Tensor  # (clips, clips) over all pairs of their windows; 0 where a pair does not count
    counts: Tensor  # (clips, clips) 1, or 0 between a clip and itself, or its partner
    num_generated: int
    paired: bool  # generated clip i is a reconstruction of reference clip i


def bandwidth(reference: Clips, at_most: int = 2000) -> float:
    """The median distance between windows of different clips, of `at_most` windows spread evenly over the set.

    Distances of 0 are left out.

    Raises:
        ValueError: there is one clip only, or all windows are the same.

    Source: Gretton et al. 2012, "A kernel two-sample test", section 8; Chung et al. 2025, "KAD: no more FAD!".
    """
    vectors, clip = torch.cat(list(reference)), clip_of_window(reference)
    chosen = torch.linspace(0, len(vectors) - 1, min(len(vectors), at_most)).long()
    x = (vectors[chosen] - vectors.mean(0)).double()
    distances = torch.cdist(x, x)
    apart = distances[(clip[chosen].unsqueeze(1) < clip[chosen].unsqueeze(0)) & (distances > 0)]
    if len(apart) == 0:
        raise ValueError("the reference has one clip only, or clips that are all the same: it has no scale to measure with.")
    return apart.median().item()


def kernel(generated: Clips, reference: Clips, bandwidth: float, paired: bool = False) -> Kernel:
    """Gaussian kernel exp(-|x - y|² / (2 bandwidth²)), the mean over windows of each two clips, in blocks of windows.

    Memory is that of (clips)² numbers and of one block, whatever the number of windows.
    """
    clips = [*generated, *reference]
    num_windows = torch.tensor([len(clip) for clip in clips])
    centre = torch.cat(list(reference)).double().mean(0)  # distances lose fewer digits near the origin
    clips = [((clip.double() - centre) / bandwidth).float() for clip in clips]
    blocks = [torch.as_tensor(block) for block in _blocks_of_clips(num_windows.tolist())]
    means = torch.zeros(len(clips), len(clips), dtype=torch.float64)
    for number, rows in enumerate(blocks):
        row_clips = [clips[i] for i in rows]
        x, of_row = torch.cat(row_clips), clip_of_window(row_clips)
        for columns in blocks[number:]:
            column_clips = [clips[i] for i in columns]
            y, of_column = torch.cat(column_clips), clip_of_window(column_clips)
            halves = 0.5 * x.square().sum(1, keepdim=True) + 0.5 * y.square().sum(1)
            values = (x @ y.mT - halves).clamp_max_(0).exp_()  # exp(-|x - y|² / 2)
            by_row = values.new_zeros(len(rows), len(y)).index_add_(0, of_row, values)
            between = values.new_zeros(len(columns), len(rows)).index_add_(0, of_column, by_row.mT.contiguous()).mT.double()
            between /= num_windows[rows].unsqueeze(1) * num_windows[columns]
            means[rows.unsqueeze(1), columns] = between
            means[columns.unsqueeze(1), rows] = between.mT
    counts = 1 - torch.eye(len(clips), dtype=torch.float64)
    if paired:
        partners = torch.arange(len(generated))
        counts[partners, len(generated) + partners] = counts[len(generated) + partners, partners] = 0
    return Kernel(means * counts, counts, len(generated), paired)


def discrepancy(kernel: Kernel, first: Tensor, second: Tensor) -> Tensor:
    """100 times the unbiased squared maximum mean discrepancy between subsets of the clips.

    Args:
        kernel: of all clips.
        first: (clips, P) 1 for the clips of the first of two subsets and 0 for others, P times; two or more clips each.
        second: as first, for the other subset; no clip may be in both.

    Returns:
        (P,) values, about 0 for subsets of the same kind, also below.

    Source: Gretton et al. 2012, "A kernel two-sample test", equation 3, over clips in place of vectors.
    """

    def mean(a: Tensor, b: Tensor) -> Tensor:
        return (a * (kernel.means @ b)).sum(0) / (a * (kernel.counts @ b)).sum(0)

    first, second = first.double(), second.double()
    return SCALE * (mean(first, first) + mean(second, second) - 2 * mean(first, second))


def kernel_audio_distance(kernel: Kernel) -> Estimate:
    """KAD of the generated against the reference clips, with its interval by leaving out each clip, or each pair.

    Source: Chung et al. 2025, "KAD: no more FAD! An effective and efficient evaluation metric for audio generation".
    """
    clips, made = len(kernel.means), kernel.num_generated
    first = (torch.arange(clips) < made).double().unsqueeze(1)
    second = 1 - first
    value = discrepancy(kernel, first, second).item()
    without = []
    for chosen in torch.arange(made if kernel.paired else clips).split(STEP):
        kept = torch.ones(clips, len(chosen), dtype=torch.float64)
        kept[chosen, torch.arange(len(chosen))] = 0
        if kernel.paired:
            kept[made + chosen, torch.arange(len(chosen))] = 0
        without.append(discrepancy(kernel, first * kept, second * kept))
    of_clip = torch.cat(without).tolist()
    return jackknife(value, of_clip) if kernel.paired else jackknife(value, of_clip[:made], of_clip[made:])


def permutation_test(kernel: Kernel, seed: int = 0, num_permutations: int = 999) -> float | None:
    """Probability that KAD comes out at least as large where the clips of both sets are shuffled: small if they differ.

    Pairs are not torn apart: each is swapped or not. None if there are too few different shuffles for a p below 0.05.

    Source: Gretton et al. 2012, section 5; Phipson and Smyth 2010, "Permutation p-values should never be zero".
    """
    generator = np.random.default_rng(seed)
    clips, made = len(kernel.means), kernel.num_generated
    shuffles = 2**made if kernel.paired else math.comb(clips, made)
    symmetric = kernel.paired or 2 * made == clips  # the same two sets in either order are one shuffle
    if shuffles < FEWEST_SHUFFLES * (2 if symmetric else 1):
        return None
    first = torch.zeros(clips, num_permutations + 1, dtype=torch.float64)
    first[:made, 0] = 1
    for column in range(1, num_permutations + 1):
        if kernel.paired:
            swapped = torch.from_numpy(generator.integers(0, 2, made))
            first[torch.arange(made) + made * swapped, column] = 1
        else:
            first[torch.from_numpy(generator.permutation(clips)[:made]), column] = 1
    values = discrepancy(kernel, first, 1 - first)
    return (values >= values[0] - 1e-9 * values[0].abs()).double().mean().item()


def _blocks_of_clips(num_windows: Sequence[int]) -> list[list[int]]:
    """Clip numbers in runs of at most BLOCK windows, or of one clip."""
    blocks: list[list[int]] = []
    filled = BLOCK
    for clip, windows in enumerate(num_windows):
        if filled + windows > BLOCK:
            blocks.append([])
            filled = 0
        blocks[-1].append(clip)
        filled += windows
    return blocks
