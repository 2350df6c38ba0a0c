"""The Fréchet distance against closed forms and torchmetrics, and FID∞ with its interval against the truth."""

import re
import time

import numpy as np
import pytest
import torch
from torchmetrics.image.fid import _compute_fid

from s4audio.metrics.frechet import Moments, frechet_distance, frechet_infinity, merge, moments


def random_covariance(d: int, generator: np.random.Generator) -> torch.Tensor:
    root = torch.from_numpy(generator.standard_normal((d, 2 * d)))
    return root @ root.mT / d


def of_gaussian(mean: torch.Tensor, covariance: torch.Tensor) -> Moments:
    return Moments(101, mean, 100 * covariance)


def one_window_each(vectors: np.ndarray) -> list[torch.Tensor]:
    return list(torch.from_numpy(vectors).unsqueeze(1))


@pytest.mark.parametrize("d", [1, 3, 64])
def test_gaussians_that_share_their_axes_have_a_closed_form(d):
    generator = np.random.default_rng(d)
    axes = torch.linalg.qr(torch.from_numpy(generator.standard_normal((d, d)))).Q
    s1, s2 = (torch.from_numpy(generator.uniform(0.1, 3, d)) for _ in range(2))
    m1, m2 = (torch.from_numpy(generator.standard_normal(d)) for _ in range(2))
    wanted = (m1 - m2).square().sum() + (s1 - s2).square().sum()
    got = frechet_distance(*(of_gaussian(m, axes * s.square() @ axes.mT) for m, s in ((m1, s1), (m2, s2))))
    assert got == pytest.approx(wanted.item(), rel=1e-9)


def test_two_dimensions_have_a_closed_form():
    """tr((S1 S2)^½) of 2 x 2 matrices is sqrt(tr(S1 S2) + 2 sqrt(det(S1 S2)))."""
    generator = np.random.default_rng(0)
    for _ in range(20):
        S1, S2 = (random_covariance(2, generator) for _ in range(2))
        root_trace = ((S1 @ S2).trace() + 2 * (S1.det() * S2.det()).sqrt()).sqrt()
        wanted = S1.trace() + S2.trace() - 2 * root_trace + 1
        got = frechet_distance(of_gaussian(torch.zeros(2).double(), S1), of_gaussian(torch.tensor([1.0, 0]).double(), S2))
        assert got == pytest.approx(wanted.item(), abs=1e-9)


@pytest.mark.parametrize("d", [4, 64])
def test_is_that_of_torchmetrics(d):
    generator = np.random.default_rng(d)
    x, y = (torch.from_numpy(generator.standard_normal((300, d)) * scale + scale) for scale in (1.0, 1.4))
    theirs = _compute_fid(x.mean(0), x.mT.cov(), y.mean(0), y.mT.cov())
    assert frechet_distance(x, y) == pytest.approx(theirs.item(), rel=1e-6)


def test_merged_moments_are_those_of_the_whole_in_any_order():
    vectors = torch.randn(1000, 8, dtype=torch.float64) + 100
    whole = moments(vectors)
    for sizes in ([1000], [1, 999], [500, 500], [7, 600, 393], [1] * 1000):
        parts = [moments(part) for part in vectors.split(sizes)]
        for order in (parts, parts[::-1]):
            merged = merge(order)
            assert merged.number == 1000
            torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-14, atol=0)
            torch.testing.assert_close(merged.scatter, whole.scatter, rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("number", [2, 10, 63, 64, 65, 500])
def test_identical_sets_are_at_no_distance(number):
    x = 10 * torch.randn(number, 64)
    assert frechet_distance(x, x.flip(0)) < 1e-6
    assert frechet_distance(x, x + 1) == pytest.approx(64, rel=1e-5)


def test_fewer_vectors_than_dimensions_are_the_same_by_vectors_and_by_covariances():
    x, y = torch.randn(20, 50).double(), 2 * torch.randn(30, 50).double()
    assert frechet_distance(x, y) == pytest.approx(frechet_distance(moments(x), moments(y)), rel=1e-8)


def test_a_constant_dimension_is_no_trouble():
    x, y = torch.randn(200, 8), torch.randn(200, 8)
    x[:, 3] = y[:, 3] = 5.0
    others = [i for i in range(8) if i != 3]
    assert frechet_distance(x, y) == pytest.approx(frechet_distance(x[:, others], y[:, others]), abs=1e-9)


def test_many_dimensions_and_few_vectors_are_quick():
    x, y = torch.randn(500, 2048), torch.randn(500, 2048)
    start = time.process_time()
    frechet_distance(x, y)
    assert time.process_time() - start < 2


def test_refuses_what_has_no_covariance():
    with pytest.raises(ValueError, match="1 vectors; a covariance needs two"):
        frechet_distance(torch.randn(1, 4), torch.randn(9, 4))
    with pytest.raises(ValueError, match="not finite"):
        frechet_distance(torch.full((5, 4), float("nan")), torch.randn(9, 4))
    with pytest.raises(ValueError, match="4 dimensions and the reference 5"):
        frechet_distance(torch.randn(9, 4), torch.randn(9, 5))


@pytest.mark.parametrize("distance", [0.0, 2.0])
def test_infinity_has_little_bias_and_its_interval_holds_the_truth(distance):
    """30 repeats of a small case; evaluation/calibration.py has the full one."""
    d, n, estimates = 16, 200, []
    for repeat in range(30):
        generator = np.random.default_rng(repeat)
        x, y = generator.standard_normal((2, n, d))
        x[:, 0] += distance**0.5
        estimates.append(frechet_infinity(one_window_each(x), one_window_each(y), seed=repeat).estimate)
    values = np.array([estimate.value for estimate in estimates])
    half_widths = np.array([(estimate.high - estimate.low) / 2 for estimate in estimates])
    plain = frechet_distance(torch.from_numpy(x), torch.from_numpy(y))
    assert abs(values.mean() - distance) < 0.15 * plain
    assert np.mean([estimate.low <= distance <= estimate.high for estimate in estimates]) >= 0.9
    assert half_widths.mean() < 2.5 * 1.96 * values.std(ddof=1)  # 2 in the full one; 30 repeats know the deviation to 13 %


def test_infinity_reads_a_line_and_says_how_well_it_fits():
    generator = np.random.default_rng(0)
    x, y = (one_window_each(generator.standard_normal((600, 20))) for _ in range(2))
    found = frechet_infinity(x, y)
    assert found.r_squared > 0.98 and found.sizes[0] == 600 and found.sizes == sorted(found.sizes, reverse=True)
    assert found.distances[0] == pytest.approx(frechet_distance(torch.cat(x), torch.cat(y)))
    assert frechet_infinity(x, y) == found and frechet_infinity(x, y, seed=1) != found


def test_infinity_of_a_few_uneven_clips():
    generator = np.random.default_rng(0)
    sets = [
        [torch.from_numpy(generator.standard_normal((n, 4))) for n in generator.integers(1, 30, number)]
        for number in (13, 40)
    ]
    found = frechet_infinity(*sets)
    assert found.estimate.low < found.estimate.value < found.estimate.high


@pytest.mark.parametrize("clips, windows", [(11, 100), (39, 1)])
def test_infinity_says_why_it_cannot_be(clips, windows):
    few, enough = [torch.randn(windows, 10) for _ in range(clips)], [torch.randn(5, 10) for _ in range(50)]
    for arguments in ((few, enough), (enough, few)):
        reason = frechet_infinity(*arguments)
        assert reason.startswith("FID∞ needs at least 12 clips and 40 independent windows")
        assert f"has {clips} clips with {clips * windows} windows" in reason


def test_windows_that_are_alike_do_not_count_as_many():
    """20 clips of 30 windows that hardly differ say no more than 20 windows; a line through them would lead astray."""
    generator = np.random.default_rng(0)
    sets = [
        [torch.from_numpy(generator.standard_normal(10) + 0.3 * generator.standard_normal((30, 10))) for _ in range(20)]
        for _ in range(2)
    ]
    reason = frechet_infinity(*sets)
    assert isinstance(reason, str) and re.search(
        r"600 windows, of which those of a clip are so alike that .* as 2\d\.", reason
    )


def test_infinity_of_windows_that_are_somewhat_alike():
    """Half of the variance is the clip's: with enough clips the interval still holds the truth, 0."""
    held = 0
    for repeat in range(10):
        generator = np.random.default_rng(repeat)
        sets = [
            [
                torch.from_numpy(generator.standard_normal(8) + generator.standard_normal((10, 8))) / 2**0.5
                for _ in range(150)
            ]
            for _ in range(2)
        ]
        found = frechet_infinity(*sets, seed=repeat).estimate
        held += found.low <= 0 <= found.high
    assert held >= 8


def test_infinity_of_reconstructions_is_not_below_that_of_fresh_clips():
    """Pairs in the same subsets at every size: a perfect reconstruction is at 0, however few the clips."""
    generator = np.random.default_rng(0)
    real = one_window_each(generator.standard_normal((300, 8)))
    assert frechet_infinity(real, real, paired=True).estimate.value == pytest.approx(0, abs=1e-9)


def test_infinity_counts_the_windows_of_both_sets():
    generator = np.random.default_rng(0)
    made, real = (one_window_each(generator.standard_normal((number, 2))) for number in (48, 24))
    found = frechet_infinity(made, real)
    assert found.sizes[0] == pytest.approx(32)  # the harmonic mean of 48 and 24


def test_infinity_takes_no_subset_that_is_too_small_for_the_smaller_set():
    generator = np.random.default_rng(0)
    made, real = (one_window_each(generator.standard_normal((number, 6))) for number in (24, 240))
    for sets in ((made, real), (real, made)):
        assert len(frechet_infinity(*sets).sizes) == 6  # 12, 10, 8, 7, 6 and 5 blocks of 2 windows: 1.5 for each dimension


def test_the_fit_of_the_line_is_the_squared_correlation():
    generator = np.random.default_rng(0)
    made, real = (one_window_each(generator.standard_normal((100, 8))) for _ in range(2))
    found = frechet_infinity(made, real)
    correlation = np.corrcoef(1 / np.array(found.sizes), found.distances)[0, 1]
    assert found.r_squared == pytest.approx(correlation**2, abs=1e-6)
