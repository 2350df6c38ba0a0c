"""Every score that compares two sets of embedded clips, with intervals, floor and verdict, as a dictionary for JSON.

The floor is what real clips score against other real clips: scores are taken again at n clips, n being the smaller of the
number of generated clips and half of that of the reference, over random draws.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from s4audio.metrics.frechet import FrechetInfinity, frechet_distance, frechet_infinity
from s4audio.metrics.kernel import Kernel, bandwidth, discrepancy, kernel, kernel_audio_distance, permutation_test
from s4audio.metrics.neighbours import Manifold, Nearest, manifold, nearest
from s4audio.metrics.resampling import Clips, Estimate, count_windows, jackknife, shuffled

NUM_GROUPS = 60  # of clips that the interval of the Fréchet distance leaves out one after the other
NUM_DRAWS = 40  # of n clips, behind the floor
NUM_MANIFOLD_DRAWS = 5
MAX_KERNEL_CLIPS = 2000  # of each set, drawn at random: the kernel between all of them takes 128 MiB
MAX_MANIFOLD_WINDOWS = 5000  # of each set, in whole clips
SIGNIFICANCE = 0.05  # of the verdict
FEWEST_CLIPS = 3
NUM_NEIGHBOURS = 5
SUSPICIOUS_SHARE = 0.15  # of windows near training windows, where 0.05 is chance
NUM_CLOSEST = 10  # pairs of generated and training clips that are listed

Progress = Callable[[str, int, int], None]  # what, how much is done, of how much


class Comparison(NamedTuple):
    """The scores, in JSON's types, and the line behind FID∞, if there is one."""

    scores: dict[str, Any]
    infinity: FrechetInfinity | None


def silently(what: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


def compare(
    generated: Clips, reference: Clips, seed: int = 0, progress: Progress = silently, paired: bool = False
) -> Comparison:
    """Fréchet distance, FID∞, KAD, verdict, precision, recall, density and coverage, and the floor of each.

    Args:
        generated: (windows, d) of each clip, three clips or more.
        reference: as generated.
        seed: of every draw.
        progress: called with (what, done, total).
        paired: generated clip i is a reconstruction of reference clip i. The two sets are not independent then: what is
            drawn, left out or shuffled is a pair, and no clip is compared with its own reconstruction (but in `fid`).

    Raises:
        ValueError: there are fewer than three clips, all clips of the reference are the same, or pairs are not pairs.
    """
    for name, clips in (("generated", generated), ("reference", reference)):
        if len(clips) < FEWEST_CLIPS:
            raise ValueError(f"the {name} set has {len(clips)} clips; a spread and its interval need {FEWEST_CLIPS}.")
    if paired and len(generated) != len(reference):
        raise ValueError(f"there are {len(generated)} generated and {len(reference)} reference clips; pairs need as many.")
    total = 5
    progress("FID", 0, total)
    fid = _frechet_with_interval(generated, reference, seed, paired)
    progress("FID at infinity", 1, total)
    infinity = frechet_infinity(generated, reference, seed, paired)
    progress("KAD", 2, total)
    width = bandwidth(reference)
    streams = (2, 2) if paired else (2, 3)
    some = [shuffled(c, seed, s)[:MAX_KERNEL_CLIPS] for c, s in zip((generated, reference), streams, strict=True)]
    kernels = kernel(some[0], some[1], width, paired)
    kad, p_value = kernel_audio_distance(kernels), permutation_test(kernels, seed)
    scores: dict[str, Any] = {
        "fid": fid.value, "fid_interval": [fid.low, fid.high], **_infinity_scores(infinity),
        "kad": kad.value, "kad_interval": [kad.low, kad.high], "kad_bandwidth": width, "kad_clips": [len(c) for c in some],
        "verdict": {"distinguishable": None if p_value is None else p_value < SIGNIFICANCE, "p_value": p_value},
    }  # fmt: skip
    progress("the floor", 3, total)
    n = min(len(generated), len(reference) // 2)
    if n < 2:
        scores |= {"at_equal_n": None, "floor": None, "floor_reason": "A floor needs 4 reference clips, twice two of them."}
    else:
        at_n, floor = _frechet_at(n, generated, reference, seed, paired)
        made, real = _kad_at(kernels, seed)
        progress("neighbours", 4, total)
        made_manifold, real_manifold = _manifold_at(n, generated, reference, seed, paired)
        scores["at_equal_n"] = {"clips": n, **at_n, **made, **made_manifold}
        scores["floor"] = {"clips": n, **floor, **real, **real_manifold}
    progress("scores", total, total)
    return Comparison(scores, None if isinstance(infinity, str) else infinity)


def memorization(generated: Clips, reference: Clips, train: Clips) -> tuple[dict[str, Any], Nearest, Nearest]:
    """Whether generated windows lie nearer to training windows than those of recordings that the generator never heard.

    Returns:
        The scores, with the closest pairs as numbers of clips; the nearest training clip of each generated one; and that of
        each reference one.
    """
    made, real = nearest(generated, train), nearest(reference, train)
    rank = int(0.05 * (len(real.of_window) + 1))  # a window like them is nearer than the rank-th in 5 % of the cases
    limit = real.of_window.sort().values[rank - 1] if rank else None
    share = None if limit is None else (made.of_window < limit).double().mean().item()
    closest = made.distance.argsort()[:NUM_CLOSEST].tolist()
    scores = {
        "median_distance_generated_to_train": made.distance.median().item(),
        "median_distance_reference_to_train": real.distance.median().item(),
        "share_nearer_than_95_percent_of_reference": share,
        "suspicious": share is not None and share > SUSPICIOUS_SHARE,
        "closest": [{"generated": i, "train": int(made.clip[i]), "distance": made.distance[i].item()} for i in closest],
    }  # fmt: skip
    return scores, made, real


def _frechet_with_interval(generated: Clips, reference: Clips, seed: int, paired: bool) -> Estimate:
    """The Fréchet distance of all clips; its interval from the same without each of up to 60 groups of them."""
    sets = [shuffled(generated, seed, 0), shuffled(reference, seed, 0 if paired else 1)]
    groups = min(NUM_GROUPS, *map(len, sets))

    def distance(left_out: int | None) -> float:
        x, y = ([clip for i, clip in enumerate(clips) if i % groups != left_out] for clips in sets)
        return frechet_distance(torch.cat(x), torch.cat(y))

    estimate = jackknife(distance(None), [distance(group) for group in range(groups)])
    return estimate._replace(low=max(0.0, estimate.low))


def _infinity_scores(infinity: FrechetInfinity | str) -> dict[str, Any]:
    if isinstance(infinity, str):
        return {"fid_infinity": None, "fid_infinity_interval": None, "fid_infinity_reason": infinity}
    estimate = infinity.estimate
    fit = {"windows": infinity.sizes, "fid": infinity.distances, "slope": infinity.slope, "r_squared": infinity.r_squared}
    return {
        "fid_infinity": estimate.value, "fid_infinity_interval": [estimate.low, estimate.high], "fid_infinity_fit": fit
    }  # fmt: skip


def _draws(
    n: int, num_generated: int, num_reference: int, seed: int, number: int, paired: bool
) -> list[tuple[list[int], list[int], list[int]]]:
    """Numbers of n generated clips, n of the reference and n others of it, without replacement, `number` times.

    With pairs, the generated are the reconstructions of those others.
    """
    drawn = []
    for draw in range(number):
        halves = shuffled(range(num_reference), seed, 10 + 2 * draw)
        real, other = halves[:n], halves[n : 2 * n]
        made = other if paired else shuffled(range(num_generated), seed, 11 + 2 * draw)[:n]
        drawn.append((made, real, other))
    return drawn


def _frechet_at(
    n: int, generated: Clips, reference: Clips, seed: int, paired: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    scores: tuple[list[float], list[float]] = [], []
    for made, real, other in _draws(n, len(generated), len(reference), seed, NUM_DRAWS, paired):
        y = torch.cat([reference[i] for i in real])
        scores[0].append(frechet_distance(torch.cat([generated[i] for i in made]), y))
        scores[1].append(frechet_distance(torch.cat([reference[i] for i in other]), y))
    return _spread("fid", scores[0]), _spread("fid", scores[1])


def _kad_at(kernels: Kernel, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    clips, num_generated = len(kernels.means), kernels.num_generated
    n = min(num_generated, (clips - num_generated) // 2)
    members = torch.zeros(3, clips, NUM_DRAWS)
    draws = _draws(n, num_generated, clips - num_generated, seed, NUM_DRAWS, kernels.paired)
    for draw, (made, real, other) in enumerate(draws):
        members[0, made, draw] = 1
        members[1, [num_generated + i for i in real], draw] = 1
        members[2, [num_generated + i for i in other], draw] = 1
    x, y, z = members
    made_scores, real_scores = discrepancy(kernels, x, y), discrepancy(kernels, z, y)
    return (
        {"kad_clips": n, **_spread("kad", made_scores.tolist())}, {"kad_clips": n, **_spread("kad", real_scores.tolist())}
    )  # fmt: skip


def _manifold_at(
    n: int, generated: Clips, reference: Clips, seed: int, paired: bool
) -> tuple[dict[str, float], dict[str, float]]:
    windows = max(count_windows(clips) / len(clips) for clips in (generated, reference))
    n = max(2, min(n, int(MAX_MANIFOLD_WINDOWS / windows)))
    found: tuple[list[Manifold], list[Manifold]] = [], []
    for made, real, other in _draws(n, len(generated), len(reference), seed, NUM_MANIFOLD_DRAWS, paired):
        x, y, z = [generated[i] for i in made], [reference[i] for i in real], [reference[i] for i in other]
        if min(count_windows(clips) - max(map(len, clips)) for clips in (x, y, z)) < NUM_NEIGHBOURS:
            return {}, {}
        found[0].append(manifold(x, y, NUM_NEIGHBOURS))
        found[1].append(manifold(z, y, NUM_NEIGHBOURS))
    means = [dict(zip(Manifold._fields, np.mean(of_draws, axis=0).tolist(), strict=True)) for of_draws in found]
    return {"manifold_clips": n, **means[0]}, {"manifold_clips": n, **means[1]}


def _spread(name: str, values: Sequence[float]) -> dict[str, Any]:
    """Mean over draws, and the range of 95 % of them."""
    return {name: float(np.mean(values)), f"{name}_interval": np.quantile(values, [0.025, 0.975]).tolist()}
