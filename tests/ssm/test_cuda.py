"""The engine on a CUDA device against float64 on the CPU; run by `make test-gpu`."""

import pytest
import torch

from s4audio.ssm import run
from tests.ssm.systems import FAMILIES, discretize, error, parameters

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("kind, init", FAMILIES)
@pytest.mark.parametrize("length", [1, 65, 5000])
def test_cuda_equals_cpu(kind, init, length):
    u, values = torch.randn(2, 3, length), parameters(kind, init)  # drawn once, for both devices
    wanted, state = run(discretize(values, "bilinear"), u.double())
    on_cuda = {name: value.cuda() for name, value in values.items()}
    y, after = run(discretize(on_cuda, "bilinear", torch.float32), u.cuda())
    assert error(y.cpu(), wanted) < 1e-5
    assert error(after.cpu(), state) < 1e-5
