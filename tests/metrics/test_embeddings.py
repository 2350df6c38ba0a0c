"""log_mel against its definition in numpy and against numbers that must never change; windows of an encoder."""

import numpy as np
import pytest
import torch

from s4audio.metrics.embeddings import EncoderWindows, LogMel, one_second_windows


def hz_of_slaney_mel(mel):
    """Slaney's scale: linear to 1 kHz (15 mel), then 27 mel for each factor of 6.4."""
    return np.where(mel < 15, mel * 200 / 3, 1000 * np.exp((np.maximum(mel, 15) - 15) * np.log(6.4) / 27))


def log_mel_in_numpy(audio: np.ndarray, rate: int) -> np.ndarray:
    """(samples,) -> (windows, 96), from the docstring."""
    hop = rate // 32
    n_fft = 4 * hop
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)
    padded = np.pad(audio, n_fft // 2)
    frames = np.stack([padded[i * hop : i * hop + n_fft] * window for i in range(len(audio) // hop)])
    power = np.abs(np.fft.rfft(frames)) ** 2
    power = np.maximum(power, 1e-8) / (n_fft / 4) ** 2
    top = 15 + 27 * np.log(rate / 2 / 1000) / np.log(6.4) if rate > 2000 else rate / 2 * 3 / 200
    edges, bins = hz_of_slaney_mel(np.linspace(0, top, 34)), np.linspace(0, rate / 2, n_fft // 2 + 1)
    left, centre, right = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    filters = np.maximum(0, np.minimum((bins - left) / (centre - left), (right - bins) / (right - centre)))
    level = np.log10(np.maximum(power @ (filters / filters.sum(1, keepdims=True)).T, 1e-8))
    seconds = len(level) // 32
    windows = level[: seconds * 32].reshape(seconds, 32, 32) if seconds else level[None]
    rms = lambda x: np.sqrt((x**2).mean(1))  # noqa: E731
    change = np.diff(windows, axis=1)
    skew = rms(np.maximum(change, 0)) - rms(np.minimum(change, 0))
    return np.concatenate([windows.mean(1), 2 * windows.std(1), 4 * skew], axis=-1)


@pytest.mark.parametrize("rate", [3000, 8000, 11025, 44100])
@pytest.mark.parametrize("seconds", [0.13, 0.9, 1, 2, 2.7, 5])
def test_log_mel_is_its_definition(rate, seconds):
    audio = 0.3 * torch.randn(1, 1, round(seconds * rate)) * torch.linspace(0, 1, round(seconds * rate))
    found = LogMel(rate)(audio)
    np.testing.assert_allclose(found[0], log_mel_in_numpy(audio[0, 0].double().numpy(), rate), atol=2e-3)
    assert found.shape == (1, max(1, int(seconds)), 96)


def test_log_mel_never_changes():
    """If this fails, old scores no longer compare with new ones: give the embedding another name."""
    time = np.arange(32000) / 16000
    audio = np.sin(2 * np.pi * 440 * time) * np.exp(-3 * (time % 0.5)) + 0.1 * np.sin(2 * np.pi * 3000 * time**2)
    found = LogMel(16000)(torch.from_numpy(audio).float().reshape(1, 1, -1))
    wanted = [-7.1783, -7.241, 3.5648, 2.695, 0.2828, 0.2522, -7.3804, -7.942, 2.0588, 2.3575, -0.4431, -0.0028]
    assert LogMel.name == "log_mel_1"
    np.testing.assert_allclose(found.flatten()[::17], wanted, atol=2e-3)


def test_log_mel_of_silence_is_finite_and_a_batch_is_its_clips():
    embedding = LogMel(8000)
    assert torch.isfinite(embedding(torch.zeros(1, 1, 8000))).all()
    audio = torch.randn(3, 1, 20000)
    torch.testing.assert_close(embedding(audio)[1:2], embedding(audio[1:2]))


def test_log_mel_tells_a_sound_from_its_reversal():
    decay = torch.exp(-torch.linspace(0, 30, 16000)) * torch.randn(16000)
    forward, backward = (LogMel(16000)(sound.reshape(1, 1, -1)) for sound in (decay, decay.flip(0)))
    assert (forward - backward)[0, 0, 64:].abs().mean() > 0.2


def test_too_short_is_a_sentence():
    with pytest.raises(ValueError, match=r"0.1 s is too short for log_mel_1, which needs 0.125 s"):
        LogMel(8000)(torch.zeros(1, 1, 800))
    with pytest.raises(ValueError, match=r"0.001 s is too short for mine, which needs 0.002 s"):
        EncoderWindows(lambda audio: audio, 8000, 8, "mine", {})(torch.zeros(1, 1, 8))


def test_windows_of_an_encoder_are_mean_and_deviation_over_a_second():
    embedding = EncoderWindows(lambda audio: audio.reshape(1, 4, -1), 80, 4, "mine", {"sha256": "x"})
    audio = torch.randn(1, 1, 200)  # 50 frames at 20 a second
    frames = audio.reshape(4, 50)
    wanted = torch.stack([torch.cat([w.mean(1), w.std(1, correction=0)]) for w in (frames[:, :20], frames[:, 20:40])])
    torch.testing.assert_close(embedding(audio)[0], wanted)
    assert embedding.details["sha256"] == "x" and embedding(audio[..., :40]).shape == (1, 1, 8)


@pytest.mark.parametrize("hop_length", [100, 128, 441])
def test_every_whole_second_is_a_window(hop_length):
    embedding = EncoderWindows(lambda audio: audio[..., ::hop_length], 44100, hop_length, "mine", {})
    assert [embedding(torch.randn(1, 1, 44100 * seconds)).shape[1] for seconds in (1, 3, 10)] == [1, 3, 10]


def test_too_low_a_rate_is_a_sentence():
    with pytest.raises(ValueError, match="900 Hz is too low a rate for log_mel_1, which needs 1000 Hz"):
        LogMel(900)


def test_one_second_windows():
    frames = torch.arange(25).reshape(1, 25, 1)
    assert [w.flatten().tolist() for w in one_second_windows(frames, 10)] == [list(range(10)), list(range(10, 20))]
    assert [len(w[0]) for w in one_second_windows(frames, 26)] == [25]


def test_windows_of_an_encoder_keep_no_gradients():
    embedding = EncoderWindows(torch.nn.Conv1d(1, 4, 4, 4), 80, 4, "mine", {})
    assert not embedding(torch.randn(1, 1, 200)).requires_grad


def test_a_window_of_frames_of_a_second_or_longer_has_two_of_them():
    embedding = EncoderWindows(lambda audio: audio[..., ::80], 80, 80, "mine", {})
    assert embedding(torch.randn(1, 1, 400)).shape == (1, 2, 2)
