"""Losses against scipy and closed forms."""

import librosa
import numpy as np
import pytest
import scipy.signal
import torch

from s4audio import losses


def test_magnitude_equals_scipy():
    audio = torch.randn(3000, dtype=torch.float64)
    window = scipy.signal.get_window("hann", 256)
    transform = scipy.signal.ShortTimeFFT(window, hop=64, fs=1, fft_mode="onesided")
    expected = np.abs(transform.stft(audio.numpy(), p0=0, p1=1 + 3000 // 64))
    np.testing.assert_allclose(losses.magnitude(audio, 256).numpy(), np.maximum(expected, 1e-4), atol=1e-10)


@pytest.mark.parametrize("shape", [(5,), (1, 1, 1), (2, 1, 63), (2, 3, 5000)])
def test_multi_resolution_stft_takes_any_length_and_has_finite_gradients(shape):
    estimate, reference = torch.zeros(shape, requires_grad=True), torch.randn(shape)
    loss = losses.multi_resolution_stft(estimate, reference)
    loss.backward()
    assert loss > 0 and torch.isfinite(estimate.grad).all()


def test_multi_resolution_stft_by_hand():
    estimate, reference = torch.randn(2, 4000), torch.randn(2, 4000)
    S_est, S_ref = losses.magnitude(estimate, 128), losses.magnitude(reference, 128)
    convergence = (S_ref - S_est).square().sum().sqrt() / S_ref.square().sum().sqrt()
    expected = convergence + (S_est.log() - S_ref.log()).abs().mean()
    torch.testing.assert_close(losses.multi_resolution_stft(estimate, reference, sizes=[128]), expected)


def test_silence_does_not_blow_up_the_spectral_loss():
    assert losses.multi_resolution_stft(0.1 * torch.randn(1, 1, 8000), torch.zeros(1, 1, 8000)) < 300


@pytest.mark.parametrize("name", losses.LOSSES)
def test_no_loss_for_a_perfect_copy_and_more_for_a_worse_one(name):
    reference = torch.randn(2, 1, 4000)
    noise = torch.randn_like(reference)
    at = [float(losses.LOSSES[name](reference + amount * noise, reference, 8000)) for amount in (0, 0.01, 0.1)]
    assert at[0] == 0 and at[0] < at[1] < at[2]


def test_mel_loss_is_the_sum_over_windows_by_numpy_and_librosa():
    estimate, reference = 0.3 * torch.randn(2, 1, 6000), 0.1 * torch.randn(2, 1, 6000)
    expected = 0.0
    for n_fft, n_mels in ((32, 5), (64, 10), (128, 20), (256, 40), (512, 80), (1024, 160), (2048, 320)):
        filters = librosa.filters.mel(sr=16_000, n_fft=n_fft, n_mels=n_mels)
        logs = []
        for audio in (estimate, reference):
            padded = np.pad(audio[:, 0].double().numpy(), ((0, 0), (n_fft // 2, n_fft // 2)))
            frames = np.lib.stride_tricks.sliding_window_view(padded, n_fft, axis=-1)[:, :: n_fft // 4]
            window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)
            spectrum = np.abs(np.fft.rfft(frames * window))  # (clips, frames, bins)
            logs.append(np.log10(np.maximum(spectrum @ filters.T, 1e-5)))
        expected += np.abs(logs[0] - logs[1]).mean()
    assert losses.multi_resolution_mel(estimate, reference, 16_000).item() == pytest.approx(expected, rel=1e-4)


def test_mel_loss_of_a_gain_is_its_logarithm_for_each_window():
    audio = 0.1 * torch.randn(1, 1, 8000)
    assert losses.multi_resolution_mel(2 * audio, audio, 8000).item() == pytest.approx(7 * np.log10(2), rel=1e-4)


@pytest.mark.parametrize("shape", [(5,), (1, 1, 1), (2, 1, 63), (2, 3, 5000)])
def test_mel_loss_takes_any_length_and_has_finite_gradients(shape):
    estimate, reference = torch.zeros(shape, requires_grad=True), torch.randn(shape)
    loss = losses.multi_resolution_mel(estimate, reference, 8000)
    loss.backward()
    assert loss > 0 and torch.isfinite(estimate.grad).all()


def test_a_loss_has_gradients_also_where_a_validation_was_the_first_to_take_it():
    estimate, reference = torch.randn(1, 1, 4000, requires_grad=True), torch.randn(1, 1, 4000)
    losses._mel_filters.cache_clear()
    with torch.inference_mode():  # as Lightning validates
        losses.multi_resolution_mel(estimate, reference, 8000)
    losses.multi_resolution_mel(estimate, reference, 8000).backward()
    assert estimate.grad is not None and estimate.grad.any()


@pytest.mark.parametrize("name", losses.LOSSES)
def test_losses_are_float32_in_mixed_precision(name):
    estimate, reference = torch.randn(1, 1, 4000).bfloat16(), torch.randn(1, 1, 4000)
    wanted = losses.LOSSES[name](estimate.float(), reference, 8000)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(losses.LOSSES[name](estimate, reference, 8000), wanted)


def test_adversarial_losses_by_hand():
    real, made = (
        [torch.tensor([1.0, 0.5, 0.8]), torch.tensor([[0.9]])],
        [torch.tensor([0.0, 0.5, 1.0]), torch.tensor([[0.2]])],
    )
    on_real, on_made = ((0.25 + 0.04) / 3 + 0.01) / 2, ((0.25 + 1.0) / 3 + 0.04) / 2
    assert losses.discriminator_loss(real, made).item() == pytest.approx(on_real + on_made)
    assert losses.adversarial_loss(made).item() == pytest.approx(((1 + 0.25) / 3 + 0.64) / 2)
    # of the first 2 of 3 and 2 of 3 are right, of the second all
    assert losses.discriminator_accuracy(real, made).item() == pytest.approx((2 / 3 + 1) / 2)
    assert losses.feature_loss(real, made).item() == pytest.approx(((1 + 0 + 0.2) / (1 + 0.5 + 0.8) + 0.7 / 0.9) / 2)
    assert losses.feature_loss(real, real) == 0 and losses.feature_loss([torch.zeros(3)], [torch.ones(3)]) < torch.inf
