"""Times a state-space convolution: the textbook path (Vandermonde matrix + FFT) against the engine, in one run.

    python evaluation/bench/ssm_conv.py --device cpu

Each path of each shape runs in a process of its own, the two paths in turn, so that its peak memory (the highest
resident set, less the highest before the first call) is its own. A time is the median over the repeats after one warm-up;
parameters to output forward, and to every gradient (u, A, B, C, dt) for forward + backward. The ratio is textbook / ours.
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
from importlib import metadata
from pathlib import Path

SHAPES = [(1, 64, 90112), (16, 128, 1024), (8, 64, 16384)]
PATHS = ("textbook", "ours")


def measure(path: str, shape: tuple[int, int, int], d_state: int, backward: bool, repeats: int) -> dict[str, float]:
    """Median seconds and peak MiB of one path; runs in its own process."""
    import torch

    from s4audio import ssm
    from s4audio.ssm import reference
    from s4audio.ssm.init import initial_system

    torch.manual_seed(0)
    batch, channels, length = shape
    A, B, _ = initial_system("lin", d_state)
    A, B = (p.to(torch.complex64).repeat(channels, 1).requires_grad_(backward) for p in (A, B))
    C = torch.randn(channels, d_state // 2, dtype=torch.complex64, requires_grad=backward)
    dt = torch.logspace(-3, -1, channels).unsqueeze(-1).requires_grad_(backward)
    u = torch.randn(batch, channels, length, requires_grad=backward)
    gradient = torch.randn(batch, channels, length) if backward else None

    def once() -> float:
        for parameter in (u, A, B, C, dt):
            parameter.grad = None
        start = time.perf_counter()
        with torch.set_grad_enabled(backward):
            system = ssm.diagonal_system(A, B, C, dt, "zoh")
            if path == "textbook":
                y = reference.fft_convolution(u, reference.vandermonde_kernel(system, length))
            else:
                y, _ = ssm.run(system, u)
            if backward:
                y.backward(gradient)
        return time.perf_counter() - start

    idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    once()
    seconds = statistics.median(once() for _ in range(repeats))
    return {"seconds": seconds, "mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - idle) / 1024}


def in_own_process(**job: object) -> dict[str, float]:
    """`measure(**job)` in a fresh Python."""
    done = subprocess.run(
        [sys.executable, os.path.abspath(__file__), "--job", json.dumps(job)], capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"the measurement {job} failed:\n{done.stderr}")
    return json.loads(done.stdout)


def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu"], default="cpu")
    parser.add_argument("--d_state", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--shapes", nargs="*", default=[",".join(map(str, s)) for s in SHAPES], help="batch,channels,length")
    parser.add_argument("--json", help="also write the figures to this file")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        job = json.loads(args.job)
        print(json.dumps(measure(**job)))
        return
    rows = []
    machine = f"{processor()}, {os.cpu_count()} cores, torch {metadata.version('torch')}"
    print(f"{machine}, float32, N = {args.d_state}, median of {args.repeats}")
    print(f"{'(B, H, L)':>18}  {'pass':<18} {'textbook':>20} {'ours':>20} {'faster':>8} {'memory':>8}")
    for text in args.shapes:
        shape = tuple(map(int, text.split(",")))
        for backward in (False, True):
            found = {
                path: in_own_process(path=path, shape=shape, d_state=args.d_state, backward=backward, repeats=args.repeats)
                for path in PATHS
            }
            textbook, ours = found["textbook"], found["ours"]
            faster, smaller = textbook["seconds"] / ours["seconds"], textbook["mib"] / max(ours["mib"], 1)
            name = "forward + backward" if backward else "forward"
            cells = [f"{f['seconds'] * 1e3:9.1f} ms {f['mib']:5.0f} MiB" for f in (textbook, ours)]
            print(
                f"{shape!s:>18}  {name:<18} {cells[0]:>20} {cells[1]:>20} {faster:>7.1f}x {f'1/{smaller:.1f}':>8}",
                flush=True,
            )
            rows.append({"shape": shape, "pass": name, **found, "faster": faster, "memory_ratio": smaller})
    if args.json:
        with open(args.json, "w") as file:
            json.dump(
                {"machine": machine, "d_state": args.d_state, "rows": rows},
                file,
                indent=1,
            )


if __name__ == "__main__":
    main()
