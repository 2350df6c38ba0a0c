"""Kernel audio distance (KAD) with its interval, and the test whether two sets can be told apart.

A set is a list of clips, each (windows, d). Pairs of windows of the same clip are left out throughout: they are alike, and
would make any two sets look different.
"""

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


class Kernel(NamedTuple):
    """The kernel between all clips of two sets; the generated clips come first."""

    sums: Tensor  # (clips, clips) kernel values over all pairs of their windows; 0 between a clip and itself
    num_windows: Tensor  # (clips,)
    num_generated: int


def bandwidth(reference: Clips, at_most: int = 2000) -> float:
    """The median distance between windows of different clips, of `at_most` windows spread evenly over the set.

    Raises:
        ValueError: there is one clip only, or all windows are the same.

    Source: Gretton et al. 2012, "A kernel two-sample test", section 8; Chung et al. 2025, "KAD: no more FAD!".
    """
    vectors, clip = torch.cat(list(reference)), clip_of_window(reference)
    chosen = torch.linspace(0, len(vectors) - 1, min(len(vectors), at_most)).long()
    distances = torch.cdist(vectors[chosen].double(), vectors[chosen].double())
    apart = distances[clip[chosen].unsqueeze(1) < clip[chosen].unsqueeze(0)]
    median = apart.median().item() if len(apart) else 0.0
    if median == 0:
        raise ValueError("the reference has one clip only, or clips that are all the same: it has no scale to measure with.")
    return median


def kernel(generated: Clips, reference: Clips, bandwidth: float) -> Kernel:
    """Gaussian kernel exp(-|x - y|² / (2 bandwidth²)) summed between clips, in blocks of windows.

    Memory is that of (clips)² numbers and of one block, whatever the number of windows.
    """
    clips = [*generated, *reference]
    num_windows = torch.tensor([len(clip) for clip in clips])
    centre = torch.cat(list(reference)).double().mean(0)  # distances lose fewer digits near the origin
    clips = [((clip.double() - centre) / bandwidth).float() for clip in clips]
    blocks = [torch.as_tensor(block) for block in _blocks_of_clips(num_windows.tolist())]
    sums = torch.zeros(len(clips), len(clips), dtype=torch.float64)
    for number, rows in enumerate(blocks):
        row_clips = [clips[i] for i in rows]
        x, of_row = torch.cat(row_clips), clip_of_window(row_clips)
        for columns in blocks[number:]:
            column_clips = [clips[i] for i in columns]
            y, of_column = torch.cat(column_clips), clip_of_window(column_clips)
            values = torch.cdist(x, y, compute_mode="use_mm_for_euclid_dist").square_().mul_(-0.5).exp_()
            by_row = values.new_zeros(len(rows), len(y)).index_add_(0, of_row, values)
            between = values.new_zeros(len(columns), len(rows)).index_add_(0, of_column, by_row.mT.contiguous()).mT
            sums[rows.unsqueeze(1), columns] = between.double()
            sums[columns.unsqueeze(1), rows] = between.double().mT
    sums.fill_diagonal_(0)
    return Kernel(sums, num_windows.double(), len(generated))


def discrepancy(kernel: Kernel, first: Tensor, second: Tensor) -> Tensor:
    """100 times the unbiased squared maximum mean discrepancy between subsets of the clips.

    Args:
        kernel: of all clips.
        first: (clips, P) 1 for the clips of the first of two subsets and 0 for others, P times.
        second: as first, for the other subset; no clip may be in both.

    Returns:
        (P,) values, about 0 for subsets of the same kind, also below.

    Source: Gretton et al. 2012, "A kernel two-sample test", equation 3; leaving out pairs of the same clip is ours.
    """

    def mean(a: Tensor, b: Tensor, same: bool) -> Tensor:
        pairs = (a * w).sum(0) * (b * w).sum(0) - (same * a * w.square()).sum(0)
        return (a * (kernel.sums @ b)).sum(0) / pairs

    w = kernel.num_windows.unsqueeze(1)
    first, second = first.double(), second.double()
    return SCALE * (mean(first, first, True) + mean(second, second, True) - 2 * mean(first, second, False))


def kernel_audio_distance(kernel: Kernel) -> Estimate:
    """KAD of the generated against the reference clips, with its interval by leaving out each clip.

    Source: Chung et al. 2025, "KAD: no more FAD! An effective and efficient evaluation metric for audio generation".
    """
    generated = torch.arange(len(kernel.num_windows)) < kernel.num_generated
    first, second = generated.double().unsqueeze(1), (~generated).double().unsqueeze(1)
    value = discrepancy(kernel, first, second).item()
    without = []
    for chosen in generated.nonzero().split(STEP) + (~generated).nonzero().split(STEP):
        left_out = torch.zeros(len(generated), len(chosen), dtype=torch.float64)
        left_out[chosen.flatten(), torch.arange(len(chosen))] = 1
        without.append(discrepancy(kernel, first * (1 - left_out), second * (1 - left_out)))
    of_clip = torch.cat(without)
    return jackknife(value, of_clip[: kernel.num_generated].tolist(), of_clip[kernel.num_generated :].tolist())


def permutation_test(kernel: Kernel, seed: int = 0, num_permutations: int = 999) -> float:
    """Probability that KAD comes out at least as large where the clips of both sets are shuffled: small if they differ.

    Source: Gretton et al. 2012, section 5; Phipson and Smyth 2010, "Permutation p-values should never be zero".
    """
    generator = np.random.default_rng(seed)
    clips = len(kernel.num_windows)
    first = torch.zeros(clips, num_permutations + 1, dtype=torch.float64)
    first[: kernel.num_generated, 0] = 1
    for column in range(1, num_permutations + 1):
        first[torch.from_numpy(generator.permutation(clips)[: kernel.num_generated]), column] = 1
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
