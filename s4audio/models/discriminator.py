"""What an adversarial training sets against a generator: a network that tells recordings from what was made of them."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from s4audio.losses import stft

COMPRESSION = 0.3  # the power to which magnitudes are raised; without, few spots of a spectrum are large enough to be seen


class SpectrogramDiscriminator(nn.Module):
    """Scores of every spot of a spectrogram, real and imaginary part, by convolutions over time and frequency.

    Magnitudes are compressed, phases kept.

    Args:
        n_fft: window in samples; frames advance by a quarter of it.
        width: channels of the hidden layers.

    Source: Défossez et al. 2022, "High fidelity neural audio compression", section 3.4; the compression is ours.
    """

    def __init__(self, n_fft: int, width: int) -> None:
        super().__init__()
        self.n_fft = n_fft
        # Kernels are (time, frequency); the dilations see farther in time, the strides halve the frequencies.
        hidden = [weight_norm(nn.Conv2d(2, width, (3, 9), padding=(1, 4)))]
        for dilation in (1, 2, 4):
            hidden.append(
                weight_norm(nn.Conv2d(width, width, (3, 9), (1, 2), padding=(dilation, 4), dilation=(dilation, 1)))
            )
        hidden.append(weight_norm(nn.Conv2d(width, width, 3, padding=1)))
        self.hidden = nn.ModuleList(hidden)
        self.score = weight_norm(nn.Conv2d(width, 1, 3, padding=1))

    def forward(self, audio: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(B, 1, T) -> scores (B, 1, frames, bands), and the features of each hidden layer (B, width, frames, bands)"""
        with torch.autocast(audio.device.type, enabled=False):
            spectrum = stft(audio.float(), self.n_fft) * (8 / (3 * self.n_fft)) ** 0.5  # as loud as the audio: Hann's power
            power = spectrum.real.square() + spectrum.imag.square()
            spectrum = spectrum * (power + 1e-6) ** ((COMPRESSION - 1) / 2)
        u = torch.view_as_real(spectrum[:, 0]).permute(0, 3, 2, 1)  # (B, 2, frames, n_fft / 2 + 1)
        features = []
        for layer in self.hidden:
            u = F.leaky_relu(layer(u), 0.2)
            features.append(u)
        return self.score(u), features


class Discriminator(nn.Module):
    """A `SpectrogramDiscriminator` for each of several window sizes; channels of audio are judged one by one.

    Args:
        sizes: windows in samples.
        width: channels of the hidden layers.

    Raises:
        ValueError: there is no window, one is no multiple of 4 samples, or width is not positive.

    Source: as SpectrogramDiscriminator.
    """

    def __init__(self, sizes: Sequence[int] = (2048, 1024, 512, 256, 128), width: int = 16) -> None:
        super().__init__()
        if not sizes or any(size < 4 or size % 4 for size in sizes) or width < 1:
            raise ValueError(
                f"sizes is {list(sizes)} and width {width}; wanted one window or more, each a multiple of 4 samples, and a "
                "width of at least 1."
            )
        self.of_sizes = nn.ModuleList(SpectrogramDiscriminator(size, width) for size in sizes)

    def forward(self, audio: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """(B, channels, T) -> the scores of each window size, and the features of all hidden layers"""
        mono = audio.flatten(0, 1).unsqueeze(1)
        judged = [of_size(mono) for of_size in self.of_sizes]
        return [scores for scores, _ in judged], [feature for _, features in judged for feature in features]
