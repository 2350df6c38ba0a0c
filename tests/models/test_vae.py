"""Both VAEs: shapes, their KL against torch's, draws, and that a collapse is seen."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from s4audio import S4DVAE, CausalAutoencoder, ConvVAE
from s4audio.layers import GatedBlock
from s4audio.models.vae import VariationalAutoencoder
from s4audio.tasks.callbacks import Progress

DEFAULTS = {"strides": (2, 3), "widths": (4, 6, 8), "latent_channels": 5, "num_blocks": 1, "losses": ("l1", "mse")}


@pytest.fixture(params=[ConvVAE, S4DVAE])
def vae(request):
    """Makes a small one."""
    more = {"d_state": 4} if request.param is S4DVAE else {}

    def make(**arguments) -> VariationalAutoencoder:
        return request.param(8000, **{**DEFAULTS, **more, **arguments})

    return make


@pytest.mark.parametrize("strides", [(2, 3), (4, 5), (6, 2)])
@pytest.mark.parametrize("length", [1, 5, 6, 7, 64, 999])
def test_output_is_as_long_as_the_input(vae, length, strides):
    model, audio = vae(strides=strides).eval(), torch.randn(2, 1, length)
    latent = model.encode(audio)
    assert latent.shape == (2, 5, -(-length // model.hop_length))
    assert model(audio).shape == audio.shape
    assert model.decode(latent).shape[-1] == latent.shape[-1] * model.hop_length
    assert torch.equal(model(audio), model(audio))  # the mean of the posterior, no draw


def test_kl_is_that_of_torch(vae):
    model, audio = vae(free_nats=0.0).eval(), torch.randn(3, 1, 300)
    mean, log_variance = model.posterior(audio)
    wanted = kl_divergence(Normal(mean, (0.5 * log_variance).exp()), Normal(0.0, 1.0)).mean()
    torch.testing.assert_close(model.training_losses(audio)["kl"], wanted)


def test_free_nats_are_free(vae):
    model, audio = vae(free_nats=100.0), torch.randn(3, 1, 300)
    losses = model.training_losses(audio)
    assert losses["kl"].item() == 100
    losses["kl"].backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_losses_reach_every_parameter(vae):
    model = vae(free_nats=0.0)
    for module in model.modules():
        if isinstance(module, GatedBlock):
            torch.nn.init.normal_(module.inner[3].weight)  # half of it zeros at first, which stop the gradients of the block
    sum(model.training_losses(torch.randn(2, 1, 500)).values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all() and parameter.grad.any(), name


def test_sizes_that_are_none_are_refused(vae):
    with pytest.raises(ValueError, match="batch_size is 0; wanted a whole number, at least 1"):
        vae().sample(0, 8)


def test_kl_is_float32_in_mixed_precision(vae):
    with torch.autocast("cpu", torch.bfloat16):
        assert vae().training_losses(torch.randn(2, 1, 300))["kl"].dtype == torch.float32


def test_training_draws_and_validation_does_not_change(vae):
    model, audio = vae(), torch.randn(2, 1, 300)
    assert model.training_losses(audio)["l1"] != model.training_losses(audio)["l1"]
    model.eval()
    assert model.training_losses(audio)["l1"] == model.training_losses(audio)["l1"]


def test_samples_are_the_prior_decoded(vae):
    model = vae().eval()
    first, again, other = (model.sample(2, 101, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert first.shape == (2, 1, 101) and torch.equal(first, again) and not torch.equal(first, other)
    latent = torch.randn(2, 5, 17, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(first, model.decode(latent, 101))


def test_active_dimensions_are_counted_and_a_collapse_is_said(vae, capsys):
    model, audio = vae().eval(), torch.randn(4, 1, 600)
    with torch.no_grad():
        last = model.encoder[-1] if isinstance(model, ConvVAE) else model.encoder[-2]
        last.weight[:5], last.bias[:5] = 0, 0  # every posterior mean 0: nothing is said
    assert model.active_dimensions(audio) == 0
    with torch.no_grad():
        last.weight[:3] = torch.randn(last.weight[:3].shape)  # not all equal: behind a norm the channels' sum says nothing
    assert model.active_dimensions(audio) == 3
    progress = Progress(len, "clips")
    for active, said in ((3, ""), (2, "only 2 of 5 latent dimensions"), (1, "")):  # said once
        progress._warn_of_collapse(active, 5)
        told = capsys.readouterr().out
        assert told.startswith(said) and bool(told) == bool(said)


def test_only_what_is_causal_streams():
    assert not hasattr(ConvVAE(8000, **DEFAULTS), "stream")
    with pytest.raises(RuntimeError, match="hears the future and cannot stream"):
        S4DVAE(8000, **DEFAULTS, d_state=4, bidirectional=True).initial_state(1)
    with pytest.raises(RuntimeError, match=r"BatchNorm1d.* mixes samples"):
        S4DVAE(8000, **DEFAULTS, d_state=4).train().initial_state(1)  # it streams what it has learned


def test_the_s4d_vae_is_the_causal_autoencoder_with_a_norm_and_a_log_variance():
    model, plain = S4DVAE(8000, **DEFAULTS, d_state=4).eval(), CausalAutoencoder(8000, **DEFAULTS, d_state=4).eval()
    *heard, _, mean, _ = model.encoder
    plain.encoder[:-1].load_state_dict(torch.nn.Sequential(*heard).state_dict())
    audio = torch.randn(2, 1, 301)
    padded = torch.nn.functional.pad(audio, (0, 5))
    u = plain.encoder[:-1](padded)
    u = (u - u.mean(1, keepdim=True)) / (u.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()  # the norm before training
    found = model.posterior(audio)
    torch.testing.assert_close(found[0], mean(u) / (1 + 1e-5) ** 0.5)  # a variance of 1, before anything is counted
    torch.testing.assert_close(model.encode(audio), found[0])
    assert (found[1] == -4).all()
    posterior, _ = model.train().posterior(audio)  # of a batch in training
    torch.testing.assert_close(posterior.mean((0, 2)), torch.zeros(5), rtol=0, atol=1e-5)
    torch.testing.assert_close(posterior.std((0, 2), correction=0), torch.ones(5), rtol=0, atol=1e-2)
    assert [type(m) for m in model.decoder] == [type(m) for m in plain.decoder]


def test_the_posterior_is_bounded_however_large_the_blocks_grow():
    model = S4DVAE(8000, **DEFAULTS, d_state=4).eval()
    with torch.no_grad():
        model.log_variance.weight.normal_(0, 1e3)
        for parameter in model.encoder[:-3].parameters():
            if parameter.dim() == 3 and parameter.shape[-1] != 2:  # convolutions and Linears
                parameter.mul_(30)
    mean, log_variance = model.posterior(torch.randn(2, 1, 600))
    assert mean.abs().max() < 8**0.5 * model.encoder[-2].weight.norm() + 1
    assert -12 <= log_variance.min() < -10 and 2 < log_variance.max() <= 4
    loss = sum(model.training_losses(torch.randn(2, 1, 600)).values())
    loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters() if parameter.grad is not None)


def test_the_kl_brings_a_log_variance_back_from_its_bound():
    model = S4DVAE(8000, **DEFAULTS, d_state=4)
    torch.nn.init.constant_(model.log_variance.bias, -20.0)
    _, log_variance = model.posterior(torch.randn(2, 1, 300))
    assert log_variance.max() < -11.5
    model.training_losses(torch.randn(2, 1, 300))["kl"].backward()
    assert (model.log_variance.bias.grad < -1e-3).all()  # to the larger


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"widths": (4, 6)}, "widths has 2 entries and strides 2"),
        ({"free_nats": -1.0}, "free_nats"),
        ({"losses": ("kl",)}, "losses is"),
    ],
)
def test_wrong_arguments_are_sentences(vae, arguments, message):
    with pytest.raises(ValueError, match=message):
        vae(**arguments)


@pytest.mark.parametrize(
    "arguments, message", [({"num_blocks": 0}, "num_blocks 0"), ({"strides": (1, 2)}, r"strides \[1, 2\]")]
)
def test_the_convolutions_want_blocks_and_strides(arguments, message):
    with pytest.raises(ValueError, match=message):
        ConvVAE(8000, **{**DEFAULTS, **arguments})


def test_the_blocks_of_an_s4d_vae_begin_as_shortcuts():
    torch.manual_seed(0)
    model = S4DVAE(8000, strides=(2, 4), widths=(4, 8, 8), latent_channels=4, num_blocks=1, d_state=8, bidirectional=True)
    model.eval()
    impulse = torch.zeros(1, 1, 800)
    impulse[..., 400] = 1
    response = (model.encode(impulse) - model.encode(torch.zeros_like(impulse)))[0]
    heard = response.abs().amax(0).nonzero()
    assert heard.min() >= 48 and heard.max() <= 52  # the strided convolutions reach so far, state spaces everywhere
    model.train()
    audio = 0.1 * torch.randn(2, 1, 800)
    model.reconstruct(audio)[0].sub(audio).square().mean().backward()
    blocks = [block for block in model.modules() if isinstance(block, GatedBlock)]
    assert len(blocks) == 6 and all(block.inner[3].weight.grad.abs().sum() > 0 for block in blocks)  # and learn


@pytest.mark.parametrize("training", [True, False])
def test_the_latent_is_drawn_from_the_posterior(vae, monkeypatch, training):
    model, seen = vae().train(training), []
    mean, log_variance = torch.full((1, 5, 20_000), 2.0), torch.full((1, 5, 20_000), -3.0)
    monkeypatch.setattr(model, "posterior", lambda audio: (mean, log_variance))
    monkeypatch.setattr(model, "decode", lambda latent, num_samples=None: seen.append(latent) or latent)
    model.reconstruct(torch.zeros(1, 1, 10))
    drawn = (seen[0].flatten() - 2) * math.exp(1.5)
    assert drawn.mean() == pytest.approx(0, abs=0.02) and drawn.std() == pytest.approx(1, abs=0.02)
    assert (drawn.abs() > 2).float().mean() == pytest.approx(0.0455, abs=0.01)  # of a Gaussian, and of no uniform one


def test_free_nats_are_those_of_each_channel(vae, monkeypatch):
    model, mean = vae(free_nats=0.5), torch.zeros(1, 5, 7)
    mean[:, 0] = 2  # 2 nats in one channel, none in four
    monkeypatch.setattr(model, "posterior", lambda audio: (mean, torch.zeros_like(mean)))
    kl = model.reconstruct(torch.zeros(1, 1, 7 * model.hop_length))[1]["kl"]
    assert kl.item() == pytest.approx((2 + 4 * 0.5) / 5)


def test_the_convolutions_posterior_is_bounded():
    model = ConvVAE(8000, **DEFAULTS)
    for bias, bound in ((100.0, 4), (-100.0, -12)):
        torch.nn.init.constant_(model.encoder[-1].bias, bias)
        assert (model.posterior(torch.randn(2, 1, 60))[1] == bound).all()


def test_a_dimension_is_active_that_tells_clips_apart(vae, monkeypatch):
    model, scale = vae().eval(), torch.tensor([1.0, 0.3, 0.1, 0.0, 0.0]).view(1, 5, 1)
    mean = torch.tensor([0.0, 1.0]).view(2, 1, 1).expand(2, 1, 9) * scale  # constant in time
    monkeypatch.setattr(model, "encode", lambda audio: mean)
    assert model.active_dimensions(torch.zeros(2, 1, 9)) == 2
