"""One thread, with which tests on a busy machine are up to 17 times faster, and the same random numbers every time.

Where there is no CUDA, Triton's kernels run in its interpreter.
"""

import os
import signal
from importlib.util import find_spec

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # numpy's and scipy's, read when they are imported

import pytest
import torch

# What is started in the background is told to ignore Ctrl-C, and so would be what the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start: several at once on few cores wait for each other

if not torch.cuda.is_available() and find_spec("triton"):
    os.environ["TRITON_INTERPRET"] = "1"  # read when s4audio.ssm.triton is imported
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_for_numpy(tensor, scope):
        """Triton 3.6 makes an int of an array of one entry, which numpy 2.4 refuses."""
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_for_numpy
    multiply = interpreter.InterpreterBuilder.create_dot

    def multiply_bfloat16(self, a, b, d, *options):
        """numpy has no bfloat16, and the interpreter would multiply its bits: make it float32 first."""

        def widen(v):
            if v.dtype != tl.bfloat16:
                return v
            bits = interpreter._convert_float(v.data, tl.bfloat16, tl.float32, None)
            return interpreter.TensorHandle(bits.view(np.float32).reshape(v.data.shape), tl.float32)

        return multiply(self, widen(a), widen(b), d, *options)

    interpreter.InterpreterBuilder.create_dot = multiply_bfloat16
    convert = interpreter._convert_float

    def convert_to_nearest(data, source, target, rounding):
        """The interpreter cuts float32 off where it makes bfloat16 of it; GPUs round to the nearest."""
        if source == tl.float32 and target == tl.bfloat16:
            return torch.from_numpy(data.view(np.float32).copy()).bfloat16().view(torch.uint16).numpy()
        return convert(data, source, target, rounding)

    interpreter._convert_float = convert_to_nearest


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory) -> None:
    """Tests and the programs that they start leave the user's own cache alone."""
    os.environ["S4AUDIO_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
