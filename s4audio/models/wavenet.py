"""WaveNet: gated dilated causal convolutions on quantized audio; the baseline of SaShiMi, for likelihood only."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from s4audio.audio import check_quantization
from s4audio.models.autoencoder import check_sample_rate
from s4audio.models.sashimi import shifted, surprise, to_codes


class WaveNet(nn.Module):
    """Autoregressive model of quantized audio with a bounded memory: stacks of convolutions with dilations 1, 2, 4, …

    Args:
        sample_rate: of the audio it is trained on, in Hz.
        d_model: channels of the convolutions.
        d_skip: channels that lead from every layer to the end.
        num_stacks: how often the dilations begin anew.
        num_layers: layers of each stack; it hears num_stacks * (2^num_layers - 1) + 1 samples back.
        quantization: one of QUANTIZATIONS.
        num_levels: an even number.

    Raises:
        ValueError: an argument outside its range.

    Source: van den Oord et al. 2016, "WaveNet: a generative model for raw audio".
    """

    channels = 1

    def __init__(
        self,
        sample_rate: int,
        *,
        d_model: int = 128,
        d_skip: int = 288,
        num_stacks: int = 3,
        num_layers: int = 12,
        quantization: str = "mu_law",
        num_levels: int = 256,
    ) -> None:
        super().__init__()
        check_sample_rate(sample_rate)
        check_quantization(num_levels, quantization)
        if min(d_model, d_skip, num_stacks, num_layers) < 1 or num_layers > 20:
            raise ValueError(
                f"d_model {d_model}, d_skip {d_skip}, num_stacks {num_stacks} and num_layers {num_layers} must "
                "be at least 1, num_layers at most 20."
            )
        self.sample_rate, self.d_model, self.d_skip = sample_rate, d_model, d_skip
        self.num_stacks, self.num_layers = num_stacks, num_layers
        self.quantization, self.num_levels = quantization, num_levels
        dilations = [2**layer for _ in range(num_stacks) for layer in range(num_layers)]
        self.embedding = nn.Embedding(num_levels, d_model)
        self.gates = nn.ModuleList(nn.Conv1d(d_model, 2 * d_model, 2, dilation=dilation) for dilation in dilations)
        # The last layer leads to the end only.
        widths = [d_skip + d_model] * (len(dilations) - 1) + [d_skip]
        self.outs = nn.ModuleList(nn.Conv1d(d_model, width, 1) for width in widths)
        self.head = nn.Sequential(nn.ReLU(), nn.Conv1d(d_skip, d_skip, 1), nn.ReLU(), nn.Conv1d(d_skip, num_levels, 1))

    def forward(self, audio: Tensor, label: Tensor | None = None) -> Tensor:
        """(B, 1, T) -> logits (B, num_levels, T) of each sample, given those before it; a label changes nothing."""
        codes = to_codes(audio, self.num_levels, self.quantization)
        u = self.embedding(shifted(codes, torch.full_like(codes[:, 0], self.num_levels // 2))).mT
        skips: Any = 0
        gate: Any
        for gate, out in zip(self.gates, self.outs, strict=True):
            value, opening = gate(F.pad(u, (gate.dilation[0], 0))).chunk(2, dim=1)
            skip, added = out(value.tanh() * opening.sigmoid()).tensor_split((self.d_skip,), dim=1)
            skips = skips + skip
            if added.shape[1]:
                u = u + added
        return self.head(skips * len(self.outs) ** -0.5)

    def training_losses(self, audio: Tensor, label: Tensor | None = None) -> dict[str, Tensor]:
        """`nll`, the mean negative log-likelihood in bits per sample."""
        return {"nll": -self._log_likelihood(audio).mean() / audio.shape[-1]}

    @torch.no_grad()
    def log_likelihood(self, audio: Tensor, label: Tensor | None = None) -> Tensor:
        """(B, 1, T) -> (B,), the log2 of the probability of each clip's codes: bits, negative, summed over its samples."""
        return self._log_likelihood(audio)

    def _log_likelihood(self, audio: Tensor) -> Tensor:
        return -surprise(self(audio), to_codes(audio, self.num_levels, self.quantization))
