"""How long `s4audio check` takes for many short files and for a long one, and in how much memory.

    python evaluation/bench/check_folder.py --files 10000 --minutes 6 60 --json evaluation/results/check_folder.json

Writes noise, 2 s at 16 kHz a file, and stereo at 48 kHz for the long ones, and checks them in processes of their own that
read their peak resident memory (of Linux, VmHWM) before and after.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

import s4audio
from s4audio.audio import write_blocks

RATE, SECONDS = 16_000, 2
LONG_RATE = 48_000
CODE = """
import contextlib, io, json, sys, time, scipy.signal
import s4audio.cli.check
from s4audio.cli import main
def peak(): return int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) / 1024
before, start = peak(), time.perf_counter()
with contextlib.redirect_stdout(io.StringIO()):
    assert main(['check', *sys.argv[1:]]) == 0
print(json.dumps({'seconds': time.perf_counter() - start, 'imported_mib': before, 'peak_mib': peak()}))
"""


def make(path: Path, seconds: float, rate: int, channels: int, seed: int) -> None:
    """One file of noise, a minute at a time."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [min(60.0, seconds - done) for done in np.arange(0, seconds, 60)]
    blocks = ((0.1 * torch.randn(channels, round(n * rate), generator=generator)).clamp(-1, 1) for n in lengths)
    write_blocks(path, blocks, rate)


def check(folder: Path, out: Path, workers: int) -> dict:
    command = [sys.executable, "-c", CODE, str(folder), "--out", str(out), "--workers", str(workers)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True, check=True)
    return {"workers": workers, **json.loads(done.stdout)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=10_000, help=f"short files, of {SECONDS} s each (default 10000)")
    parser.add_argument("--minutes", type=float, nargs="*", default=[6, 60], help="lengths of the long files (default 6 60)")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="threads that read (default 1 2)")
    parser.add_argument("--json", help="also write the figures to this file")
    args = parser.parse_args()
    result: dict = {"file_seconds": SECONDS, "sample_rate": RATE, "short": [], "long": []}
    with tempfile.TemporaryDirectory() as name:
        many = Path(name) / "many"
        for number in range(args.files):
            make(many / f"{number // 500:03d}" / f"{number:05d}.wav", SECONDS, RATE, 1, number)
        for workers in args.workers:
            found = {"files": args.files, **check(many, Path(name) / "out", workers)}
            result["short"].append(found)
            print(f"{args.files:,} files, {workers} threads: {_figures(found)}", flush=True)
        for minutes in args.minutes:
            make(Path(name) / "long" / f"{minutes:g}.wav", 60 * minutes, LONG_RATE, 2, 0)
            found = {"minutes": minutes, **check(Path(name) / "long" / f"{minutes:g}.wav", Path(name) / "out", 1)}
            result["long"].append(found)
            print(f"one file of {minutes:g} min: {_figures(found)}", flush=True)
    result["versions"] = {"s4audio": s4audio.__version__, "torch": torch.__version__, "python": platform.python_version()}
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


def _figures(found: dict) -> str:
    return f"{found['seconds']:.1f} s, {found['peak_mib']:.0f} MiB, of which {found['imported_mib']:.0f} before the first"


if __name__ == "__main__":
    main()
