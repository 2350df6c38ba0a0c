"""Compares autoencoders as codecs on recordings that they were not trained on.

    python evaluation/codec.py MODEL [MODEL ...] --data FOLDER --json FILE

For each model: the mel distance as the Descript audio codec reports it, SI-SDR, and how many seconds of audio it encodes
and decodes in a second on one CPU thread. Files are cut into clips of --seconds, side by side, taken as mono at the model's
rate and at the level that it was trained on; silent clips are left out. Each score is the mean over clips, with its standard
error behind it.
"""

import argparse
import json
import platform
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

import s4audio
from s4audio.audio import find_audio, normalize, read_audio
from s4audio.checkpoint import fingerprint, read_config
from s4audio.metrics.signal import mel_distance, si_sdr

REPEATS = 5  # of the timing


def clips(folder: str, sample_rate: int, level: str, seconds: float) -> list[Tensor]:
    """(1, 1, samples) each, side by side, without what is left at the end of a file and without silence.

    Raises:
        SystemExit: there is none.
    """
    length, found = round(seconds * sample_rate), []
    for file in find_audio(folder):
        audio = normalize(read_audio(file, sample_rate)[0], level)
        found += [clip for clip in audio.unsqueeze(0).split(length, dim=-1) if clip.shape[-1] == length and clip.any()]
    if not found:
        raise SystemExit(f"{folder} holds no clip of {seconds} s that is not silent; give a smaller --seconds.")
    return found


@torch.no_grad()
def score(path: str, folder: str, seconds: float, device: str) -> dict[str, Any]:
    """What a model does with the clips of a folder."""
    model: Any = s4audio.load(path, device)
    training = read_config(path)["training"]
    heard = clips(folder, model.sample_rate, training.get("normalize", "none"), seconds)
    made = [model(clip.to(device)).cpu() for clip in heard]
    scores = {
        "mel_distance": [mel_distance(m, clip, model.sample_rate).item() for m, clip in zip(made, heard, strict=True)],
        "si_sdr_db": [si_sdr(m, clip).item() for m, clip in zip(made, heard, strict=True)],
    }
    row: dict[str, Any] = {
        "model": path, "class": type(model).__name__, "sha256": fingerprint(path), "steps": training.get("steps"),
        "wall_seconds": training.get("wall_seconds"), "parameters": sum(p.numel() for p in model.parameters()),
        "sample_rate": model.sample_rate, "hop_length": model.hop_length,
        "latent_numbers_a_second": model.latent_channels * model.sample_rate / model.hop_length, "clips": len(heard),
    }  # fmt: skip
    for name, values in scores.items():
        of_clips = torch.tensor(values, dtype=torch.float64)
        row[name] = of_clips.mean().item()
        row[f"{name}_standard_error"] = of_clips.std().item() / len(values) ** 0.5 if len(values) > 1 else None
    return {**row, **speed(model.cpu(), heard[0])}


@torch.no_grad()
def speed(model: Any, clip: Tensor) -> dict[str, float]:
    """Seconds of audio a second on one CPU thread, the median of a few clips after a first."""
    latent, seconds = model.encode(clip), clip.shape[-1] / model.sample_rate
    model.decode(latent)

    def once(call: Any, given: Tensor) -> float:
        start = time.perf_counter()
        call(given)
        return time.perf_counter() - start

    return {
        "encodes_times_real_time": seconds / median(once(model.encode, clip) for _ in range(REPEATS)),
        "decodes_times_real_time": seconds / median(once(model.decode, latent) for _ in range(REPEATS)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="model folder")
    parser.add_argument("--data", required=True, metavar="FOLDER", help="recordings that no model was trained on")
    parser.add_argument("--seconds", type=float, default=5.0, help="length of a clip (default 5)")
    parser.add_argument("--device", default="cpu", help="where the clips go through the models (default cpu)")
    parser.add_argument("--json", metavar="FILE", help="also write the scores to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [score(path, args.data, args.seconds, args.device) for path in args.models]
    print("| model | parameters | numbers a second | mel distance | SI-SDR, dB | encodes, decodes (times real time) |")
    print("| --- | --- | --- | --- | --- | --- |")
    for row in rows:
        cells = [f"{row['class']}, {row['model']}", f"{row['parameters']:,}", f"{row['latent_numbers_a_second']:,.0f}"]
        for name in ("mel_distance", "si_sdr_db"):
            error = row[f"{name}_standard_error"]
            cells.append(f"{row[name]:.2f}" + ("" if error is None else f" ± {error:.2f}"))
        cells.append(f"{row['encodes_times_real_time']:.0f}, {row['decodes_times_real_time']:.0f}")
        print(f"| {' | '.join(cells)} |")
    print(f"{rows[0]['clips']} clips of {args.seconds:g} s from {args.data}; mean ± standard error")
    if args.json:
        versions = {"s4audio": s4audio.__version__, "torch": torch.__version__, "python": platform.python_version()}
        result = {"data": args.data, "seconds": args.seconds, "device": args.device, "rows": rows, "versions": versions}
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
