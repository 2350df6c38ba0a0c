"""Whether an hour of audio streams: in memory that stays flat, as the model's own forward, and without seams.

    python evaluation/bench/stream_hour.py MODEL --minutes 60 --json evaluation/results/stream_hour.json

Makes a file at the model's rate, of notes that do not keep to the blocks, and sends it through `s4audio reconstruct` (a WAV
file, blocks of a second) and through `s4audio stream` (32-bit floats), each on one thread in a process of its own. Of each:

* its resident memory (of Linux, VmRSS) when a twelfth and eleven twelfths of the output have come out: minutes 5 and 55;
* three random windows of 10 s against `forward`. A window is computed with so much of the sound before it that the model's
  slowest pole has fallen to exp(-25): what is left out is below rounding. How much twice as much changes stands beside it;
* the steps |y[k] - y[k - 1]| at block edges against those elsewhere: against all, and against the largest of as many places
  drawn at random, 1,000 times, among the other edges of the model's frames.
"""

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import s4audio
import s4audio.checkpoint
from s4audio.audio import write_blocks
from s4audio.cli.info import memories

NOTE_SECONDS, WINDOW_SECONDS, DRAWS = 0.7, 10, 1000


def notes(num_samples: int, sample_rate: int):
    """Notes of three harmonics, one after the other, and faint noise; (1, samples) at a time."""
    generator, length = np.random.default_rng(0), round(NOTE_SECONDS * sample_rate)
    time_ = np.arange(length) / sample_rate
    envelope = np.exp(-3 * time_) * np.minimum(1, 200 * time_)
    for first in range(0, num_samples, length):
        pitch = sample_rate / 80 * 2 ** generator.uniform(0, 2)
        tone = sum(np.sin(2 * np.pi * k * pitch * time_ + generator.uniform(0, 6)) / k for k in (1, 2, 3))
        samples = generator.uniform(0.1, 0.4) * envelope * tone + 0.002 * generator.standard_normal(length)
        yield torch.from_numpy(samples[: num_samples - first]).float().unsqueeze(0)


def watch(process: subprocess.Popen, output: Path, num_bytes: int) -> dict[str, float]:
    """Waits for a process; its seconds, and its resident MiB at a twelfth and at eleven twelfths of the output."""
    began, shares, found = time.perf_counter(), {"minute_5": 1 / 12, "minute_55": 11 / 12}, {}
    partial = output.with_name(f".{output.name}.new")
    while process.poll() is None:
        written = next((path.stat().st_size for path in (partial, output) if path.exists()), 0)
        status = Path(f"/proc/{process.pid}/status").read_text()
        if "VmRSS" in status:
            resident = int(status.split("VmRSS:")[1].split()[0]) / 1024
            for name, share in shares.items():
                if written >= share * num_bytes:
                    found.setdefault(name, resident)
        time.sleep(0.02)
    assert process.returncode == 0
    return {"seconds": time.perf_counter() - began, "resident_mib": found}


@torch.no_grad()
def largest_difference(model, audio: np.ndarray, got: np.ndarray, gain: float, context: int) -> list[dict[str, float]]:
    """Of three random windows: where, how far from `forward`, and how far that moves with twice the context."""
    generator, windows, hop = np.random.default_rng(1), [], model.hop_length
    length = min(WINDOW_SECONDS * model.sample_rate, len(audio)) // hop * hop  # a frame that is cut hears zeros
    for start in sorted((hop * generator.integers(0, (len(audio) - length) // hop + 1, 3)).tolist()):
        wanted = []
        for before in (2 * context, context):
            first = max(0, (start - before) // hop * hop)
            piece = torch.from_numpy(audio[first : start + length])[None, None]
            wanted.append(model(gain * piece)[0, 0, start - first :].numpy() / gain)
        difference = np.abs(got[start : start + length] - np.clip(wanted[0], -1, 1)).max()
        moved = np.abs(wanted[0] - wanted[1]).max()
        windows.append({"second": start / model.sample_rate, "difference": float(difference), "context": float(moved)})
    return windows


def seams(got: np.ndarray, block: int, hop_length: int) -> dict[str, float]:
    """The steps at block edges against those elsewhere."""
    steps = np.abs(np.diff(got))
    edges = np.arange(block, len(got), block)
    frames = np.setdiff1d(np.arange(hop_length, len(got), hop_length), edges)
    at_edges, largest = steps[edges - 1], float(steps[edges - 1].max())
    generator = np.random.default_rng(2)
    draws = np.array([steps[generator.choice(frames, len(edges)) - 1].max() for _ in range(DRAWS)])
    steps[edges - 1] = 0
    return {
        "edges": len(edges), "mean_at_edges": float(at_edges.mean()), "mean_elsewhere": float(steps.mean()),
        "largest_at_edges": largest, "largest_elsewhere": float(steps.max()),
        "steps_elsewhere_that_are_larger": int((steps > largest).sum()),
        "share_of_draws_with_a_larger_step": float((draws >= largest).mean()),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="model folder")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--block", type=int, default=8192, help="samples, of `s4audio stream`")
    parser.add_argument("--json", help="also write the figures to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = s4audio.load(args.model)
    rate, num_samples = model.sample_rate, round(60 * args.minutes * model.sample_rate)
    slowest = max(memory.decay.max().item() for memory in memories(model))  # s, to 1/e
    context = math.ceil(25 * slowest * rate)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "s4audio"]
    result = {
        "command": f"python evaluation/bench/stream_hour.py MODEL --minutes {args.minutes:g}",
        "machine": f"{processor()}, {os.cpu_count()} cores, one thread",
        "minutes": args.minutes, "sample_rate": rate, "hop_length": model.hop_length, "samples": num_samples,
        "parameters": sum(p.numel() for p in model.parameters()), "slowest_pole_seconds": slowest,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        wav, raw, out_wav, out_raw = (Path(folder) / name for name in ("in.wav", "in.raw", "out.wav", "out.raw"))
        write_blocks(wav, notes(num_samples, rate), rate)
        pcm = np.memmap(wav, "<i2", "r", 44)
        audio = pcm.astype(np.float32) / 32768
        audio.tofile(raw)
        normalized = s4audio.checkpoint.read_config(args.model)["training"].get("normalize") == "peak"
        peak = float(np.abs(audio).max()) if normalized else 1.0
        quiet = {"env": environment, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(
            [*command, "reconstruct", args.model, str(wav), str(out_wav)], stdout=subprocess.DEVNULL, **quiet
        )
        result["reconstruct"] = watch(process, out_wav, 2 * num_samples)
        with raw.open("rb") as source, out_raw.open("wb") as sink:
            options = ["--format", "f32", "--block", str(args.block), "--gain", str(-20 * math.log10(peak))]
            process = subprocess.Popen([*command, "stream", args.model, *options], stdin=source, stdout=sink, **quiet)
            result["stream"] = {"block": args.block, **watch(process, out_raw, 4 * num_samples)}
        outputs = {
            "reconstruct": (np.memmap(out_wav, "<i2", "r", 44).astype(np.float32) / 32768, rate),
            "stream": (np.fromfile(out_raw, "<f4"), args.block),
        }
        for verb, (got, block) in outputs.items():
            assert len(got) == num_samples
            found = result[verb]
            found["real_time_factor"] = found["seconds"] / (60 * args.minutes)
            found["windows"] = largest_difference(model, audio, got, 1 / peak, context)
            found["seams"] = seams(got, block, model.hop_length)
            print(json.dumps({verb: found}, indent=1), flush=True)
    if args.json:
        versions = {"s4audio": s4audio.__version__, "torch": torch.__version__, "python": platform.python_version()}
        Path(args.json).write_text(json.dumps({**result, "versions": versions}, indent=1) + "\n")


def processor() -> str:
    """The name of the processor, where Linux tells it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
