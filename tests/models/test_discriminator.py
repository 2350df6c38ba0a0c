"""The discriminator: shapes, what it sees, and that it judges clip by clip and channel by channel."""

import pytest
import torch

from s4audio.models import Discriminator


def discriminator(**arguments) -> Discriminator:
    return Discriminator(**{"sizes": (64, 16), "width": 4, **arguments})


@pytest.mark.parametrize("length", [1, 63, 1000])
def test_there_is_a_score_for_every_frame_of_every_window(length):
    scores, features = discriminator()(torch.randn(3, 1, length))
    assert [s.shape[:3] for s in scores] == [(3, 1, 1 + length // 16), (3, 1, 1 + length // 4)]
    assert [s.shape[3] for s in scores] == [5, 2]  # 33 and 9 bins, halved three times
    assert len(features) == 10 and all(f.shape[:2] == (3, 4) for f in features)


def test_it_sees_compressed_magnitudes_and_the_phases():
    seen = []
    model = discriminator(sizes=(256,))
    model.of_sizes[0].hidden[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    audio = 0.3 * torch.randn(4, 1, 20_000)
    model(audio)
    assert seen[0].shape == (4, 2, 1 + 20_000 // 64, 129)
    heard = torch.complex(*seen[0].unbind(1)).mT  # (clips, bins, frames)
    wanted = torch.stft(audio[:, 0], 256, 64, window=torch.hann_window(256), pad_mode="constant", return_complex=True)
    power = heard.abs().pow(2 / 0.3)[:, 1:-1, 4:-4].mean()  # of white noise, that of a sample
    assert power.item() == pytest.approx(0.09, rel=0.03)
    loud = wanted.abs() > 1
    assert loud.float().mean() > 0.8
    torch.testing.assert_close((heard / wanted).angle()[loud].abs().max(), torch.tensor(0.0), rtol=0, atol=1e-4)
    ratio = heard.abs() / wanted.abs().pow(0.3)
    torch.testing.assert_close(ratio[loud], ratio[loud].mean().expand(int(loud.sum())), rtol=2e-3, atol=0)


def test_clips_and_channels_are_judged_one_by_one():
    model, audio = discriminator(), torch.randn(2, 3, 500)
    together, _ = model(audio)
    for index, clip in enumerate(audio.flatten(0, 1)):
        alone, _ = model(clip.view(1, 1, -1))
        for ours, theirs in zip(together, alone, strict=True):
            torch.testing.assert_close(ours[index : index + 1], theirs, rtol=1e-4, atol=1e-5)


def test_gradients_reach_every_parameter_and_the_audio():
    model, audio = discriminator(), torch.randn(2, 1, 500, requires_grad=True)
    scores, features = model(audio)
    (sum(s.square().mean() for s in scores) + sum(f.abs().mean() for f in features)).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
    assert torch.isfinite(audio.grad).all() and audio.grad.any(-1).all()


@pytest.mark.parametrize("arguments", [{"sizes": ()}, {"sizes": (64, 30)}, {"sizes": (0,)}, {"width": 0}])
def test_wrong_arguments_are_a_sentence(arguments):
    with pytest.raises(ValueError, match="wanted one window or more, each a multiple of 4 samples, and a width"):
        discriminator(**arguments)


def test_each_feature_has_a_gradient():
    audio = torch.randn(2, 1, 500, requires_grad=True)
    for feature in discriminator()(audio)[1]:
        (gradient,) = torch.autograd.grad(feature.square().sum(), audio, retain_graph=True)
        assert gradient.any()


def test_it_hears_ten_frames_to_either_side():
    model, audio = discriminator(sizes=(64,)), torch.randn(1, 1, 1600)
    changed = audio.clone()
    changed[..., 800] += 1  # in the windows of frames 49 to 51
    (before,), (after,) = model(audio)[0], model(changed)[0]
    heard = (before - after).abs().amax((0, 1, 3)).nonzero()
    assert (int(heard.min()), int(heard.max())) == (39, 61)
