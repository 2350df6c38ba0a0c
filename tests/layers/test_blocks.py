"""Norm and blocks against torch's own operations."""

import torch
from torch import nn

from s4audio.layers import S4D, ChannelNorm, FeedForward, S4Block


def test_channel_norm_is_layer_norm_over_channels():
    norm, reference = ChannelNorm(5).double(), nn.LayerNorm(5).double()
    with torch.no_grad():
        reference.weight.copy_(norm.weight.normal_())
        reference.bias.copy_(norm.bias.normal_())
    u = torch.randn(2, 5, 7, dtype=torch.float64)
    torch.testing.assert_close(norm(u), reference(u.mT).mT)


def test_feed_forward_is_two_linear_maps_around_a_shortcut():
    block = FeedForward(4, expand=3)
    norm, wide, _, _, back = block.inner
    u = torch.randn(2, 4, 6)
    hidden = nn.functional.gelu(torch.einsum("oi,bil->bol", wide.weight[..., 0], norm(u)) + wide.bias[:, None])
    expected = u + torch.einsum("oi,bil->bol", back.weight[..., 0], hidden) + back.bias[:, None]
    torch.testing.assert_close(block(u), expected)


def test_s4_block_follows_the_order_of_the_reference_systems():
    kinds = [type(module).__name__ for module in S4Block(S4D(4, 4), dropout=0.1).inner]
    assert kinds == ["ChannelNorm", "S4D", "GELU", "Dropout", "Conv1d", "ChannelNorm"]  # system 5
    kinds = [type(module).__name__ for module in S4Block(S4D(4, 4), mix=False).inner]
    assert kinds == ["ChannelNorm", "S4D", "GELU"]  # system 1
