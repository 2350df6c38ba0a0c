"""Autoencoders of raw waveforms made of S4D layers.

* `S4DAutoencoder`: reference system 4, three small layers around a factor of two in time. Its norms run over the whole
  clip, so it cannot stream.
* `CausalAutoencoder`: stages of S4D blocks with any strides; what it learned as a convolution it streams in blocks.

Both are (batch, channels, samples) in and out, for every length, with `encode` and `decode` in between.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from s4audio.layers import S4D, CausalConv1d, CausalConvTranspose1d, Chain, GatedBlock
from s4audio.losses import LOSSES

Generators = torch.Generator | Sequence[torch.Generator] | None


def noise(shape: Sequence[int], generator: Generators, draw: Callable[..., Tensor] = torch.randn) -> Tensor:
    """Standard normal numbers, or those that `draw` draws, of a shape whose first entry is the batch, on the CPU.

    With one generator per clip, the noise of a clip depends on its own generator alone, not on its place in a batch.

    Raises:
        ValueError: it is no generator, or there are several, but not one per clip.
    """
    several = generator if isinstance(generator, Sequence) else [generator]
    if generator is not None and not all(isinstance(one, torch.Generator) for one in several):
        raise ValueError(f"generator is {generator!r}; wanted torch.Generator().manual_seed(0), or a list, one per clip.")
    if isinstance(generator, Sequence):
        if len(generator) != shape[0]:
            raise ValueError(
                f"there are {len(generator)} generators for a batch of {shape[0]}; wanted one, or one per clip."
            )
        return torch.stack([draw(tuple(shape[1:]), generator=one) for one in generator])
    return draw(tuple(shape), generator=generator)


def within_full_scale(audio: Tensor) -> Tensor:
    """(B, channels, T), and what would go beyond full scale, and be clipped in a file, quieter as a whole."""
    return audio / audio.abs().amax((1, 2), keepdim=True).clamp_min(1)


class WaveformAutoencoder(nn.Module, ABC):
    """What a generator offers, from `encode` and `decode`; they are the two autoencoders' own."""

    sample_rate: int
    channels: int
    hop_length: int
    latent_channels: int
    losses: Sequence[str]

    @abstractmethod
    def encode(self, audio: Tensor) -> Tensor:
        """(B, channels, T) -> latent (B, D, ceil(T / hop_length))"""

    @abstractmethod
    def decode(self, latent: Tensor, num_samples: int | None = None) -> Tensor:
        """Latent (B, D, F) -> (B, channels, F hop_length), cut to num_samples if that is given."""

    def forward(self, audio: Tensor) -> Tensor:
        """(B, channels, T) -> (B, channels, T)"""
        return self.decode(self.encode(audio), audio.shape[-1])

    def reconstruct(self, audio: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """A training pass: (B, channels, T) again, and the named losses that are not of the waveform."""
        return self(audio), {}

    def estimate_and_losses(self, audio: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """A training pass: (B, channels, T) again, and all losses, first the reconstruction's, as named at construction."""
        estimate, others = self.reconstruct(audio)
        return estimate, {**{name: LOSSES[name](estimate, audio, self.sample_rate) for name in self.losses}, **others}

    def training_losses(self, audio: Tensor, label: Tensor | None = None) -> dict[str, Tensor]:
        """The losses of `estimate_and_losses`; a label changes nothing."""
        return self.estimate_and_losses(audio)[1]

    def vary(self, audio: Tensor, strength: float, generator: Generators = None) -> Tensor:
        """The clips again with noise mixed into the latent.

        Args:
            audio: (B, channels, T).
            strength: 0 reconstructs; s keeps sqrt(1 - s^2) of the latent's deviation from its mean and adds noise of s times
                its size, channel by channel, so that the size stays; 1 keeps only the mean.
            generator: one, or one per clip.

        Raises:
            ValueError: strength is outside [0, 1], or the audio is not what is wanted.
        """
        check_audio(audio, self.channels, next(self.parameters()).dtype)
        if not 0 <= strength <= 1:
            raise ValueError(f"the variation is {strength}; wanted 0 (reconstruction) to 1 (only noise).")
        latent = self.encode(audio)
        if strength == 0:
            return self.decode(latent, audio.shape[-1])
        spread, mean = torch.std_mean(latent, dim=-1, correction=0, keepdim=True)
        fresh = noise(latent.shape, generator).to(latent) * spread
        return self.decode(mean + (1 - strength**2) ** 0.5 * (latent - mean) + strength * fresh, audio.shape[-1])


class _ClipNorm(nn.Module):
    """Normalizes each channel over the whole clip, then scales and shifts it; the reference's norm, at any length."""

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))

    def forward(self, u: Tensor) -> Tensor:
        return F.layer_norm(u, u.shape[-1:]) * self.weight.unsqueeze(-1) + self.bias.unsqueeze(-1)


class S4DAutoencoder(WaveformAutoencoder):
    """Reference system 4, for any length and sample rate.

    norm -> S4D -> Conv(1 -> 2, stride 2) -> norm -> S4D -> GELU | norm -> ConvTranspose(2 -> 1, stride 2) -> norm -> the
    first S4D again -> GELU, with `|` where the latent is. The norms run over the whole clip: it cannot stream.

    Args:
        sample_rate: of the audio it is trained on, in Hz.
        d_state: real state size of each channel. The original found more than 20 unstable.
        final_gelu: keep the original's last GELU. It cannot go below -0.17, so the negative half of a louder wave is lost;
            False leaves it out.
        channels: of the audio.
        losses: names of LOSSES; the original's is mse.
        discretization: one of ssm.DISCRETIZATIONS.
        init: one of ssm.INITS.

    Raises:
        ValueError: an unknown loss, or what S4D refuses.

    Source: reference system 4.
    """

    def __init__(
        self,
        sample_rate: int,
        d_state: int = 10,
        *,
        final_gelu: bool = True,
        channels: int = 1,
        losses: Sequence[str] = ("mse",),
        discretization: str = "zoh",
        init: str = "lin",
    ) -> None:
        super().__init__()
        check_losses(losses)
        check_sample_rate(sample_rate)
        self.sample_rate, self.d_state, self.final_gelu, self.channels = sample_rate, d_state, final_gelu, channels
        self.losses, self.discretization, self.init = tuple(losses), discretization, init
        self.hop_length, self.latent_channels = 2, 2 * channels
        self.norm_in = _ClipNorm(channels)
        self.outer = S4D(channels, d_state, init=init, discretization=discretization)
        self.down = nn.Conv1d(channels, 2 * channels, 2, stride=2)
        self.norm_down = _ClipNorm(2 * channels)
        self.inner = S4D(2 * channels, d_state, init=init, discretization=discretization)
        self.norm_latent = _ClipNorm(2 * channels)
        self.up = nn.ConvTranspose1d(2 * channels, channels, 2, stride=2)
        self.norm_out = _ClipNorm(channels)

    def encode(self, audio: Tensor) -> Tensor:
        """(B, channels, T) -> latent (B, 2 channels, ceil(T / 2))"""
        x = self.outer(self.norm_in(audio))
        x = self.down(F.pad(x, (0, x.shape[-1] % 2)))
        return F.gelu(self.inner(self.norm_down(x)))

    def decode(self, latent: Tensor, num_samples: int | None = None) -> Tensor:
        """Latent (B, 2 channels, F) -> (B, channels, 2 F), cut to num_samples if that is given."""
        x = self.up(self.norm_latent(latent))[..., :num_samples]
        x = self.outer(self.norm_out(x))
        return F.gelu(x) if self.final_gelu else x

    @torch.no_grad()
    def sample(
        self, batch_size: int, num_samples: int, *, label: Tensor | None = None, generator: Generators = None
    ) -> Tensor:
        """(B, channels, num_samples) from white noise in place of audio, as the original; never beyond full scale."""
        check_counts(batch_size=batch_size, num_samples=num_samples)
        return within_full_scale(self(noise((batch_size, self.channels, num_samples), generator).to(self.outer.D)))

    def initial_state(self, batch_size: int) -> tuple:
        """Refuses: the norms need the whole clip."""
        raise RuntimeError(
            "S4DAutoencoder normalizes over the whole clip, so it hears the future and cannot stream; "
            "use CausalAutoencoder for streaming."
        )


class AutoencoderState(NamedTuple):
    """What a causal autoencoder remembers between blocks."""

    encoder: tuple
    decoder: tuple


class CausalAutoencoder(WaveformAutoencoder):
    """Causal S4D autoencoder: a stem, stages of gated S4D blocks between strided convolutions, and the mirror image back.

    Frame j of the latent has heard the samples up to (j + 1) hop_length - 1 and sample t of the output the frames up to
    t // hop_length: streaming is delayed by hop_length - 1 samples at most, and no sample hears beyond its own frame. With
    `bidirectional`, which is not causal at all, every frame hears the whole clip, before and after; that cannot stream.

    Args:
        sample_rate: of the audio it is trained on, in Hz.
        strides: downsampling factors, outermost first; hop_length is their product.
        widths: channels of each stage, outermost first; one more than strides.
        latent_channels: D; the latent holds D * sample_rate / hop_length numbers a second.
        num_blocks: S4D blocks of each stage, outermost first, in the encoder and again in the decoder; one number for all.
        d_state: real state size of each channel.
        channels: of the audio.
        losses: names of LOSSES.
        discretization: one of ssm.DISCRETIZATIONS.
        init: one of ssm.INITS.
        dt_min: smallest step size at initialization, in samples of the layer's own rate.
        dt_max: largest step size at initialization.
        bidirectional: whether each S4D also runs backwards in time.

    Raises:
        ValueError: widths, strides and num_blocks that do not fit, an unknown loss, or what S4D refuses.

    Source: ours; strided encoders of waveforms as in Défossez et al. 2022, "High fidelity neural audio compression".
    """

    def __init__(
        self,
        sample_rate: int,
        *,
        strides: Sequence[int] = (2, 4, 4),
        widths: Sequence[int] = (16, 32, 64, 64),
        latent_channels: int = 16,
        num_blocks: int | Sequence[int] = 1,
        d_state: int = 64,
        channels: int = 1,
        losses: Sequence[str] = ("l1", "stft"),
        discretization: str = "zoh",
        init: str = "lin",
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        bidirectional: bool = False,
    ) -> None:
        super().__init__()
        check_losses(losses)
        check_sample_rate(sample_rate)
        check_stages(widths, strides)
        depths = blocks_of_stages(num_blocks, widths)
        if min(*widths, *strides, latent_channels, channels) < 1:
            raise ValueError(
                f"widths {list(widths)}, strides {list(strides)}, latent_channels {latent_channels} and channels {channels} "
                "must all be at least 1."
            )
        self.sample_rate, self.strides, self.widths = sample_rate, tuple(strides), tuple(widths)
        self.latent_channels, self.d_state, self.channels = latent_channels, d_state, channels
        self.num_blocks = num_blocks if isinstance(num_blocks, int) else tuple(num_blocks)
        self.losses, self.discretization, self.init = tuple(losses), discretization, init
        self.dt_min, self.dt_max, self.bidirectional = dt_min, dt_max, bidirectional
        self.hop_length = 1
        for stride in strides:
            self.hop_length *= stride

        def stage(index: int) -> list[nn.Module]:
            layer = partial(
                S4D, widths[index], d_state, init=init, discretization=discretization, dt_min=dt_min, dt_max=dt_max,
                bidirectional=bidirectional,
            )  # fmt: skip
            return [GatedBlock(layer()) for _ in range(depths[index])]

        innermost = len(strides)
        encoder: list[nn.Module] = [CausalConv1d(channels, widths[0], 7)]
        decoder: list[nn.Module] = [nn.Conv1d(latent_channels, widths[-1], 1), *stage(innermost)]
        for index, stride in enumerate(strides):
            encoder += [*stage(index), CausalConv1d(widths[index], widths[index + 1], 2 * stride, stride)]
        for index, stride in reversed(list(enumerate(strides))):
            decoder += [CausalConvTranspose1d(widths[index + 1], widths[index], 2 * stride, stride), *stage(index)]
        self.encoder = Chain(*encoder, *stage(innermost), nn.Conv1d(widths[-1], latent_channels, 1))
        # No norm before the last convolution: it would take the loudness away that the convolution must give back.
        self.decoder = Chain(*decoder, CausalConv1d(widths[0], channels, 7))
        self.latent_mean: Tensor
        self.latent_std: Tensor
        self.register_buffer("latent_mean", torch.zeros(latent_channels, 1))
        self.num_batches: Tensor
        self.register_buffer("latent_std", torch.ones(latent_channels, 1))
        self.register_buffer("num_batches", torch.zeros(()))

    def encode(self, audio: Tensor) -> Tensor:
        """(B, channels, T) -> latent (B, D, ceil(T / hop_length))"""
        return self.encoder(F.pad(audio, (0, -audio.shape[-1] % self.hop_length)))

    def decode(self, latent: Tensor, num_samples: int | None = None) -> Tensor:
        """Latent (B, D, F) -> (B, channels, F hop_length), cut to num_samples if that is given."""
        return self.decoder(latent)[..., :num_samples]

    def reconstruct(self, audio: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """As of WaveformAutoencoder; also follows the latent's mean and size, for `sample`."""
        latent = self.encode(audio)
        if self.training:
            with torch.no_grad():
                std, mean = torch.std_mean(latent.to(self.latent_std.dtype), dim=(0, 2), correction=0)
                self.num_batches += 1
                weight = (1 / self.num_batches).clamp_min(0.01)  # the mean of all batches, then of about the last hundred
                self.latent_mean.lerp_(mean.unsqueeze(-1), weight)
                self.latent_std.lerp_(std.unsqueeze(-1), weight)
        return self.decode(latent, audio.shape[-1]), {}

    @torch.no_grad()
    def sample(
        self, batch_size: int, num_samples: int, *, label: Tensor | None = None, generator: Generators = None
    ) -> Tensor:
        """(B, channels, num_samples) from white noise with each latent channel's mean and size; never beyond full scale."""
        check_counts(batch_size=batch_size, num_samples=num_samples)
        shape = (batch_size, self.latent_channels, -(-num_samples // self.hop_length))
        latent = noise(shape, generator).to(self.latent_mean) * self.latent_std + self.latent_mean
        return within_full_scale(self.decode(latent, num_samples))

    def initial_state(self, batch_size: int) -> AutoencoderState:
        """The state before the first sample."""
        return AutoencoderState(self.encoder.initial_state(batch_size), self.decoder.initial_state(batch_size))

    def stream(self, audio: Tensor, state: AutoencoderState) -> tuple[Tensor, AutoencoderState]:
        """A block of any length -> the samples of every frame that is complete.

        The outputs of all blocks in a row are `forward` of the whole, less what an incomplete last frame still holds back;
        hop_length - 1 zeros at the end bring it out.
        """
        latent, encoder = self.encoder.stream(audio, state.encoder)
        audio, decoder = self.decoder.stream(latent, state.decoder)
        return audio, AutoencoderState(encoder, decoder)

    def step(self, audio: Tensor, state: AutoencoderState) -> tuple[Tensor, AutoencoderState]:
        """One sample, through the recurrences: (B, channels, 1) -> nothing, or hop_length samples."""
        latent, encoder = self.encoder.step(audio, state.encoder)
        audio, decoder = self.decoder.step(latent, state.decoder)
        return audio, AutoencoderState(encoder, decoder)


class StreamState(NamedTuple):
    """Where a stream stands between blocks: all that it takes to go on."""

    model: AutoencoderState
    waiting: Tensor  # (channels, samples) of an incomplete block
    owed: int  # samples that the model has taken and not given back, since their frame is incomplete


def begin_stream(model: CausalAutoencoder) -> StreamState:
    """The state before the first sample.

    Raises:
        RuntimeError: the model cannot stream.
    """
    return StreamState(model.initial_state(1), model.latent_mean.new_zeros(model.channels, 0), 0)


@torch.no_grad()
def advance_stream(
    model: CausalAutoencoder, audio: Tensor, state: StreamState, block: int | None = None
) -> tuple[Tensor, StreamState]:
    """The samples that are complete once `audio` has come in, and the state after it.

    Args:
        model: one that streams.
        audio: (channels, samples), any number of them.
        state: of `begin_stream`, or what the last call returned.
        block: how many samples the model is given at a time; fewer wait in the state. Then the output is bit for bit the
            same in whatever pieces the audio comes. None gives it what is there; then the output is the same to rounding.

    Returns:
        (channels, samples), none or many, that follow those of the last call; and the state.
    """
    waiting, after, outputs = torch.cat([state.waiting, audio], dim=-1), state.model, [audio[..., :0]]
    taken = waiting.shape[-1] // block * block if block else waiting.shape[-1]
    for piece in waiting[..., :taken].split(block or taken, dim=-1) if taken else ():
        y, after = model.stream(piece.unsqueeze(0), after)
        outputs.append(y[0])
    output = torch.cat(outputs, dim=-1)
    return output, StreamState(after, waiting[..., taken:].clone(), state.owed + taken - output.shape[-1])


@torch.no_grad()
def finish_stream(model: CausalAutoencoder, state: StreamState) -> Tensor:
    """(channels, samples) that are still to come when the input has ended: with them the output is as long as the input."""
    missing = state.owed + state.waiting.shape[-1]
    if missing == 0:
        return state.waiting
    y, _ = model.stream(F.pad(state.waiting, (0, model.hop_length - 1)).unsqueeze(0), state.model)
    return y[0, :, :missing]


def stream_latency(hop_length: int, block: int) -> int:
    """How many samples after itself a sample comes out, at most, of a stream in blocks of `block` samples.

    It waits for the end of its frame, and the frame for the end of the block that this falls into.

    Example:
        >>> stream_latency(hop_length=16, block=1), stream_latency(hop_length=16, block=1024), stream_latency(16, 10)
        (15, 1023, 23)
    """
    return hop_length - 1 + block - math.gcd(hop_length, block)


def stream_blocks(model: CausalAutoencoder, blocks: Iterable[Tensor]) -> Iterator[Tensor]:
    """`model` of a recording that comes in blocks (channels, samples) of any lengths; the output is as long as the input.

    Blocks are taken and given one at a time, so that memory does not grow with the recording.

    Raises:
        RuntimeError: the model cannot stream.
    """
    state = begin_stream(model)
    for block in blocks:
        y, state = advance_stream(model, block, state)
        if y.shape[-1]:
            yield y
    rest = finish_stream(model, state)
    if rest.shape[-1]:
        yield rest


def check_losses(losses: Sequence[str]) -> None:
    """Raises: ValueError, if a name is none of LOSSES, or there is none."""
    unknown = [name for name in losses if name not in LOSSES]
    if unknown or not losses:
        raise ValueError(f"losses is {list(losses)}; wanted one or more of {', '.join(LOSSES)}.")


def check_sample_rate(sample_rate: int) -> None:
    """Raises: ValueError, if it is not a whole number of Hz."""
    if not isinstance(sample_rate, int) or sample_rate < 1:
        raise ValueError(f"sample_rate is {sample_rate!r}; wanted a whole number of Hz, at least 1.")


def check_classes(classes: Sequence[str]) -> None:
    """Raises: ValueError, if they are no list of names, each once."""
    if isinstance(classes, str) or not all(isinstance(name, str) for name in classes) or len(set(classes)) < len(classes):
        raise ValueError(f"classes is {classes!r}; wanted a list of names, each once.")


def check_counts(**counts: int) -> None:
    """Raises: ValueError, if one of them is not a whole number of at least 1."""
    for name, value in counts.items():
        if not isinstance(value, Integral) or value < 1:
            raise ValueError(f"{name} is {value!r}; wanted a whole number, at least 1.")


def check_audio(audio: Tensor, channels: int, dtype: torch.dtype | None = None) -> None:
    """Raises: ValueError, if it is no tensor (B, channels, T) of finite floating-point numbers, of a type, or is empty."""
    if not isinstance(audio, Tensor) or not audio.is_floating_point() or audio.dtype != (dtype or audio.dtype):
        kind = audio.dtype if isinstance(audio, Tensor) else type(audio).__name__
        wanted = dtype or "floating-point numbers"
        raise ValueError(f"the audio is {kind}; wanted a tensor of {wanted}, with 1 for full scale.")
    if audio.dim() != 3 or audio.shape[1] != channels or not audio.numel():
        raise ValueError(f"the audio has shape {tuple(audio.shape)}; wanted (clips, {channels}, samples), none of them 0.")
    if not audio.isfinite().all():
        raise ValueError("the audio holds samples that are not finite numbers.")


def check_labels(label: Tensor, classes: Sequence[str]) -> None:
    """Raises: ValueError, if it is no row of whole numbers, or one of them is that of no class."""
    if not isinstance(label, Tensor) or label.dim() != 1 or label.is_floating_point():
        given = label.tolist() if isinstance(label, Tensor) else label
        raise ValueError(f"label is {given!r}; wanted a tensor of the numbers of classes, one for each clip.")
    if not classes:
        raise ValueError(f"label is {label.tolist()}, and the model has no classes; leave it out.")
    if label.numel() and not 0 <= int(label.min()) <= int(label.max()) < len(classes):
        raise ValueError(f"label is {label.tolist()}; wanted numbers from 0 to {len(classes) - 1}, of the model's classes.")


def check_stages(widths: Sequence[int], strides: Sequence[int]) -> None:
    """Raises: ValueError, if there is not one width more than strides."""
    if len(widths) != len(strides) + 1:
        raise ValueError(f"widths has {len(widths)} entries and strides {len(strides)}; wanted one width more than strides.")


def blocks_of_stages(num_blocks: int | Sequence[int], widths: Sequence[int]) -> list[int]:
    """How many blocks each stage has, from one number for all or one for each.

    Raises:
        ValueError: there is not one for each width, one is negative, or all are 0.
    """
    depths = [num_blocks] * len(widths) if isinstance(num_blocks, int) else list(num_blocks)
    if len(depths) != len(widths):
        raise ValueError(f"num_blocks has {len(depths)} entries and widths {len(widths)}; wanted one for each width.")
    if min(depths) < 0 or max(depths) == 0:
        raise ValueError(f"num_blocks is {num_blocks}; wanted none below 0, and a block somewhere.")
    return depths
