"""Pictures of audio: the one place that draws. matplotlib is imported when something is drawn, not before."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from s4audio.losses import magnitude

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, ACCENT = "#333333", "#1f6f8b"


def clips_figure(clips: dict[str, Tensor], sample_rate: int) -> "Figure":
    """Waveform and spectrogram of each named clip, one column a clip.

    Args:
        clips: name -> (channels, T) audio; the first channel is drawn.
        sample_rate: in Hz.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0 * len(clips), 4.6), layout="constrained")
    axes = figure.subplots(2, len(clips), squeeze=False, sharex=True, sharey="row", height_ratios=(2, 3))
    for column, (name, audio) in enumerate(clips.items()):
        wave, picture = axes[0, column], axes[1, column]
        samples = audio[0].detach().float().cpu()
        seconds = samples.shape[-1] / sample_rate
        low, high = _envelope(samples)
        time = torch.linspace(0, seconds, low.shape[-1])
        wave.fill_between(time.numpy(), low.numpy(), high.numpy(), color=ACCENT, linewidth=0.3)
        wave.set_ylim(-1.05, 1.05)
        rms_db = 10 * torch.log10(samples.square().mean().clamp_min(1e-12)).item()
        wave.set_title(f"{name}: peak {samples.abs().max().item():.2f}, {rms_db:.1f} dBFS RMS", fontsize=10, color=INK)
        image = picture.imshow(
            _spectrogram_db(samples).numpy(), origin="lower", aspect="auto", cmap="magma", vmin=-90, vmax=0,
            extent=(0, seconds, 0, sample_rate / 2000), interpolation="nearest",
        )  # fmt: skip
        picture.set_xlabel("seconds")
    axes[0, 0].set_ylabel("amplitude")
    axes[1, 0].set_ylabel("kHz")
    figure.colorbar(image, ax=axes[1, :].tolist(), label="dB re a full-scale sine", pad=0.01)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def save_clips_figure(path: str | Path, clips: dict[str, Tensor], sample_rate: int) -> None:
    """`clips_figure` as a PNG file."""
    clips_figure(clips, sample_rate).savefig(path, dpi=100, format="png")


def _envelope(samples: Tensor, points: int = 1200) -> tuple[Tensor, Tensor]:
    """Lowest and highest sample of each of at most `points` stretches."""
    stretch = max(1, samples.shape[-1] // points)
    whole = samples[: samples.shape[-1] // stretch * stretch].reshape(-1, stretch)
    return whole.amin(-1), whole.amax(-1)


def _spectrogram_db(samples: Tensor) -> Tensor:
    """(bins, frames) level against a full-scale sine, at most about 1,000 frames."""
    n_fft = 512
    hop_length = max(n_fft // 4, samples.shape[-1] // 1000)
    return 20 * torch.log10(magnitude(samples, n_fft, hop_length) / (n_fft / 4)).clamp_min(-6)
