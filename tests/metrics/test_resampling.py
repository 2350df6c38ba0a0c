"""The jackknife against a statistic whose deviation is known, and the draws."""

import numpy as np
import pytest
import torch

from s4audio.metrics.resampling import clip_of_window, count_windows, effective_windows, jackknife, shuffled


def test_jackknife_of_a_mean_is_its_standard_error():
    values = np.random.default_rng(0).standard_normal(50)
    found = jackknife(values.mean(), ((values.sum() - values) / 49).tolist())
    assert found.high - found.value == pytest.approx(1.959964 * values.std(ddof=1) / 50**0.5, rel=1e-9)
    assert found.value - found.low == pytest.approx(found.high - found.value)


def test_jackknife_of_two_sets_adds_their_variances():
    one, two = jackknife(0.0, [1.0, -1.0]), jackknife(0.0, [1.0, -1.0], [1.0, -1.0])
    assert two.high == pytest.approx(2**0.5 * one.high)


def test_shuffles_depend_on_seed_and_stream_alone():
    numbers = list(range(100))
    assert shuffled(numbers, 1, 2) == shuffled(numbers, 1, 2) != shuffled(numbers, 1, 3)
    assert sorted(shuffled(numbers, 5)) == numbers


def test_windows_know_their_clip():
    clips = [torch.zeros(n, 2) for n in (2, 1, 3)]
    assert clip_of_window(clips).tolist() == [0, 0, 1, 2, 2, 2] and count_windows(clips) == 6


@pytest.mark.parametrize("share", [0.0, 0.3, 0.8])
def test_effective_windows_are_those_that_give_the_mean_its_variance(share):
    """`share` of the variance is the clip's."""
    numbers, variances, generator = [], [], np.random.default_rng(0)
    for _ in range(200):
        clips = [
            torch.from_numpy(
                share**0.5 * generator.standard_normal(4) + (1 - share) ** 0.5 * generator.standard_normal((n, 4))
            )
            for n in generator.integers(5, 12, 30)
        ]
        numbers.append(effective_windows(clips))
        variances.append(torch.cat(clips).mean(0).square().mean().item())
    assert np.mean(numbers) == pytest.approx(1 / np.mean(variances), rel=0.15)


def test_effective_windows_of_one_a_clip_and_of_all_the_same():
    assert effective_windows([torch.randn(1, 3) for _ in range(7)]) == 7
    assert effective_windows([torch.ones(5, 3)] * 4) == pytest.approx(4)


def test_a_long_clip_of_one_sound_counts_by_its_share_of_the_mean():
    clips = [torch.randn(1, 3).expand(windows, 3) for windows in (1, 1, 1, 9)]
    assert effective_windows(clips) == pytest.approx(12**2 / (1 + 1 + 1 + 9**2))


def test_effective_windows_of_uneven_clips_are_their_definition():
    generator = np.random.default_rng(0)
    clips = [generator.standard_normal() + generator.standard_normal((windows, 1)) for windows in (1, 2, 9, 30)]
    whole, lengths = np.concatenate(clips), np.array([1, 2, 9, 30])
    within = sum(((clip - clip.mean()) ** 2).sum() for clip in clips) / (42 - 4)
    between = sum(len(clip) * (clip.mean() - whole.mean()) ** 2 for clip in clips) / (4 - 1)
    typical = (42 - (lengths**2).sum() / 42) / (4 - 1)
    alike = (between - within) / (between + (typical - 1) * within)
    wanted = 42 / (1 + ((lengths**2).sum() / 42 - 1) * alike)
    assert 0 < alike < 1 and effective_windows([torch.from_numpy(clip) for clip in clips]) == pytest.approx(wanted)
