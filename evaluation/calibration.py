"""Whether the evaluator's estimates, intervals and verdict are what they say, on sets whose distance is known.

    python evaluation/calibration.py --json evaluation/results/calibration.json

Windows are drawn from Gaussians, one a clip, or ten that share half of their variance. FID∞: 1,000 against 1,000 windows of
128 dimensions, at a true distance of 0 and of 2; the share of the 95 % intervals that hold the truth, and how wide they are
against 1.96 standard deviations of the estimate. KAD: its mean over repeats at 31 and at 300 clips, against its standard
error. The verdict: how often it tells two sets of one kind apart, which should be in 5 % of the repeats.
"""

import argparse
import json
import platform
import time
from pathlib import Path

import numpy as np
import torch

import s4audio
from s4audio.metrics.frechet import frechet_distance, frechet_infinity
from s4audio.metrics.kernel import BANDWIDTH_RULE, bandwidth, kernel, kernel_audio_distance, permutation_test


def clips(
    generator: np.random.Generator, number: int, windows: int, dimensions: int, shift: float = 0.0
) -> list[torch.Tensor]:
    """Clips (windows, dimensions) of unit variance, half of it the clip's if it has several windows."""
    shared = 0.5 if windows > 1 else 0.0
    of_clip, own = (
        generator.standard_normal((number, 1, dimensions)),
        generator.standard_normal((number, windows, dimensions)),
    )
    vectors = torch.from_numpy(shared**0.5 * of_clip + (1 - shared) ** 0.5 * own)
    vectors[..., 0] += shift
    return list(vectors)


def of_intervals(estimates: list, truth: float) -> dict[str, float]:
    """Bias, coverage and width of estimates with intervals."""
    values = np.array([estimate.value for estimate in estimates])
    half_widths = np.array([(estimate.high - estimate.low) / 2 for estimate in estimates])
    deviation = values.std(ddof=1)
    return {
        "truth": truth,
        "mean": values.mean(),
        "standard_deviation": deviation,
        "standard_error_of_mean": deviation / len(values) ** 0.5,
        "coverage_of_95_percent_interval": np.mean([e.low <= truth <= e.high for e in estimates]),
        "half_width_over_1.96_deviations": half_widths.mean() / (1.96 * deviation),
    }


def infinity(repeats: int, distance: float, number: int, windows: int, dimensions: int) -> dict[str, float]:
    estimates, plain = [], []
    for repeat in range(repeats):
        generator = np.random.default_rng([repeat, 0])
        made = clips(generator, number, windows, dimensions, distance**0.5)
        real = clips(generator, number, windows, dimensions)
        found = frechet_infinity(made, real, repeat)
        if isinstance(found, str):
            raise SystemExit(found)
        estimates.append(found.estimate)
        plain.append(frechet_distance(torch.cat(made), torch.cat(real)))
    sizes = {"clips": number, "windows": windows, "dimensions": dimensions}
    return {**sizes, **of_intervals(estimates, distance), "plain_fid_mean": np.mean(plain)}


def kernels(repeats: int, number: int, windows: int, dimensions: int) -> dict[str, float]:
    estimates, p_values = [], []
    for repeat in range(repeats):
        generator = np.random.default_rng([repeat, 1])
        made, real = clips(generator, number, windows, dimensions), clips(generator, number, windows, dimensions)
        between = kernel(made, real, bandwidth(real))
        estimates.append(kernel_audio_distance(between))
        p_values.append(permutation_test(between, repeat))
    wrong = np.mean(np.array(p_values) < 0.05)
    sizes = {"clips": number, "windows": windows, "dimensions": dimensions}
    return {**sizes, **of_intervals(estimates, 0.0), "told_apart_at_5_percent": wrong}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--clips", type=int, default=1000, help="for FID∞ (default 1000)")
    parser.add_argument("--dimensions", type=int, default=128, help="for FID∞ (default 128)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result: dict = {"repeats": args.repeats, "fid_infinity": [], "kad": [], "kad_bandwidth": BANDWIDTH_RULE}
    start = time.perf_counter()
    cases = [(0.0, args.clips, 1, args.dimensions), (2.0, args.clips, 1, args.dimensions)]
    cases += [(distance, args.clips // 2, 10, args.dimensions // 4) for distance in (0.0, 2.0)]
    for distance, number, windows, dimensions in cases:
        found = infinity(args.repeats, distance, number, windows, dimensions)
        result["fid_infinity"].append(found)
        print(
            f"FID∞, {windows} windows a clip, at a true distance of {distance:g}: mean {found['mean']:.3f} "
            f"(plain FID {found['plain_fid_mean']:.2f}), interval holds the truth in "
            f"{found['coverage_of_95_percent_interval']:.1%}, half-width "
            f"{found['half_width_over_1.96_deviations']:.2f} x 1.96 deviations",
            flush=True,
        )
    for number, windows in ((31, 1), (300, 1), (31, 10)):
        found = kernels(args.repeats, number, windows, 16)
        result["kad"].append(found)
        print(
            f"KAD of {number} clips of {windows} windows, of one kind: mean {found['mean']:.4f} ± "
            f"{found['standard_error_of_mean']:.4f}, interval holds 0 in {found['coverage_of_95_percent_interval']:.1%}, "
            f"told apart in {found['told_apart_at_5_percent']:.1%}",
            flush=True,
        )
    result["seconds"] = round(time.perf_counter() - start, 1)
    result["versions"] = {"s4audio": s4audio.__version__, "torch": torch.__version__, "python": platform.python_version()}
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1, default=float) + "\n")


if __name__ == "__main__":
    main()
