"""Variational autoencoders of raw waveforms: the latent of a clip is a Gaussian, and the prior a standard normal.

* `ConvVAE`: of convolutions; the baseline of reference system 4, and its judge.
* `S4DVAE`: the encoder and decoder of `CausalAutoencoder`, which stream.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from s4audio.layers import ChannelNorm, GatedBlock, Residual
from s4audio.models.autoencoder import (
    CausalAutoencoder,
    Generators,
    WaveformAutoencoder,
    check_counts,
    check_losses,
    check_sample_rate,
    check_stages,
    noise,
    within_full_scale,
)

LOG_VARIANCE = (-12.0, 4.0)  # beyond these a posterior is a point or noise, and its exponential a danger


class VariationalAutoencoder(WaveformAutoencoder):
    """What a VAE is beside its networks: a draw from the posterior of `posterior`, its distance to the prior, and samples.

    Source: Kingma and Welling 2014, "Auto-encoding variational Bayes"; free bits from Kingma et al. 2016, "Improved
    variational inference with inverse autoregressive flow".
    """

    latent_channels: int
    free_nats: float

    @abstractmethod
    def posterior(self, audio: Tensor) -> tuple[Tensor, Tensor]:
        """(B, channels, T) -> mean and log variance of the latent, each (B, D, ceil(T / hop_length))"""

    def reconstruct(self, audio: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(B, channels, T) from a draw of the posterior, and its `kl` to the prior, in nats per latent number."""
        mean, log_variance = (v.to(audio.dtype) for v in self.posterior(audio))  # as exact as the audio, under autocast too
        fixed = None if self.training else torch.Generator().manual_seed(0)  # validation: the same noise every time
        drawn = noise(mean.shape, fixed).to(mean) if fixed else torch.randn_like(mean)
        latent = mean + drawn * (0.5 * log_variance).exp()
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean((0, 2))  # (D,)
        return self.decode(latent, audio.shape[-1]), {"kl": kl.clamp_min(self.free_nats).mean()}

    @torch.no_grad()
    def active_dimensions(self, audio: Tensor) -> int:
        """How many latent channels say something about these clips: whose posterior mean has a variance above 0.01.

        Source: Burda et al. 2016, "Importance weighted autoencoders", section 5.2.
        """
        return int((self.encode(audio).var((0, 2)) > 0.01).sum())

    @torch.no_grad()
    def sample(
        self, batch_size: int, num_samples: int, *, label: Tensor | None = None, generator: Generators = None
    ) -> Tensor:
        """(B, channels, num_samples) from a latent drawn from the prior; never beyond full scale."""
        check_counts(batch_size=batch_size, num_samples=num_samples)
        shape = (batch_size, self.latent_channels, -(-num_samples // self.hop_length))
        return within_full_scale(self.decode(noise(shape, generator).to(next(self.parameters())), num_samples))


class ConvVAE(VariationalAutoencoder):
    """Convolutional VAE: ConvNeXt blocks between strided convolutions, a Gaussian for each latent number, and back.

    The convolutions look ahead as far as back: it does not stream.

    Args:
        sample_rate: of the audio it is trained on, in Hz.
        strides: downsampling factors of 2 or more, outermost first; hop_length is their product.
        widths: channels of each stage, outermost first; one more than strides.
        latent_channels: D; the latent holds D * sample_rate / hop_length numbers a second.
        num_blocks: ConvNeXt blocks of each stage but the outermost, in the encoder and again in the decoder.
        free_nats: what a latent channel may say for nothing, in nats a frame: below it the `kl` loss does not push.
        channels: of the audio.
        losses: names of LOSSES; `kl` comes with them.

    Raises:
        ValueError: widths and strides that do not fit, an argument outside its range, or an unknown loss.

    Source: as VariationalAutoencoder; the blocks from Liu et al. 2022, "A ConvNet for the 2020s".
    """

    def __init__(
        self,
        sample_rate: int,
        *,
        strides: Sequence[int] = (4, 4, 8),
        widths: Sequence[int] = (32, 96, 192, 192),
        latent_channels: int = 32,
        num_blocks: int = 2,
        free_nats: float = 0.05,
        channels: int = 1,
        losses: Sequence[str] = ("l1", "stft"),
    ) -> None:
        super().__init__()
        check_losses(losses)
        check_sample_rate(sample_rate)
        check_stages(widths, strides)
        if min(strides) < 2 or min(*widths, latent_channels, channels, num_blocks) < 1 or free_nats < 0:
            raise ValueError(
                f"strides {list(strides)} must be at least 2, widths {list(widths)}, latent_channels {latent_channels}, "
                f"num_blocks {num_blocks} and channels {channels} at least 1, and free_nats {free_nats} not negative."
            )
        self.sample_rate, self.strides, self.widths = sample_rate, tuple(strides), tuple(widths)
        self.latent_channels, self.num_blocks, self.free_nats = latent_channels, num_blocks, free_nats
        self.channels, self.losses = channels, tuple(losses)
        self.hop_length = math.prod(strides)
        encoder: list[nn.Module] = [nn.Conv1d(channels, widths[0], 7, padding=3), nn.GELU()]
        decoder: list[nn.Module] = [nn.Conv1d(latent_channels, widths[-1], 7, padding=3)]
        for width, wider, stride in zip(widths, widths[1:], strides, strict=False):
            down = nn.Conv1d(width, wider, 2 * stride, stride, padding=-(-stride // 2))
            encoder += [down, *_blocks(wider, num_blocks)]
        for width, wider, stride in reversed(list(zip(widths, widths[1:], strides, strict=False))):
            up = nn.ConvTranspose1d(wider, width, 2 * stride, stride, padding=-(-stride // 2), output_padding=stride % 2)
            decoder += [*_blocks(wider, num_blocks), up]
        self.encoder = nn.Sequential(*encoder, nn.Conv1d(widths[-1], 2 * latent_channels, 1))
        self.decoder = nn.Sequential(*decoder, nn.GELU(), nn.Conv1d(widths[0], channels, 7, padding=3))

    def posterior(self, audio: Tensor) -> tuple[Tensor, Tensor]:
        """(B, channels, T) -> mean and log variance of the latent, each (B, D, ceil(T / hop_length))"""
        mean, log_variance = self.encoder(F.pad(audio, (0, -audio.shape[-1] % self.hop_length))).chunk(2, dim=1)
        return mean, log_variance.clamp(*LOG_VARIANCE)

    def encode(self, audio: Tensor) -> Tensor:
        """(B, channels, T) -> the posterior's mean (B, D, ceil(T / hop_length))"""
        return self.posterior(audio)[0]

    def decode(self, latent: Tensor, num_samples: int | None = None) -> Tensor:
        """Latent (B, D, F) -> (B, channels, F hop_length), cut to num_samples if that is given."""
        return self.decoder(latent)[..., :num_samples]


class S4DVAE(VariationalAutoencoder, CausalAutoencoder):
    """The encoder and decoder of `CausalAutoencoder`, with a Gaussian for each latent number.

    What keeps it from exploding or vanishing: every block begins as its shortcut, so that a waveform comes through from the
    first step, its phase too, where random state spaces of a long memory would drown it; the posterior is read from channels
    that are normalized frame by frame, however much the blocks before have added up; its mean is normalized over batch and
    time, channel by channel, so that a latent begins with a variance of 1 and is heard above the noise of the draw; the log
    variance begins in the middle of its bounds, and comes near them so gently that the `kl` can bring it back; and a channel
    may say `free_nats` for nothing. The task does its part: a `kl` that warms up, a learning rate of their own for the state
    spaces' dynamics, clipping.

    It streams if it is not bidirectional, by the mean of the posterior.

    Args:
        sample_rate: as all of what follows but free_nats, of CausalAutoencoder.
        free_nats: what a latent channel may say for nothing, in nats a frame: below it the `kl` loss does not push.

    Raises:
        ValueError: as CausalAutoencoder; free_nats is negative.

    Source: as VariationalAutoencoder; the norm of the mean from Zhu et al. 2020, "A batch normalized inference network keeps
    the KL vanishing away", with a scale that is learned; the network is ours.
    """

    def __init__(
        self,
        sample_rate: int,
        *,
        strides: Sequence[int] = (4, 4, 8),
        widths: Sequence[int] = (32, 96, 192, 192),
        latent_channels: int = 32,
        num_blocks: int | Sequence[int] = (0, 2, 4, 4),
        d_state: int = 32,
        free_nats: float = 0.05,
        channels: int = 1,
        losses: Sequence[str] = ("l1", "stft"),
        discretization: str = "zoh",
        init: str = "lin",
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        bidirectional: bool = False,
    ) -> None:
        super().__init__(
            sample_rate, strides=strides, widths=widths, latent_channels=latent_channels, num_blocks=num_blocks,
            d_state=d_state, channels=channels, losses=losses, discretization=discretization, init=init, dt_min=dt_min,
            dt_max=dt_max, bidirectional=bidirectional,
        )  # fmt: skip
        if free_nats < 0:
            raise ValueError(f"free_nats is {free_nats}; wanted 0 or more.")
        self.free_nats = free_nats
        for block in self.modules():
            if isinstance(block, GatedBlock):
                block.begin_as_shortcut()
        self.encoder.insert(-1, ChannelNorm(widths[-1]))  # in front of the Linear that makes the mean
        self.encoder.append(nn.BatchNorm1d(latent_channels))
        self.log_variance = nn.Conv1d(widths[-1], latent_channels, 1)  # before it is bounded
        for parameter in self.log_variance.parameters():
            nn.init.zeros_(parameter)

    def posterior(self, audio: Tensor) -> tuple[Tensor, Tensor]:
        """(B, channels, T) -> mean and log variance of the latent, each (B, D, ceil(T / hop_length))"""
        heard = self.encoder[:-2](F.pad(audio, (0, -audio.shape[-1] % self.hop_length)))
        low, high = LOG_VARIANCE
        middle, reach = (low + high) / 2, (high - low) / 2
        return self.encoder[-2:](heard), middle + reach * torch.tanh(self.log_variance(heard) / reach)


def _blocks(width: int, num_blocks: int) -> list[nn.Module]:
    """ConvNeXt blocks: a convolution of each channel over 7 samples, norm, and two Linears with GELU, around a shortcut."""
    return [
        Residual(
            nn.Conv1d(width, width, 7, padding=3, groups=width), ChannelNorm(width),
            nn.Conv1d(width, 3 * width, 1), nn.GELU(), nn.Conv1d(3 * width, width, 1),
        )
        for _ in range(num_blocks)
    ]  # fmt: skip
