"""Loss functions on audio (..., T): estimate first, reference second; each returns one number, lower is better."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

STFT_SIZES = (2048, 1024, 512, 256, 128, 64)  # samples; long windows tell pitches apart, short ones place onsets


def mse(estimate: Tensor, reference: Tensor) -> Tensor:
    """Mean squared error."""
    return F.mse_loss(estimate, reference)


def l1(estimate: Tensor, reference: Tensor) -> Tensor:
    """Mean absolute error."""
    return F.l1_loss(estimate, reference)


def magnitude(audio: Tensor, n_fft: int, hop_length: int | None = None) -> Tensor:
    """Magnitudes of the short-time Fourier transform, Hann window, (..., n_fft / 2 + 1, frames), for any length.

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
    # The square root has no gradient at zero; this floor is 100 dB under a full-scale sine in a window of 64.
    power = transform.real.square() + transform.imag.square()
    return power.clamp_min(1e-8).sqrt().reshape(*audio.shape[:-1], *power.shape[-2:])


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
            error, size, floor = norms_over_devices(torch.stack([error, size, size.new_tensor(floor)]))
        convergence = error / size.clamp_min(floor)
        terms.append(convergence + F.l1_loss(S_est.log(), S_ref.log()))
    return torch.stack(terms).mean()


def norms_over_devices(norms: Tensor) -> Tensor:
    """Euclidean norms of what the devices that train together hold, from those of each one's share; with gradients."""
    from torch.distributed.nn.functional import all_reduce

    return all_reduce(norms.square()).sqrt()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mse": mse, "l1": l1, "stft": multi_resolution_stft}
