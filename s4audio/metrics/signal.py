"""Scores of a signal against its reference, one number per clip: (estimate, reference), each (..., T)."""

import torch
from torch import Tensor

from s4audio.losses import log_mel, magnitude, mel_magnitude


def si_sdr(estimate: Tensor, reference: Tensor) -> Tensor:
    """Scale-invariant signal-to-distortion ratio in dB; higher is better.

    Args:
        estimate: (..., T) audio.
        reference: (..., T) audio at the same rate; a silent reference gives nan, a silent estimate minus infinity.

    Returns:
        (...) one value per signal.

    Raises:
        ValueError: the shapes differ.

    Source: Le Roux et al. 2019, "SDR - half-baked or well done?", equation 3, without removing the mean.
    """
    _check(estimate, reference)
    scale = (estimate * reference).sum(-1, keepdim=True) / reference.square().sum(-1, keepdim=True)
    target = scale * reference
    ratio = target.square().sum(-1) / (estimate - target).square().sum(-1)
    silent = (estimate == 0).all(-1) & ~(reference == 0).all(-1)
    return 10 * torch.log10(torch.where(silent, 0.0, ratio))


def log_spectral_distance(estimate: Tensor, reference: Tensor, n_fft: int = 2048) -> Tensor:
    """Root mean square over frequency of the difference of log power spectra, mean over frames, in dB; lower is better.

    Args:
        estimate: (..., T) audio.
        reference: (..., T) audio at the same rate.
        n_fft: window in samples; frames advance by a quarter of it. Powers are floored at 1e-8 of a unit sample.

    Returns:
        (...) one value per signal.

    Raises:
        ValueError: the shapes differ.

    Source: Gray and Markel 1976, "Distance measures for speech processing"; the framing is ours.
    """
    _check(estimate, reference)
    difference = 20 * torch.log10(magnitude(estimate, n_fft) / magnitude(reference, n_fft))
    return difference.square().mean(-2).sqrt().mean(-1)


def mel_distance(estimate: Tensor, reference: Tensor, sample_rate: int) -> Tensor:
    """Distance of mel spectrograms as the Descript audio codec reports it; lower is better.

    Mean absolute difference of log10 power plus that of magnitude, summed over two resolutions (150 mel bands of windows of
    2048 samples, 80 of 512).

    Args:
        estimate: (..., T) audio.
        reference: (..., T) audio at the same rate.
        sample_rate: in Hz.

    Returns:
        (...) one value per signal.

    Raises:
        ValueError: the shapes differ.
        RuntimeError: torchaudio cannot be imported.

    Source: Kumar et al. 2023, "High-fidelity audio compression with improved RVQGAN", its evaluation.
    """
    _check(estimate, reference)
    total = torch.zeros(estimate.shape[:-1], device=estimate.device)
    for n_mels, n_fft in ((150, 2048), (80, 512)):
        mel_est, mel_ref = (mel_magnitude(audio, sample_rate, n_fft, n_mels) for audio in (estimate, reference))
        log_difference = 2 * (log_mel(mel_est) - log_mel(mel_ref))
        total = total + log_difference.abs().mean((-2, -1)) + (mel_est - mel_ref).abs().mean((-2, -1))
    return total


def _check(estimate: Tensor, reference: Tensor) -> None:
    if estimate.shape != reference.shape:
        raise ValueError(
            f"estimate is {tuple(estimate.shape)} and reference {tuple(reference.shape)}; the shapes must agree."
        )
