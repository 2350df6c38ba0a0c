"""All scores of two sets: what they are for sets of one kind, of two kinds, and too small ones."""

import numpy as np
import pytest
import torch

from s4audio.metrics.comparison import _spread, compare, memorization
from s4audio.metrics.frechet import frechet_distance


def clips(number: int, seed: int, shift: float = 0.0, windows: int = 4, d: int = 6) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(windows, d, generator=generator) + shift for _ in range(number)]


def test_one_kind_is_at_its_floor():
    scores, infinity = compare(clips(40, 0), clips(60, 1))
    assert not scores["verdict"]["distinguishable"] and scores["verdict"]["p_value"] > 0.05
    low, high = scores["floor"]["fid_interval"]
    assert scores["floor"]["clips"] == scores["at_equal_n"]["clips"] == 30
    assert low < scores["at_equal_n"]["fid"] < high
    assert scores["kad_interval"][0] < 0 < scores["kad_interval"][1]
    assert scores["fid_infinity_interval"][0] < 0 < scores["fid_infinity_interval"][1]
    assert infinity is not None and infinity.estimate.value == scores["fid_infinity"]
    assert scores["fid"] == pytest.approx(frechet_distance(torch.cat(clips(40, 0)), torch.cat(clips(60, 1))))
    assert scores["fid_interval"][0] <= scores["fid"] <= scores["fid_interval"][1]


def test_two_kinds_are_told_apart():
    scores, _ = compare(clips(40, 0, shift=1.0), clips(60, 1))
    assert scores["verdict"] == {"distinguishable": True, "p_value": 0.001}
    assert scores["at_equal_n"]["fid_interval"][0] > scores["floor"]["fid_interval"][1]
    assert scores["fid_infinity"] == pytest.approx(6, abs=0.6)
    assert scores["at_equal_n"]["kad"] > scores["floor"]["kad"] + 1
    assert scores["at_equal_n"]["density"] < scores["floor"]["density"]


def test_floor_is_the_mean_score_of_independent_real_sets():
    """The floor of one reference set is, on average, what fresh sets of that size score."""
    floors = [compare(clips(20, s), clips(40, 100 + s))[0]["floor"] for s in range(8)]
    fresh = [frechet_distance(torch.cat(clips(20, 1000 + s)), torch.cat(clips(20, 2000 + s))) for s in range(100)]
    assert np.mean([floor["fid"] for floor in floors]) == pytest.approx(np.mean(fresh), rel=0.15)
    assert abs(np.mean([floor["kad"] for floor in floors])) < 0.5


def test_the_same_seed_gives_the_same_scores():
    made, real = clips(15, 0), clips(30, 1)
    assert compare(made, real, seed=3) == compare(made, real, seed=3)
    assert compare(made, real, seed=3) != compare(made, real, seed=4)


def test_few_clips_have_scores_and_reasons():
    scores, infinity = compare(clips(3, 0), clips(3, 1))
    assert infinity is None and scores["fid_infinity"] is None and "needs at least 12 clips" in scores["fid_infinity_reason"]
    assert scores["floor"] is None and "4 reference clips" in scores["floor_reason"]
    assert np.isfinite([scores["fid"], scores["kad"], *scores["fid_interval"], *scores["kad_interval"]]).all()
    assert scores["verdict"] == {"distinguishable": None, "p_value": None}  # 3 against 3 can be shuffled in 10 ways
    with pytest.raises(ValueError, match="the generated set has 2 clips; a spread and its interval need 3"):
        compare(clips(2, 0), clips(3, 1))


def test_more_dimensions_than_vectors():
    scores, _ = compare(clips(10, 0, d=300), clips(20, 1, d=300))
    assert scores["fid"] > 0 and scores["at_equal_n"]["fid"] == pytest.approx(scores["floor"]["fid"], rel=0.1)


def test_large_sets_are_thinned_for_what_costs_their_square(monkeypatch):
    monkeypatch.setattr("s4audio.metrics.comparison.MAX_KERNEL_CLIPS", 25)
    scores, _ = compare(clips(40, 0), clips(60, 1))
    assert scores["kad_clips"] == [25, 25] and scores["floor"]["kad_clips"] == 12 and scores["floor"]["clips"] == 30


def test_floor_depends_on_the_reference_alone():
    real = clips(40, 1)
    floors = [compare(clips(number, 0), real)[0]["floor"] for number in (20, 30)]
    assert floors[0] == floors[1]


def test_reconstructions_are_compared_as_pairs():
    real = clips(40, 0)
    copies, _ = compare(real, real, paired=True)
    assert copies["fid"] < 1e-9 and copies["kad"] == pytest.approx(0, abs=1e-9) and not copies["verdict"]["distinguishable"]
    assert copies["at_equal_n"]["fid"] == copies["floor"]["fid"] and copies["at_equal_n"]["kad"] == copies["floor"]["kad"]
    worse, _ = compare([clip + 0.5 for clip in real], real, paired=True)
    assert worse["verdict"]["distinguishable"] and worse["at_equal_n"]["fid"] > worse["floor"]["fid"]
    with pytest.raises(ValueError, match="there are 39 generated and 40 reference clips; pairs need as many"):
        compare(real[1:], real, paired=True)


def test_copies_are_found():
    train, real = clips(30, 0), clips(30, 1)
    made = [*clips(8, 2), train[7] + 0.001, train[11].clone()]
    scores, to_train, real_to_train = memorization(made, real, train)
    first, second = scores["closest"][:2]
    assert (first["generated"], first["train"]) == (9, 11) and (second["generated"], second["train"]) == (8, 7)
    assert first["distance"] < 1e-3 and scores["share_nearer_than_95_percent_of_reference"] >= 0.2
    assert len(to_train.distance) == 10 and len(real_to_train.distance) == 30


@pytest.mark.parametrize("number, windows", [(30, (4, 4)), (200, (4, 4)), (100, (1, 10)), (100, (10, 1))])
def test_chance_makes_five_percent_look_like_copies(number, windows):
    """Also where clips are of other lengths."""
    shares = []
    for repeat in range(10):
        made, real = clips(number, 3 + repeat, windows=windows[0]), clips(number, 100 + repeat, windows=windows[1])
        shares.append(memorization(made, real, clips(30, 0))[0]["share_nearer_than_95_percent_of_reference"])
    assert np.mean(shares) == pytest.approx(0.05, abs=0.02)


def test_too_few_windows_say_nothing_about_copies():
    scores, _, _ = memorization(clips(3, 0), clips(3, 1), clips(3, 2))
    assert scores["share_nearer_than_95_percent_of_reference"] is None and len(scores["closest"]) == 3


def test_the_interval_of_a_distance_does_not_reach_below_none():
    real = clips(4, 0)
    scores, _ = compare([clip + 0.01 * torch.randn(4, 6) for clip in real], real)
    assert 0 == scores["fid_interval"][0] < scores["fid"] < scores["fid_interval"][1]


def test_the_range_of_draws_holds_95_percent_of_them():
    assert _spread("fid", range(41)) == {"fid": 20, "fid_interval": [1, 39]}


def test_a_share_of_copies_is_counted_against_the_distance_of_one_reference_window_in_twenty():
    real, train = clips(19, 0, windows=1), clips(30, 1)
    assert memorization(real, real, train)[0]["share_nearer_than_95_percent_of_reference"] == 0  # none is nearer than itself
    assert memorization(real, real[1:], train)[0]["share_nearer_than_95_percent_of_reference"] is None


def test_copies_score_what_the_floor_does_and_leave_nothing_to_spread():
    real = clips(40, 0)
    copies, _ = compare(real, real, paired=True)
    assert copies["at_equal_n"] == copies["floor"] and copies["fid_interval"] == pytest.approx([0, 0], abs=1e-6)


def test_neighbours_are_looked_for_among_so_many_windows_at_most(monkeypatch):
    monkeypatch.setattr("s4audio.metrics.comparison.MAX_MANIFOLD_WINDOWS", 40)
    scores, _ = compare(clips(40, 0), clips(60, 1))
    assert scores["at_equal_n"]["manifold_clips"] == scores["floor"]["manifold_clips"] == 10
