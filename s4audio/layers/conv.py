"""Causal convolutions that change the sample rate, with their state in and out."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ConvState(NamedTuple):
    """What a convolution keeps between blocks: input not used up yet, or output not complete yet."""

    kept: Tensor  # (B, channels, samples)


class CausalConv1d(nn.Module):
    """Convolution whose output frame j ends at input sample (j + 1) stride - 1; `stride` samples in, one frame out.

    Args:
        in_channels: channels in.
        out_channels: channels out.
        kernel_size: taps, at least `stride`.
        stride: downsampling factor. A length that is no multiple of it is padded with zeros at the end.

    Raises:
        ValueError: kernel_size < stride, which would skip samples.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> None:
        super().__init__()
        if not 1 <= stride <= kernel_size:
            raise ValueError(f"kernel_size is {kernel_size} and stride {stride}; wanted 1 <= stride <= kernel_size.")
        self.conv = nn.Conv1d(in_channels, out_channels, kernel_size, stride)
        self.stride, self.overlap = stride, kernel_size - stride

    def forward(self, u: Tensor) -> Tensor:
        """(B, in, L) -> (B, out, ceil(L / stride))"""
        return self.conv(F.pad(u, (self.overlap, -u.shape[-1] % self.stride)))

    def initial_state(self, batch_size: int) -> ConvState:
        """The samples before the first: silence."""
        return ConvState(self.conv.weight.new_zeros(batch_size, self.conv.in_channels, self.overlap))

    def stream(self, u: Tensor, state: ConvState) -> tuple[Tensor, ConvState]:
        """A block of any length -> every frame that is complete, and the input the next frame still needs."""
        waiting = torch.cat([state.kept, u], dim=-1)
        num_frames = (waiting.shape[-1] - self.overlap) // self.stride
        if num_frames == 0:
            return u.new_zeros(u.shape[0], self.conv.out_channels, 0), ConvState(waiting)
        used = num_frames * self.stride
        return self.conv(waiting[..., : used + self.overlap]), ConvState(
            waiting[..., used:].clone()
        )  # not a view: a state must not keep the block alive


class CausalConvTranspose1d(nn.Module):
    """Transposed convolution: one frame in, `stride` samples out, which depend on this frame and those before it.

    Args:
        in_channels: channels in.
        out_channels: channels out.
        kernel_size: taps, at least `stride`.
        stride: upsampling factor.

    Raises:
        ValueError: kernel_size < stride, which would leave samples empty.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int) -> None:
        super().__init__()
        if not 1 <= stride <= kernel_size:
            raise ValueError(f"kernel_size is {kernel_size} and stride {stride}; wanted 1 <= stride <= kernel_size.")
        self.conv = nn.ConvTranspose1d(in_channels, out_channels, kernel_size, stride)
        self.stride, self.overlap = stride, kernel_size - stride

    def forward(self, u: Tensor) -> Tensor:
        """(B, in, L) -> (B, out, L stride)"""
        return self.conv(u)[..., : u.shape[-1] * self.stride]

    def initial_state(self, batch_size: int) -> ConvState:
        """What frames before the first add to the output: nothing."""
        return ConvState(self.conv.weight.new_zeros(batch_size, self.conv.out_channels, self.overlap))

    def stream(self, u: Tensor, state: ConvState) -> tuple[Tensor, ConvState]:
        """A block of any number of frames -> their samples, and what they add to the samples after."""
        if u.shape[-1] == 0:
            return u.new_zeros(u.shape[0], self.conv.out_channels, 0), state
        assert self.conv.bias is not None  # for mypy; nn.ConvTranspose1d has one unless told otherwise
        y = F.conv_transpose1d(u, self.conv.weight, stride=self.stride)  # the tails overlap, so the bias comes last
        y = torch.cat([y[..., : self.overlap] + state.kept, y[..., self.overlap :]], dim=-1)
        complete = u.shape[-1] * self.stride
        return y[..., :complete] + self.conv.bias.unsqueeze(-1), ConvState(y[..., complete:].clone())
