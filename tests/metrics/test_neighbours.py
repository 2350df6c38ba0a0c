"""Neighbour scores against loops and against cases whose answer is known."""

import pytest
import torch

from s4audio.metrics.neighbours import manifold, nearest


def one_window_each(vectors):
    return list(vectors.unsqueeze(1))


def test_is_the_definition():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(30, 3, generator=generator), torch.randn(40, 3, generator=generator) + 0.5
    found = manifold(one_window_each(x), one_window_each(y), num_neighbours=3)
    radius_y = torch.cdist(y, y).sort().values[:, 3]
    radius_x = torch.cdist(x, x).sort().values[:, 3]
    distance = torch.cdist(x, y)
    assert found.precision == pytest.approx((distance <= radius_y).any(1).float().mean().item())
    assert found.recall == pytest.approx((distance.mT <= radius_x).any(1).float().mean().item())
    assert found.density == pytest.approx((distance <= radius_y).sum().item() / 3 / 30)
    assert found.coverage == pytest.approx((distance <= radius_y).any(0).float().mean().item())


def test_one_kind_is_close_and_another_is_far():
    same = manifold(one_window_each(torch.randn(500, 4)), one_window_each(torch.randn(500, 4)))
    assert same.density == pytest.approx(1, abs=0.1) and same.coverage > 0.9 and same.precision > 0.85
    far = manifold(one_window_each(torch.randn(500, 4) + 20), one_window_each(torch.randn(500, 4)))
    assert far == (0, 0, 0, 0)
    collapsed = manifold(one_window_each(0.01 * torch.randn(500, 4)), one_window_each(torch.randn(500, 4)))
    assert collapsed.precision == 1 and collapsed.recall < 0.05 and collapsed.coverage < 0.2


def test_windows_of_the_same_clip_are_no_neighbours():
    """Each clip is a tight cluster of windows: balls that reach only to the clip's own windows would hold nothing."""
    centres = torch.randn(200, 4)
    x, y = ([c + 0.001 * torch.randn(10, 4) for c in half] for half in centres.split(100))
    found = manifold(x, y)
    assert found.coverage > 0.3
    with pytest.raises(ValueError, match="there are 3 windows beside those of a clip"):
        manifold([torch.randn(3, 2), torch.randn(3, 2)], [torch.randn(9, 2), torch.randn(9, 2)])


def test_nearest_clip():
    others = [torch.randn(n, 6) for n in (3, 5, 1, 8)]
    clips = [others[3][[2, 7]] + 0.01, others[0] + 0.01, torch.randn(4, 6)]
    found = nearest(clips, others)
    assert found.clip[:2].tolist() == [3, 0] and found.distance[:2].max() < 0.05
    wanted = [torch.cdist(clips[2], other).amin(1).mean() for other in others]
    assert found.distance[2] == pytest.approx(min(wanted).item(), rel=1e-5)


def test_the_windows_beside_the_longest_clip_must_be_enough():
    uneven, enough = [torch.randn(6, 2), torch.randn(3, 2)], [torch.randn(9, 2), torch.randn(9, 2)]
    for sets in ((uneven, enough), (enough, uneven)):
        with pytest.raises(ValueError, match="there are 3 windows beside those of a clip; 5 neighbours"):
            manifold(*sets)
