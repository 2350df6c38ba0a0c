"""How much memory and time `s4audio reconstruct` takes for a long file, and whether it gives what the model gives at once.

    python evaluation/bench/stream_file.py MODEL --minutes 1 10 --json evaluation/results/stream_file.json

Makes a file of each length at the model's rate, runs the command on one thread in a process of its own, and reads that
process's peak resident memory (of Linux, VmHWM). A process that loads the model and does nothing stands beside it.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import s4audio
import s4audio.checkpoint
from s4audio.audio import normalize, read_audio, write_audio

CROP_SECONDS = 20


def measure(code: str) -> tuple[float, float, str]:
    """Seconds, peak MiB and output of a Python process on one thread."""
    # Not getrusage: that counts the parent's memory at the fork too.
    code += "\nprint('KiB', open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    start = time.perf_counter()
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True).stdout
    return time.perf_counter() - start, int(out.split("KiB")[1]) / 1024, out.split("KiB")[0].strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="model folder")
    parser.add_argument("--minutes", type=float, nargs="+", default=[1.0, 10.0])
    parser.add_argument("--json", help="also write the figures to this file")
    args = parser.parse_args()
    model = s4audio.load(args.model)
    seconds, memory, _ = measure(f"import s4audio, soxr, soundfile; s4audio.load({args.model!r})")
    print(f"loading the model alone: {seconds:.1f} s, {memory:.0f} MiB")
    result = {"loading": {"seconds": seconds, "peak_mib": memory}, "files": []}
    with tempfile.TemporaryDirectory() as folder:
        for minutes in args.minutes:
            source, target = Path(folder) / "in.wav", Path(folder) / "out.wav"
            generator = torch.Generator().manual_seed(0)
            num_samples = round(60 * minutes * model.sample_rate)
            envelope = 0.05 + 0.3 * torch.sin(torch.arange(num_samples) / model.sample_rate).square()
            write_audio(
                source, (envelope * torch.randn(1, num_samples, generator=generator)).clamp(-1, 1), model.sample_rate
            )
            verb = ["reconstruct", args.model, str(source), str(target)]
            took, memory, said = measure(f"from s4audio.cli import main; assert main({verb!r}) == 0")
            speed = 60 * minutes / took
            level = s4audio.checkpoint.read_config(args.model)["training"].get("normalize", "none")
            audio, _ = read_audio(source)
            gain = (normalize(audio, level).abs().max() / audio.abs().max()).item()
            crop = audio[..., : CROP_SECONDS * model.sample_rate]
            with torch.no_grad():
                wanted = model(gain * crop.unsqueeze(0))[0] / gain
            got = read_audio(target)[0]
            difference = (got[..., : crop.shape[-1]] - wanted.clamp(-1, 1)).abs().max().item()
            print(
                f"{minutes:g} min: {took:.1f} s with loading, {speed:.1f} times real time on one core, "
                f"peak {memory:.0f} MiB; against forward on its first {CROP_SECONDS} s: {difference:.1e}\n"
                f"  {said.splitlines()[-1]}"
            )
            entry = {"minutes": minutes, "seconds": took, "real_time_factor": speed, "peak_mib": memory}
            result["files"].append({**entry, "largest_difference_from_forward": difference, "samples": got.shape[-1]})
    if args.json:
        result["versions"] = {
            "s4audio": s4audio.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
