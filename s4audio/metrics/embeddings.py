"""What turns audio into the vectors that are compared.

An embedding is anything with a `name`, a `sample_rate` in Hz and `__call__(audio) -> (batch, windows, dim)` for audio
(batch, 1, samples) at that rate. It may have `details`, a dictionary in JSON's types for the record of a score.
"""

import hashlib
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from s4audio.audio import mel_filterbank
from s4audio.losses import magnitude


class Embedding(Protocol):
    """What a score needs to know about an embedding."""

    name: str
    sample_rate: int  # Hz

    def __call__(self, audio: Tensor) -> Tensor:
        """Mono audio (batch, 1, samples) -> (batch, windows, dim).

        Raises:
            ValueError: the audio is too short.
        """
        ...


class LogMel:
    """Statistics of a log mel spectrogram over each second: fixed, untrained, and the same for ever.

    32 mel bands (Slaney's scale) up to half the sample rate, 32 frames a second of four times that length, levels in bel
    against a full-scale sine and not below -8. Of each band over a second: the mean, twice the standard deviation, and four
    times by how much it rises faster than it falls (root mean square of the rises from frame to frame, less that of the
    falls), which tells a sound from its reversal; the factors let the three spread about alike. A clip of less than a second
    is one window.

    Args:
        sample_rate: of the audio, in Hz.

    Raises:
        ValueError: the rate is below 1,000 Hz.

    Source: ours.
    """

    name = "log_mel_1"  # another number if ever anything about it changed

    num_bands = 32
    frames_a_second = 32
    fewest_frames = 4
    lowest_rate = 1000

    def __init__(self, sample_rate: int) -> None:
        self.sample_rate = sample_rate
        self.hop_length = sample_rate // self.frames_a_second
        self.n_fft = 4 * self.hop_length
        if sample_rate < self.lowest_rate:
            raise ValueError(f"{sample_rate} Hz is too low a rate for {self.name}, which needs {self.lowest_rate} Hz.")
        filters = mel_filterbank(sample_rate, self.n_fft, self.num_bands)
        self.filters = filters / filters.sum(0)  # the mean power of the bins in a band
        self.details = {
            "sha256": hashlib.sha256(f"{self.name} {sample_rate}".encode()).hexdigest(),  # there are no weights
            "layer": "mean, deviation and rise less fall of 32 mel bands", "pooling": "windows of 1 s",
            "training_data": None,
        }  # fmt: skip

    def __call__(self, audio: Tensor) -> Tensor:
        """(batch, 1, samples) -> (batch, windows, 96)

        Raises:
            ValueError: the audio is shorter than an eighth of a second.
        """
        frames = audio.shape[-1] // self.hop_length
        if frames < self.fewest_frames:
            raise ValueError(
                f"{audio.shape[-1] / self.sample_rate:.3g} s is too short for {self.name}, which needs "
                f"{self.fewest_frames / self.frames_a_second:g} s."
            )
        power = (magnitude(audio[:, 0].float(), self.n_fft, self.hop_length)[..., :frames] / (self.n_fft / 4)).square()
        level = (power.mT @ self.filters).clamp_min(1e-8).log10()  # (B, frames, bands)
        return torch.stack([_statistics(window) for window in one_second_windows(level, self.frames_a_second)], dim=1)


class EncoderWindows:
    """Mean and deviation of an encoder's latent over each second; a clip of less than a second is one window.

    Args:
        encode: (batch, 1, samples) -> (batch, D, frames).
        sample_rate: in Hz.
        hop_length: samples in a frame.
        name: of the encoder.
        details: for the record: `sha256` of the weights, `training_data` and so on.
    """

    def __init__(
        self, encode: Callable[[Tensor], Tensor], sample_rate: int, hop_length: int, name: str, details: dict[str, Any]
    ) -> None:
        self.encode, self.sample_rate, self.hop_length, self.name = encode, sample_rate, hop_length, name
        self.details = {"layer": "latent", "pooling": "mean and deviation over windows of 1 s", **details}

    @torch.no_grad()
    def __call__(self, audio: Tensor) -> Tensor:
        """(batch, 1, samples) -> (batch, windows, 2 D)

        Raises:
            ValueError: the audio is shorter than two frames.
        """
        if audio.shape[-1] < 2 * self.hop_length:
            raise ValueError(
                f"{audio.shape[-1] / self.sample_rate:.3g} s is too short for {self.name}, which needs "
                f"{2 * self.hop_length / self.sample_rate:.3g} s."
            )
        latent = self.encode(audio).float().mT  # (B, frames, D)
        windows = one_second_windows(latent, max(2, self.sample_rate // self.hop_length))
        return torch.stack([torch.cat([w.mean(1), w.std(1, correction=0)], dim=-1) for w in windows], dim=1)


def one_second_windows(frames: Tensor, frames_a_second: int) -> list[Tensor]:
    """(batch, frames, d) cut into windows of a second; what is left at the end is dropped, unless it is all there is."""
    whole = frames.shape[1] // frames_a_second
    if whole == 0:
        return [frames]
    return list(frames[:, : whole * frames_a_second].chunk(whole, dim=1))


def _statistics(level: Tensor) -> Tensor:
    """(batch, frames, bands) -> (batch, 3 bands)"""
    change = level.diff(dim=1)
    rise, fall = (part.square().mean(1).sqrt() for part in (change.clamp_min(0), change.clamp_max(0)))
    return torch.cat([level.mean(1), 2 * level.std(1, correction=0), 4 * (rise - fall)], dim=-1)
