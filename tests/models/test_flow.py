"""Flow matching: what can be said exactly, with the velocity of a Gaussian in the network's place; and that it learns."""

import math
import os
import time
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch

from s4audio import S4DVAE, CausalAutoencoder, ConvVAE, Flow, S4Model, load
from s4audio.models import euler
from s4audio.models import flow as flow_module
from s4audio.models.flow import HELD_OUT_TIMES, KNOWN_GUIDANCE, KNOWN_SHARE, LET_GO, WINDOWS
from s4audio.models.samplers import flow_times, multistep
from s4audio.tasks.optim import parameter_groups
from tests.models.test_samplers import gaussian_velocity

RATE, HERTZ = 1000, 62.5  # of the sine that the small flow learns


def flow(**arguments) -> Flow:
    defaults = {"strides": (2, 3), "widths": (4, 6, 8), "num_blocks": 1, "d_state": 4}
    return Flow(8000, **{**defaults, **arguments})


def latent_flow(**arguments) -> Flow:
    autoencoder = CausalAutoencoder(8000, strides=(2, 4), widths=(4, 4, 6), latent_channels=3, d_state=4)
    return flow(autoencoder=autoencoder, **arguments)


MODELS = {"raw": flow, "latent": latent_flow, "labelled": lambda: flow(classes=("yes", "no"))}


@pytest.fixture(params=MODELS)
def model(request) -> Flow:
    return MODELS[request.param]().eval()


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def hears_what_it_is_told(model: Flow) -> Flow:
    """As after a training: of the time, the label, and what is known, whose weights begin with zeros."""
    torch.nn.init.normal_(model.enter_known.weight, std=0.3)
    for block in (module for module in model.modules() if hasattr(module, "modulation")):
        torch.nn.init.normal_(block.modulation.weight, std=0.1)
    return model


def gaussian(monkeypatch, model: Flow, mean: float = 1.5, deviation: float = 0.4) -> None:
    """Gives the model the velocity of normal data, in its own normalization."""
    exact = gaussian_velocity(mean, deviation)
    monkeypatch.setattr(model, "forward", lambda x, time, label=None, known=None: exact(x, time.view(-1, 1, 1)))


@pytest.mark.parametrize("length", [1, 2, 5, 6, 7, 97])
def test_any_length_goes(model, length):
    x = torch.randn(2, len(model.data_mean), length)
    assert model(x, torch.rand(2)).shape == x.shape
    assert model.sample(2, length, num_steps=1).shape == (2, 1, length)
    assert model.vary(torch.randn(2, 1, length), 0.5, num_steps=1).shape == (2, 1, length)
    assert model.continue_(torch.randn(2, 1, length), 5, num_steps=1).shape == (2, 1, 5)


def test_losses_reach_every_parameter_but_the_autoencoders(model, monkeypatch):
    monkeypatch.setattr(flow_module, "_spans", lambda data: (torch.arange(data.shape[-1]) < 5).to(data).expand(3, 1, -1))
    for block in (module for module in model.modules() if hasattr(module, "modulation")):
        torch.nn.init.normal_(block.modulation.weight)  # zero at first, where it stops the gradient of the embedding
    label = torch.tensor([0, 1, 1]) if model.classes else None
    model.train().training_losses(torch.randn(3, 1, 96), label)["flow"].backward()
    for name, parameter in model.named_parameters():
        if name.startswith("autoencoder"):
            assert parameter.grad is None and not parameter.requires_grad, name
        else:
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all() and parameter.grad.any(), name


def test_the_loss_is_the_mean_squared_error_of_the_velocity(monkeypatch):
    """With the exact velocity of normal data the loss is the variance of data - noise given x_t, averaged over t."""
    model = flow().eval()
    gaussian(monkeypatch, model, 0.0, 0.5)
    audio = 0.5 * torch.randn(64, 1, 20_000)
    t = (torch.arange(HELD_OUT_TIMES) + 0.5) / HELD_OUT_TIMES
    wanted = (0.25 / ((1 - t) ** 2 + (0.5 * t) ** 2)).mean()
    assert model.training_losses(audio)["flow"] == pytest.approx(float(wanted), rel=0.02)
    t = torch.linspace(0, 1, 10_001)  # of a training, on the average, where 23 of 54 lie in a span, if there is one
    wanted = (0.25 / ((1 - t) ** 2 + (0.5 * t) ** 2)).mean() * (1 - KNOWN_SHARE * 31 / 54)
    monkeypatch.setattr(model, "_normalized", lambda data: data)
    assert model.train().training_losses(0.5 * torch.randn(5000, 1, 50))["flow"] == pytest.approx(float(wanted), rel=0.02)


def test_validation_does_not_depend_on_a_draw(model):
    audio = torch.randn(4, 1, 60)
    assert model.training_losses(audio)["flow"] == model.training_losses(audio)["flow"]
    model.train()
    assert model.training_losses(audio)["flow"] != model.training_losses(audio)["flow"]


def test_validation_does_not_depend_on_the_batch(model):
    audio = torch.randn(4, 1, 60) * torch.tensor([0.1, 0.5, 1.0, 2.0]).view(-1, 1, 1)
    label = torch.tensor([0, 0, 1, 1]) if model.classes else None
    hears_what_it_is_told(model)
    alone = [model.training_losses(audio[k : k + 1], None if label is None else label[k : k + 1])["flow"] for k in range(4)]
    torch.testing.assert_close(model.training_losses(audio, label)["flow"], torch.stack(alone).mean())


@pytest.mark.parametrize("name", ["raw", "latent"])
def test_data_are_normalized_by_all_that_was_seen(name):
    model = MODELS[name]().train()
    batches = [0.3 * scale * torch.randn(4, 1, 400) + 0.1 for scale in (0.2, 1.0, 3.0)]
    for batch in batches:
        model.training_losses(batch)
    data = torch.cat([model._data(batch) for batch in batches])
    torch.testing.assert_close(model.data_mean[:, 0], data.mean((0, 2)), rtol=1e-4, atol=1e-5)
    normalized = model._normalized(data)
    torch.testing.assert_close(normalized.std((0, 2), correction=0), torch.ones(data.shape[1]), rtol=1e-3, atol=0)
    before = model.data_square.clone()
    model.eval().training_losses(batches[0])
    assert torch.equal(model.data_square, before)


def test_the_autoencoder_is_kept_as_it_is():
    """Also its norm over batches, which in training would count them; and what it says of a clip is of that clip alone."""
    autoencoder = S4DVAE(8000, strides=(2, 4), widths=(4, 4, 6), latent_channels=3, num_blocks=1, d_state=4)
    model = flow(autoencoder=autoencoder).train()
    before = {name: value.clone() for name, value in autoencoder.state_dict().items()}
    audio = torch.randn(3, 1, 400)
    model.training_losses(audio)
    assert model.training and all(torch.equal(value, before[name]) for name, value in autoencoder.state_dict().items())
    torch.testing.assert_close(model._data(audio)[:1], model._data(audio[:1]))


def test_labels_are_withheld_at_their_share(monkeypatch):
    model = flow(classes=("a", "b"), label_dropout=0.25).train()
    seen = []
    monkeypatch.setattr(model, "forward", lambda x, time, label=None, known=None: seen.append(label) or x)
    model.training_losses(torch.zeros(4000, 1, 1), torch.ones(4000, dtype=torch.int64))
    assert (seen[0] == 2).float().mean() == pytest.approx(0.25, abs=0.03) and set(seen[0].tolist()) == {1, 2}
    model.eval().training_losses(torch.zeros(40, 1, 1), torch.ones(40, dtype=torch.int64))
    assert (seen[1] == 1).all()


def test_guidance_goes_from_no_label_through_the_label_and_beyond(monkeypatch):
    model = flow(classes=("a", "b")).eval()
    monkeypatch.setattr(model, "forward", lambda x, time, label=None, known=None: label.view(-1, 1, 1).float() ** 2 + 0 * x)
    x = torch.randn(3, 1, 4)
    label = torch.tensor([0, 1, 1])
    for guidance in (0.0, 1.0, 2.5):
        wanted = (4 + guidance * (label.float() ** 2 - 4)).view(-1, 1, 1).expand_as(x)  # 2 is no label
        torch.testing.assert_close(model._velocity(model.forward, label, guidance)(x, 0.3), wanted)


def test_a_longer_clip_is_varied_through_windows_of_the_training(monkeypatch):
    """They are as long as its longest clip, cover everything, overlap by half or more, and agree on a smooth mean."""
    model = flow(classes=("a", "b"))
    for length in (32, 40, 16):
        model.training_losses(torch.randn(2, 1, length), torch.tensor([0, 1]))
    assert model.trained_length == 40
    model.eval()
    places, seen = torch.arange(243.0).expand(3, 1, -1), []

    def forward(x, time, label=None, known=None):
        assert time.shape == label.shape == x.shape[:1] and len(x) <= WINDOWS
        seen.extend(zip(x[:, 0, 0].tolist(), x[:, 0, -1].tolist(), label.tolist(), strict=True))
        return torch.full_like(x, 1.0) * x[..., :1] + label.view(-1, 1, 1)

    monkeypatch.setattr(model, "forward", forward)
    time = torch.full((3,), 0.5)
    found = model._through_windows(places, time, torch.tensor([0, 1, 0]))
    starts = sorted({start for start, *_ in seen})
    assert starts[0] == 0 and starts[-1] == 243 - 40 and max(b - a for a, b in pairwise(starts)) <= 20
    assert all(last - first == 39 for first, last, _ in seen) and len(seen) == 3 * len(starts) > WINDOWS
    torch.testing.assert_close(found[1], found[0] + 1)  # every clip by its own label
    torch.testing.assert_close(found[2], found[0])
    assert found[0, 0, 0] == 0 and found[0, 0, -1] == 243 - 40 and (found.diff() > -1e-4).all() and found.diff().max() < 3
    short = places[..., :40]
    assert torch.equal(model._through_windows(short, time, torch.tensor([0, 0, 0])), torch.zeros_like(short))


def makes_threes(monkeypatch, model: Flow) -> list[torch.Tensor]:
    """The velocity that ends at 3, whatever it is told; that, (2, L), is put down."""
    seen: list[torch.Tensor] = []

    def forward(x, time, label=None, known=None):
        seen.append(known[0])
        return (3 - x) / (1 - time).view(-1, 1, 1)

    monkeypatch.setattr(model, "forward", forward)
    return seen


def test_a_longer_clip_is_made_window_after_window(monkeypatch):
    """All of the first, then parts of equal length, each told of what the windows before it made."""
    monkeypatch.setattr(flow_module, "KNOWN_GUIDANCE", 1.0)  # one call for each
    model = flow().eval()
    model.trained_length.fill_(40)
    seen = makes_threes(monkeypatch, model)
    torch.testing.assert_close(model._made(torch.zeros(1, 1, 90), 0, 90, None, None, 1, 1.0), torch.full((1, 1, 90), 3.0))
    assert [int(known[1].sum()) for known in seen] == [0, 23, 23, 24] and {known.shape[-1] for known in seen} == {40}
    for known in seen:
        assert (known[1].diff() <= 0).all()
        torch.testing.assert_close(known[0], 3 * known[1])


@pytest.mark.parametrize(
    ("span", "known"),
    [
        ((30, 70), [(20, 0), (10, 10)]),  # half of it at the end of a window, and the rest in the middle of one
        ((30, 51), [(29, 0), (15, 15)]),  # 11 and 10
        ((30, 46), [(12, 12)]),
        ((2, 12), [(2, 28)]),  # from the clip's start
        ((0, 50), [(0, 0), (15, 15)]),
        ((60, 100), [(20, 0), (20, 0)]),
        ((95, 100), [(35, 0)]),
    ],
)
def test_the_windows_of_a_span_know_what_is_before_and_behind_it(span, known, monkeypatch):
    monkeypatch.setattr(flow_module, "KNOWN_GUIDANCE", 1.0)
    model = flow().eval()
    model.trained_length.fill_(40)
    seen = makes_threes(monkeypatch, model)
    data = torch.rand(1, 1, 100)
    made = model._made(data.clone(), *span, None, None, 1, 1.0)
    masks = [told[1] for told in seen]
    told = [(int(mask.cumprod(0).sum()), int(mask.flip(0).cumprod(0).sum())) for mask in masks]
    assert told == known and [int(mask.sum()) for mask in masks] == [sum(pair) for pair in known]
    torch.testing.assert_close(made[..., slice(*span)], torch.full((1, 1, span[1] - span[0]), 3.0))


def test_what_was_known_moves_less_the_farther_it_is_from_what_is_made(monkeypatch):
    """A network that would have 3 everywhere, at once: zeros rise to it before a span, and fall again behind it."""
    model = flow().eval()
    model.trained_length.fill_(40)
    makes_threes(monkeypatch, model)
    made = model._made(torch.zeros(1, 1, 100), 40, 50, seeded(1), None, 8, 1.0)[0, 0]
    assert (made[:25] == 0).all() and (made[65:] == 0).all() and (made[40:50] - 3).abs().max() < 1e-4
    torch.testing.assert_close(made[25:40], 3 * torch.arange(1, 16) / 16, rtol=0, atol=1e-4)
    torch.testing.assert_close(made[50:65], made[25:40].flip(0))


def test_windows_change_little_where_a_point_hears_only_itself(monkeypatch):
    """What is made stays but for its last move, with the next window; of the last one there is none."""
    model = flow().eval()
    gaussian(monkeypatch, model, 0.2, 0.2)
    whole = model.sample(2, 64, generator=seeded(1))
    model.trained_length.fill_(24)
    made = model.sample(2, 64, generator=seeded(1))
    torch.testing.assert_close(made, whole, rtol=0, atol=0.3)  # 0.1 is how much of x is noise when it moves; 0.16 of 128
    assert torch.equal(made[..., :10], whole[..., :10])  # no window but the first has them
    torch.testing.assert_close(made[..., 60:], whole[..., 60:])


def test_windows_of_many_points_count_at_their_ends_too(monkeypatch):
    """The weight of the first of 24,000 points is 2e-8, which float32 has, but not as 1 less a cosine."""
    model = flow().eval()
    model.trained_length.fill_(24_000)
    gaussian(monkeypatch, model)
    assert model.vary(torch.zeros(1, 1, 24_001), 0.5, seeded(0), num_steps=2).isfinite().all()


@pytest.mark.parametrize("name", ["raw", "latent"])
def test_sampling_and_variation_follow_the_velocity(name, monkeypatch):
    """Of normal data: noise z becomes mean + deviation z, and a point on the way likewise."""
    model = MODELS[name]().eval()
    gaussian(monkeypatch, model)
    model.data_mean.fill_(-0.5)
    model.data_square.fill_(0.5**2 + 0.5**2)
    made = model.sample(2, 32, generator=seeded(1), num_steps=100)
    z = torch.randn(2, len(model.data_mean), 32 // model.frame, generator=seeded(1))
    torch.testing.assert_close(made, model._audio(1.5 + 0.4 * z, 32), rtol=0, atol=1e-3)
    slow = model.sample(2, 32, generator=seeded(1), num_steps=400, solver=euler)
    torch.testing.assert_close(slow, made, rtol=0, atol=0.01)
    coarse = [model.sample(2, 32, generator=seeded(1), num_steps=8, solver=solver) for solver in (euler, multistep)]
    assert not torch.allclose(*coarse, rtol=0, atol=0.01)
    audio = torch.randn(2, 1, 32)
    for strength in (0.3, 1.0):
        t = 1 - strength
        x = t * model._normalized(model._data(audio)) + (1 - t) * z
        x = 1.5 + 0.4 * (x - 1.5 * t) / ((1 - t) ** 2 + (0.4 * t) ** 2) ** 0.5
        varied = model.vary(audio, strength, seeded(1), num_steps=100)
        torch.testing.assert_close(varied, model._audio(x, 32), rtol=0, atol=1e-3)
    wanted = audio if name == "raw" else model.autoencoder(audio)
    assert torch.equal(model.vary(audio, 0.0), wanted)


def test_an_interpolation_ends_at_the_clips_and_keeps_the_size_of_the_noise(monkeypatch):
    model = flow().eval()
    gaussian(monkeypatch, model, 0.0, 0.4)
    first, last = 0.4 * torch.randn(2, 1, 1000)
    made = model.interpolate(first, last, 5, num_steps=100)
    assert made.shape == (5, 1, 1000)
    torch.testing.assert_close(made[0], first, rtol=0, atol=1e-3)
    torch.testing.assert_close(made[-1], last, rtol=0, atol=1e-3)
    assert made.std((1, 2)) == pytest.approx(torch.full((5,), 0.4), abs=0.02)  # a straight line would give 0.28
    torch.testing.assert_close(made[2], (first + last) / 2**0.5, rtol=0, atol=0.05)


def test_a_clip_beyond_full_scale_is_made_quieter_as_a_whole(monkeypatch):
    model = flow().eval()
    for loudest in (0.8, 3.0):
        made = torch.stack([0.1 * torch.ones(1, 50), torch.linspace(-1, loudest, 50).view(1, 50)])
        monkeypatch.setattr(model, "_audio", lambda x, num_samples, made=made: made)
        sample = model.sample(2, 50, num_steps=1)
        assert torch.equal(sample[0], made[0])
        torch.testing.assert_close(sample[1], made[1] / max(loudest, 1.0))


def test_samples_follow_the_generator_of_each_clip(model):
    together = model.sample(3, 50, generator=[seeded(seed) for seed in (1, 2, 3)], num_steps=4)
    alone = model.sample(1, 50, generator=[seeded(2)], num_steps=4)
    other = model.sample(1, 50, generator=[seeded(4)], num_steps=4)
    assert (together[1:2] - alone).abs().max() < 1 / 32768 and not torch.equal(alone, other)


def test_outside_of_the_span_the_audio_stays_bit_for_bit(model):
    audio = 0.1 * torch.randn(2, 1, 1000)
    made = model.inpaint(audio, 401, 567, seeded(1), num_steps=2)
    assert torch.equal(made[..., :401], audio[..., :401]) and torch.equal(made[..., 567:], audio[..., 567:])
    assert (made != audio)[..., 401:567].float().mean() > 0.99
    longer = model.inpaint(torch.nn.functional.pad(audio, (0, 100)), 1000, 1100, seeded(1), num_steps=2)
    assert torch.equal(model.continue_(audio, 100, generator=seeded(1), num_steps=2), longer[..., 1000:])


def test_what_stood_in_the_span_has_no_say(model):
    audio = 0.1 * torch.randn(1, 1, 500)
    other = audio.clone()
    other[..., 200:300] = 0.5
    first, second = (model.inpaint(clip, 200, 300, seeded(1), num_steps=2) for clip in (audio, other))
    assert torch.equal(first, second)


def test_the_rest_of_a_clip_is_known_on_the_way(monkeypatch):
    """At time t the network sees (1 - t) noise + t data there, whatever it makes of it, and is told the data and where.

    From LET_GO on the rest moves as the network says; it is put back in the end.
    """
    monkeypatch.setattr(flow_module, "KNOWN_GUIDANCE", 1.0)
    model = flow().eval()
    model.data_mean.fill_(0.2)
    seen = []
    monkeypatch.setattr(
        model, "forward", lambda x, time, label=None, known=None: seen.append((float(time[0]), x, known)) or 7 * x
    )
    audio = torch.randn(1, 1, 30)
    data, noise = model._normalized(audio), torch.randn(1, 1, 30, generator=seeded(1))
    model.inpaint(audio, 10, 20, seeded(1), num_steps=4)
    times = flow_times(4)[:4]
    assert [t for t, *_ in seen] == pytest.approx(times) and times[2] < LET_GO < times[3]
    where = torch.tensor([1.0] * 10 + [0.0] * 10 + [1.0] * 10)
    for t, x, known in seen:
        assert torch.equal(known, torch.stack([where * data[0, 0], where]).unsqueeze(0))
        wanted = (1 - t) * noise + t * data
        torch.testing.assert_close(x[..., :10], wanted[..., :10])
        torch.testing.assert_close(x[..., 20:], wanted[..., 20:])


def test_every_clip_is_told_what_is_known_of_it_with_and_without_its_label(monkeypatch):
    model = flow(classes=("a", "b")).eval()
    told = flow_module._known(torch.rand(2, 1, 96), (torch.rand(1, 96) < 0.5).float())

    def forward(x, time, label=None, known=None):
        return known[:, :1] + 10 * known[:, 1:] + 100 * label.view(-1, 1, 1) + 0 * x

    wanted, label = told[:, :1] + 10 * told[:, 1:], torch.tensor([1, 0])
    for guidance, heed in ((1.0, 1.0), (3.0, 1.0), (1.0, 2.5), (3.0, 2.5)):
        network = partial(flow_module._told, forward, told, heed)
        found = model._velocity(network, label, guidance)(torch.zeros(2, 1, 96), 0.5)
        torch.testing.assert_close(found, heed * wanted + 100 * (2 + guidance * (label.view(-1, 1, 1) - 2)))  # 2 is no label


def test_what_is_known_is_heeded_more_than_was_learned_where_there_is_any(monkeypatch):
    model = flow().eval()
    model.trained_length.fill_(40)
    seen, told = [], flow_module._told
    monkeypatch.setattr(flow_module, "_told", lambda *a: seen.append((a[2], bool(a[1].any()))) or told(*a))
    model.sample(1, 50, num_steps=1)
    model.inpaint(torch.zeros(1, 1, 40), 0, 40, num_steps=1)
    model.inpaint(torch.zeros(1, 1, 40), 0, 39, num_steps=1)
    assert seen == [(1.0, False), (KNOWN_GUIDANCE, True), (1.0, False), (KNOWN_GUIDANCE, True)]


def test_a_share_of_the_clips_of_a_training_is_known_but_for_a_span():
    """Of those, the span begins, ends, or does both within the clip, as two ends from a quarter before to one behind do."""
    free = flow_module._spans(torch.zeros(20_000, 1, 120))[:, 0]
    assert set(free.unique().tolist()) == {0.0, 1.0}
    first, last = free[:, 0] == 1, free[:, -1] == 1
    assert (free.diff().abs().sum(1) <= 2).all() and (free[first & last] == 1).all()
    holed = ~first & ~last & (free.sum(1) > 0)
    share = KNOWN_SHARE / 6**2  # of two ends that fall a sixth each before and behind, and four sixths within
    for found, wanted in (
        (holed, 16 * share),
        (first & ~last, 8 * share),
        (~first & last, 8 * share),
        (free.sum(1) == 0, 2 * share),
        (first & last, 1 - KNOWN_SHARE + 2 * share),
    ):
        assert found.float().mean() == pytest.approx(wanted, abs=0.01)
    assert free[holed].sum(1).mean() == pytest.approx(40, rel=0.03)  # a third of the clip


@pytest.mark.parametrize("name", ["raw", "latent"])
def test_what_is_known_is_not_counted_in_the_loss_and_changes_the_rest(name, monkeypatch):
    model = MODELS[name]().train()
    free = (torch.arange(60) < 20).float().expand(3, 1, -1)
    monkeypatch.setattr(flow_module, "_spans", lambda data: free)
    told = []
    monkeypatch.setattr(model, "forward", lambda x, time, label=None, known=None: told.append(known) or 0 * x)
    audio = torch.randn(3, 1, 60 * model.frame)
    torch.manual_seed(1)
    loss = model.training_losses(audio)["flow"]
    data = model._normalized(model._data(audio))
    assert torch.equal(told[0], torch.cat([data * (1 - free), 1 - free], dim=1))
    torch.manual_seed(1)
    noise = (torch.rand(3), torch.randn_like(data))[1]
    torch.testing.assert_close(loss, (data - noise)[..., :20].square().mean() / 3)
    monkeypatch.setattr(flow_module, "_spans", lambda data: torch.zeros_like(data[:, :1]))
    assert model.training_losses(audio)["flow"] == 0
    model.eval().training_losses(audio)
    assert not told[-1].any()  # a validation knows nothing


def test_at_first_the_network_is_deaf_to_what_is_known_and_without_it_always(model):
    x, time = torch.randn(2, len(model.data_mean), 30), torch.rand(2)
    known = torch.randn(2, len(model.data_mean) + 1, 30)
    assert torch.equal(model(x, time, None, known), model(x, time))
    torch.nn.init.normal_(model.enter_known.weight)
    assert not torch.allclose(model(x, time, None, known), model(x, time))
    assert torch.equal(model(x, time, None, 0 * known), model(x, time))


@pytest.mark.parametrize("name", ["raw", "latent"])
def test_of_a_long_recording_only_what_is_around_a_span_is_heard(name, monkeypatch):
    """A window on each side; what is farther off has no say, and does not cost anything."""
    model = MODELS[name]().eval()
    model.trained_length.fill_(100)
    heard, audio = 100 * model.frame, 0.1 * torch.randn(1, 1, 40_000)
    lengths = []
    make = model._made
    monkeypatch.setattr(model, "_made", lambda data, *rest: lengths.append(data.shape[-1]) or make(data, *rest))
    made = model.inpaint(audio, 20_000, 21_000, seeded(1), num_steps=2)
    assert made.shape == audio.shape and torch.equal(made[..., :20_000], audio[..., :20_000])
    assert torch.equal(made[..., 21_000:], audio[..., 21_000:]) and not torch.equal(made, audio)
    assert 1000 + 2 * heard <= max(lengths) * model.frame <= 1000 + 2 * (heard + 2 * model.hop_length)
    audio[..., : 20_000 - heard - 2 * model.hop_length] = 0.5
    audio[..., 21_000 + heard + 2 * model.hop_length :] = 0.5
    again = model.inpaint(audio, 20_000, 21_000, seeded(1), num_steps=2)
    assert torch.equal(again[..., 20_000:21_000], made[..., 20_000:21_000])


@pytest.mark.parametrize("name", ["raw", "latent"])
def test_what_is_made_is_moved_to_where_the_audio_is(name, monkeypatch):
    """A network that would make 0.5 everywhere, in a clip of zeros: from 0 at both borders to 0.5 within 20 ms."""
    model = MODELS[name]().eval()
    monkeypatch.setattr(model, "_audio", lambda x, num_samples: torch.full((1, 1, num_samples), 0.5))
    made = model.inpaint(torch.zeros(1, 1, 1000), 300, 700, num_steps=1)[0, 0]
    assert made.diff().abs().max() == pytest.approx(0.5 / 160, rel=1e-3)
    assert (made[460:540] == 0.5).all() and (made[:301] == 0).all() and (made[699:] == 0).all()


@pytest.mark.parametrize("length", [1, 2, 9, 100, 161])
def test_the_borders_of_a_short_span_have_no_seam(length, monkeypatch):
    """From 0 on the left to 1 on the right of what would be 0.5 and shorter than both fades."""
    model = flow().eval()
    monkeypatch.setattr(model, "_audio", lambda x, num_samples: torch.full((1, 1, num_samples), 0.5))
    audio = (torch.arange(1000) >= 300 + length).float().view(1, 1, -1)
    made = model.inpaint(audio, 300, 300 + length, num_steps=1)[0, 0]
    ends = (0.5, 0.5) if length == 1 else (0, 1)
    assert made[300] == pytest.approx(ends[0], abs=1e-6) and made[299 + length] == pytest.approx(ends[1], abs=1e-6)
    assert (made.diff() > -1e-6).all()


@pytest.fixture(scope="module")
def trained() -> Flow:
    """A flow that has seen sines of 60 to 65 Hz and amplitude 0.5, of any phase, for some seconds."""
    torch.manual_seed(0)
    model = Flow(RATE, strides=(4,), widths=(16, 32), num_blocks=1, d_state=16, dt_min=1e-2, dt_max=0.5)
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-2, 1e-3, 0.0), betas=(0.9, 0.99))
    steps = 250
    for step in range(steps):
        for group, lr in zip(optimizer.param_groups, (1e-2, 1e-3), strict=True):
            group["lr"] = lr * min(1, (step + 1) / 30) * 0.5 * (1 + math.cos(math.pi * step / steps))
        hertz, phase = torch.empty(32, 1, 1).uniform_(60, 65), 2 * math.pi * torch.rand(32, 1, 1)
        loss = model.training_losses(sine(64, hertz, phase))["flow"]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


def sine(length: int, hertz: torch.Tensor | float = HERTZ, phase: torch.Tensor | float = 0.0) -> torch.Tensor:
    wave = torch.sin(2 * math.pi * hertz * torch.arange(length) / RATE + phase)
    return 0.5 * wave.view(-1, 1, length)


def test_it_learns_pitch_loudness_and_phase(trained):
    made = trained.sample(128, 64, generator=seeded(1))[:, 0]
    assert torch.isfinite(made).all() and made.abs().max() < 1
    assert made.mean(1).abs().max() < 0.05 and made.mean().abs() < 0.005  # no DC
    assert made.square().mean(1).sqrt().mean() == pytest.approx(0.5 / 2**0.5, rel=0.05)
    spectrum = torch.fft.rfft(made)
    power = spectrum.abs().square()
    assert (power.argmax(1) == 4).float().mean() > 0.95  # 62.5 Hz
    assert (power[:, 3:6].sum(1) / power.sum(1)).median() > 0.95
    phases = spectrum[:, 4] / spectrum[:, 4].abs()
    assert phases.mean().abs() < 0.2  # all of them: 0.09 is expected of 128


@pytest.mark.parametrize("num_steps", [4, 50])
def test_few_and_many_steps_make_sines(trained, num_steps):
    power = torch.fft.rfft(trained.sample(32, 64, generator=seeded(1), num_steps=num_steps)[:, 0]).abs().square()
    assert (power[:, 3:6].sum(1) / power.sum(1)).median() > 0.9


def test_a_hole_in_a_sine_is_filled_and_a_sine_goes_on_without_a_seam(trained):
    audio = sine(256)
    holed = audio.clone()
    holed[..., 100:140] = 0
    filled = trained.inpaint(holed.repeat(16, 1, 1), 100, 140, [seeded(k) for k in range(16)])
    error = (filled - audio)[..., 100:140].square().mean((1, 2)).sqrt()
    assert error.median() < 0.12  # the sine's own level is 0.35
    before = audio[..., :128].repeat(16, 1, 1)
    longer = torch.cat([before, trained.continue_(before, 64, generator=[seeded(k) for k in range(16)])], dim=-1)
    for made, borders in ((filled, (100, 140)), (longer, (128,))):
        steps = made.diff().abs()[:, 0]
        inside = steps[:, 100:139] if len(borders) == 2 else steps[:, 128:]
        assert max(steps[:, border - 1].max() for border in borders) <= inside.max()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["raw", "latent", "labelled"])
def test_gpu_sampling_is_that_of_the_cpu(name):
    """Window after window, by a graph."""
    model = hears_what_it_is_told(MODELS[name]().eval())
    model.trained_length.fill_(300)
    label = torch.tensor([0, 1]) if name == "labelled" else None
    wanted = model.sample(2, 5000, generator=[seeded(1), seeded(2)], label=label)
    label = None if label is None else label.cuda()
    found = model.cuda().sample(2, 5000, generator=[seeded(1), seeded(2)], label=label)
    assert found.is_cuda and (found.cpu() - wanted).abs().max() < 1e-3  # float32, in another order


@pytest.mark.gpu
def test_gpu_memory_does_not_grow_with_samples():
    model = flow().eval().cuda()
    model.sample(1, 5000, num_steps=2)
    before = torch.cuda.memory_allocated()
    for _ in range(40):
        model.sample(1, 5000, num_steps=2)
    assert torch.cuda.memory_allocated() - before < 2**20


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["raw", "latent"])
def test_gpu_inpainting_is_that_of_the_cpu(name):
    model, audio = hears_what_it_is_told(MODELS[name]().eval()), 0.1 * torch.randn(2, 1, 5000)
    wanted = model.inpaint(audio, 2000, 3000, [seeded(1), seeded(2)], num_steps=8)
    found = model.cuda().inpaint(audio.cuda(), 2000, 3000, [seeded(1), seeded(2)], num_steps=8)
    assert found.is_cuda and (found.cpu() - wanted).abs().max() < 1e-3


@pytest.mark.gpu
@pytest.mark.skipif("PYTEST_XDIST_WORKER" in os.environ, reason="other tests take their share of the GPU")
def test_gpu_ten_seconds_take_less_than_one():
    """Of the pretrained model."""
    model: Any = load("classical-16k", "cuda")
    model.sample(1, 160_000)
    torch.cuda.synchronize()
    took = []
    for _ in range(3):
        began = time.monotonic()
        model.sample(1, 160_000).cpu()
        took.append(time.monotonic() - began)
    assert min(took) < 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strides": (1, 2)}, r"strides \[1, 2\] must be at least 2"),
        ({"widths": (4, 4)}, "widths has 2 entries and strides 2"),
        ({"num_blocks": 0}, "a block somewhere"),
        ({"label_dropout": 1.0}, "label_dropout is 1.0"),
        ({"classes": "ab"}, "classes is 'ab'; wanted a list of names, each once"),
        ({"classes": ("a", "a")}, "wanted a list of names, each once"),
        ({"autoencoder": S4Model(1, 2, 4, 1)}, "autoencoder is a S4Model"),
        ({"autoencoder": ConvVAE(4000, strides=(2,), widths=(2, 2))}, "channels at 4000 Hz and the flow 1 at 8000 Hz"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        flow(**arguments)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.sample(1, 8, label=torch.tensor([2])), r"label is \[2\]; wanted numbers from 0 to 1"),
        (lambda m: m.sample(1, 8, label="b"), "label is 'b'; wanted a tensor of the numbers of classes"),
        (lambda m: m.sample(1, 8, label=torch.tensor([1]), guidance=-1.0), "guidance is -1.0"),
        (lambda m: m.sample(1, 8, num_steps=0), "num_steps is 0"),
        (lambda m: m.vary(torch.zeros(1, 1, 8), 1.5), r"the variation is 1.5; wanted 0"),
        (lambda m: m.inpaint(torch.zeros(1, 1, 8), 3, 9), "the span is 3 to 9; wanted one inside of the 8 samples"),
        (lambda m: m.continue_(torch.zeros(1, 1, 8), 0), "num_samples is 0; wanted a whole number"),
        (lambda m: m.inpaint(torch.zeros(1, 1, 8), 0.2, 0.5), "the span is 0.2 to 0.5; wanted whole numbers, in samples"),
        (lambda m: m.inpaint(torch.zeros(1, 8), 3, 9), r"the audio has shape \(1, 8\); wanted \(clips, 1, samples\)"),
        (
            lambda m: m.inpaint(torch.zeros(1, 1, 8).short(), 3, 9),
            "the audio is torch.int16; wanted a tensor of torch.float32",
        ),
        (
            lambda m: m.vary(torch.zeros(1, 1, 8).double(), 0.5),
            "the audio is torch.float64; wanted a tensor of torch.float32",
        ),
        (lambda m: m.vary(torch.zeros(1, 2, 8), 0.5), r"the audio has shape \(1, 2, 8\)"),
        (lambda m: m.vary(torch.zeros(1, 1, 0), 0.5), r"the audio has shape \(1, 1, 0\)"),
        (lambda m: m.vary([0.0], 0.5), "the audio is list"),
        (lambda m: m.continue_(torch.full((1, 1, 8), math.nan), 4), "the audio holds samples that are not finite"),
        (lambda m: m.interpolate(torch.zeros(1, 1, 8), torch.zeros(1, 1, 8), 3), r"the audio has shape \(2, 1, 1, 8\)"),
        (lambda m: m.sample(1, 0), "num_samples is 0; wanted a whole number, at least 1"),
        (lambda m: m.sample(1.5, 8), "batch_size is 1.5; wanted a whole number"),
        (lambda m: m.sample(1, 8, num_steps=2.5), "num_steps is 2.5; wanted a whole number"),
        (lambda m: m.sample(1, 8, label=torch.tensor(1)), "label is 1; wanted a tensor of the numbers of classes, one for"),
        (lambda m: m.sample(1, 8, label=torch.tensor([0.5])), r"label is \[0.5\]; wanted a tensor of the numbers"),
        (lambda m: m.sample(1, 8, generator=0), r"generator is 0; wanted torch.Generator\(\).manual_seed\(0\)"),
        (lambda m: m.interpolate(torch.zeros(1, 8), torch.zeros(1, 9), 3), "wanted two of one shape"),
        (lambda m: m.interpolate(torch.zeros(1, 8), torch.zeros(1, 8), 1), "num is 1; wanted at least 2"),
        (lambda m: m.interpolate(torch.zeros(1, 8), torch.zeros(1, 8), 2, label="b"), "label is 'b'; wanted a tensor"),
        (
            lambda m: m.interpolate(torch.zeros(1, 8), torch.zeros(1, 8), 3, label=torch.tensor([0, 1])),
            r"label is \[0, 1\]; wanted one number",
        ),
    ],
)
def test_wrong_requests_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(flow(classes=("a", "b")).eval())


def test_labels_without_classes_are_refused():
    with pytest.raises(ValueError, match=r"label is \[0\], and the model has no classes"):
        flow().eval().sample(1, 8, label=torch.tensor([0]))
    with pytest.raises(ValueError, match="there are labels, but the model has no classes"):
        flow().training_losses(torch.zeros(1, 1, 8), torch.tensor([0]))


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_one_label_for_several_clips_is_refused(guidance):
    with pytest.raises(ValueError, match="label has 1 numbers for 3 clips; wanted one for each"):
        flow(classes=("a", "b")).sample(3, 20, label=torch.tensor([1]), guidance=guidance)


def test_double_precision_trains(model):
    model.double().train().training_losses(torch.randn(2, 1, 60, dtype=torch.float64))["flow"].backward()
    assert {parameter.grad.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float64}


@pytest.mark.parametrize(
    "call",
    [
        lambda model, audio, options: model.vary(audio, 0.5, **options),
        lambda model, audio, options: model.inpaint(audio, 10, 30, **options),
        lambda model, audio, options: model.continue_(audio, 12, **options),
    ],
    ids=["vary", "inpaint", "continue"],
)
def test_label_and_guidance_reach_the_velocity(monkeypatch, call):
    model, seen, label = flow(classes=("a", "b")).eval(), [], torch.tensor([1, 0])
    monkeypatch.setattr(
        model, "_velocity", lambda network, label, guidance: seen.append((label, guidance)) or (lambda x, t: 0 * x)
    )
    call(model, torch.randn(2, 1, 60), {"label": label, "guidance": 3.0, "num_steps": 2})
    assert seen[0][1] == 3.0 and torch.equal(seen[0][0], label)


def test_an_interpolation_follows_its_label_there_and_back(monkeypatch):
    model, seen = flow(classes=("a", "b")).eval(), []
    monkeypatch.setattr(
        model,
        "forward",
        lambda x, time, label=None, known=None: seen.append(None if label is None else label.tolist()) or 0 * x,
    )
    model.interpolate(torch.randn(1, 60), torch.randn(1, 60), 3, label=torch.tensor([1]), num_steps=1)
    assert seen == [[1, 1], [1, 1], [1, 1, 1], [1, 1, 1]]  # the two ends, and the three clips; never without the label


def test_a_span_is_made_anew_in_every_frame_that_it_touches(monkeypatch):
    model, seen, original = latent_flow().eval(), [], flow_module._holding
    monkeypatch.setattr(flow_module, "_holding", lambda v, free, known: seen.append(free) or original(v, free, known))
    model.inpaint(torch.randn(1, 1, 80), 12, 33, num_steps=1)
    assert seen[0].nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5]  # frames of 8 samples, and one on each side


def test_times_are_told_apart_by_their_waves():
    waves = flow_module._waves(torch.tensor([0.0, 1.0, 0.3, 0.301]))
    half = waves.shape[1] // 2
    assert waves[0].tolist() == [1.0] * half + [0.0] * half
    assert waves[1, 0] == pytest.approx(-1)  # half a period from noise to data
    assert (waves[2] - waves[3]).abs().max() > 1  # and 500


def test_the_shortcuts_carry_what_the_inside_does_not_know():
    model, x, time = flow().eval(), torch.randn(1, 1, 60), torch.tensor([0.5])
    with torch.no_grad():
        for up in model.up:
            up.weight.zero_()
            up.bias.zero_()
    assert not torch.allclose(model(x, time), model(0 * x, time))
