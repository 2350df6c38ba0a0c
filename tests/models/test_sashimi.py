"""SaShiMi: its likelihood is one, it trains in chunks as in one piece, and what it generates is what it says that it is."""

import math
from itertools import product

import pytest
import torch
from torch import nn

from s4audio.layers import S4D
from s4audio.models import sashimi as module
from s4audio.models import stepping
from s4audio.models.sashimi import CHECKED, RunawayError, SaShiMi
from s4audio.models.stepping import Stepper, step_of
from s4audio.ssm import backend
from s4audio.tasks.graph import LossGraph
from tests.test_streaming import random_sizes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

CLASSES = ("left", "right", "both")
VARIANTS = {
    "S4D": {},
    "S4": {"layer": "S4"},
    "unet": {"unet": True},
    "classes": {"classes": CLASSES},
    "no pools": {"pools": (), "num_blocks": 2},
    "one pool": {"pools": (5,), "num_blocks": (1, 2)},
}


def model(**arguments) -> SaShiMi:
    torch.manual_seed(2)
    small = {"d_model": 6, "num_blocks": (1, 2, 1), "pools": (3, 2), "d_state": 6, "num_levels": 16, "chunk_samples": 30}
    return SaShiMi(8000, **{**small, **arguments}).eval()


def labels(built: SaShiMi, batch_size: int) -> torch.Tensor | None:
    return torch.arange(batch_size) % 3 if built.classes else None


def noise(*shape: int) -> torch.Tensor:
    return 0.4 * torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_in_blocks_of_any_size_the_logits_are_the_same(name):
    built, audio = model(**VARIANTS[name]).double(), noise(2, 1, 210)
    whole = built(audio, labels(built, 2))
    assert whole.shape == (2, 16, 210)
    for sizes in ([1] * 210, [7] * 30, [210], random_sizes(210)):
        state, outputs = built.initial_state(2, labels(built, 2)), []
        for block in audio.split(sizes, dim=-1):
            logits, state = built.stream(block, state)
            outputs.append(logits)
        torch.testing.assert_close(torch.cat(outputs, dim=-1), whole, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("place", [0, 1, 2, 3, 5, 6, 17])
@torch.no_grad()
def test_a_sample_is_heard_by_those_after_it_and_by_no_other(name, place):
    built, audio = model(**VARIANTS[name]).double(), noise(1, 1, 40)
    changed = audio.clone()
    changed[..., place] = -1.0
    difference = (built(changed, labels(built, 1)) - built(audio, labels(built, 1))).abs().amax((0, 1))
    assert (difference[: place + 1] < 1e-12).all() and (difference[place + 1 :] > 1e-12).all()


@pytest.mark.parametrize("length", [1, 2, 5, 6, 7, 31])
def test_any_length_goes(length):
    built, audio = model(), noise(2, 1, length)
    loss = built.training_losses(audio)["nll"]
    assert built(audio).shape == (2, 16, length)
    torch.testing.assert_close(built.log_likelihood(audio).mean(), -loss.detach() * length)
    assert built.sample(2, length, generator=seeded()).shape == (2, 1, length)


@pytest.mark.parametrize("quantization", ["linear", "mu_law"])
def test_the_probabilities_of_all_recordings_add_up_to_one(quantization):
    """Every recording of five samples of four levels."""
    built = model(num_levels=4, quantization=quantization)
    codes = torch.tensor(list(product(range(4), repeat=5)))
    audio = module.dequantize(codes, 4, quantization).unsqueeze(1)
    assert torch.equal(built.codes(audio), codes)
    assert built.log_likelihood(audio).double().exp2().sum().item() == pytest.approx(1, abs=1e-5)


def test_without_a_label_classes_are_equally_likely():
    built, audio = model(classes=CLASSES, chunk_samples=24).double(), noise(2, 1, 60)
    each = [built.log_likelihood(audio, torch.full((2,), number)).exp2() for number in range(3)]
    torch.testing.assert_close(built.log_likelihood(audio).exp2(), sum(each) / 3)


@pytest.mark.parametrize("length", [60, 95])
@pytest.mark.parametrize("name", VARIANTS)
def test_in_chunks_the_loss_and_its_gradients_are_those_of_the_whole(name, length):
    audio, found = noise(2, 1, length), []
    for chunk_samples in (30, 300):
        built = model(chunk_samples=chunk_samples, **VARIANTS[name]).double()
        loss = built.training_losses(audio, labels(built, 2))["nll"]
        loss.backward()
        found.append((loss.detach(), {name: parameter.grad for name, parameter in built.named_parameters()}))
    (loss, gradients), (wanted, whole) = found
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=0)
    for parameter, gradient in whole.items():
        assert gradient.abs().max() > 0, parameter
        torch.testing.assert_close(gradients[parameter], gradient, rtol=1e-8, atol=1e-11, msg=parameter)


def test_dropout_is_the_same_in_both_passes_of_a_chunk(monkeypatch):
    found = []
    for direct in (False, True):
        if direct:
            monkeypatch.setattr(module, "checkpoint", lambda function, *arguments, **_: function(*arguments))
        built = model(dropout=0.5).double().train()
        torch.manual_seed(4)
        built.training_losses(noise(1, 1, 90))["nll"].backward()
        found.append(torch.cat([parameter.grad.flatten() for parameter in built.parameters()]))
    torch.testing.assert_close(*found)


def test_a_chunk_more_keeps_its_codes_and_state_for_the_gradient_and_no_more():
    """In numbers that autograd keeps, per sample: of a chunk its codes, and of a clip in one piece over a hundred."""

    def kept(chunk_samples: int, length: int) -> int:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            model(chunk_samples=chunk_samples).training_losses(noise(1, 1, length))
        return sum(sizes)

    assert kept(600, 2400) - kept(600, 1200) <= 1200 < (kept(6000, 2400) - kept(6000, 1200)) / 100


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 1.0), (1.3, 0.8)])
@torch.no_grad()
def test_codes_are_drawn_of_the_probabilities_of_the_whole_past(name, temperature, top_p):
    """Again with the parallel form on all that was drawn so far, and a search through the sorted codes."""
    built = model(**VARIANTS[name]).double()
    label = labels(built, 2)
    made = built.generate(2, 20, label=label, generator=seeded(), temperature=temperature, top_p=top_p)
    uniform, audio = torch.rand(2, 20, generator=seeded()), torch.zeros(2, 1, 1)
    for t in range(20):
        p = (built(audio, label)[..., t] / temperature).softmax(-1)
        for clip in range(2):
            ranked = sorted(range(16), key=lambda code: -p[clip, code]) if top_p < 1 else range(16)
            allowed, total = [], 0.0
            for code in ranked:
                if total < top_p:
                    allowed.append(code)
                    total += p[clip, code].item()
            threshold = uniform[clip, t].item() * total
            drawn = next(code for i, code in enumerate(allowed) if p[clip, allowed[: i + 1]].sum() > threshold)
            assert made.codes[clip, t] == drawn
        audio = torch.cat([made.audio[..., : t + 1], torch.zeros(2, 1, 1)], dim=-1)


@pytest.mark.parametrize("prefix", [0, 1, 5, 6, 40])
@pytest.mark.parametrize("name", VARIANTS)
def test_the_likelihood_of_what_it_made_is_the_likelihood(name, prefix):
    """Float32; 1e-4 is what the two ways of summing may differ by (measured: 1e-6)."""
    built = model(**VARIANTS[name])
    label, before = labels(built, 3), noise(3, 1, prefix)
    made = built.generate(
        3, 101, label=label, generator=seeded(), temperature=0.9, top_p=0.95, prefix=before if prefix else None
    )
    whole = built.log_likelihood(torch.cat([before, made.audio], dim=-1), label)
    alone = built.log_likelihood(before, label) if prefix else 0
    torch.testing.assert_close(made.log_likelihood, whole - alone, rtol=1e-4, atol=0)
    assert torch.equal(built.codes(made.audio), made.codes)
    if prefix:
        follows = built.continue_(before, 101, label=label, generator=seeded(), temperature=0.9, top_p=0.95)
        assert torch.equal(follows, made.audio)


@pytest.mark.parametrize("layer", ["S4D", "S4"])
@torch.no_grad()
def test_modes_that_nothing_drives_take_part_in_a_step(layer):
    built = model(layer=layer, pools=(), num_blocks=1)
    built.layers[0].inner[1].B[:, 0] = 0
    made = built.generate(2, 50, generator=seeded(), prefix=noise(2, 1, 20))
    whole = built.log_likelihood(torch.cat([noise(2, 1, 20), made.audio], dim=-1))
    torch.testing.assert_close(made.log_likelihood, whole - built.log_likelihood(noise(2, 1, 20)), rtol=1e-4, atol=0)


def test_the_same_generators_make_the_same_clips_and_classes_are_drawn():
    built = model(classes=CLASSES)
    first, again = (built.generate(4, 30, generator=[seeded(s) for s in range(4)]) for _ in range(2))
    turned = built.generate(4, 30, generator=[seeded(s) for s in (3, 2, 1, 0)])
    assert torch.equal(first.codes, again.codes) and torch.equal(first.label, again.label)
    assert torch.equal(first.codes, turned.codes.flip(0)) and not torch.equal(first.codes[0], first.codes[1])
    drawn = built.generate(60, 1, generator=seeded()).label
    assert set(drawn.tolist()) == {0, 1, 2} and drawn.bincount().min() > 8
    given = built.generate(2, 30, label=torch.tensor([2, 0]), generator=seeded()).label
    assert given.tolist() == [2, 0] and model().generate(1, 5).label is None


def test_generated_tensors_can_be_trained_on():
    built = model()
    built.training_losses(built.sample(1, 20, generator=seeded()))["nll"].backward()


@torch.no_grad()
def test_a_model_that_runs_away_is_stopped():
    built = model(pools=(), num_blocks=1)
    head = built.layers[-1]
    head.weight.zero_()
    head.bias[8] = 100.0
    assert built.sample(1, 2 * CHECKED).abs().max() == 0  # silence is a constant too
    head.bias[15] = 200.0
    assert built.sample(1, CHECKED - 1).min() > 0.6  # a short stretch at full scale is not yet one too many
    with pytest.raises(RunawayError, match=f"clip 0 of the batch ran away: {CHECKED} samples in a row are at full scale"):
        built.sample(2, 2 * CHECKED)
    head.bias[3] = math.nan
    with pytest.raises(RunawayError, match="clip 0 of the batch ran away: its probabilities are no longer finite"):
        built.sample(2, 10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pools": (3, 1)}, r"pools \[3, 1\] at least 2"),
        ({"num_blocks": (1, 2)}, "num_blocks has 2 entries and pools 2; wanted one more"),
        ({"num_blocks": (1, 0, 1)}, "must be at least 1"),
        ({"layer": "S5"}, "layer is 'S5'; choose one of S4D, S4"),
        ({"quantization": "a_law"}, "quantization is 'a_law'"),
        ({"num_levels": 17}, "num_levels is 17"),
        ({"classes": ("a", "b", "a")}, "wanted a list of names, each once"),
        ({"classes": "ab"}, "wanted a list of names, each once"),
        ({"chunk_samples": 31}, "chunk_samples is 31; wanted a multiple of the product of pools, 6"),
    ],
)
def test_arguments_outside_their_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        model(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0.0}, "temperature 0.0 must be above 0"),
        ({"top_p": 1.5}, r"top_p 1.5 in \(0, 1\]"),
        ({"num_samples": 0}, "num_samples is 0; wanted a whole number"),
        ({"prefix": torch.zeros(1, 2, 5)}, r"the audio has shape \(1, 2, 5\); wanted \(clips, 1, samples\)"),
        ({"prefix": torch.zeros(2, 1, 5)}, "prefix has 2 clips and batch_size is 1"),
        ({"label": torch.tensor([3])}, r"label is \[3\]; wanted numbers from 0 to 2"),
        ({"label": torch.tensor([1, 1])}, r"wants a label a clip, \(1,\); its shape is \(2,\)"),
        ({"generator": [seeded(), seeded()]}, "there are 2 generators for a batch of 1"),
    ],
)
def test_what_cannot_be_generated_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        model(classes=CLASSES).generate(**{"batch_size": 1, "num_samples": 5, **arguments})


def test_no_audio_has_no_likelihood():
    with pytest.raises(ValueError, match=r"the audio has shape \(1, 1, 0\)"):
        model().log_likelihood(torch.zeros(1, 1, 0))


def test_audio_and_labels_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"audio has shape \(1, 2, 30\); wanted \(batch, 1, samples\)"):
        model()(noise(1, 2, 30))
    with pytest.raises(ValueError, match=r"the model has 3 classes and wants a label a clip, \(1,\); there is none"):
        model(classes=CLASSES)(noise(1, 1, 30))
    assert torch.equal(model()(noise(1, 1, 30), torch.tensor([7])), model()(noise(1, 1, 30)))


def test_a_layer_without_a_step_is_named():
    with pytest.raises(TypeError, match=r"Tanh\(\) has no step of its own"):
        step_of(nn.Tanh(), None, 0)


def test_it_learns_a_period():
    """A wave of 12 samples with a little noise: nearly 3 bits by order 0, less than half of it from the past."""
    wave = 0.6 * torch.sin(torch.arange(240) * 2 * math.pi / 12).repeat(4, 1, 1) + 0.02 * noise(4, 1, 240)
    built = model(num_levels=32, quantization="linear", d_model=8, pools=(3,), num_blocks=1, chunk_samples=300).train()
    optimizer = torch.optim.AdamW(built.parameters(), lr=2e-2)
    for _ in range(40):
        optimizer.zero_grad()
        loss = built.training_losses(wave)["nll"]
        loss.backward()
        optimizer.step()
    share = built.codes(wave).flatten().bincount().double() / wave.numel()
    order_0 = -(share[share > 0] * share[share > 0].log2()).sum().item()
    assert order_0 > 2.9 and loss.item() < 0.5 * order_0
    made = built.eval().sample(1, 240, generator=seeded())
    assert 18 <= torch.fft.rfft(made[0, 0]).abs().argmax() <= 22 and made.abs().max() > 0.3  # 20 periods in 240 samples


@pytest.mark.parametrize(
    ("arguments", "temperature", "top_p", "in_parts"),
    [
        ({"classes": CLASSES}, 0.7, 1.0, False),
        ({"num_levels": 20, "num_blocks": (2, 1)}, 1.0, 1.0, False),
        ({"num_levels": 20, "num_blocks": (2, 1)}, 1.0, 1.0, True),
        ({"layer": "S4"}, 1.0, 0.8, False),
    ],
)
def test_fused_steps_draw_the_same(monkeypatch, arguments, temperature, top_p, in_parts):
    """On a CPU in Triton's interpreter; sizes are no powers of two, so that the kernels' masks count."""
    pytest.importorskip("triton")
    if in_parts:  # as weights that do not fit into registers are read, a few rows at a time
        monkeypatch.setattr(stepping.fused, "WHOLE", 0)
        monkeypatch.setattr(stepping.fused, "NUMBERS", 128)
    launched = []
    for name in ("through_pairs", "draw"):
        kernel = getattr(stepping.fused, name)
        monkeypatch.setattr(stepping.fused, name, lambda *a, name=name, kernel=kernel: launched.append(name) or kernel(*a))
    built, found = model(pools=(3,), **{"num_blocks": 1, **arguments}).to(DEVICE), []
    label = torch.tensor([0, 2], device=DEVICE) if built.classes else None
    for name in ("chunk", "triton"):
        assert launched == []
        with backend(name):
            made = built.generate(
                2, 9, label=label, generator=seeded(), temperature=temperature, top_p=top_p, prefix=noise(2, 1, 4)
            )
            found.append(made)
    assert set(launched) == (set() if built.layer == "S4" else {"through_pairs", "draw"})
    assert torch.equal(found[0].codes, found[1].codes)
    torch.testing.assert_close(found[0].log_likelihood, found[1].log_likelihood, rtol=1e-5, atol=0)


@pytest.mark.gpu
def test_gpu_fused_steps_of_all_widths_draw_the_same():
    """96, 192 and 384 channels: weights held whole and read in parts, by 4, 8 and 16 warps."""
    built = SaShiMi(8000, d_model=96, num_blocks=2, pools=(2, 2)).to(DEVICE).eval()
    narrow = SaShiMi(8000, d_model=48, num_blocks=2, pools=(2,)).to(DEVICE).eval()
    for each in (built, narrow):
        found = []
        for name in ("chunk", "triton"):
            with backend(name):
                found.append(each.generate(3, 64, generator=seeded()))
        assert torch.equal(found[0].codes, found[1].codes)
        torch.testing.assert_close(found[0].log_likelihood, found[1].log_likelihood, rtol=1e-4, atol=0)


def test_fused_draws_read_uniform_numbers_of_any_layout():
    pytest.importorskip("triton")
    built, found = model(pools=(), num_blocks=1).to(DEVICE), []
    uniform = torch.rand(3, 6, generator=seeded()).to(DEVICE).T  # sample by sample, whose clips lie apart
    with backend("triton"), torch.inference_mode():
        for numbers in (uniform, uniform.contiguous()):
            found.append(Stepper(built, built.initial_state(3), 0, 1.0, 1.0)._run(numbers)[0])
    assert torch.equal(*found)


def test_generation_leaves_the_number_of_threads_as_it_was():
    built, threads = model(), torch.get_num_threads()
    with torch.no_grad():
        built.layers[-1].bias[0] = math.nan
    try:
        torch.set_num_threads(2)
        with pytest.raises(RuntimeError, match="ran away"):
            built.generate(1, 5)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


@pytest.mark.gpu
@pytest.mark.parametrize("prefix", [0, 5])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_graph_of_a_frame_steps_as_it_does_without(name, prefix):
    built = model(**VARIANTS[name]).cuda()
    label = labels(built, 3)
    label = None if label is None else label.cuda()
    before = noise(3, 1, prefix).cuda()
    made = built.generate(3, 200, label=label, generator=seeded(), prefix=before if prefix else None)
    whole = built.log_likelihood(torch.cat([before, made.audio], dim=-1), label)
    alone = built.log_likelihood(before, label) if prefix else 0
    torch.testing.assert_close(made.log_likelihood, whole - alone, rtol=1e-4, atol=0)
    state = built.initial_state(3, label)
    if prefix:
        _, state = built.stream(before, state)
    plain = Stepper(built, state, prefix, 1.0, 1.0)
    uniform = torch.rand(3, 200, generator=seeded()).T.cuda()
    with torch.inference_mode():
        codes, _ = plain._run(uniform)
    assert torch.equal(codes.T, made.codes)


@pytest.mark.gpu
def test_a_long_clip_is_trained_on_within_20_gib_also_in_a_graph():
    built = SaShiMi(16000).cuda().train()
    audio = noise(1, 1, 131_072).cuda()
    torch.cuda.reset_peak_memory_stats()
    loss = built.training_losses(audio)["nll"]
    loss.backward()
    loss = loss.detach()  # what is kept of its graph belongs to this stream, and a capture must not wait for that
    assert torch.cuda.max_memory_allocated() < 20 * 2**30
    wanted = [parameter.grad.clone() for parameter in built.parameters()]
    built.zero_grad()
    total, _ = LossGraph(built, built.training_losses, (audio,))((audio,), lambda names: [1.0])
    total.backward()
    torch.testing.assert_close(total.detach(), loss)
    for parameter, gradient in zip(built.parameters(), wanted, strict=True):
        assert (parameter.grad - gradient).norm() <= 1e-3 * gradient.norm()


def test_dropout_acts_in_training_only():
    built, audio = model(dropout=0.5).train(), noise(1, 1, 40)
    assert not torch.equal(built(audio), built(audio))
    built.eval()
    assert torch.equal(built(audio), built(audio))


@pytest.mark.parametrize(("unet", "layers"), [(False, 6), (True, 9)])
def test_a_unet_has_blocks_on_the_way_down_too(unet, layers):
    built = model(num_blocks=(1, 2, 3), pools=(2, 2), unet=unet, chunk_samples=32)
    assert sum(isinstance(module, S4D) for module in built.modules()) == layers


@pytest.mark.parametrize("code", [0, 15])
def test_full_scale_of_either_sign_is_running_away(code):
    codes = torch.full((CHECKED, 2), 8)
    codes[:, 1] = code
    with pytest.raises(RunawayError, match="clip 1 of the batch ran away"):
        module.refuse_runaway(codes, torch.zeros(CHECKED, 2), 16)
    module.refuse_runaway(codes[1:], torch.zeros(CHECKED - 1, 2), 16)


def test_the_first_sample_follows_on_silence():
    assert model().initial_state(3).previous.tolist() == [8, 8, 8]
