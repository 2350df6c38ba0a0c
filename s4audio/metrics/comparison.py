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
from s4audio.metrics.neighbours import Nearest, manifold, nearest
from s4audio.metrics.resampling import Clips, Estimate, count_windows, jackknife, shuffled

NUM_GROUPS = 20  # of clips that the interval of the Fréchet distance leaves out one after the other
NUM_DRAWS = 40  # of n clips, behind the floor
NUM_MANIFOLD_DRAWS = 5
MAX_KERNEL_CLIPS = 2000  # of each set, drawn at random: the kernel between all of them takes 128 MiB
MAX_MANIFOLD_WINDOWS = 5000  # of each set, in whole clips
SIGNIFICANCE = 0.05  # of the verdict
NUM_CLOSEST = 10  # pairs of generated and training clips that are listed

Progress = Callable[[str, int, int], None]  # what, how much is done, of how much


class Comparison(NamedTuple):
    """The scores, in JSON's types, and the line behind FID∞, if there is one."""

    scores: dict[str, Any]
    infinity: FrechetInfinity | None


def silently(what: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


def compare(generated: Clips, reference: Clips, seed: int = 0, progress: Progress = silently) -> Comparison:
    """Fréchet distance, FID∞, KAD, verdict, precision, recall, density and coverage, and the floor of each.

    Args:
        generated: (windows, d) of each clip, two clips or more.
        reference: as generated.
        seed: of every draw.
        progress: called with (what, done, total).

    Raises:
        ValueError: there is one clip only, or all clips of the reference are the same.
    """
    for name, clips in (("generated", generated), ("reference", reference)):
        if len(clips) < 2:
            raise ValueError(f"the {name} set has {len(clips)} clip; a spread needs two.")
    total = 5
    progress("FID", 0, total)
    fid = _frechet_with_interval(generated, reference, seed)
    progress("FID at infinity", 1, total)
    infinity = frechet_infinity(generated, reference, seed)
    progress("KAD", 2, total)
    width = bandwidth(reference)
    some = [shuffled(clips, seed, 2 + i)[:MAX_KERNEL_CLIPS] for i, clips in enumerate((generated, reference))]
    kernels = kernel(some[0], some[1], width)
    kad, p_value = kernel_audio_distance(kernels), permutation_test(kernels, seed)
    scores: dict[str, Any] = {
        "fid": fid.value, "fid_interval": [fid.low, fid.high], **_infinity_scores(infinity),
        "kad": kad.value, "kad_interval": [kad.low, kad.high], "kad_bandwidth": width, "kad_clips": [len(c) for c in some],
        "verdict": {"distinguishable": p_value < SIGNIFICANCE, "p_value": p_value},
    }  # fmt: skip
    progress("the floor", 3, total)
    n = min(len(generated), len(reference) // 2)
    if n < 2:
        scores |= {"at_equal_n": None, "floor": None, "floor_reason": "A floor needs 4 reference clips, twice two of them."}
    else:
        at_n, floor = _frechet_at(n, generated, reference, seed)
        made, real = _kad_at(kernels, seed)
        made_manifold, real_manifold = _manifold_at(n, generated, reference, seed)
        progress("neighbours", 4, total)
        scores["at_equal_n"] = {"clips": n, **at_n, **made, **made_manifold}
        scores["floor"] = {"clips": n, **floor, **real, **real_manifold}
    progress("scores", total, total)
    return Comparison(scores, None if isinstance(infinity, str) else infinity)


def memorization(generated: Clips, reference: Clips, train: Clips) -> tuple[dict[str, Any], Nearest, Nearest]:
    """Whether generated clips lie nearer to training clips than recordings do that the generator never heard.

    Returns:
        The scores, with the closest pairs as numbers of clips; the nearest training clip of each generated one; and that of
        each reference one.
    """
    made, real = nearest(generated, train), nearest(reference, train)
    limit = real.distance.quantile(0.05)
    closest = made.distance.argsort()[:NUM_CLOSEST].tolist()
    scores = {
        "median_distance_generated_to_train": made.distance.median().item(),
        "median_distance_reference_to_train": real.distance.median().item(),
        "share_nearer_than_95_percent_of_reference": (made.distance < limit).double().mean().item(),
        "closest": [{"generated": i, "train": int(made.clip[i]), "distance": made.distance[i].item()} for i in closest],
    }
    return scores, made, real


def _frechet_with_interval(generated: Clips, reference: Clips, seed: int) -> Estimate:
    """The Fréchet distance of all clips; its interval from the same without each of up to 20 groups of them."""
    sets = [shuffled(clips, seed, i) for i, clips in enumerate((generated, reference))]
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


def _draws(n: int, generated: Clips, reference: Clips, seed: int, number: int) -> list[tuple[Clips, ...]]:
    """n generated clips, n of the reference and n others of it, drawn without replacement, `number` times."""
    drawn: list[tuple[Clips, ...]] = []
    for draw in range(number):
        halves = shuffled(reference, seed, 10 + 2 * draw)
        drawn.append((shuffled(generated, seed, 11 + 2 * draw)[:n], halves[:n], halves[n : 2 * n]))
    return drawn


def _frechet_at(n: int, generated: Clips, reference: Clips, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    drawn = [tuple(torch.cat(list(part)) for part in draw) for draw in _draws(n, generated, reference, seed, NUM_DRAWS)]
    made = [frechet_distance(x, y) for x, y, _ in drawn]
    real = [frechet_distance(other, y) for _, y, other in drawn]
    return _spread("fid", made), _spread("fid", real)


def _kad_at(kernels: Kernel, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    clips, made = len(kernels.num_windows), kernels.num_generated
    n = min(made, (clips - made) // 2)
    members = torch.zeros(3, clips, NUM_DRAWS)
    generator = np.random.default_rng([seed, 4])
    for draw in range(NUM_DRAWS):
        halves = made + torch.from_numpy(generator.permutation(clips - made))
        members[0, torch.from_numpy(generator.permutation(made))[:n], draw] = 1
        members[1, halves[:n], draw] = 1
        members[2, halves[n : 2 * n], draw] = 1
    x, y, other = members
    return _spread("kad", discrepancy(kernels, x, y).tolist()), _spread("kad", discrepancy(kernels, other, y).tolist())


def _manifold_at(n: int, generated: Clips, reference: Clips, seed: int) -> tuple[dict[str, float], dict[str, float]]:
    windows = max(count_windows(clips) / len(clips) for clips in (generated, reference))
    n = max(2, min(n, int(MAX_MANIFOLD_WINDOWS / windows)))
    drawn = _draws(n, generated, reference, seed, NUM_MANIFOLD_DRAWS)
    if min(count_windows(clips) - max(map(len, clips)) for draw in drawn for clips in draw) < 5:
        return {}, {}  # fewer than five neighbours
    made = [manifold(x, y)._asdict() for x, y, _ in drawn]
    real = [manifold(other, y)._asdict() for _, y, other in drawn]
    return tuple({name: float(np.mean([one[name] for one in of])) for name in of[0]} for of in (made, real))  # type: ignore[return-value]


def _spread(name: str, values: Sequence[float]) -> dict[str, Any]:
    """Mean over draws, and the range of 95 % of them."""
    return {name: float(np.mean(values)), f"{name}_interval": np.quantile(values, [0.025, 0.975]).tolist()}
