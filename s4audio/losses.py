"""Loss functions on audio (..., T): estimate first, reference second; each returns one number, lower is better.

Also those of a generator and a discriminator that train against each other, on the discriminator's scores and features.
"""

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from s4audio.audio import mel_filterbank

STFT_SIZES = (2048, 1024, 512, 256, 128, 64)  # samples; long windows tell pitches apart, short ones place onsets
MEL_SIZES = ((32, 5), (64, 10), (128, 20), (256, 40), (512, 80), (1024, 160), (2048, 320))  # window in samples, mel bands


def mse(estimate: Tensor, reference: Tensor) -> Tensor:
    """Mean squared error."""
    return F.mse_loss(estimate, reference)


def l1(estimate: Tensor, reference: Tensor) -> Tensor:
    """Mean absolute error."""
    return F.l1_loss(estimate, reference)


def stft(audio: Tensor, n_fft: int, hop_length: int | None = None) -> Tensor:
    """The short-time Fourier transform, Hann window, complex (..., n_fft / 2 + 1, frames), for any length.

    Args:
        audio: (..., T).
        n_fft: window and transform size in samples.
        hop_length: samples between frames; a quarter of the window if None.
    """
    window = torch.hann_window(n_fft, device=audio.device, dtype=audio.dtype)
    flat = audio.reshape(-1, audio.shape[-1])
    # Padding with zeros, not reflection: a clip may be shorter than the window.
    transform = torch.stft(
        flat, n_fft, hop_length or n_fft // 4, window=window, center=True, pad_mode="constant", return_complex=True
    )
    return transform.reshape(*audio.shape[:-1], *transform.shape[-2:])


def magnitude(audio: Tensor, n_fft: int, hop_length: int | None = None) -> Tensor:
    """Magnitudes of `stft`, at least 1e-4."""
    transform = stft(audio, n_fft, hop_length)
    # The square root has no gradient at zero; this floor is 100 dB under a full-scale sine in a window of 64.
    power = transform.real.square() + transform.imag.square()
    return power.clamp_min(1e-8).sqrt()


def mel_magnitude(audio: Tensor, sample_rate: int, n_fft: int, n_mels: int) -> Tensor:
    """Magnitudes of `stft` in bands of the Slaney mel scale, (..., n_mels, frames), float32 whatever autocast says.

    Raises:
        RuntimeError: torchaudio cannot be imported.
    """
    with torch.autocast(audio.device.type, enabled=False):
        spectrum = magnitude(audio, n_fft)
        return _mel_filters(sample_rate, n_fft, n_mels, spectrum.device, spectrum.dtype) @ spectrum


@cache  # to the device once, and not while a CUDA graph is captured
@torch.inference_mode(False)  # where the first to ask is a validation, they would be of no use to a gradient
def _mel_filters(sample_rate: int, n_fft: int, n_mels: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return mel_filterbank(sample_rate, n_fft, n_mels).mT.contiguous().to(device, dtype)


def log_mel(mel: Tensor) -> Tensor:
    """log10 of mel magnitudes, at least -5."""
    return mel.clamp_min(1e-5).log10()


def multi_resolution_mel(
    estimate: Tensor, reference: Tensor, sample_rate: int, sizes: Sequence[tuple[int, int]] = MEL_SIZES
) -> Tensor:
    """Mean absolute difference of log10 mel magnitudes, summed over windows of 32 samples in 5 bands to 2,048 in 320.

    Frames advance by a quarter of a window.

    Args:
        estimate: (..., T) audio.
        reference: (..., T) audio at the same rate.
        sample_rate: in Hz.
        sizes: windows in samples, and the mel bands of each.

    Raises:
        RuntimeError: torchaudio cannot be imported.

    Source: Kumar et al. 2023, "High-fidelity audio compression with improved RVQGAN", section 3.4; at silence our magnitudes
    have a floor of their own, which the filters of long windows lift to 1.3e-5 at 16 kHz.
    """
    estimate, reference = estimate.float(), reference.float()
    terms = []
    for n_fft, n_mels in sizes:
        mel_est, mel_ref = (mel_magnitude(audio, sample_rate, n_fft, n_mels) for audio in (estimate, reference))
        terms.append(F.l1_loss(log_mel(mel_est), log_mel(mel_ref)))
    return torch.stack(terms).sum()


def multi_resolution_stft(estimate: Tensor, reference: Tensor, sizes: Sequence[int] = STFT_SIZES) -> Tensor:
    """Spectral convergence plus mean absolute log-magnitude difference (natural log), averaged over window sizes.

    Spectral convergence is ||S_ref - S_est|| / ||S_ref|| over the whole batch, in training over that of all devices, with
    ||S_ref|| at least that of magnitudes of 0.01, so that silence cannot blow it up.

    Source: Yamamoto et al. 2020, "Parallel WaveGAN", equations 4 to 6; the sizes are ours.
    """
    estimate, reference = estimate.float(), reference.float()
    terms = []
    for n_fft in sizes:
        S_est, S_ref = magnitude(estimate, n_fft), magnitude(reference, n_fft)
        floor = 0.01 * S_ref.numel() ** 0.5
        error, size = torch.linalg.vector_norm(S_ref - S_est), torch.linalg.vector_norm(S_ref)
        if estimate.requires_grad and torch.distributed.is_available() and torch.distributed.is_initialized():
            error, size, floor = norms_over_devices(torch.stack([error, size, torch.full_like(size, floor)]))
        convergence = error / size.clamp_min(floor)
        terms.append(convergence + F.l1_loss(S_est.log(), S_ref.log()))
    return torch.stack(terms).mean()


def norms_over_devices(norms: Tensor) -> Tensor:
    """Euclidean norms of what the devices that train together hold, from those of each one's share; with gradients."""
    from torch.distributed.nn.functional import all_reduce

    return all_reduce(norms.square()).sqrt()


def discriminator_loss(real: Sequence[Tensor], made: Sequence[Tensor]) -> Tensor:
    """Least squares, mean over discriminators: scores of recordings should be 1 and those of what was made 0.

    Source: Mao et al. 2017, "Least squares generative adversarial networks", equation 2, with a = 0 and b = 1.
    """
    terms = [(1 - r.float()).square().mean() + m.float().square().mean() for r, m in zip(real, made, strict=True)]
    return torch.stack(terms).mean()


def adversarial_loss(made: Sequence[Tensor]) -> Tensor:
    """Least squares, mean over discriminators: the generator wants scores of 1 for what it made.

    Source: as `discriminator_loss`, with c = 1.
    """
    return torch.stack([(1 - scores.float()).square().mean() for scores in made]).mean()


def discriminator_accuracy(real: Sequence[Tensor], made: Sequence[Tensor]) -> Tensor:
    """Share of the scores on the right side of 0.5, mean over discriminators: 1 sees through everything, 0.5 guesses."""
    terms = [((r > 0.5).float().mean() + (m <= 0.5).float().mean()) / 2 for r, m in zip(real, made, strict=True)]
    return torch.stack(terms).mean()


def feature_loss(real: Sequence[Tensor], made: Sequence[Tensor]) -> Tensor:
    """Mean over a discriminator's layers of the absolute difference of features, relative to those of the recording.

    Source: Défossez et al. 2022, "High fidelity neural audio compression", equation 5.
    """
    pairs = [(r.float(), m.float()) for r, m in zip(real, made, strict=True)]
    return torch.stack([F.l1_loss(m, r) / r.abs().mean().clamp_min(1e-5) for r, m in pairs]).mean()


LOSSES: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {  # of estimate, reference and their sample rate in Hz
    "mse": lambda estimate, reference, _: mse(estimate, reference),
    "l1": lambda estimate, reference, _: l1(estimate, reference),
    "stft": lambda estimate, reference, _: multi_resolution_stft(estimate, reference),
    "mel": multi_resolution_mel,
}
