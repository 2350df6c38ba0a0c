"""The sequence classifier learns, and is invariant where it must be."""

import pytest
import torch
from torch.nn import functional as F

from s4audio import S4Model


@pytest.mark.parametrize("arguments", [{"layer": "S4D"}, {"layer": "S4", "discretization": "bilinear"}, {"mix": False}])
def test_tells_slow_from_fast_tones(arguments):
    torch.manual_seed(0)
    model = S4Model(1, 2, d_model=8, num_layers=1, d_state=8, **arguments)
    label = torch.tensor([0, 1] * 8)
    frequency = torch.where(label == 0, 0.1, 0.9) + 0.05 * torch.rand(16)
    u = torch.sin(frequency[:, None, None] * torch.arange(128) + 6 * torch.rand(16, 1, 1))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(40):
        logits = model(u)
        optimizer.zero_grad()
        F.cross_entropy(logits, label).backward()
        optimizer.step()
    assert logits.shape == (16, 2)
    assert (logits.argmax(1) == label).float().mean() > 0.9


def test_unknown_layer_is_refused():
    with pytest.raises(ValueError, match="layer is 'S5'; choose S4D or S4"):
        S4Model(3, 10, layer="S5")
