"""Causal convolutions against torch's own, padded by hand."""

import pytest
import torch
from torch.nn import functional as F

from s4audio.layers import CausalConv1d, CausalConvTranspose1d


@pytest.mark.parametrize("length", [1, 2, 3, 4, 17])
def test_downsampling_ends_each_frame_with_its_own_samples(length):
    layer = CausalConv1d(2, 3, 6, 3).double()
    u = torch.randn(1, 2, length, dtype=torch.float64)
    y = layer(u)
    assert y.shape == (1, 3, -(-length // 3))
    for j in range(y.shape[-1]):
        window = F.pad(u, (6, 6))[..., 6 + 3 * (j + 1) - 6 : 6 + 3 * (j + 1)]
        expected = torch.einsum("bit,oit->bo", window, layer.conv.weight) + layer.conv.bias
        torch.testing.assert_close(y[..., j], expected)


@pytest.mark.parametrize(("kernel_size", "stride"), [(4, 2), (3, 3), (7, 2)])
def test_upsampling_is_the_transposed_convolution_without_its_tail(kernel_size, stride):
    layer = CausalConvTranspose1d(2, 3, kernel_size, stride)
    u = torch.randn(2, 2, 9)
    expected = F.conv_transpose1d(u, layer.conv.weight, layer.conv.bias, stride)
    torch.testing.assert_close(layer(u), expected[..., : 9 * stride])


@pytest.mark.parametrize("layer", [CausalConv1d, CausalConvTranspose1d])
def test_a_stride_beyond_the_kernel_is_refused(layer):
    with pytest.raises(ValueError, match="kernel_size is 2 and stride 3"):
        layer(1, 1, 2, 3)
