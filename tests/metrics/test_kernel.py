"""KAD against loops, its mean and interval against the truth, and how often the verdict is wrong."""

import math

import numpy as np
import pytest
import torch

from s4audio.metrics.kernel import (
    bandwidth,
    discrepancy,
    kernel,
    kernel_audio_distance,
    permutation_test,
)


def clips(generator: torch.Generator, number: int, d: int = 5, shift: float = 0.0, windows: int = 1) -> list[torch.Tensor]:
    return [torch.randn(windows, d, generator=generator) + shift for _ in range(number)]


def mean_kernel(first, second, width):
    """The mean over pairs of different clips of the mean over their windows, by loops."""

    def of_clips(a, b):
        values = [math.exp(-(x - y).square().sum().item() / (2 * width**2)) for x in a for y in b]
        return sum(values) / len(values)

    pairs = [of_clips(a, b) for a in first for b in second if a is not b]
    return sum(pairs) / len(pairs)


def test_is_the_definition():
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(n, 5, generator=generator) for n in (2, 3, 1, 4)]
    real = [torch.randn(n, 5, generator=generator) + 0.5 for n in (3, 2, 2)]
    wanted = 100 * (mean_kernel(made, made, 2.0) + mean_kernel(real, real, 2.0) - 2 * mean_kernel(made, real, 2.0))
    found = kernel_audio_distance(kernel(made, real, 2.0))
    assert found.value == pytest.approx(wanted, abs=1e-4)

    def without(index):
        x, y = (made[:index] + made[index + 1 :], real) if index < 4 else (made, real[: index - 4] + real[index - 3 :])
        return 100 * (mean_kernel(x, x, 2.0) + mean_kernel(y, y, 2.0) - 2 * mean_kernel(x, y, 2.0))

    variance = sum((n - 1) * np.var([without(i) for i in of]) for n, of in ((4, range(4)), (3, range(4, 7))))
    assert found.high - found.value == pytest.approx(1.959964 * variance**0.5, rel=1e-4)


def test_pairs_are_not_compared_with_themselves():
    """Reconstructions are not independent of their originals: without care they score below 0, and are never told apart."""
    found, wrong, seen = [], 0, 0
    for repeat in range(60):
        generator = torch.Generator().manual_seed(repeat)
        real = clips(generator, 20)
        made = [clip + 0.1 * torch.randn(1, 5, generator=generator) for clip in real]
        between = kernel(made, real, bandwidth(real), paired=True)
        found.append(kernel_audio_distance(between).value)
        wrong += permutation_test(between, repeat, 99) < 0.05
        shifted = [clip + 0.3 for clip in made]
        seen += permutation_test(kernel(shifted, real, bandwidth(real), paired=True), repeat, 99) < 0.05
    values = np.array(found)
    assert abs(values.mean()) < 3 * values.std(ddof=1) / 60**0.5 and wrong <= 7 and seen >= 55
    naive = kernel_audio_distance(kernel(made, real, bandwidth(real))).value
    assert naive < -1 < values.min()


def test_clips_of_unequal_length_do_not_fool_the_verdict():
    wrong = 0
    for repeat in range(60):
        generator = torch.Generator().manual_seed(repeat)
        made, real = clips(generator, 30, windows=1), clips(generator, 30, windows=8)
        wrong += permutation_test(kernel(made, real, bandwidth(real)), repeat, 99) < 0.05
    assert wrong <= 7


@pytest.mark.parametrize(
    "number, paired, enough",
    [((3, 3), False, False), ((4, 4), False, True), ((3, 4), False, True), ((5, 5), True, False), ((6, 6), True, True),
     ((600, 700), False, True)],
)  # fmt: skip
def test_too_few_shuffles_give_no_p(number, paired, enough):
    generator = torch.Generator().manual_seed(0)
    between = kernel(clips(generator, number[0]), clips(generator, number[1]), 1.0, paired)
    assert (permutation_test(between) is not None) == enough


def test_blocks_change_nothing(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    made, real = ([torch.randn(1 + i % 7, 5, generator=generator) for i in range(20)] for _ in range(2))
    at_once = kernel(made, real, 2.0)
    monkeypatch.setattr("s4audio.metrics.kernel.BLOCK", 10)
    torch.testing.assert_close(kernel(made, real, 2.0).means, at_once.means, rtol=1e-6, atol=1e-6)


def test_bandwidth_is_the_median_between_clips():
    real = clips(torch.Generator().manual_seed(0), 9, windows=3)
    distances = [(x - y).norm() for i, a in enumerate(real) for b in real[i + 1 :] for x in a for y in b]
    assert bandwidth(real) == pytest.approx(torch.stack(distances).median().item(), rel=1e-6)
    assert bandwidth([*real, *[torch.ones(3, 5)] * 30]) > 0  # most distances are 0
    with pytest.raises(ValueError, match="no scale to measure with"):
        bandwidth([torch.ones(3, 4), torch.ones(2, 4)])


@pytest.mark.parametrize("number", [10, 31])
def test_has_no_bias_and_a_wide_enough_interval(number):
    """100 repeats; evaluation/calibration.py has more."""
    found = []
    for repeat in range(100):
        generator = torch.Generator().manual_seed(repeat)
        made, real = (clips(generator, number, windows=2) for _ in range(2))
        found.append(kernel_audio_distance(kernel(made, real, bandwidth(real))))
    values = np.array([estimate.value for estimate in found])
    assert abs(values.mean()) < 3 * values.std(ddof=1) / 10
    assert np.mean([estimate.low <= 0 <= estimate.high for estimate in found]) >= 0.9
    assert np.mean([estimate.high - estimate.value for estimate in found]) < 2 * 1.96 * values.std(ddof=1)


def test_verdict_is_seldom_wrong_and_sees_a_difference():
    wrong, seen = 0, 0
    for repeat in range(200):
        generator = torch.Generator().manual_seed(repeat)
        made, real, other = clips(generator, 20), clips(generator, 20), clips(generator, 20, shift=0.7)
        width = bandwidth(real)
        wrong += permutation_test(kernel(made, real, width), repeat, 99) < 0.05
        seen += permutation_test(kernel(other, real, width), repeat, 99) < 0.05
    assert 0.01 <= wrong / 200 <= 0.09 and seen / 200 > 0.9


def test_windows_of_a_clip_that_are_alike_do_not_fool_the_verdict():
    """Ten windows of each clip that hardly differ: shuffled as windows, any two sets would be told apart."""
    wrong = 0
    for repeat in range(60):
        generator = torch.Generator().manual_seed(repeat)
        made, real = ([c + 0.1 * torch.randn(10, 5, generator=generator) for c in clips(generator, 12)] for _ in range(2))
        wrong += permutation_test(kernel(made, real, bandwidth(real)), repeat, 99) < 0.05
    assert wrong <= 7


def test_subsets_of_the_clips():
    generator = torch.Generator().manual_seed(0)
    made, real = clips(generator, 6), clips(generator, 8, shift=1.0)
    everything = kernel(made, real, 2.0)
    first, second = torch.zeros(14, 1), torch.zeros(14, 1)
    first[[0, 2, 5]], second[[7, 8, 12]] = 1, 1
    few = kernel([made[0], made[2], made[5]], [real[1], real[2], real[6]], 2.0)
    wanted = kernel_audio_distance(few).value
    assert discrepancy(everything, first, second).item() == pytest.approx(wanted, rel=1e-5)


def test_the_bandwidth_looks_at_windows_from_all_over_the_set():
    generator = torch.Generator().manual_seed(0)
    real = [scale * clip for scale in (1, 100) for clip in clips(generator, 100)]
    assert bandwidth(real, at_most=50) == pytest.approx(bandwidth(real), rel=0.3)


def test_the_interval_of_pairs_is_from_leaving_out_each_pair():
    generator = torch.Generator().manual_seed(0)
    real = clips(generator, 5, windows=2)
    made = [clip + 0.5 * torch.randn(2, 5, generator=generator) for clip in real]
    found = kernel_audio_distance(kernel(made, real, 2.0, paired=True))

    def without(index):
        x, y = (of[:index] + of[index + 1 :] for of in (made, real))
        return kernel_audio_distance(kernel(x, y, 2.0, paired=True)).value

    variance = 4 * np.var([without(index) for index in range(5)])
    assert found.high - found.value == pytest.approx(1.959964 * variance**0.5, rel=1e-3)


@pytest.mark.parametrize("seed", range(5))
def test_a_shuffle_into_the_same_two_sets_counts_as_large_as_they_are(seed):
    """Of the 70 halves of 8 clips 2 are the sets themselves."""
    generator = torch.Generator().manual_seed(seed)
    made, real = clips(generator, 4, windows=3, shift=3.0), clips(generator, 4, windows=3)
    assert permutation_test(kernel(made, real, 2.0), seed) == pytest.approx(2 / 70, abs=0.014)


def test_sets_that_no_shuffle_equals_have_a_p_of_one_in_a_thousand():
    generator = torch.Generator().manual_seed(0)
    made, real = clips(generator, 30, shift=2.0), clips(generator, 30)
    assert permutation_test(kernel(made, real, bandwidth(real))) == 0.001
