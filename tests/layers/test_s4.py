"""S4D and S4: parameters and what they mean."""

import copy

import pytest
import torch

from s4audio import ssm
from s4audio.layers import S4, S4D, frozen
from s4audio.ssm import chunk


@pytest.mark.parametrize("layer", [S4D, S4])
def test_output_is_the_ssm_kernel_plus_the_skip(layer):
    module = layer(3, 8).double()
    u = torch.randn(2, 3, 40, dtype=torch.float64)
    K = ssm.kernel(module.system(), 40)
    expected = sum(K[:, lag, None] * torch.nn.functional.pad(u, (lag, 0))[..., :40] for lag in range(40))
    torch.testing.assert_close(module(u), expected + module.D[:, None] * u, rtol=0, atol=1e-12)


@pytest.mark.parametrize("layer", [S4D, S4])
def test_bidirectional_is_one_direction_plus_the_reversed_other(layer):
    both = layer(3, 8, bidirectional=True).double()
    ahead, back = layer(3, 8).double(), layer(3, 8).double()
    for single, C in zip((ahead, back), both.C.chunk(2), strict=True):
        single.load_state_dict({**both.state_dict(), "C": C, "D": torch.zeros(3, dtype=torch.float64)})
    u = torch.randn(2, 3, 100, dtype=torch.float64)
    expected = ahead(u) + back(u.flip(-1)).flip(-1) + both.D[:, None] * u
    torch.testing.assert_close(both(u), expected, rtol=0, atol=1e-12)
    with ssm.backend("reference"):
        torch.testing.assert_close(both(u), expected, rtol=0, atol=1e-10)
        kernels = ssm.kernel(both.system(), 20)
    torch.testing.assert_close(
        kernels, torch.cat([ssm.kernel(one.system(), 20) for one in (ahead, back)]), rtol=0, atol=1e-10
    )


def test_step_sizes_start_between_their_bounds():
    dt = S4D(1000, 2, dt_min=0.01, dt_max=0.02).log_dt.exp()
    assert 0.01 <= dt.min() < 0.0101 and 0.0198 < dt.max() <= 0.02


def test_poles_stay_in_the_left_half_plane_whatever_the_parameters():
    layer = S4D(2, 4)
    with torch.no_grad():
        layer.log_A_real.normal_(std=5)
    assert (layer.A().real < 0).all()


@pytest.mark.parametrize("layer", [S4D, S4])
def test_rate_halves_the_time_constants_of_a_kernel_at_half_the_rate(layer):
    module = layer(2, 8, dt_min=1e-3, dt_max=1e-3).double()
    fine = ssm.kernel(module.system(rate=0.5), 400)[:, ::2]
    coarse = ssm.kernel(module.system(), 200)
    assert ((2 * fine - coarse).abs().max() / coarse.abs().max()) < 0.1  # dt is small against every mode


@pytest.mark.parametrize("layer", [S4D, S4])
def test_every_parameter_learns_and_survives_a_deepcopy(layer):
    module = layer(2, 8)
    module(torch.randn(2, 2, 90)).square().mean().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name
    u = torch.randn(1, 2, 30)
    assert torch.equal(copy.deepcopy(module)(u), module(u))


@torch.no_grad()
def test_autocast_keeps_the_state_space_in_float32():
    layer = S4D(4, 16)
    u = torch.randn(1, 4, 500)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(u), layer(u.float()))
        low = layer(u.bfloat16())
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), layer(u), rtol=0, atol=0.02 * float(layer(u).abs().max()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"d_model": 0}, "d_model is 0"),
        ({"d_model": 2, "d_state": 7}, "d_state is 7"),
        ({"d_model": 2, "init": "nothing"}, "init is 'nothing'"),
        ({"d_model": 2, "discretization": "euler"}, "discretization is 'euler'"),
        ({"d_model": 2, "dt_min": 0.2}, "dt_min is 0.2"),
        ({"d_model": 2, "alpha": 0.3}, "alpha is 0.3"),
        ({"d_model": 2, "gap": 0.5}, "only 'async'"),
    ],
)
def test_wrong_arguments_are_refused_with_the_value(arguments, message):
    with pytest.raises(ValueError, match=message):
        S4D(**arguments)


def test_s4_wants_a_low_rank_term():
    with pytest.raises(ValueError, match=r"'lin', which has no low-rank term.*use S4D"):
        S4(2, 8, init="lin")


@pytest.mark.parametrize("bidirectional, channels", [(False, 4), (False, 16), (True, 4), (True, 16)])
def test_another_number_of_channels_is_refused(bidirectional, channels):
    with pytest.raises(ValueError, match=rf"u has shape \(2, {channels}, 50\); wanted \(batch, 8, length\)"):
        S4D(8, 8, bidirectional=bidirectional)(torch.randn(2, channels, 50))


@pytest.mark.parametrize("layer", [S4D, S4])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_frozen_model_is_the_same_and_makes_its_operators_once(layer, bidirectional, monkeypatch):
    torch.manual_seed(0)
    model = torch.nn.Sequential(layer(3, 8, bidirectional=bidirectional).double())
    u = torch.randn(2, 3, 500, dtype=torch.float64)
    made = []
    for name in ("diagonal_operators", "dense_operators"):
        original = getattr(chunk, name)
        monkeypatch.setattr(chunk, name, lambda *given, original=original: made.append(1) or original(*given))
    with torch.no_grad():
        wanted, shorter = model(u), model(u[..., :70])
        made.clear()
        with frozen(model):
            for _ in range(3):
                assert torch.equal(model(u), wanted) and torch.equal(model(u[..., :70]), shorter)
        assert len(made) == len({chunk.chunk_length(500), chunk.chunk_length(70)})
        model[0].C.mul_(2)
        assert not torch.allclose(model(u), wanted)


def test_layers_are_not_left_frozen_where_freezing_one_fails(monkeypatch):
    model = torch.nn.Sequential(S4D(2, 4), S4D(2, 4))

    def fails() -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(model[1], "freeze", fails)
    with pytest.raises(torch.OutOfMemoryError), frozen(model):
        pass
    model(torch.randn(1, 2, 9)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("layer", [S4D, S4])
@pytest.mark.parametrize(("discretization", "option"), [("generalized_bilinear", "alpha"), ("async", "gap")])
def test_alpha_and_gap_reach_the_system(layer, discretization, option):
    one, other = (layer(2, 4, init="legs", discretization=discretization, **{option: value}) for value in (0.5, 0.9))
    other.load_state_dict(one.state_dict())
    assert not torch.allclose(ssm.kernel(one.system(), 20), ssm.kernel(other.system(), 20))


def test_a_frozen_layer_that_is_converted_is_frozen_no_more():
    layer, u = S4D(2, 4), torch.randn(1, 2, 20, dtype=torch.float64)
    layer.freeze()
    with torch.no_grad():
        layer.C.mul_(2)
    fresh = S4D(2, 4).double()
    fresh.load_state_dict(layer.double().state_dict())
    torch.testing.assert_close(layer(u), fresh(u))
