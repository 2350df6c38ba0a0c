"""The sequence classifier learns, and is invariant where it must be."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from s4audio import S4Model
from s4audio.layers import S4D
from s4audio.models import PatchS4Model


@pytest.mark.parametrize(
    "arguments",
    [{"layer": "S4D"}, {"layer": "S4", "discretization": "bilinear"}, {"block": "filter"}, {"block": "post_norm"}],
)
def test_tells_slow_from_fast_tones(arguments):
    torch.manual_seed(0)
    model = S4Model(1, 2, d_model=8, num_layers=1, d_state=8, **arguments)
    label = torch.tensor([0, 1] * 8)
    frequency = torch.where(label == 0, 0.1, 0.9) + 0.05 * torch.rand(16)
    u = torch.sin(frequency[:, None, None] * torch.arange(128) + 6 * torch.rand(16, 1, 1))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(40):
        logits = model(u)
        optimizer.zero_grad()
        F.cross_entropy(logits, label).backward()
        optimizer.step()
    assert logits.shape == (16, 2)
    assert (logits.argmax(1) == label).float().mean() > 0.9


def test_unknown_layers_and_blocks_are_refused():
    with pytest.raises(ValueError, match="layer is 'S5'; choose S4D or S4"):
        S4Model(3, 10, layer="S5")
    for model in (S4Model, PatchS4Model):
        with pytest.raises(ValueError, match="block is 'pre_norm'; choose one of filter, mix, spectral, post_norm"):
            model(3, 10, block="pre_norm")


def test_every_second_block_reads_a_square_image_by_columns():
    model = S4Model(1, 2, d_model=4, num_layers=3, d_state=4, side=8).eval()
    image = torch.randn(2, 1, 8, 8)
    encoder, first, _, second, _, third = model.trunk
    y = first(encoder(image.flatten(-2))).view(2, 4, 8, 8)
    y = second(y.mT.flatten(-2)).view(2, 4, 8, 8)
    torch.testing.assert_close(model(image.flatten(-2)), model.head(third(y.mT.flatten(-2)).mean(-1)))


def test_a_side_below_1_is_refused():
    with pytest.raises(ValueError, match="side is 0; wanted the height and width of the images, at least 1"):
        S4Model(3, 10, d_model=4, num_layers=2, d_state=4, side=0)


def test_a_side_that_is_not_the_images_is_refused():
    with pytest.raises(ValueError, match="the sequences have 100 samples; wanted the 64 of a square image of side 8"):
        S4Model(3, 10, d_model=4, num_layers=2, d_state=4, side=8)(torch.rand(1, 3, 100))


def test_patches_are_read_both_ways_when_asked():
    image = torch.rand(1, 3, 64, requires_grad=True)
    for bidirectional in (False, True):
        model = PatchS4Model(
            3, 10, d_model=8, num_layers=1, patch=4, d_state=4, block="mix", bidirectional=bidirectional
        ).eval()
        first = model.trunk(model.embed(image))[..., 0].square().sum()  # the sum of what is normed is 0, whatever it is
        (gradient,) = torch.autograd.grad(first, image)
        assert bool(gradient[..., -1].any()) == bidirectional  # whether the first patch hears the last pixel


def test_the_example_of_the_field_has_its_number_of_parameters():
    model = S4Model(3, 10, 128, 4, block="post_norm", dropout=0.1, learn_B=False)
    assert sum(parameter.numel() for parameter in model.parameters()) == 201_482


def test_inputs_are_normalized_by_moments_that_the_model_keeps():
    model, u = S4Model(2, 3, d_model=4, num_layers=1, d_state=4).eval(), torch.rand(2, 2, 30)
    plain = model(u)
    model.set_moments(torch.tensor([0.5, 1.0]), torch.tensor([0.25, 0.0]))  # a channel that never changes
    shifted = torch.stack([0.25 * u[:, 0] + 0.5, u[:, 1] + 1.0], 1)
    torch.testing.assert_close(model(shifted), plain)
    assert {"input_mean", "input_std"} <= set(model.state_dict())


@pytest.mark.parametrize("options", [{}, {"block": "post_norm", "bidirectional": True}])
def test_patches_of_an_image_are_read_in_their_order(options):
    model = PatchS4Model(3, 10, d_model=8, num_layers=2, patch=4, d_state=4, **options).eval()
    image = torch.rand(2, 3, 8, 8)
    patches = model.stem(image)
    assert patches.shape == (2, 8, 2, 2)
    expected = model.head(model.trunk(patches.reshape(2, 8, 4)).mean(-1))
    torch.testing.assert_close(model(image.flatten(-2)), expected)


def test_the_output_projections_of_patches_have_a_spectral_norm_of_one():
    model = PatchS4Model(3, 10, d_model=8, num_layers=1, patch=4, d_state=4)
    for _ in range(30):  # power iterations, one a training step
        model(torch.rand(1, 3, 64))
    weight = model.trunk[0].inner[-1].weight[..., 0]
    assert torch.linalg.matrix_norm(weight, 2).item() == pytest.approx(1, abs=1e-3)


def test_the_reference_system_2_has_twelve_blocks_of_512():
    model = PatchS4Model(3, 10)
    assert len(model.trunk) == 12 and model.stem(torch.rand(1, 3, 32, 32)).shape == (1, 512, 4, 4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: S4Model(3, 10, block="odd"), "block is 'odd'; choose one of filter, mix, spectral, post_norm"),
        (lambda: PatchS4Model(3, 10, d_model=7), "d_model is 7; wanted an even number"),
        (lambda: PatchS4Model(3, 10, d_model=4, num_layers=1)(torch.rand(1, 3, 60)), "have 60 pixels"),
    ],
)
def test_what_a_classifier_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("block", ["mix", "spectral", "post_norm"])
@pytest.mark.parametrize("patches", [False, True])
def test_dropout_reaches_every_block_and_acts_in_training_only(block, patches):
    size = {"d_model": 8, "num_layers": 2, "d_state": 4, "block": block, "dropout": 0.3}
    model = PatchS4Model(1, 2, patch=2, **size) if patches else S4Model(1, 2, **size)
    shares = [module.p for module in model.modules() if isinstance(module, (nn.Dropout, nn.Dropout1d))]
    assert shares == [0.3] * (4 if block == "post_norm" else 2)
    u = torch.randn(1, 1, 16)
    assert not torch.equal(model(u), model(u))
    model.eval()
    assert torch.equal(model(u), model(u))


def test_the_layers_are_what_the_arguments_say():
    options = {"discretization": "async", "gap": 0.3, "alpha": 0.7, "bidirectional": True}
    model = S4Model(1, 2, 64, 2, d_state=8, init="legs", dt_min=0.02, dt_max=0.03, **options)
    layers = [module for module in model.modules() if isinstance(module, S4D)]
    assert len(layers) == 2
    for layer in layers:
        assert {name: getattr(layer, name) for name in options} == options and layer.d_state == 8
        assert 0.0199 < layer.log_dt.exp().min() < layer.log_dt.exp().max() < 0.0301
        torch.testing.assert_close(layer.A(), S4D(1, 8, init="legs").A().expand(64, -1))


@pytest.mark.parametrize(("block", "linears"), [("filter", 0), ("mix", 1)])
def test_only_some_blocks_mix_channels(block, linears):
    model = S4Model(1, 2, 4, 1, d_state=4, block=block)
    assert sum(isinstance(module, nn.Conv1d) for module in model.trunk[1].modules()) == linears


def test_the_stem_is_two_convolutions():
    model, image = PatchS4Model(3, 10, d_model=8, num_layers=1, patch=4, d_state=4), torch.rand(2, 3, 8, 8)
    first, _, second = model.stem
    assert first.weight.shape == (4, 3, 3, 3) and second.weight.shape == (8, 4, 4, 4)
    inner = F.gelu(F.conv2d(image, first.weight, first.bias, padding=1))
    torch.testing.assert_close(model.embed(image.flatten(-2)), F.conv2d(inner, second.weight, second.bias, 4).flatten(-2))
