"""WaveNet: what a sample hears, and a likelihood that is one."""

from itertools import product

import pytest
import torch
from torch.nn import functional as F

from s4audio.audio import dequantize
from s4audio.models import WaveNet
from s4audio.models.sashimi import to_codes


def model(**arguments) -> WaveNet:
    torch.manual_seed(0)
    small = {"d_model": 6, "d_skip": 5, "num_stacks": 2, "num_layers": 3, "num_levels": 16}
    return WaveNet(8000, **{**small, **arguments}).double().eval()


@torch.no_grad()
def test_a_sample_hears_so_far_back_and_no_further_and_nothing_ahead():
    built, audio = model(), 0.4 * torch.randn(1, 1, 60)
    changed = audio.clone()
    changed[..., 20] = -1.0
    difference = (built(changed) - built(audio)).abs().amax((0, 1))
    reach = 2 * (2**3 - 1) + 1
    assert (difference[:21] == 0).all() and (difference[21 : 21 + reach] > 0).all() and (difference[21 + reach :] == 0).all()


def test_the_probabilities_of_all_recordings_add_up_to_one():
    codes = torch.tensor(list(product(range(4), repeat=5)))
    built, audio = model(num_levels=4), dequantize(codes, 4).unsqueeze(1)
    found = built.log_likelihood(audio)
    assert found.exp2().sum().item() == pytest.approx(1, abs=1e-9)
    torch.testing.assert_close(built.training_losses(audio)["nll"].detach(), -found.mean() / 5)


def test_the_loss_reaches_every_parameter():
    built = model()
    built.training_losses(0.4 * torch.randn(2, 1, 50))["nll"].backward()
    for name, parameter in built.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("arguments", [{"num_layers": 0}, {"num_layers": 21}, {"d_skip": 0}])
def test_sizes_outside_their_range_are_refused(arguments):
    with pytest.raises(ValueError, match="must be at least 1, num_layers at most 20"):
        model(**arguments)


def test_it_is_the_network_of_the_paper():
    built, audio = model(), 0.4 * torch.randn(1, 1, 30, dtype=torch.float64)
    u = built.embedding(F.pad(to_codes(audio, 16, "mu_law"), (1, 0), value=8)[:, :-1]).mT  # the first follows on silence
    skips = torch.zeros(())
    for index, (gate, out) in enumerate(zip(built.gates, built.outs, strict=True)):
        before = F.pad(u, (2 ** (index % 3), 0))[..., :30]
        made = sum(torch.einsum("oi,bit->bot", gate.weight[..., tap], v) for tap, v in enumerate((before, u)))
        value, opening = (made + gate.bias[:, None]).chunk(2, 1)
        both = out(value.tanh() * opening.sigmoid())
        skips = skips + both[:, :5]
        u = u + both[:, 5:] if index < 5 else u
    torch.testing.assert_close(built(audio), built.head(skips / 6**0.5))
