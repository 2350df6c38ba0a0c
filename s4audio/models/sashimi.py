"""SaShiMi: an autoregressive model of raw audio. Each sample is drawn from what the state spaces make of all before it.

Audio is quantized to `num_levels` codes; the model gives each code's probability, and so an exact likelihood of any
recording. It is trained in parallel, or in chunks with the state carried over, and generates by stepping the same weights
sample by sample (stepping.py). Tiers of blocks run at lower and lower rates, each inside the one before (layers.Pooled).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from s4audio.audio import check_quantization, dequantize, quantize
from s4audio.layers import Chain, ChannelNorm, FeedForward, GatedBlock, Pooled
from s4audio.models.autoencoder import (
    Generators,
    check_audio,
    check_classes,
    check_counts,
    check_labels,
    check_sample_rate,
    noise,
)
from s4audio.models.classifier import LAYERS
from s4audio.models.stepping import Stepper

CHECKED = 1024  # samples between looks at what is generated


class RunawayError(RuntimeError):
    """What a model generates is no sound: the message says which clip, and what to try."""


class SaShiMiState(NamedTuple):
    """What SaShiMi remembers between blocks."""

    previous: Tensor  # (B,) code of the last sample
    condition: Tensor  # (B, d_model, 1), the embedding of the class; zero without classes
    layers: tuple


class Generated(NamedTuple):
    """What SaShiMi made."""

    audio: Tensor  # (B, 1, num_samples), without the prefix
    codes: Tensor  # (B, num_samples)
    log_likelihood: Tensor  # (B,) bits of these codes under the model as it is, whatever temperature they were drawn at
    label: Tensor | None  # (B,) their classes, given or drawn; None without classes


class SaShiMi(nn.Module):
    """Autoregressive model of quantized audio: gated state-space blocks and feed-forward blocks in tiers of falling rate.

    Args:
        sample_rate: of the audio it is trained on, in Hz.
        d_model: channels of the outermost tier.
        num_blocks: pairs of a state-space and a feed-forward block in each tier, outermost first; one number for all.
        pools: by what the rate falls from each tier to the next.
        expand: by what the number of channels grows.
        d_state: real state size of each channel.
        layer: `S4D` or `S4`.
        quantization: one of QUANTIZATIONS.
        num_levels: an even number.
        unet: whether the tiers, all but the innermost, also have their blocks on the way down, before the pool.
        classes: names of the labels, in the order of their numbers. Where no label is given the classes are equally likely,
            in likelihoods and in what is generated; logits want one. To a model without classes a label changes nothing.
        dropout: probability, in the feed-forward blocks.
        chunk_samples: longer clips are trained and scored in chunks of so many samples, a multiple of the product of pools,
            with the state carried over: gradients are those of the whole, and memory is that of a chunk.

    Raises:
        ValueError: an argument outside its range, or what S4D and `quantize` refuse.

    Source: Goel et al. 2022, "It's raw! Audio generation with state-space models". The blocks are GatedBlock and
    FeedForward; a tier adds to what it was given, once, around its pool.
    """

    channels = 1

    def __init__(
        self,
        sample_rate: int,
        *,
        d_model: int = 64,
        num_blocks: int | Sequence[int] = (4, 4, 8),
        pools: Sequence[int] = (4, 4),
        expand: int = 2,
        d_state: int = 64,
        layer: str = "S4D",
        quantization: str = "mu_law",
        num_levels: int = 256,
        unet: bool = False,
        classes: Sequence[str] = (),
        dropout: float = 0.0,
        chunk_samples: int = 32768,
    ) -> None:
        super().__init__()
        check_sample_rate(sample_rate)
        check_quantization(num_levels, quantization)
        depths = [num_blocks] * (len(pools) + 1) if isinstance(num_blocks, int) else list(num_blocks)
        if len(depths) != len(pools) + 1:
            raise ValueError(f"num_blocks has {len(depths)} entries and pools {len(pools)}; wanted one more than pools.")
        if min(d_model, expand, *depths) < 1 or min(pools, default=2) < 2:
            raise ValueError(
                f"d_model {d_model}, expand {expand} and num_blocks {num_blocks} must be at least 1, pools {list(pools)} at "
                "least 2."
            )
        check_classes(classes)
        if layer not in LAYERS:
            raise ValueError(f"layer is {layer!r}; choose one of {', '.join(LAYERS)}.")
        self.hop_length = math.prod(pools)  # samples of a step of the innermost tier
        if chunk_samples < 1 or chunk_samples % self.hop_length:
            raise ValueError(
                f"chunk_samples is {chunk_samples}; wanted a multiple of the product of pools, {self.hop_length}."
            )
        self.sample_rate, self.d_model, self.pools, self.expand = sample_rate, d_model, tuple(pools), expand
        self.num_blocks = num_blocks if isinstance(num_blocks, int) else tuple(num_blocks)
        self.d_state, self.layer, self.quantization, self.num_levels = d_state, layer, quantization, num_levels
        self.unet, self.classes, self.dropout, self.chunk_samples = unet, tuple(classes), dropout, chunk_samples

        def blocks(index: int) -> list[nn.Module]:
            width, made = d_model * expand**index, list[nn.Module]()
            for _ in range(depths[index]):
                made += [GatedBlock(LAYERS[layer](width, d_state)), FeedForward(width, 2, dropout)]
            return made

        def tier(index: int) -> list[nn.Module]:
            if index == len(pools):
                return blocks(index)
            width = d_model * expand**index
            down = blocks(index) if unet else []
            return [*down, Pooled(width, width * expand, pools[index], *tier(index + 1)), *blocks(index)]

        self.embedding = nn.Embedding(num_levels, d_model)
        self.embed_label = nn.Embedding(len(classes), d_model) if classes else None
        self.layers = Chain(*tier(0), ChannelNorm(d_model), nn.Conv1d(d_model, num_levels, 1))

    def codes(self, audio: Tensor) -> Tensor:
        """(B, 1, T) -> (B, T) whole numbers below num_levels."""
        return to_codes(audio, self.num_levels, self.quantization)

    def forward(self, audio: Tensor, label: Tensor | None = None) -> Tensor:
        """(B, 1, T) -> logits (B, num_levels, T) of each sample, given those before it."""
        codes = self.codes(audio)
        before = self.initial_state(len(codes), label)
        return self.layers(self._embed(shifted(codes, before.previous), before.condition))

    def initial_state(self, batch_size: int, label: Tensor | None = None) -> SaShiMiState:
        """The state before the first sample, which follows on silence.

        Raises:
            ValueError: the model has classes, and there are not as many labels as clips.
        """
        weight = self.embedding.weight
        previous = torch.full((batch_size,), self.num_levels // 2, device=weight.device)
        condition = weight.new_zeros(batch_size, self.d_model, 1)
        if self.embed_label is not None:
            if label is None or tuple(label.shape) != (batch_size,):
                found = "there is none" if label is None else f"its shape is {tuple(label.shape)}"
                raise ValueError(
                    f"the model has {len(self.classes)} classes and wants a label a clip, ({batch_size},); {found}."
                )
            condition = self.embed_label(label).unsqueeze(-1)
        return SaShiMiState(previous, condition, self.layers.initial_state(batch_size))

    def stream(self, audio: Tensor, state: SaShiMiState) -> tuple[Tensor, SaShiMiState]:
        """A block of any length -> the logits of its samples, each given those before it."""
        return self._stream(self.codes(audio), state)

    def training_losses(self, audio: Tensor, label: Tensor | None = None) -> dict[str, Tensor]:
        """`nll`, the mean negative log-likelihood in bits per sample."""
        return {"nll": self._bits(audio, label).mean() / audio.shape[-1]}

    @torch.no_grad()
    def log_likelihood(self, audio: Tensor, label: Tensor | None = None) -> Tensor:
        """(B, 1, T) -> (B,), the log2 of the probability of each clip's codes: bits, negative, summed over its samples."""
        check_audio(audio, self.channels)
        return -self._bits(audio, label)

    @torch.no_grad()
    def generate(
        self,
        batch_size: int,
        num_samples: int,
        *,
        label: Tensor | None = None,
        generator: Generators = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        prefix: Tensor | None = None,
    ) -> Generated:
        """New audio, drawn sample by sample, with its exact log-likelihood.

        The draws are uniform numbers made on the CPU. On another device or at another batch size the probabilities are
        rounded otherwise, so that sooner or later another code is drawn, and from there another clip.

        Args:
            batch_size: clips.
            num_samples: of each.
            label: (batch_size,) classes; of a model that has them, drawn with equal chances if None.
            generator: one, or one per clip.
            temperature: above 0; what the logits are divided by. Below 1 likely codes become likelier.
            top_p: in (0, 1]; draws from the likeliest codes only, the fewest whose chances add up to so much.
            prefix: (batch_size, 1, samples) that the new audio follows on; silence if None.

        Raises:
            ValueError: an argument outside its range, or a prefix or labels that do not fit.
            RunawayError: the model runs away: its probabilities are no numbers, or for CHECKED samples it makes nothing but
                full scale of one sign.
        """
        check_counts(batch_size=batch_size, num_samples=num_samples)
        if not temperature > 0 or not 0 < top_p <= 1:
            raise ValueError(f"temperature {temperature} must be above 0, and top_p {top_p} in (0, 1].")
        if prefix is not None:
            check_audio(prefix, self.channels)
        if prefix is not None and prefix.shape[0] != batch_size:
            raise ValueError(f"prefix has {prefix.shape[0]} clips and batch_size is {batch_size}; wanted one for each.")
        device = self.embedding.weight.device
        if not self.classes:
            label = None
        elif label is None:
            label = (noise((batch_size,), generator, torch.rand) * len(self.classes)).long().to(device)
        else:
            check_labels(label, self.classes)
        state = self.initial_state(batch_size, label)
        length = 0
        if prefix is not None:
            length = prefix.shape[-1]
            for block in prefix.to(device).split(self.chunk_samples, dim=-1):
                _, state = self.stream(block, state)
        uniform = noise((batch_size, num_samples), generator, torch.rand).T.to(device).contiguous()
        stepper = Stepper(self, state, length, temperature, top_p)
        blocks = []
        for block in uniform.split(CHECKED):
            blocks.append(stepper(block))
            refuse_runaway(*blocks[-1], self.num_levels)
        codes, log2_p = (torch.cat(part).T for part in zip(*blocks, strict=True))  # (B, num_samples)
        audio = dequantize(codes, self.num_levels, self.quantization).unsqueeze(1)
        return Generated(audio, codes, log2_p.sum(-1), label)

    def sample(
        self,
        batch_size: int,
        num_samples: int,
        *,
        label: Tensor | None = None,
        generator: Generators = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
    ) -> Tensor:
        """(B, 1, num_samples); arguments and errors are those of `generate`."""
        made = self.generate(batch_size, num_samples, label=label, generator=generator, temperature=temperature, top_p=top_p)
        return made.audio

    def continue_(
        self,
        audio: Tensor,
        num_samples: int,
        *,
        label: Tensor | None = None,
        generator: Generators = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
    ) -> Tensor:
        """(B, 1, num_samples) that follow on (B, 1, T); arguments and errors are those of `generate`."""
        check_audio(audio, self.channels)  # before its shape is read
        made = self.generate(
            audio.shape[0], num_samples, label=label, generator=generator, temperature=temperature, top_p=top_p, prefix=audio
        )
        return made.audio

    def _bits(self, audio: Tensor, label: Tensor | None) -> Tensor:
        """(B,) negative log2 of the probability of each clip's codes."""
        if self.classes and label is None:
            numbers = torch.arange(len(self.classes), device=audio.device)
            each = torch.stack([self._bits(audio, number.expand(len(audio))) for number in numbers])  # (classes, B)
            return math.log2(len(each)) - torch.logsumexp(-math.log(2) * each, 0) / math.log(2)
        if audio.shape[-1] <= self.chunk_samples:
            return surprise(self(audio, label), self.codes(audio))
        state, bits = self.initial_state(audio.shape[0], label), audio.new_zeros(audio.shape[0])
        again = self.training and self.dropout > 0  # the same dropout in both passes
        for chunk in self.codes(audio).split(self.chunk_samples, dim=-1):
            if torch.is_grad_enabled():
                added, state = checkpoint(self._chunk, chunk, state, use_reentrant=False, preserve_rng_state=again)
            else:
                added, state = self._chunk(chunk, state)
            bits = bits + added
        return bits

    def _chunk(self, codes: Tensor, state: SaShiMiState) -> tuple[Tensor, SaShiMiState]:
        logits, state = self._stream(codes, state)
        return surprise(logits, codes), state

    def _stream(self, codes: Tensor, state: SaShiMiState) -> tuple[Tensor, SaShiMiState]:
        """(B, n) codes and the state before them -> logits (B, num_levels, n) and the state after them."""
        logits, layers = self.layers.stream(self._embed(shifted(codes, state.previous), state.condition), state.layers)
        previous = codes[:, -1] if codes.shape[-1] else state.previous
        return logits, SaShiMiState(previous.clone(), state.condition, layers)

    def _embed(self, codes: Tensor, condition: Tensor) -> Tensor:
        """(B, n) -> (B, d_model, n)"""
        return self.embedding(codes).mT + condition


def to_codes(audio: Tensor, num_levels: int, quantization: str) -> Tensor:
    """(B, 1, T) -> (B, T), as `quantize`.

    Raises:
        ValueError: the audio is not of that shape.
    """
    if audio.dim() != 3 or audio.shape[1] != 1:
        raise ValueError(f"audio has shape {tuple(audio.shape)}; wanted (batch, 1, samples).")
    return quantize(audio[:, 0], num_levels, quantization)


def shifted(codes: Tensor, previous: Tensor) -> Tensor:
    """(B, n) -> (B, n): the code before each."""
    return torch.cat([previous.unsqueeze(-1), codes], dim=-1)[:, : codes.shape[-1]]


def surprise(logits: Tensor, codes: Tensor) -> Tensor:
    """Logits (B, num_levels, T) and codes (B, T) -> (B,) bits: the negative log2 of the codes' probability."""
    return F.cross_entropy(logits, codes, reduction="none").sum(-1) / math.log(2)


def refuse_runaway(codes: Tensor, log2_p: Tensor, num_levels: int) -> None:
    """Raises: RunawayError, if codes (n, B) were drawn of probabilities that are no numbers, or a clip of CHECKED samples is
    full scale of one sign throughout. Silence, a constant too, is nothing wrong.
    """
    lost = ~torch.isfinite(log2_p).all(0)  # (B,)
    if lost.any():
        raise RunawayError(
            f"clip {int(lost.nonzero()[0])} of the batch ran away: its probabilities are no longer finite numbers. The "
            "model has diverged; take an earlier one, or train it with a lower learning rate."
        )
    first = codes[0]
    stuck = (codes == first).all(0) & ((first == 0) | (first == num_levels - 1))
    if len(codes) >= CHECKED and stuck.any():
        raise RunawayError(
            f"clip {int(stuck.nonzero()[0])} of the batch ran away: {len(codes)} samples in a row are at full scale. Try "
            "another seed, a lower temperature or top_p, or train the model for longer."
        )
