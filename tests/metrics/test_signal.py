"""Signal scores against closed forms and librosa."""

import librosa
import numpy as np
import pytest
import torch

from s4audio.audio import mel_filterbank
from s4audio.metrics.signal import log_spectral_distance, mel_distance, si_sdr


@pytest.mark.parametrize("snr_db", [-10, 0, 20, 60])
def test_si_sdr_of_orthogonal_noise_is_its_snr_at_any_gain(snr_db):
    time = torch.arange(8000, dtype=torch.float64) / 8000
    signal, noise = torch.sin(2 * torch.pi * 100 * time), torch.cos(2 * torch.pi * 100 * time)
    estimate = 0.3 * (signal + 10 ** (-snr_db / 20) * noise)
    assert si_sdr(estimate, signal).item() == pytest.approx(snr_db, abs=1e-6)


def test_si_sdr_is_nan_on_silence_and_one_value_a_signal():
    values = si_sdr(torch.randn(3, 1, 100), torch.cat([torch.zeros(1, 1, 100), torch.randn(2, 1, 100)]))
    assert values.shape == (3, 1) and values[0].isnan() and not values[1:].isnan().any()
    assert si_sdr(torch.zeros(100), torch.randn(100)) == -torch.inf


def test_log_spectral_distance_of_a_gain_is_the_gain():
    audio = torch.randn(2, 1, 10_000)
    torch.testing.assert_close(log_spectral_distance(0.1 * audio, audio), torch.full((2, 1), 20.0), rtol=1e-3, atol=0)
    assert (log_spectral_distance(audio, audio) == 0).all()


def test_mel_filters_are_librosas():
    ours = mel_filterbank(16_000, 512, 80).numpy().T
    np.testing.assert_allclose(ours, librosa.filters.mel(sr=16_000, n_fft=512, n_mels=80), atol=1e-6)


def test_mel_distance_of_a_gain_by_hand():
    audio = 0.5 * torch.randn(1, 20_000)
    expected = 0.0
    for n_mels, n_fft in ((150, 2048), (80, 512)):
        spectrum = np.abs(librosa.stft(audio[0].numpy(), n_fft=n_fft, hop_length=n_fft // 4, pad_mode="constant"))
        mel = librosa.filters.mel(sr=16_000, n_fft=n_fft, n_mels=n_mels) @ spectrum
        expected += np.abs(mel - 0.5 * mel).mean() + np.abs(2 * np.log10(2 * np.ones_like(mel))).mean()
    assert mel_distance(0.5 * audio, audio, 16_000).item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("score", [si_sdr, log_spectral_distance, lambda a, b: mel_distance(a, b, 8000)])
def test_different_shapes_are_refused(score):
    with pytest.raises(ValueError, match="the shapes must agree"):
        score(torch.zeros(2, 1, 100), torch.zeros(2, 1, 99))


def test_log_spectral_distance_is_the_root_mean_square_over_frequency_of_each_frame():
    estimate, reference = torch.randn(2, 5000), torch.randn(2, 5000) * torch.linspace(0.1, 1, 5000)
    S_est, S_ref = (np.abs(librosa.stft(v.double().numpy(), n_fft=256, hop_length=64)) for v in (estimate, reference))
    wanted = np.sqrt(np.square(20 * np.log10(S_est / S_ref)).mean(-2)).mean(-1)
    assert log_spectral_distance(estimate, reference, 256).numpy() == pytest.approx(wanted, rel=1e-3)
