"""Norm and blocks against torch's own operations."""

import copy

import pytest
import torch
from torch import nn

from s4audio.layers import S4D, ChannelNorm, FeedForward, GatedBlock, ModulatedBlock, Pooled, PostNormBlock, S4Block
from s4audio.ssm import backend
from tests.ssm.systems import error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_channel_norm_is_layer_norm_over_channels():
    norm, reference = ChannelNorm(5).double(), nn.LayerNorm(5).double()
    with torch.no_grad():
        reference.weight.copy_(norm.weight.normal_())
        reference.bias.copy_(norm.bias.normal_())
    u = torch.randn(2, 5, 7, dtype=torch.float64)
    torch.testing.assert_close(norm(u), reference(u.mT).mT)


def normalized(norm: ChannelNorm, u: torch.Tensor, name: str) -> dict[str, torch.Tensor]:
    """Output and gradients."""
    u = u.detach().requires_grad_()
    norm.zero_grad()
    with backend(name):
        y = norm(u)
    torch.manual_seed(1)
    y.backward(torch.randn(y.shape).to(y))
    found = {"y": y, "du": u.grad, "dweight": norm.weight.grad, "dbias": norm.bias.grad}
    return {name: value.detach().cpu().double() for name, value in found.items()}


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 7), (3, 32, 300), (2, 700, 20)])
def test_fused_channel_norm_equals_the_plain_one(monkeypatch, shape, dtype, tolerance):
    fused = pytest.importorskip("s4audio.layers.triton")
    monkeypatch.setattr(fused, "PROGRAMS", 2)  # several tiles each
    norm, u = ChannelNorm(shape[1]), (3 * torch.randn(shape) + 1).to(dtype)
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    wanted = normalized(copy.deepcopy(norm).double(), u.double(), "chunk")
    found = normalized(norm.to(DEVICE), u.to(DEVICE), "triton")
    for name, value in found.items():
        assert error(value, wanted[name]) < tolerance, name


def test_fused_channel_norm_is_registered_as_torch_wants_it():
    fused = pytest.importorskip("s4audio.layers.triton")
    u, weight, bias = torch.randn(2, 5, 7), torch.randn(5), torch.randn(5)
    arguments = [v.to(DEVICE).requires_grad_() for v in (u, weight, bias)]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(fused.channel_norm, (*arguments, 1e-5), test_utils=tests)


def test_fused_channel_norm_takes_what_is_strided_and_refuses_second_derivatives():
    pytest.importorskip("s4audio.layers.triton")
    norm, u = ChannelNorm(5).to(DEVICE), torch.randn(2, 7, 5, device=DEVICE).mT.requires_grad_()
    with backend("chunk"):
        wanted = norm(u)
    with backend("triton"):
        found = norm(u)
        assert error(found, wanted) < 1e-6
        (first,) = torch.autograd.grad(found.square().sum(), u, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivatives; take them within s4audio.backend\('chunk'\)"):
        first.sum().backward()


def gradients(block: nn.Module, u: torch.Tensor, name: str) -> dict[str, torch.Tensor]:
    """Output and all gradients, with the same dropout every time."""
    u = u.detach().requires_grad_()
    block.zero_grad()
    torch.manual_seed(2)
    with backend(name):
        y = block(u)
    torch.manual_seed(1)
    y.backward(torch.randn(y.shape).to(y))
    found = {"y": y, "du": u.grad} | {f"d{name}": parameter.grad for name, parameter in block.named_parameters()}
    return {name: value.detach().cpu() for name, value in found.items()}


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 7), (3, 32, 300)])
def test_a_fused_post_norm_block_equals_the_plain_one(monkeypatch, shape, dropout):
    fused = pytest.importorskip("s4audio.layers.triton")
    monkeypatch.setattr(fused, "PROGRAMS", 2)
    torch.manual_seed(0)
    block, u = PostNormBlock(S4D(shape[1], 4), dropout).to(DEVICE), torch.randn(shape, device=DEVICE)
    with torch.no_grad():
        block[1].weight.normal_()
        block[1].bias.normal_()
    if dropout:  # two masks, which are drawn in the same order
        kept = iter([torch.bernoulli(torch.full(shape[:2], 0.6)).to(DEVICE) / 0.6 for _ in range(4)])
        monkeypatch.setattr("s4audio.layers.blocks._share_kept", lambda y, share: next(kept))
        monkeypatch.setattr(nn.Dropout1d, "forward", lambda module, y: y * next(kept).unsqueeze(-1))
        masks = list(kept)[:2]
        kept = iter(masks * 2)
    wanted, found = (gradients(block, u, name) for name in ("chunk", "triton"))
    for name, value in found.items():
        assert error(value, wanted[name]) < 1e-5, name


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 7), (3, 32, 300)])
def test_a_fused_gated_block_equals_the_plain_one(shape):
    pytest.importorskip("s4audio.layers.triton")
    torch.manual_seed(0)
    block, u = GatedBlock(S4D(shape[1], 4)).to(DEVICE), torch.randn(shape, device=DEVICE)
    wanted, found = (gradients(block, u, name) for name in ("chunk", "triton"))
    for name, value in found.items():
        assert error(value, wanted[name]) < 1e-5, name


def test_fused_dropout_takes_whole_channels_and_only_in_training():
    pytest.importorskip("s4audio.layers.triton")
    block, u = PostNormBlock(S4D(64, 4), 0.5).to(DEVICE), torch.randn(2, 64, 9, device=DEVICE)
    with backend("triton"):
        first, second = block(u), block(u)
        block.eval()
        assert not torch.equal(first, second) and torch.equal(block(u), block(u))
        with backend("chunk"):
            wanted = block(u)
        assert error(block(u), wanted) < 1e-5


@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize("with_dropout", [False, True])
def test_fused_ends_of_blocks_are_registered_as_torch_wants_them(with_norm, with_dropout):
    fused = pytest.importorskip("s4audio.layers.triton")
    v, bias, u, norm = torch.randn(2, 10, 7), torch.randn(10), torch.randn(2, 5, 7), (torch.randn(5), torch.randn(5))
    v, bias, u, *norm = (part.to(DEVICE).requires_grad_() for part in (v, bias, u, *norm))
    keep = torch.rand(2, 5, device=DEVICE) if with_dropout else None
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(fused.gelu, (u, keep), test_utils=tests)
    torch.library.opcheck(fused.gated, (v, bias, u, keep, *(norm if with_norm else (None, None)), 1e-5), test_utils=tests)


@pytest.mark.parametrize("name", ["chunk", "triton"])
@pytest.mark.parametrize("shape", [(2, 3, 7), (2, 7, 7), (5, 7)])
def test_channel_norm_refuses_other_channels(name, shape):
    with backend(name), pytest.raises(ValueError, match=r"u has shape .*; wanted \(batch, 5, length\)"):
        ChannelNorm(5).to(DEVICE)(torch.randn(shape, device=DEVICE))


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


@pytest.mark.parametrize("length", [1, 3, 4, 11])
def test_a_pool_adds_what_was_made_of_the_frame_before(length):
    """Frame by frame, with the two Linears that the convolutions are."""
    pooled = Pooled(2, 5, 3, nn.GELU()).double()
    u = torch.randn(1, 2, length, dtype=torch.float64)
    wanted = u.clone()
    for t in range(3, length):
        start, place = 3 * (t // 3 - 1), t % 3
        frame = u[0, :, start : start + 3]  # (2, 3)
        inner = torch.einsum("oik,ik->o", pooled.down.conv.weight, frame) + pooled.down.conv.bias
        wanted[0, :, t] += (
            torch.einsum("io,i->o", pooled.up.conv.weight[:, :, place], nn.GELU()(inner)) + pooled.up.conv.bias
        )
    torch.testing.assert_close(pooled(u), wanted)


def test_a_modulation_scales_and_shifts_the_norm_and_at_first_says_nothing():
    block, u = ModulatedBlock(S4D(4, 4), 6), torch.randn(3, 4, 20)
    assert torch.equal(block(u, torch.randn(3, 6)), block.block(u))
    with torch.no_grad():
        block.modulation.bias[:4], block.modulation.bias[4:] = 0.5, -1.0
    norm, ssm, *_ = block.block.inner
    torch.testing.assert_close(block(u, torch.zeros(3, 6)), block.block.mix(ssm(1.5 * norm(u) - 1), u))
