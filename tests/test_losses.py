"""Losses against scipy and closed forms."""

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
