"""Both autoencoders: shapes at every length, reconstruction, noise and variation."""

import pytest
import torch
from torch.nn import functional as F

from s4audio import S4D, S4DVAE, CausalAutoencoder, ConvVAE, S4DAutoencoder
from s4audio.models.autoencoder import noise, stream_blocks


def causal(**arguments) -> CausalAutoencoder:
    defaults = {"strides": (2, 3), "widths": (4, 4, 6), "latent_channels": 3, "d_state": 4, "losses": ("mse", "l1", "stft")}
    return CausalAutoencoder(8000, **{**defaults, **arguments})


MODELS = {"system 4": lambda: S4DAutoencoder(3000), "causal": causal}


@pytest.fixture(params=MODELS)
def model(request) -> torch.nn.Module:
    return MODELS[request.param]().eval()


@pytest.mark.parametrize("length", [1, 2, 3, 5, 6, 7, 64, 999])
def test_output_is_as_long_as_the_input(model, length):
    audio = torch.randn(2, 1, length)
    latent = model.encode(audio)
    assert latent.shape == (2, model.latent_channels, -(-length // model.hop_length))
    assert model(audio).shape == model.decode(latent, length).shape == audio.shape
    assert model.decode(latent).shape[-1] == latent.shape[-1] * model.hop_length
    assert torch.equal(model(audio), model.decode(latent, length))


def test_losses_reach_every_parameter(model):
    sum(model.training_losses(torch.randn(2, 1, 500)).values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


def test_system_4_is_the_reference_network():
    model = S4DAutoencoder(3000).double()
    audio = torch.randn(2, 1, 1000, dtype=torch.float64)

    def norm(u, module):
        return (u - u.mean(-1, keepdim=True)) / (u.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt() * module.weight[
            :, None
        ] + module.bias[:, None]

    x = model.down(model.outer(norm(audio, model.norm_in)))
    latent = F.gelu(model.inner(norm(x, model.norm_down)))
    x = model.outer(norm(model.up(norm(latent, model.norm_latent)), model.norm_out))
    torch.testing.assert_close(model(audio), F.gelu(x), rtol=0, atol=1e-12)
    assert model(audio).min() > -0.17
    model.final_gelu = False
    torch.testing.assert_close(model(audio), x, rtol=0, atol=1e-12)
    assert [m.d_state for m in (model.outer, model.inner)] == [10, 10]
    assert sum(p.numel() for p in model.parameters()) == 119


def test_noise_of_a_clip_is_its_own():
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    together = noise((3, 2, 50), generators)
    alone = noise((1, 2, 50), [torch.Generator().manual_seed(2)])
    assert torch.equal(together[2:], alone)
    assert together.std() == pytest.approx(1, abs=0.15)
    with pytest.raises(ValueError, match="there are 3 generators for a batch of 2"):
        noise((2, 1, 5), generators)


def test_samples_follow_the_generator(model):
    first, second, other = (model.sample(2, 101, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert first.shape == (2, 1, 101)
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_variation_goes_from_reconstruction_to_noise(model):
    audio = torch.sin(torch.arange(600) / 5).reshape(1, 1, -1)
    with torch.no_grad():
        assert torch.equal(model.vary(audio, 0.0), model(audio))
        distances = [
            (model.vary(audio, s, torch.Generator().manual_seed(0)) - model(audio)).square().mean() for s in (0.1, 0.3, 0.9)
        ]
    assert 0 < distances[0] < distances[1] < distances[2]
    with pytest.raises(ValueError, match=r"the variation is 1.5; wanted 0"):
        model.vary(audio, 1.5)


def test_variation_keeps_the_latents_size():
    model = causal()
    model.encode, model.decode = lambda audio: latent, lambda latent, num_samples: latent
    latent = 3 + 2 * torch.randn(1, 3, 100_000)
    varied = model.vary(torch.zeros(1, 1, 1), 0.6, torch.Generator().manual_seed(0))
    assert varied.mean() == pytest.approx(3, abs=0.02) and varied.std() == pytest.approx(2, abs=0.02)


def test_audio_and_sizes_that_do_not_fit_are_refused(model):
    for audio, message in (
        (torch.zeros(8), r"the audio has shape \(8,\); wanted \(clips, 1, samples\)"),
        (torch.zeros(1, 2, 8), r"the audio has shape \(1, 2, 8\)"),
        (torch.zeros(1, 1, 8).double(), "the audio is torch.float64; wanted a tensor of torch.float32"),
        (torch.full((1, 1, 8), float("inf")), "samples that are not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            model.vary(audio, 0.5)
    with pytest.raises(ValueError, match="num_samples is 0; wanted a whole number, at least 1"):
        model.sample(1, 0)


def test_training_follows_the_latents_statistics():
    model = causal().train()
    audio = torch.randn(4, 1, 600)
    latent = model.encode(audio).detach()
    for _ in range(3):
        model.training_losses(audio)
    torch.testing.assert_close(model.latent_mean[:, 0], latent.mean((0, 2)), rtol=0, atol=0.02)
    torch.testing.assert_close(model.latent_std[:, 0], latent.std((0, 2), correction=0), rtol=0, atol=0.02)
    before = model.latent_mean.clone()
    model.eval().training_losses(audio + 5)
    assert torch.equal(model.latent_mean, before)


def test_a_small_autoencoder_learns_a_tone():
    torch.manual_seed(0)
    model = causal(losses=("mse",)).train()
    audio = 0.5 * torch.sin(torch.arange(1200) * torch.tensor([[0.2], [0.31]])).unsqueeze(1)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(60):
        loss = model.training_losses(audio)["mse"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.2 * audio.square().mean()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"widths": (4, 4)}, "widths has 2 entries and strides 2"),
        ({"losses": ("mse", "loud")}, r"losses is \['mse', 'loud'\]"),
        ({"losses": ()}, "wanted one or more of mse, l1, stft"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        causal(**arguments)


@pytest.mark.parametrize("rate", [0, -8000, 8000.0, "8000", None])
@pytest.mark.parametrize("model", [CausalAutoencoder, ConvVAE, S4DAutoencoder])
def test_a_sample_rate_is_a_whole_number_of_hz(model, rate):
    with pytest.raises(ValueError, match=f"sample_rate is {rate!r}; wanted a whole number of Hz, at least 1"):
        model(rate)


@pytest.mark.parametrize("lengths", [[1], [6], [7, 1, 5, 6, 30], [0, 3, 0, 2], [100, 1]])
def test_a_recording_in_blocks_comes_back_as_long_and_as_the_whole(lengths):
    model = causal().double().eval()
    audio = torch.randn(1, sum(lengths), dtype=torch.float64)
    blocks = stream_blocks(model, iter(audio.split(lengths, dim=-1)))
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(list(blocks), dim=-1), model(audio.unsqueeze(0))[0], rtol=0, atol=1e-12)


def test_blocks_are_taken_one_at_a_time_and_no_graph_is_kept():
    taken = []

    def blocks():
        for number in range(3):
            taken.append(number)
            yield torch.zeros(1, 60)

    stream = stream_blocks(causal(), blocks())
    assert not next(stream).requires_grad and taken == [0]


def test_a_model_that_hears_the_future_takes_no_blocks():
    with pytest.raises(RuntimeError, match="cannot stream"):
        next(stream_blocks(S4DAutoencoder(3000), [torch.zeros(1, 10)]))


def test_each_stage_has_as_many_blocks_as_it_is_told():
    def count(model: torch.nn.Module) -> dict[int, int]:
        widths = [layer.d_model for layer in model.modules() if isinstance(layer, S4D)]
        return {width: widths.count(width) for width in sorted(set(widths))}

    assert count(causal(widths=(4, 5, 6), num_blocks=(0, 1, 3))) == {5: 2, 6: 6}
    assert count(causal(widths=(4, 5, 6), num_blocks=2)) == {4: 4, 5: 4, 6: 4}
    with pytest.raises(ValueError, match="num_blocks has 2 entries and widths 3"):
        causal(num_blocks=(1, 1))
    for none in (0, (0, 0, 0), (1, -1, 1)):
        with pytest.raises(ValueError, match="wanted none below 0, and a block somewhere"):
            causal(num_blocks=none)


def test_bidirectional_hears_the_future_and_refuses_to_stream():
    model = CausalAutoencoder(4000, strides=(4,), widths=(4, 8), d_state=8, bidirectional=True)
    audio = torch.randn(1, 1, 103)
    later = audio.clone()
    later[..., 100:] = 0
    with torch.no_grad():
        made, other = model(audio), model(later)
    assert made.shape == audio.shape
    assert not torch.equal(made[..., :50], other[..., :50])
    with pytest.raises(RuntimeError, match="hears the future and cannot stream; build it with bidirectional=False"):
        model.initial_state(1)


def test_state_spaces_are_what_the_arguments_say():
    model = causal(widths=(32, 32, 32), d_state=8, init="legs", discretization="bilinear", dt_min=0.02, dt_max=0.03)
    layers = [module for module in model.modules() if isinstance(module, S4D)]
    assert layers
    for layer in layers:
        assert layer.discretization == "bilinear" and layer.d_state == 8
        assert 0.0199 < layer.log_dt.exp().min() < layer.log_dt.exp().max() < 0.0301
        torch.testing.assert_close(layer.A(), S4D(1, 8, init="legs").A().expand(32, -1))


def test_the_latents_statistics_forget_the_first_batches(monkeypatch):
    model, latent = causal().train(), torch.zeros(1, 3, 10)
    monkeypatch.setattr(model, "encode", lambda audio: latent)
    monkeypatch.setattr(model, "decode", lambda latent, num_samples=None: latent)
    for _ in range(200):
        model.reconstruct(torch.zeros(1, 1, 1))
    latent = torch.ones(1, 3, 10)
    for _ in range(100):
        model.reconstruct(torch.zeros(1, 1, 1))
    assert model.latent_mean.flatten().tolist() == pytest.approx([1 - 0.99**100] * 3, rel=1e-3)


def test_variation_keeps_the_mean_and_size_of_each_channel_of_each_clip(monkeypatch):
    model = causal()
    mean, size = (torch.tensor(v).unsqueeze(-1) for v in ([[3.0, -1.0], [0.0, 5.0]], [[2.0, 0.1], [1.0, 0.5]]))
    latent = mean + size * torch.randn(2, 2, 50_000)
    monkeypatch.setattr(model, "encode", lambda audio: latent)
    monkeypatch.setattr(model, "decode", lambda latent, num_samples: latent)
    varied = model.vary(torch.zeros(2, 1, 1), 0.6, torch.Generator().manual_seed(0))
    torch.testing.assert_close(varied.mean(-1, keepdim=True), mean, rtol=0, atol=0.05)
    torch.testing.assert_close(varied.std(-1, keepdim=True), size, rtol=0.03, atol=0)


def test_samples_have_the_latents_mean_and_size(monkeypatch):
    model = causal().eval()
    model.latent_mean.copy_(torch.tensor([[1.0], [-2.0], [3.0]]))
    model.latent_std.copy_(torch.tensor([[0.5], [1.0], [2.0]]))
    seen = []
    monkeypatch.setattr(model, "decode", lambda latent, num_samples: seen.append(latent) or 0 * latent)
    model.sample(1, 6 * 20_000, generator=torch.Generator().manual_seed(0))
    made = seen[0]
    torch.testing.assert_close(made.mean((0, 2)), model.latent_mean[:, 0], rtol=0, atol=0.05)
    torch.testing.assert_close(made.std((0, 2)), model.latent_std[:, 0], rtol=0.03, atol=0)


MAKERS = {  # and what of them makes the audio
    "system 4": (lambda: S4DAutoencoder(3000), "forward"),
    "causal": (causal, "decode"),
    "vae": (lambda: ConvVAE(8000, strides=(2, 3), widths=(4, 4, 4)), "decode"),
    "s4d_vae": (lambda: S4DVAE(8000, strides=(2, 3), widths=(4, 4, 4), num_blocks=1, d_state=4), "decode"),
}


@pytest.mark.parametrize("name", MAKERS)
def test_a_clip_from_noise_beyond_full_scale_is_made_quieter_as_a_whole(name, monkeypatch):
    """It would be clipped in a file; and the others of its batch stay as they are."""
    kind, makes = MAKERS[name]
    model = kind().eval()
    wave = torch.linspace(-1, 1, 60).view(1, 1, 60)
    monkeypatch.setattr(model, makes, lambda *given: torch.cat([0.5 * wave, 3 * wave]))
    torch.testing.assert_close(model.sample(2, 60), torch.cat([0.5 * wave, wave]))
