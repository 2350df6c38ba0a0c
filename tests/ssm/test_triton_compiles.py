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

COMPILE_ONLY = """
import json, sys, torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

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
"""
ENGINE = """
from s4audio.ssm import triton as fused
from tests.ssm.systems import discretize, parameters
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
"""
BLOCK_ENDS = """
from s4audio.layers import triton as fused
for channels in (3, 128, 512):
    for dtype in (torch.float32, torch.bfloat16):
        v, u = (torch.zeros(2, width, 200, dtype=dtype, requires_grad=True) for width in (2 * channels, channels))
        shapes = (2 * channels, (2, channels), channels, channels)
        bias, keep, weight, shift = (torch.ones(shape, requires_grad=True) for shape in shapes)
        for drop, norm in ((None, (None, None)), (keep.detach(), (weight, shift))):
            fused.gated(v, bias, fused.gelu(u, drop), drop, *norm, 1e-5).sum().backward()
        fused.channel_norm(u, weight, shift, 1e-5).sum().backward()
"""
STEPS = """
from s4audio.ssm import ops
from s4audio.layers import triton_step
from s4audio.models import SaShiMi
ops.fuses = lambda u: True
from s4audio.models.stepping import Stepper
for arguments in ({}, {"d_model": 6, "pools": (3,), "num_blocks": 1, "d_state": 6, "num_levels": 20, "chunk_samples": 300}):
    model = SaShiMi(8000, **arguments)
    with torch.inference_mode():
        stepper = Stepper(model, model.initial_state(2), 0, 0.9, 1.0)
        stepper._run(torch.zeros(16, 2))
"""
SHAPES = [(2, 200, 64), (1, 1, 64), (40, 130, 2)]  # batch, length, d_state: segments of one chunk, a rest, one sample, tiles
WALK = {"_sums", "_starts", "_forward", "_backward", "_totals"}
OPERATORS = {"_operators", "_operators_backward", "_discretize", "_discretize_gradient"}
DENSE = {"_dense_rows", "_dense_rows_gradient"}


def compiled(program, *arguments):
    """The kernels that a program launches, compiled in a process without the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    source = COMPILE_ONLY + program + "print(json.dumps(shared))"
    command = [sys.executable, "-c", source, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=os.getcwd())
    assert done.returncode == 0, done.stderr[-3000:]
    shared = json.loads(done.stdout)
    for name, taken in shared.items():
        assert taken <= 227 * 1024 // 2, f"{name} takes {taken} bytes of shared memory: two programs would not fit"
    return set(shared)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind, init", [("diagonal", "lin"), ("dplr", "legs")])
def test_kernels_compile_for_an_h100(kind, init, dtype):
    shapes = SHAPES[:1] if kind == "dplr" or dtype == "bfloat16" else SHAPES
    assert compiled(ENGINE, kind, init, dtype, shapes) == WALK | (DENSE if kind == "dplr" else OPERATORS)


def test_ends_of_blocks_compile_for_an_h100():
    assert compiled(BLOCK_ENDS) == {"_norm", "_norm_gradient", "_gelu", "_gelu_gradient", "_gated", "_gated_gradient"}


def test_steps_of_generation_compile_for_an_h100():
    assert compiled(STEPS) == {"_discretize", "_pairs", "_draw"}
