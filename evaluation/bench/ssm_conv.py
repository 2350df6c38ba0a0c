"""Times a state-space convolution: the textbook path (Vandermonde matrix + FFT) against the engine, in one run.

    python evaluation/bench/ssm_conv.py --device cpu
    python evaluation/bench/ssm_conv.py --device cuda

A pass goes from the parameters to the output (forward), or on to every gradient: u, A, B, C, dt (forward + backward). Times
are medians after warming up; the ratio is textbook / ours.

On the CPU each path of each shape runs in a process of its own, the paths in turn, so that its peak memory (the highest
resident set, less the highest before the first call) is its own. On a GPU all paths share a process, and a time is that of a
CUDA graph's replay, because issuing some sixty small kernels one by one takes longer than most of these passes: `eager` has
that time too. Peak memory is the allocator's, less the inputs. The floor is 2 tensor passes forward and 5 forward +
backward at the speed of a copy that is measured first. The textbook cannot take bfloat16 (nor can cuFFT): ratios in
bfloat16 are against the textbook in float32. `compiled` is torch.compile of the textbook.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from s4audio import ssm
from s4audio.ssm import reference
from s4audio.ssm.diagonal import diagonal_system
from s4audio.ssm.init import initial_system

SHAPES = {
    "cpu": [(1, 64, 90112), (16, 128, 1024), (8, 64, 16384)],
    "cuda": [(64, 512, 1024), (8, 64, 131072), (8, 256, 65536), (1, 64, 1048576), (1, 2, 90000), (128, 512, 16)],
}
SMALL_STATE = {(1, 2, 90000): 10}  # reference system 4
PATHS = ("textbook", "ours")
PASSES = {False: "forward", True: "forward + backward"}


def make_pass(
    path: str, shape: tuple[int, int, int], d_state: int, backward: bool, device: str, dtype: torch.dtype = torch.float32
) -> Callable[[], None]:
    """One pass over inputs that are drawn now; `path` is textbook, compiled or ours."""
    torch.manual_seed(0)
    batch, channels, length = shape
    A, B, _ = initial_system("lin", d_state)
    A, B = (p.to(torch.complex64).repeat(channels, 1) for p in (A, B))
    C = torch.randn(channels, d_state // 2, dtype=torch.complex64)
    dt = torch.logspace(-3, -1, channels).unsqueeze(-1)
    u = torch.randn(batch, channels, length, dtype=dtype, device=device)
    inputs = [tensor.to(device).requires_grad_(backward) for tensor in (A, B, C, dt, u)]
    gradient = torch.randn_like(u) if backward else None

    def textbook(A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, dt: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        system = diagonal_system(A, B, C, dt, "zoh")
        return reference.fft_convolution(u, reference.vandermonde_kernel(system, length))

    def ours(A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, dt: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return ssm.convolve(ssm.diagonal_system(A, B, C, dt, "zoh"), u)

    function = {"textbook": textbook, "compiled": torch.compile(textbook), "ours": ours}[path]

    def once() -> None:
        with torch.set_grad_enabled(backward):
            y = function(*inputs)
            if backward:
                torch.autograd.grad(y, inputs, gradient)

    return once


def measure_on_cpu(path: str, shape: tuple[int, int, int], d_state: int, backward: bool, repeats: int) -> dict[str, float]:
    """Median seconds and peak MiB; runs in its own process."""
    once = make_pass(path, shape, d_state, backward, "cpu")

    def seconds() -> float:
        start = time.perf_counter()
        once()
        return time.perf_counter() - start

    idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    once()
    median = statistics.median(seconds() for _ in range(repeats))
    return {"seconds": median, "mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - idle) / 1024}


def in_own_process(**job: object) -> dict[str, float]:
    """`measure_on_cpu(**job)` in a fresh Python."""
    done = subprocess.run(
        [sys.executable, os.path.abspath(__file__), "--job", json.dumps(job)], capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"the measurement {job} failed:\n{done.stderr}")
    return json.loads(done.stdout)


def on_cpu(shapes: list[tuple[int, int, int]], d_state: int, repeats: int) -> dict[str, Any]:
    """Both paths at every shape, forward and forward + backward."""
    machine = f"{processor()}, {os.cpu_count()} cores, torch {metadata.version('torch')}"
    print(f"{machine}, float32, N = {d_state}, median of {repeats}")
    print(f"{'(B, H, L)':>18}  {'pass':<18} {'textbook':>20} {'ours':>20} {'faster':>8} {'memory':>8}")
    rows = []
    for shape in shapes:
        for backward, name in PASSES.items():
            job = {"shape": shape, "d_state": d_state, "backward": backward, "repeats": repeats}
            found = {path: in_own_process(path=path, **job) for path in PATHS}
            textbook, ours = found["textbook"], found["ours"]
            faster, smaller = textbook["seconds"] / ours["seconds"], textbook["mib"] / max(ours["mib"], 1)
            cells = [f"{f['seconds'] * 1e3:9.1f} ms {f['mib']:5.0f} MiB" for f in (textbook, ours)]
            print(
                f"{shape!s:>18}  {name:<18} {cells[0]:>20} {cells[1]:>20} {faster:>7.1f}x {f'1/{smaller:.1f}':>8}",
                flush=True,
            )
            rows.append({"shape": shape, "pass": name, **found, "faster": faster, "memory_ratio": smaller})
    return {"machine": machine, "d_state": d_state, "rows": rows}


def milliseconds(function: Callable[[], object], repeats: int) -> float:
    """Median on the GPU's own clock, with a cold cache."""
    from triton.testing import do_bench

    return do_bench(function, warmup=10, rep=10 * repeats, return_mode="median")


def measure_on_cuda(once: Callable[[], None], repeats: int) -> dict[str, float | None]:
    """Milliseconds of a graph's replay and eagerly, and peak MiB beyond the inputs; None throughout if memory runs out."""
    try:
        once()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        once()
        torch.cuda.synchronize()
        mib = (torch.cuda.max_memory_allocated() - before) / 2**20
        eager = milliseconds(once, repeats)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            once()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            once()
        return {"ms": milliseconds(graph.replay, repeats), "eager_ms": eager, "mib": mib}
    except torch.OutOfMemoryError:
        return {"ms": None, "eager_ms": None, "mib": None}
    finally:
        torch.cuda.empty_cache()


def copy_speed(repeats: int) -> float:
    """Bytes per second, read and written, of a copy of 1 GiB."""
    numbers = torch.randn(2**28, device="cuda")
    copied = torch.empty_like(numbers)
    return 2 * 4 * numbers.numel() / milliseconds(lambda: copied.copy_(numbers), repeats) * 1e3


def on_cuda(
    shapes: list[tuple[int, int, int]], d_state: int, repeats: int, compiled: bool, keep: Callable[[dict[str, Any]], None]
) -> None:
    """Every path at every shape, forward and forward + backward, in float32, and ours in bfloat16 as well; `keep` is given
    all that is known after every pass, since a machine may be lent for less time than this takes."""
    copy = copy_speed(repeats)
    machine = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    print(f"{machine}, copies {copy / 1e12:.2f} TB/s; milliseconds of a graph's replay, median")
    heads = " ".join(f"{head:>8}" for head in ("ms", "eager", "MiB", "faster", "memory", "floors"))
    print(f"{'(B, H, L)':>18} {'pass':<18} {'path':<16} {heads}")
    paths = [("textbook", torch.float32), ("ours", torch.float32), ("ours", torch.bfloat16)]
    if compiled:
        paths.insert(1, ("compiled", torch.float32))
    rows = []
    for shape in shapes:
        size, N = shape[0] * shape[1] * shape[2], SMALL_STATE.get(shape, d_state)
        for backward, name in PASSES.items():
            textbook: dict[str, float | None] = {}
            for path, dtype in paths:
                found = measure_on_cuda(make_pass(path, shape, N, backward, "cuda", dtype), repeats)
                textbook = found if path == "textbook" else textbook
                floor = (5 if backward else 2) * size * dtype.itemsize / copy * 1e3
                row = {"shape": shape, "d_state": N, "pass": name, "path": path, "dtype": str(dtype)[6:], **found}
                ms, mib = found["ms"], found["mib"]
                row["faster"] = textbook["ms"] / ms if ms and textbook["ms"] else None
                row["memory_ratio"] = textbook["mib"] / mib if mib and textbook["mib"] else None
                row["floor_ms"], row["floors"] = floor, ms / floor if ms else None
                rows.append(row)
                cells = [row[key] for key in ("ms", "eager_ms", "mib", "faster", "memory_ratio", "floors")]
                text = " ".join(f"{'-' if cell is None else f'{cell:.4g}':>8}" for cell in cells)
                print(f"{shape!s:>18} {name:<18} {path + ' ' + row['dtype']:<16} {text}", flush=True)
            keep({"machine": machine, "copy_bytes_per_second": copy, "rows": rows})


def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--d_state", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--shapes", nargs="*", help="batch,channels,length")
    parser.add_argument(
        "--compiled", action="store_true", help="on a GPU: also torch.compile of the textbook, which takes minutes"
    )
    parser.add_argument("--json", help="also write the figures to this file")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        print(json.dumps(measure_on_cpu(**json.loads(args.job))))
        return
    shapes = [tuple(map(int, text.split(","))) for text in args.shapes] if args.shapes else SHAPES[args.device]

    def keep(result: dict[str, Any]) -> None:
        if args.json:
            Path(args.json).write_text(json.dumps(result, indent=1) + "\n")

    if args.device == "cpu":
        keep(on_cpu(shapes, args.d_state, args.repeats))
    else:
        on_cuda(shapes, args.d_state, args.repeats, args.compiled, keep)


if __name__ == "__main__":
    main()
