"""The contract of every causal layer and model: forward = stream in blocks of any size = step by step, and no sample hears
the future. A new layer, model, discretization or init joins CAUSAL or is in a dict already.

Float32 tolerance: 1e-5 of the largest output; measured over all cases 1.6e-6 (engine and recurrence round differently).
"""

import copy
import tempfile
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from s4audio import S4DVAE, CausalAutoencoder, S4DAutoencoder, S4Model
from s4audio.layers import (
    S4,
    S4D,
    CausalConv1d,
    CausalConvTranspose1d,
    Chain,
    FeedForward,
    GatedBlock,
    Pooled,
    PostNormBlock,
    Residual,
    S4Block,
)
from s4audio.models import advance_stream, begin_stream, finish_stream, stream_latency
from s4audio.ssm import DISCRETIZATIONS, INITS

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
CHANNELS, LENGTH = 3, 210


def autoencoder() -> CausalAutoencoder:
    return CausalAutoencoder(
        8000, strides=(2, 3), widths=(4, 6, 5), latent_channels=3, d_state=4, channels=CHANNELS, num_blocks=2
    )


def variational() -> S4DVAE:
    return S4DVAE(8000, strides=(2, 3), widths=(4, 6, 5), latent_channels=3, num_blocks=1, d_state=4, channels=CHANNELS)


LAYERS = {
    f"S4D {init} {scheme}": lambda init=init, scheme=scheme: S4D(CHANNELS, 8, init=init, discretization=scheme, alpha=0.7)
    for init, scheme in product(INITS, DISCRETIZATIONS)
} | {
    f"S4 {init} {scheme}": lambda init=init, scheme=scheme: S4(CHANNELS, 8, init=init, discretization=scheme, alpha=0.7)
    for init, scheme in product(["legs", "fout"], DISCRETIZATIONS)
}  # fmt: skip
CAUSAL: dict[str, Callable[[], nn.Module]] = LAYERS | {
    "S4D async gap": lambda: S4D(CHANNELS, 8, discretization="async", gap=0.3),
    "S4D rate": lambda: S4D(CHANNELS, 8, rate=0.5),
    "CausalConv1d": lambda: CausalConv1d(CHANNELS, 4, 5),
    "CausalConv1d stride": lambda: CausalConv1d(CHANNELS, 4, 6, 3),
    "CausalConv1d kernel = stride": lambda: CausalConv1d(CHANNELS, 4, 2, 2),
    "CausalConvTranspose1d": lambda: CausalConvTranspose1d(CHANNELS, 2, 5, 3),
    "CausalConvTranspose1d kernel = stride": lambda: CausalConvTranspose1d(CHANNELS, 2, 4, 4),
    "FeedForward": lambda: FeedForward(CHANNELS),
    "S4Block": lambda: S4Block(S4(CHANNELS, 8), dropout=0.1),
    "S4Block without mixing": lambda: S4Block(S4D(CHANNELS, 8), mix=False),
    "S4Block with a spectral norm": lambda: S4Block(S4D(CHANNELS, 8), spectral=True),
    "PostNormBlock": lambda: PostNormBlock(S4D(CHANNELS, 8)),
    "GatedBlock": lambda: GatedBlock(S4D(CHANNELS, 8)),
    "Chain": lambda: Chain(
        CausalConv1d(CHANNELS, 4, 4, 2), Residual(S4D(4, 8), nn.GELU()), CausalConvTranspose1d(4, 2, 4, 2)
    ),
    "Pooled": lambda: Pooled(CHANNELS, 5, 3, GatedBlock(S4D(5, 8)), Pooled(5, 4, 2, S4D(4, 4)), FeedForward(5)),
    "S4Model's trunk": lambda: S4Model(CHANNELS, 10, d_model=4, num_layers=2, d_state=8, layer="S4").trunk,
    "CausalAutoencoder": autoencoder,
    "S4DVAE": variational,
}


def make(name: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(1)
    return CAUSAL[name]().to(dtype).eval()


def in_blocks(module: nn.Module, u: Tensor, sizes: list[int], method: str = "stream") -> Tensor:
    state, outputs = module.initial_state(u.shape[0]), []
    for block in u.split(sizes, dim=-1):
        y, state = getattr(module, method)(block, state)
        outputs.append(y)
    return torch.cat(outputs, dim=-1)


def random_sizes(length: int) -> list[int]:
    rng, sizes = np.random.default_rng(0), []
    while sum(sizes) < length:
        sizes.append(min(int(rng.integers(0, 90)), length - sum(sizes)))
    return sizes


def blocks_of(size: int) -> list[int]:
    return [size] * (LENGTH // size) + [LENGTH % size] * (LENGTH % size > 0)


BLOCKS = {
    "1": blocks_of(1),
    "7": blocks_of(7),
    "64": blocks_of(64),
    "whole": [LENGTH],
    "random, with empty ones": random_sizes(LENGTH),
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float64", "float32"])
@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_stream_and_step_equal_forward(name, dtype):
    module = make(name, dtype)
    u = torch.randn(2, CHANNELS, LENGTH, dtype=dtype)
    whole = module(u)
    for label, sizes in BLOCKS.items():
        y = in_blocks(module, u, sizes)
        # A strided convolution pads the end of a whole clip; a stream waits for the samples instead.
        assert whole.shape[-1] - y.shape[-1] < 2
        assert (y - whole[..., : y.shape[-1]]).abs().max() <= TOLERANCE[dtype] * whole.abs().max(), label
    if hasattr(module, "step"):
        y = in_blocks(module, u, BLOCKS["1"], "step")
        assert (y - whole[..., : y.shape[-1]]).abs().max() <= TOLERANCE[dtype] * whole.abs().max()


@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_no_output_hears_the_future(name):
    module = make(name, torch.float64)
    u = torch.randn(1, CHANNELS, LENGTH, dtype=torch.float64)
    whole = module(u)
    samples_in_frame = {
        "CausalConv1d stride": 3,
        "CausalConv1d kernel = stride": 2,
        "Chain": 2,
        "CausalAutoencoder": 6,
        "S4DVAE": 6,
    }.get(name, 1)
    changed_from = LENGTH // 2 // samples_in_frame * samples_in_frame  # the first sample of a frame
    changed = u.clone()
    changed[..., changed_from:] += 1
    same = changed_from * whole.shape[-1] // LENGTH
    difference = (module(changed) - whole).abs().amax((0, 1))
    assert difference[:same].max() == 0 or difference[:same].max() < 1e-12
    assert difference[same:].max() > 1e-3


@pytest.mark.parametrize("length", [1, 2, 5, 6, 7, 64, 301])
@torch.no_grad()
def test_autoencoder_streams_any_length_once_the_last_frame_is_filled(length):
    model = make("CausalAutoencoder", torch.float64)
    audio = torch.randn(2, CHANNELS, length, dtype=torch.float64)
    filled = torch.nn.functional.pad(audio, (0, model.hop_length - 1))
    streamed = in_blocks(model, filled, [1] * filled.shape[-1])[..., :length]
    torch.testing.assert_close(streamed, model(audio), rtol=0, atol=1e-9)


def in_pieces(model: nn.Module, audio: Tensor, sizes: list[int], block: int | None) -> Tensor:
    state, outputs = begin_stream(model), []
    for piece in audio.split(sizes, dim=-1):
        y, state = advance_stream(model, piece, state, block)
        outputs.append(y)
    return torch.cat([*outputs, finish_stream(model, state)], dim=-1)


SHORT = 75
PIECES = {"1": [1] * SHORT, "7": [7] * 10 + [5], "whole": [SHORT], "random": random_sizes(SHORT)}


@pytest.mark.parametrize("block", [None, 1, 64])
@pytest.mark.parametrize("sizes", PIECES.values(), ids=PIECES)
def test_a_stream_in_pieces_is_forward(sizes, block):
    model = make("CausalAutoencoder", torch.float64)
    audio = torch.randn(CHANNELS, SHORT, dtype=torch.float64)
    with torch.no_grad():
        whole = model(audio.unsqueeze(0))[0]
    torch.testing.assert_close(in_pieces(model, audio, sizes, block), whole, rtol=0, atol=1e-9)


@pytest.mark.parametrize("block", [4, 50])
def test_a_stream_in_blocks_is_the_same_bit_for_bit_whatever_the_pieces(block):
    model, audio = make("CausalAutoencoder", torch.float32), torch.randn(CHANNELS, SHORT)
    whole = in_pieces(model, audio, [SHORT], block)
    assert all(torch.equal(in_pieces(model, audio, sizes, block), whole) for sizes in PIECES.values())


@pytest.mark.parametrize("block", [1, 4, 6, 50])
def test_latency_is_what_a_sample_waits_at_most(block):
    model, waits, given = make("CausalAutoencoder", torch.float32), [], 0
    state = begin_stream(model)
    for now in range(160):  # of blocks of 50 three, with which their place in the frames comes round
        y, state = advance_stream(model, torch.zeros(CHANNELS, 1), state, block)
        waits += [now - sample for sample in range(given, given + y.shape[-1])]
        given += y.shape[-1]
    assert max(waits) == stream_latency(model.hop_length, block)


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_a_frozen_layer_streams_the_same_bit_for_bit_and_forgets_later_parameters(name):
    module, u = make(name, torch.float32), torch.randn(2, CHANNELS, LENGTH)
    wanted = [in_blocks(module, u, sizes) for sizes in BLOCKS.values()]
    module.freeze()
    for parameter in module.parameters():
        if parameter is not module.D:
            parameter.zero_()
    for _ in range(2):  # the second time with the operators of the first
        assert all(map(torch.equal, (in_blocks(module, u, sizes) for sizes in BLOCKS.values()), wanted))


@pytest.mark.parametrize("layer", [S4D, S4])
def test_a_frozen_layer_is_copied_moved_and_has_no_gradients(layer):
    module, u = layer(CHANNELS, 8), torch.randn(1, CHANNELS, 20, requires_grad=True)
    module.freeze()
    for _ in range(2):
        module.stream(u, module.initial_state(1))[0].sum().backward()
    assert module.C.grad is None and u.grad is not None
    other = copy.deepcopy(module).double()
    y, _ = other.stream(u.double(), other.initial_state(1))
    torch.testing.assert_close(y, other(u.double()))


@pytest.mark.parametrize("layer", [S4D, S4])
def test_bidirectional_layers_hear_the_future_and_refuse_to_stream(layer):
    module = layer(CHANNELS, 8, bidirectional=True).double()
    u = torch.randn(1, CHANNELS, 50, dtype=torch.float64)
    later = u.clone()
    later[..., -1] += 1
    assert (module(later) - module(u))[..., 0].abs().max() > 1e-6
    with pytest.raises(RuntimeError, match="hears the future and cannot stream"):
        module.initial_state(1)
    with pytest.raises(RuntimeError, match="hears the future"):
        Chain(module).initial_state(1)


def test_system_4_refuses_to_stream():
    with pytest.raises(RuntimeError, match="normalizes over the whole clip"):
        S4DAutoencoder(3000).initial_state(1)


@pytest.mark.parametrize("module", [nn.GroupNorm(1, CHANNELS), nn.Conv1d(CHANNELS, CHANNELS, 3, padding=1), nn.AvgPool1d(1)])
def test_a_chain_names_the_module_that_cannot_stream(module):
    with pytest.raises(RuntimeError, match=rf"module 1 of the chain, {type(module).__name__}.* cannot stream"):
        Chain(nn.GELU(), module).initial_state(1)


@torch.no_grad()
def test_a_state_does_not_keep_its_block_alive():
    model = make("CausalAutoencoder", torch.float32)
    _, state = model.stream(torch.randn(1, CHANNELS, 60_001), model.initial_state(1))
    with tempfile.TemporaryFile() as file:
        torch.save(state, file)
        assert file.tell() < 100_000


@torch.no_grad()
def test_a_state_can_be_forked():
    module = make("GatedBlock", torch.float64)
    u = torch.randn(1, CHANNELS, 60, dtype=torch.float64)
    _, state = module.stream(u[..., :20], module.initial_state(1))
    first, _ = module.stream(u[..., 20:], state)
    again, _ = module.stream(u[..., 20:], state)
    assert torch.equal(first, again)
