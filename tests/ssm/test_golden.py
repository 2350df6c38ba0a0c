"""Numbers of the public S4 reference and of scipy, made outside this project; golden/README.md says how."""

from pathlib import Path

import numpy as np
import pytest
import torch

from s4audio.ssm import BACKENDS, DiagonalSystem, backend, kernel, ops, run
from tests.ssm.systems import cast, discretize, error

FILES = sorted((Path(__file__).parent / "golden").glob("*_L1024.npz"))


def load(path: Path) -> dict[str, torch.Tensor]:
    """The file's arrays, without the leading axis of one that C, D, K and P have."""
    with np.load(path) as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file.files if file[name].dtype.kind in "fc"}
    return {name: value[0] if name in ("C", "D", "K", "P") else value for name, value in arrays.items()}


def system_of(path: Path, golden: dict[str, torch.Tensor], dtype: torch.dtype):
    letters = ("A", "B", "C", "dt", "P") if "P" in golden else ("A", "B", "C", "dt")
    return discretize({letter: golden[letter] for letter in letters}, path.stem.split("_")[-2], dtype)


def test_every_file_is_here():
    assert len(FILES) == 14


@pytest.mark.parametrize(
    "name, dtype",
    [(name, torch.float32) for name in BACKENDS if name != "triton" or ops.fused]
    + [(name, torch.float64) for name in BACKENDS if name != "triton"],
)
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_kernel_output_and_state_equal_the_golden_ones(path, name, dtype):
    golden = load(path)
    device = "cuda" if name == "triton" and torch.cuda.is_available() else "cpu"  # without CUDA, in the interpreter
    system = system_of(path, golden, dtype)
    system = system._replace(**{k: v.to(device) for k, v in system._asdict().items() if isinstance(v, torch.Tensor)})
    tolerance = tolerance_from_state = 1e-4
    if dtype == torch.float64:
        tolerance = 1e-10 if "P" in golden else 1e-12
        tolerance_from_state = 1e-9 if "fout" in path.stem else tolerance
    u, modes = cast(golden["u"], dtype).to(device), golden["A"].shape[1]
    through = golden["D"].unsqueeze(-1) * golden["u"]
    with backend(name):
        assert error(kernel(system, 1024), golden["K"]) < tolerance
        y, state = run(system, u)
        assert error(y.cpu() + through, golden["y"]) < tolerance
        if "state_final" in golden:
            assert error(state, golden["state_final"][..., :modes]) < tolerance
        if "state0" in golden:
            y, state = run(system, u, cast(golden["state0"], dtype).to(device))
            assert error(y.cpu() + through, golden["y_from_state0"]) < tolerance_from_state
            assert error(state, golden["state_final_from_state0"]) < tolerance_from_state
    assert y.dtype == dtype


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_discrete_matrices_equal_the_golden_ones(path):
    golden = load(path)
    system = system_of(path, golden, torch.float64)
    if isinstance(system, DiagonalSystem):
        A_bar = torch.exp(system.log_A_bar)
        assert error(A_bar if system.C.is_complex() else A_bar.real, golden["dA"]) < 1e-12
        assert error(system.B_bar, golden["dB"]) < 1e-12
        return
    # dA acts on [x, conj x]: A_bar in other coordinates.
    eye = torch.eye(golden["A"].shape[1], dtype=torch.complex128)
    to_full = torch.cat([torch.cat([eye, 1j * eye], dim=1), torch.cat([eye, -1j * eye], dim=1)])
    assert error(to_full @ system.A_bar.to(to_full.dtype) @ torch.linalg.inv(to_full), golden["dA"]) < 1e-10
    assert error(system.B_bar.to(to_full.dtype) @ to_full.T, golden["dB"]) < 1e-10
