"""Sequence classifiers: encoder -> state-space blocks -> mean over time -> linear head."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from s4audio.layers import S4, S4D, Chain, PostNormBlock, S4Block

LAYERS: dict[str, type[S4D]] = {"S4D": S4D, "S4": S4}
BLOCKS: dict[str, Callable[..., nn.Module]] = {
    "filter": partial(S4Block, mix=False),  # system 1: channels meet in the encoder and in the head only
    "mix": S4Block,  # system 5
    "spectral": partial(S4Block, spectral=True),  # system 2
    "post_norm": PostNormBlock,  # the field's public example
}


def _check_block(block: str) -> None:
    if block not in BLOCKS:
        raise ValueError(f"block is {block!r}; choose one of {', '.join(BLOCKS)}.")


class Turn(nn.Module):
    """What was read row by row is read column by column, and the other way round: (B, C, side * side) of square images."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, u: Tensor) -> Tensor:
        """(B, C, side * side) -> (B, C, side * side)"""
        if u.shape[-1] != self.side**2:
            raise ValueError(
                f"the sequences have {u.shape[-1]} samples; wanted the {self.side**2} of a square image of side {self.side}."
            )
        return u.unflatten(-1, (self.side, self.side)).transpose(-1, -2).flatten(-2)

    def extra_repr(self) -> str:
        return f"side={self.side}"


class Classifier(nn.Module):
    """What the classifiers share: inputs made to have mean 0 and deviation 1, a trunk, the mean over time, and a head.

    The moments of the inputs belong to the model, so that it can be given them as they come.
    """

    input_mean: Tensor
    input_std: Tensor

    def __init__(self, d_input: int, num_classes: int, d_model: int, trunk: nn.Module) -> None:
        super().__init__()
        self.d_input, self.num_classes, self.d_model = d_input, num_classes, d_model
        self.register_buffer("input_mean", torch.zeros(d_input))
        self.register_buffer("input_std", torch.ones(d_input))
        self.trunk, self.head = trunk, nn.Linear(d_model, num_classes)

    def set_moments(self, mean: Tensor, std: Tensor) -> None:
        """The inputs' mean and standard deviation, (d_input,) each; a channel that never changes is left as it is."""
        self.input_mean.copy_(mean)
        self.input_std.copy_(torch.where(std > 0, std, torch.ones_like(std)))

    def forward(self, u: Tensor) -> Tensor:
        """(B, d_input, L) -> (B, num_classes)"""
        u = (u - self.input_mean.unsqueeze(-1)) / self.input_std.unsqueeze(-1)
        return self.head(self.trunk(self.embed(u)).mean(-1))

    def embed(self, u: Tensor) -> Tensor:
        """The normalized inputs as the trunk reads them: as they are, here."""
        return u


class S4Model(Classifier):
    """A linear encoder, and blocks that read the sequence sample by sample.

    Args:
        d_input: channels of the sequence.
        num_classes: outputs.
        d_model: width.
        num_layers: blocks.
        layer: `S4D` or `S4`.
        block: one of BLOCKS.
        d_state: real state size of each channel.
        dropout: probability, in each block.
        init: one of ssm.INITS; None for the layer's own.
        discretization: one of ssm.DISCRETIZATIONS.
        alpha: of the generalized bilinear transform.
        gap: of async: the interval between samples.
        dt_min: smallest step size at initialization.
        dt_max: largest step size at initialization.
        bidirectional: whether each layer also runs backwards in time.
        learn_B: whether B is trained.
        side: for square images, their height and width: every second block reads them column by column. None: sequences.

    Raises:
        ValueError: an unknown layer or block, a side below 1, or what the layer refuses.

    Source: reference systems 1 and 5; with `post_norm` the example of the public code.
    """

    def __init__(
        self,
        d_input: int,
        num_classes: int,
        d_model: int = 128,
        num_layers: int = 4,
        *,
        layer: str = "S4D",
        block: str = "mix",
        d_state: int = 64,
        dropout: float = 0.0,
        init: str | None = None,
        discretization: str = "zoh",
        alpha: float = 0.5,
        gap: float = 1.0,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        bidirectional: bool = False,
        learn_B: bool = True,
        side: int | None = None,
    ) -> None:
        if layer not in LAYERS:
            raise ValueError(f"layer is {layer!r}; choose S4D or S4.")
        _check_block(block)
        if side is not None and side < 1:
            raise ValueError(f"side is {side}; wanted the height and width of the images, at least 1, or null.")
        options: dict[str, Any] = {} if init is None else {"init": init}

        def one_block() -> nn.Module:
            ssm = LAYERS[layer](
                d_model, d_state, discretization=discretization, alpha=alpha, gap=gap, dt_min=dt_min, dt_max=dt_max,
                bidirectional=bidirectional, learn_B=learn_B, **options,
            )  # fmt: skip
            return BLOCKS[block](ssm, dropout=dropout)

        parts: list[nn.Module] = [nn.Conv1d(d_input, d_model, 1)]
        for index in range(num_layers):
            if side and index:
                parts.append(Turn(side))
            parts.append(one_block())
        super().__init__(d_input, num_classes, d_model, Chain(*parts))
        self.num_layers, self.layer, self.block, self.d_state, self.dropout = num_layers, layer, block, d_state, dropout
        self.init, self.discretization, self.alpha, self.gap = init, discretization, alpha, gap
        self.dt_min, self.dt_max, self.bidirectional, self.learn_B = dt_min, dt_max, bidirectional, learn_B
        self.side = side


class PatchS4Model(Classifier):
    """Reference system 2: two convolutions make patches of a square image, and S4D blocks read the patches in their order.

    Conv(d_input -> d_model / 2, 3 x 3) -> GELU -> Conv(-> d_model, patch x patch, in steps of it) -> blocks, in system 2
    with a spectral norm on their output projection.

    Args:
        d_input: channels of a pixel.
        num_classes: outputs.
        d_model: width, even.
        num_layers: blocks.
        patch: height and width of a patch.
        block: one of BLOCKS.
        d_state: real state size of each channel.
        dropout: probability, in each block.
        bidirectional: whether each layer also reads the patches from the last to the first.

    Raises:
        ValueError: d_model is odd, an unknown block, or what S4D refuses.

    Source: reference system 2; spectral normalization from Miyato et al. 2018, "Spectral normalization for generative
    adversarial networks".
    """

    def __init__(
        self,
        d_input: int,
        num_classes: int,
        d_model: int = 512,
        num_layers: int = 12,
        *,
        patch: int = 8,
        block: str = "spectral",
        d_state: int = 64,
        dropout: float = 0.0,
        bidirectional: bool = False,
    ) -> None:
        _check_block(block)
        if patch < 1:
            raise ValueError(f"patch is {patch}; wanted at least 1 pixel.")
        if d_model % 2:
            raise ValueError(f"d_model is {d_model}; wanted an even number, half of which the first convolution makes.")
        ssms = (S4D(d_model, d_state, bidirectional=bidirectional) for _ in range(num_layers))
        super().__init__(d_input, num_classes, d_model, Chain(*(BLOCKS[block](ssm, dropout=dropout) for ssm in ssms)))
        self.num_layers, self.patch, self.block = num_layers, patch, block
        self.d_state, self.dropout, self.bidirectional = d_state, dropout, bidirectional
        self.stem = nn.Sequential(
            nn.Conv2d(d_input, d_model // 2, 3, padding=1), nn.GELU(), nn.Conv2d(d_model // 2, d_model, patch, patch)
        )

    def embed(self, u: Tensor) -> Tensor:
        """(B, d_input, side * side) -> (B, d_model, patches), for a side that is a multiple of `patch`"""
        side = round(u.shape[-1] ** 0.5)
        if side * side != u.shape[-1] or side % self.patch:
            raise ValueError(
                f"the sequences have {u.shape[-1]} pixels; wanted those of a square image whose side is a multiple of "
                f"{self.patch}."
            )
        return self.stem(u.unflatten(-1, (side, side))).flatten(-2)
