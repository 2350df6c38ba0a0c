"""Sequence classifier: linear encoder -> state-space blocks -> mean over time -> linear head."""

from torch import Tensor, nn

from s4audio.layers import S4, S4D, Chain, S4Block


class S4Model(nn.Module):
    """The classifier of reference systems 1 and 5.

    Args:
        d_input: channels of the sequence.
        num_classes: outputs.
        d_model: width.
        num_layers: blocks.
        layer: `S4D` or `S4`.
        d_state: real state size of each channel.
        dropout: probability, in each block.
        mix: whether each block mixes its channels (system 5) or only normalizes, filters and bends them (system 1).
        discretization: one of ssm.DISCRETIZATIONS.
        alpha: of the generalized bilinear transform.
        gap: of async: the interval between samples.
        bidirectional: whether each layer also runs backwards in time.

    Raises:
        ValueError: an unknown layer, or what the layer refuses.

    Source: reference systems 1 and 5.
    """

    def __init__(
        self,
        d_input: int,
        num_classes: int,
        d_model: int = 128,
        num_layers: int = 4,
        *,
        layer: str = "S4D",
        d_state: int = 64,
        dropout: float = 0.0,
        mix: bool = True,
        discretization: str = "zoh",
        alpha: float = 0.5,
        gap: float = 1.0,
        bidirectional: bool = False,
    ) -> None:
        super().__init__()
        layers = {"S4D": S4D, "S4": S4}
        if layer not in layers:
            raise ValueError(f"layer is {layer!r}; choose S4D or S4.")
        self.d_input, self.num_classes, self.d_model, self.num_layers = d_input, num_classes, d_model, num_layers
        self.layer, self.d_state, self.dropout, self.mix = layer, d_state, dropout, mix
        self.discretization, self.alpha, self.gap, self.bidirectional = discretization, alpha, gap, bidirectional

        def block() -> S4Block:
            ssm = layers[layer](
                d_model, d_state, discretization=discretization, alpha=alpha, gap=gap, bidirectional=bidirectional
            )
            return S4Block(ssm, dropout=dropout, mix=mix)

        self.trunk = Chain(nn.Conv1d(d_input, d_model, 1), *(block() for _ in range(num_layers)))
        self.head = nn.Linear(d_model, num_classes)

    def forward(self, u: Tensor) -> Tensor:
        """(B, d_input, L) -> (B, num_classes)"""
        return self.head(self.trunk(u).mean(-1))
