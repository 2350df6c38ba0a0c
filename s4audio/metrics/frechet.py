"""The Fréchet distance between two sets of vectors, its value without the bias of few samples, and how sure both are.

A set is a list of clips, each (windows, d): what is drawn, left out or split is always a whole clip. Everything is float64.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from s4audio.metrics.resampling import Clips, Estimate, count_windows, effective_windows, jackknife, shuffled

NUM_BLOCKS = 12  # parts of a set that subsets of FID∞ are put together from
SUBSET_BLOCKS = (12, 10, 8, 7, 6, 5, 4, 3)  # sizes of these subsets, in blocks: about evenly spaced in 1 / size
NUM_GROUPS = 20  # of clips that the jackknife leaves out one after the other


class Moments(NamedTuple):
    """Number, mean and scatter (the sum of outer products of the deviations from the mean) of vectors."""

    number: int
    mean: Tensor  # (d,)
    scatter: Tensor  # (d, d)

    def covariance(self) -> Tensor:
        """(d, d), unbiased."""
        return self.scatter / (self.number - 1)


class FrechetInfinity(NamedTuple):
    """The Fréchet distance at an infinite number of samples, and the line it was read from."""

    estimate: Estimate
    sizes: list[float]  # windows in a subset, on average
    distances: list[float]  # mean Fréchet distance of the subsets of each size
    slope: float  # distance = estimate + slope / size
    r_squared: float


def moments(vectors: Tensor) -> Moments:
    """Moments of (n, d) vectors."""
    vectors = vectors.double()
    mean = vectors.mean(0)
    deviation = vectors - mean
    return Moments(len(vectors), mean, deviation.mT @ deviation)


def merge(parts: Iterable[Moments]) -> Moments:
    """Moments of all the vectors of the parts, whatever their sizes and order.

    Source: Chan, Golub and LeVeque 1983, "Algorithms for computing the sample variance".
    """
    parts = list(parts)
    number = sum(part.number for part in parts)
    mean = torch.stack([part.number * part.mean for part in parts]).sum(0) / number
    between = torch.stack([part.number**0.5 * (part.mean - mean) for part in parts])
    return Moments(number, mean, torch.stack([part.scatter for part in parts]).sum(0) + between.mT @ between)


def frechet_distance(generated: Tensor | Moments, reference: Tensor | Moments) -> float:
    """Squared 2-Wasserstein distance between the Gaussians of two sets: |m1 - m2|² + tr(S1 + S2 - 2 (S1^½ S2 S1^½)^½).

    The last trace is the sum of the singular values of R1 R2', for any R with R'R = S: the symmetric root of the covariance
    by its eigenvectors or, where there are fewer vectors than dimensions, the centred vectors themselves. So there is no
    root of a matrix that is not symmetric, nothing imaginary, and singular covariances are like any other.

    Args:
        generated: (n, d) vectors, at least two, or their moments.
        reference: as generated.

    Returns:
        A number, at least 0.

    Raises:
        ValueError: fewer than two vectors, another number of dimensions, or a value that is not finite.

    Source: Heusel et al. 2017, "GANs trained by a two time-scale update rule", equation 6; the singular values are ours.
    """
    (m1, R1), (m2, R2) = _mean_and_root(generated), _mean_and_root(reference)
    if len(m1) != len(m2):
        raise ValueError(f"the generated vectors have {len(m1)} dimensions and the reference {len(m2)}.")
    squares = (m1 - m2).square().sum() + R1.square().sum() + R2.square().sum()
    return max(0.0, (squares - 2 * torch.linalg.svdvals(R1 @ R2.mT).sum()).item())


def frechet_infinity(generated: Clips, reference: Clips, seed: int = 0, paired: bool = False) -> FrechetInfinity | str:
    """The Fréchet distance without the bias of few samples: a line in 1 / size through subsets, read at 0.

    Both sets are shuffled and cut into 12 blocks of whole clips. Subsets are runs of 3 to 12 blocks, drawn without
    replacement, of both sets at the same share. The interval is the jackknife's: the same again without each of 20 groups of
    clips that are spread evenly over the blocks.

    Args:
        generated: (windows, d) of each clip.
        reference: as generated.
        seed: of the shuffles.
        paired: generated clip i is a reconstruction of reference clip i; both are in a subset, or neither.

    Returns:
        The estimate, or a sentence that says why there can be none: fewer than 12 clips, or than 4 d effective windows.

    Source: Chong and Forsyth 2020, "Effectively unbiased FID and Inception score and where to find them"; subsets of both
    sets, in blocks, and the interval are ours.
    """
    d = generated[0].shape[-1]
    sets = [shuffled(generated, seed, 0), shuffled(reference, seed, 0 if paired else 1)]
    effective = [effective_windows(clips) for clips in sets]
    for name, clips, number in zip(("generated", "reference"), sets, effective, strict=True):
        if len(clips) < NUM_BLOCKS or number < 4 * d:
            alike = f", of which those of a clip are so alike that they say as much as {number:.0f}"
            return (
                f"FID∞ needs at least {NUM_BLOCKS} clips and {4 * d} independent windows (4 for each of the {d} dimensions) "
                f"a side; the {name} set has {len(clips)} clips with {count_windows(clips)} windows"
                f"{alike if number < 0.95 * count_windows(clips) else ''}. KAD has no such bias."
            )
    sizes = [size for size in SUBSET_BLOCKS if size * min(effective) / NUM_BLOCKS >= 1.5 * d]
    groups = min(NUM_GROUPS, *map(len, sets))
    line = _line(sets, sizes)
    without = [_line(sets, sizes, partial(_outside, groups, group)).intercept for group in range(groups)]
    estimate = jackknife(line.intercept, without)
    return FrechetInfinity(estimate, line.sizes, line.distances, line.slope, line.r_squared)


class _Line(NamedTuple):
    """distance = intercept + slope / size, fitted to the mean distance of the subsets of each size."""

    sizes: list[float]
    distances: list[float]
    intercept: float
    slope: float
    r_squared: float


def _outside(groups: int, group: int, clip: int) -> bool:
    return clip % groups != group


def _line(sets: Sequence[Clips], sizes: Sequence[int], kept: Callable[[int], bool] = lambda clip: True) -> _Line:
    """The fit through subsets of `sizes` blocks of both sets, of those clips whose number is `kept`."""
    blocks = [
        [
            moments(torch.cat([clips[i] for i in block if kept(i)]))
            for block in np.array_split(range(len(clips)), NUM_BLOCKS)
            if any(map(kept, block))
        ]
        for clips in sets
    ]
    inverse_sizes, distances = [], []
    for size in sizes:
        points = []
        for start in range(0, NUM_BLOCKS, size):
            parts = [merge(of_set[(start + i) % len(of_set)] for i in range(min(size, len(of_set)))) for of_set in blocks]
            points.append((sum(0.5 / part.number for part in parts), frechet_distance(*parts)))
        inverse_size, distance = np.mean(points, axis=0)
        inverse_sizes.append(inverse_size)
        distances.append(distance)
    slope, intercept = np.polyfit(inverse_sizes, distances, 1)
    residual = distances - (intercept + slope * np.array(inverse_sizes))
    r_squared = 1 - residual.var() / np.var(distances)
    sizes_in_windows = (1 / np.array(inverse_sizes)).tolist()
    return _Line(sizes_in_windows, list(map(float, distances)), float(intercept), float(slope), float(r_squared))


def _mean_and_root(vectors: Tensor | Moments) -> tuple[Tensor, Tensor]:
    """(d,) mean and (r, d) root R of the covariance, R'R = S."""
    if isinstance(vectors, Tensor):
        if len(vectors) < 2 or not torch.isfinite(vectors).all():
            what = "a value that is not finite" if len(vectors) > 1 else f"{len(vectors)} vectors; a covariance needs two"
            raise ValueError(f"a Fréchet distance cannot be had of a set with {what}.")
        if len(vectors) <= vectors.shape[1]:
            vectors = vectors.double()
            mean = vectors.mean(0)
            return mean, (vectors - mean) / (len(vectors) - 1) ** 0.5
        vectors = moments(vectors)
    eigenvalues, eigenvectors = torch.linalg.eigh(vectors.covariance())
    return vectors.mean, eigenvalues.clamp_min(0).sqrt().unsqueeze(-1) * eigenvectors.mT
