"""Every Triton kernel compiles for an H100 as it is called, on a machine without one, and leaves room for a second program.

The interpreter cannot tell: it takes types that the compiler refuses, and has no shared memory to run out of. In a process
of its own, since kernels that were decorated for the interpreter cannot be compiled.
"""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

PROGRAM = """
import json, sys, torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from s4audio.ssm import triton as fused
from tests.ssm.systems import discretize, parameters

class Driver:  # of a GPU that is not there
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0

run, shared = JITFunction.run, {}
def compile_only(self, *args, grid, warmup, **kwargs):
    kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
    shared[self.__name__] = max(shared.get(self.__name__, 0), kernel.metadata.shared)
    wrong = [line for line in kernel.asm["ptx"].splitlines() if "wgmma" in line and "tf32" in line]
    assert not wrong, f"{self.__name__} multiplies 64 rows as three TF32 products: Triton 3.6 compiles wrong numbers"

driver.set_active(Driver())
JITFunction.run = compile_only
kind, init, dtype, shapes = json.loads(sys.argv[1])
plain = {"rate": 1, "alpha": 0.5, "gap": 1}
for batch, length, d_state in shapes:
    values = {name: value.requires_grad_() for name, value in parameters(kind, init, 3, d_state).items()}
    system = discretize(values, "bilinear", torch.float32)
    if kind == "diagonal":
        continuous = {name: values[name].to(torch.complex64) for name in "ABC"}
        for scheme in ("dirac", "zoh", "bilinear"):
            system = fused.diagonal_system(**continuous, dt=values["dt"].float(), discretization=scheme, **plain)
    u = torch.zeros(batch, 3, length, dtype=getattr(torch, dtype), requires_grad=True)
    y, _ = fused.run(system, u, torch.zeros(3, batch, d_state), torch.zeros(3, requires_grad=True))
    y.sum().backward()
print(json.dumps(shared))
"""
SHAPES = [(2, 200, 64), (1, 1, 64), (40, 130, 2)]  # batch, length, d_state: segments of one chunk, a rest, one sample, tiles
WALK = {"_sums", "_starts", "_forward", "_backward", "_totals"}
OPERATORS = {"_operators", "_operators_backward", "_discretize", "_discretize_gradient"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind, init", [("diagonal", "lin"), ("dplr", "legs")])
def test_kernels_compile_for_an_h100(kind, init, dtype):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    arguments = json.dumps([kind, init, dtype, SHAPES[:1] if kind == "dplr" or dtype == "bfloat16" else SHAPES])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, arguments], capture_output=True, text=True, env=environment, cwd=os.getcwd()
    )
    assert done.returncode == 0, done.stderr[-3000:]
    shared = json.loads(done.stdout)
    assert set(shared) == (WALK if kind == "dplr" else WALK | OPERATORS)
    for name, taken in shared.items():
        assert taken <= 227 * 1024 // 2, f"{name} takes {taken} bytes of shared memory: two programs would not fit"
