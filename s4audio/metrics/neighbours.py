"""What nearest neighbours tell about two sets: fidelity, variety, and whether training clips were copied.

A set is a list of clips, each (windows, d). A window's neighbours are windows of other clips: those of its own are alike.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from s4audio.metrics.resampling import Clips, clip_of_window

BLOCK = 2048  # windows in a block of distances


class Manifold(NamedTuple):
    """How two sets lie in each other; shares from 0 to 1, but for density, which is about 1 for two sets of one kind."""

    precision: float  # generated windows that lie among the reference's
    recall: float  # reference windows that lie among the generated's
    density: float  # how many balls of the reference hold a generated window, over the number expected
    coverage: float  # reference windows with a generated window nearby


class Nearest(NamedTuple):
    """For each clip the clip of another set that is nearest to it."""

    distance: Tensor  # (clips,) mean over the clip's windows of the distance to the nearest window of that clip
    clip: Tensor  # (clips,) its number
    of_window: Tensor  # (windows of all clips,) distance to the nearest window of any of the others


def manifold(generated: Clips, reference: Clips, num_neighbours: int = 5) -> Manifold:
    """Precision, recall, density and coverage, with balls that reach to the num_neighbours-th neighbour.

    All depend on the number of windows: compare them at equal numbers only.

    Raises:
        ValueError: fewer than two clips, or no num_neighbours windows of other clips.

    Source: Kynkäänniemi et al. 2019, "Improved precision and recall metric"; Naeem et al. 2020, "Reliable fidelity and
    diversity metrics for generative models".
    """
    generated, reference = _centred(reference, generated), _centred(reference, reference)
    x, y = torch.cat(generated), torch.cat(reference)
    radius_x, radius_y = _radii(generated, num_neighbours), _radii(reference, num_neighbours)
    inside = torch.zeros(len(x))  # in how many balls of the reference each generated window lies
    covered, recalled = torch.zeros(len(y), dtype=torch.bool), torch.zeros(len(y), dtype=torch.bool)
    for rows, distance in _distances(x, y):
        in_balls = distance <= radius_y
        inside[rows] = in_balls.sum(1).float()
        covered |= in_balls.any(0)
        recalled |= (distance <= radius_x[rows].unsqueeze(1)).any(0)
    return Manifold(
        precision=(inside > 0).double().mean().item(),
        recall=recalled.double().mean().item(),
        density=inside.double().mean().item() / num_neighbours,
        coverage=covered.double().mean().item(),
    )


def nearest(clips: Clips, others: Clips) -> Nearest:
    """For each clip the nearest of `others`, by the mean over its windows of the distance to their nearest window.

    Source: ours.
    """
    clips, others = _centred(others, clips), _centred(others, others)
    y, of_other = torch.cat(others), clip_of_window(others)
    found, of_window = [], []
    for clip in clips:
        distance = torch.cdist(clip, y)  # (windows, all windows of the others)
        to_clip = torch.full((len(clip), len(others)), torch.inf)
        to_clip.scatter_reduce_(1, of_other.expand_as(distance), distance, "amin")
        found.append(to_clip.mean(0).min(0))
        of_window.append(distance.amin(1))
    return Nearest(
        torch.stack([one.values for one in found]), torch.stack([one.indices for one in found]), torch.cat(of_window)
    )


def _centred(reference: Clips, clips: Clips) -> list[Tensor]:
    """The clips about the reference's mean: distances lose fewer digits near the origin."""
    centre = torch.cat(list(reference)).double().mean(0)
    return [(clip.double() - centre).float() for clip in clips]


def _radii(clips: Clips, num_neighbours: int) -> Tensor:
    """(windows,) distance of each window to its num_neighbours-th neighbour."""
    vectors, of_clip = torch.cat(list(clips)), clip_of_window(clips)
    most = max(len(clip) for clip in clips)
    if len(vectors) - most < num_neighbours:
        raise ValueError(
            f"there are {len(vectors) - most} windows beside those of a clip; {num_neighbours} neighbours are wanted."
        )
    radii = torch.empty(len(vectors))
    for rows, distance in _distances(vectors, vectors):
        distance[of_clip[rows].unsqueeze(1) == of_clip] = torch.inf
        radii[rows] = distance.kthvalue(num_neighbours, dim=1).values
    return radii


def _distances(x: Tensor, y: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows of x and their distances to y, block by block."""
    for start in range(0, len(x), BLOCK):
        yield slice(start, start + BLOCK), torch.cdist(x[start : start + BLOCK], y)
