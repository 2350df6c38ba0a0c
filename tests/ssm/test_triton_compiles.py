"""Every Triton kernel compiles for an H100, on a machine without one, and fits into its registers and shared memory.

The interpreter cannot tell: it takes types that the compiler refuses, and has no registers to run out of. Runs in a process
of its own, since kernels that were decorated for the interpreter cannot be compiled.
"""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

PROGRAM = """
import json, sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from s4audio.ssm import triton as fused

DOUBLE = {"log_A_bar", "dlog", "carry", "carry_rest", "dcarry", "dcarry_rest", "over_span", "over_last"}
INPUTS = {"u", "y", "v", "dy", "du", "X"}
INTEGERS = set("u_b u_h y_b y_h v_b v_h dy_b dy_h du_b du_h X_h batch tiles num_segments span last_span num_chunks first "
               "valid first_chunk first_partial num_partials modes o_t o_n rest".split())

for name, kind, constants in json.load(sys.stdin):
    kernel = getattr(fused, name)
    signature = {}
    for argument in kernel.arg_names:
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in INTEGERS:
            signature[argument] = "i32"
        else:
            signature[argument] = "*" + ("fp64" if argument in DOUBLE else kind if argument in INPUTS else "fp32")
    values = {(kernel.arg_names.index(argument),): value for argument, value in constants.items()}
    options = dict(fused.OPTIONS) if "PRODUCT" in constants else {}
    compiled = compile(ASTSource(kernel, signature, values), target=GPUTarget("cuda", 90, 32), options=options)
    print(json.dumps([name, compiled.metadata.shared]), flush=True)
"""


def walks() -> list[tuple]:
    """The kernels of a walk, in each precision, for both kinds of carry, with a segment of many chunks and of one."""
    kernels = []
    for kind, forward, backward, T in [("fp32", "tf32x3", "bf16x3", 32), ("bf16", "bf16", "bf16", 64)]:
        for dense in (False, True):
            shape = {"R": 16, "T": T, "N": 32, "DENSE": dense}
            kernels += [
                ("_forward", kind, {**shape, "KEEP": True, "PRODUCT": forward}),
                ("_backward", kind, {**shape, "PRODUCT": backward, "span": 1, "num_segments": 1}),
                ("_sums", kind, {**shape, "BACK": dense, "PRODUCT": backward, "o_n": 1}),
            ]
    return kernels


OTHERS = [
    ("_operators", "fp32", {"T": 32, "N": 32, "rest": 1}),
    ("_operators_backward", "fp32", {"T": 32, "N": 16, "modes": 1}),
    *(("_starts", "fp32", {"R": 16, "N": 32, "BACK": True, "DENSE": dense}) for dense in (False, True)),
]


@pytest.mark.parametrize("kernels", [walks()[:6], walks()[6:], OTHERS], ids=["float32", "bfloat16", "others"])
def test_kernels_compile_for_an_h100(kernels):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], input=json.dumps(kernels), capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    compiled = [json.loads(line) for line in done.stdout.splitlines()]
    assert [name for name, _ in compiled] == [name for name, _, _ in kernels]
    for name, shared in compiled:
        assert shared <= 227 * 1024 // 2, f"{name} takes {shared} bytes: two programs would not fit on a multiprocessor"
