"""Layers from state spaces and causal convolutions; all of them forward, and stream if they are causal."""

from s4audio.layers.blocks import (
    Chain,
    ChannelNorm,
    FeedForward,
    GatedBlock,
    ModulatedBlock,
    Pooled,
    PostNormBlock,
    Residual,
    S4Block,
)
from s4audio.layers.conv import CausalConv1d, CausalConvTranspose1d, ConvState
from s4audio.layers.s4 import S4, S4D, S4State, frozen

__all__ = [
    "S4",
    "S4D",
    "CausalConv1d",
    "CausalConvTranspose1d",
    "Chain",
    "ChannelNorm",
    "ConvState",
    "FeedForward",
    "GatedBlock",
    "ModulatedBlock",
    "Pooled",
    "PostNormBlock",
    "Residual",
    "S4Block",
    "S4State",
    "frozen",
]
