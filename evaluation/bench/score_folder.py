"""How much memory and time it takes to score many clips, and how that grows with their number.

    python evaluation/bench/score_folder.py --clips 500 5000 --json evaluation/results/score_folder.json

Makes clips of noise of varying colour, 10 s at 16 kHz, scores them against 1,000 others with log_mel in a process of its own
and reads that process's peak resident memory (of Linux, VmHWM).
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
from s4audio.audio import write_audio

RATE, SECONDS, REFERENCE = 16000, 10, 1000
CODE = """
import json, sys, time, torch, s4audio
torch.set_num_threads(int(sys.argv[3]))
start = time.perf_counter()
scores = s4audio.Evaluator().score(sys.argv[1], sys.argv[2])
seconds = time.perf_counter() - start
peak = int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) / 1024
print(json.dumps({'seconds': seconds, 'peak_mib': peak, 'fid': scores['fid'], 'kad': scores['kad']}))
"""


def make(folder: Path, clips: int, seed: int) -> None:
    """Clips of noise, each with a spectrum of its own slope."""
    folder.mkdir()
    generator = np.random.default_rng(seed)
    white = np.fft.rfft(generator.standard_normal(RATE * SECONDS))
    frequency = np.maximum(np.fft.rfftfreq(RATE * SECONDS, 1 / RATE), 20)
    for number in range(clips):
        phase = np.exp(2j * np.pi * generator.random(len(frequency)))
        audio = np.fft.irfft(white * phase * frequency ** -generator.uniform(0, 1.5))
        audio = 0.5 * audio / np.abs(audio).max()
        write_audio(folder / f"{number:05d}.wav", torch.from_numpy(audio).float().unsqueeze(0), RATE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, nargs="+", default=[500, 5000])
    parser.add_argument("--reference", type=int, default=REFERENCE, help=f"clips of the reference (default {REFERENCE})")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--json", help="also write the figures to this file")
    args = parser.parse_args()
    result: dict = {"clip_seconds": SECONDS, "sample_rate": RATE, "reference_clips": args.reference, "runs": []}
    with tempfile.TemporaryDirectory() as name:
        make(Path(name) / "reference", args.reference, 0)
        for clips in args.clips:
            made = Path(name) / f"made_{clips}"
            make(made, clips, clips)
            environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "OPENBLAS_NUM_THREADS": str(args.threads)}
            command = [sys.executable, "-c", CODE, str(made), str(Path(name) / "reference"), str(args.threads)]
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            found = {"clips": clips, **json.loads(done.stdout)}
            found["clips_a_second"] = (clips + args.reference) / found["seconds"]
            result["runs"].append(found)
            print(
                f"{clips} clips against {args.reference}: {found['seconds']:.0f} s, {found['clips_a_second']:.0f} clips a "
                f"second, peak {found['peak_mib']:.0f} MiB",
                flush=True,
            )
    result["threads"] = args.threads
    result["versions"] = {"s4audio": s4audio.__version__, "torch": torch.__version__, "python": platform.python_version()}
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
