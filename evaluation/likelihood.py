"""Scores autoregressive models by the bits that they need for a sample of recordings that they never heard.

    python evaluation/likelihood.py --train FOLDER --test FOLDER --json FILE \\
        --model SaShiMi=RUN0/best --model WaveNet=RUN1/best

Every file is scored whole, from silence on, mono at the models' rate and at the level that they were trained on: the
negative log2 of the probability of its codes, over its samples. Beside the models stands order 0, which knows how often each
code comes in --train and nothing of the past. Bits of different quantizations, rates or levels do not compare: models that
differ in these are refused. What is given is the mean over all samples of all files, and the deviation of the files' own.
"""

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import s4audio
from s4audio import checkpoint
from s4audio.audio import find_audio, normalize, read_audio
from s4audio.models.sashimi import to_codes

SAME = ("sample_rate", "num_levels", "quantization", "normalize")  # what bits depend on


def settings(path: str) -> dict[str, Any]:
    """Those of SAME, of the model in a folder."""
    config = checkpoint.read_config(path)
    if config["class"] not in ("SaShiMi", "WaveNet"):
        raise SystemExit(f"{path} is a {config['class']}; wanted a SaShiMi or a WaveNet.")
    return {**config["arguments"], "normalize": config["training"].get("normalize", "none")}


def read(folder: str, common: dict[str, Any]) -> list[Tensor]:
    """The recordings (1, 1, T) of a folder, as the models hear them."""
    audio = (normalize(read_audio(file, common["sample_rate"])[0], common["normalize"]) for file in find_audio(folder))
    return [clip.unsqueeze(0) for clip in audio]


def order_0(train: list[Tensor], num_levels: int, quantization: str) -> Tensor:
    """(num_levels,) float64 bits of each code by its share in the recordings; every code is counted once more than it comes,
    so that none is impossible."""
    counts = sum(to_codes(clip, num_levels, quantization).flatten().bincount(minlength=num_levels) for clip in train) + 1
    return -(counts.double() / counts.sum()).log2()


def summary(bits: list[float], samples: list[int]) -> dict[str, float]:
    """The mean over all samples, and the deviation over files."""
    of_files = torch.tensor(bits, dtype=torch.float64) / torch.tensor(samples)
    spread = of_files.std().item() if len(bits) > 1 else 0.0
    return {"bits_per_sample": sum(bits) / sum(samples), "bits_per_sample_std_of_files": spread}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True, help="folder of recordings that order 0 counts")
    parser.add_argument("--test", required=True, help="folder of recordings to score on")
    parser.add_argument("--model", action="append", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--json", help="file for the scores")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    folders = {name: folder for name, _, folder in (model.partition("=") for model in args.model)}
    common, *others = (settings(folder) for folder in folders.values())
    for name, other in zip(list(folders)[1:], others, strict=True):
        for key in SAME:
            if other[key] != common[key]:
                raise SystemExit(
                    f"{name} has {key} {other[key]}, and the first model {common[key]}; their bits do not compare."
                )
    test = read(args.test, common)
    samples = [clip.shape[-1] for clip in test]
    of_code = order_0(read(args.train, common), common["num_levels"], common["quantization"])
    by_count = [of_code[to_codes(clip, common["num_levels"], common["quantization"])].sum().item() for clip in test]
    rows: list[dict[str, Any]] = [{"model": "order 0", "parameters": common["num_levels"] - 1, **summary(by_count, samples)}]
    for name, folder in folders.items():
        model: Any = s4audio.load(folder, args.device)
        start = time.perf_counter()
        bits = [-model.log_likelihood(clip.to(args.device)).item() for clip in test]
        rows.append(
            {
                "model": name, "parameters": sum(p.numel() for p in model.parameters()), **summary(bits, samples),
                "seconds_to_score": round(time.perf_counter() - start, 2), "sha256": checkpoint.fingerprint(folder),
                "training": checkpoint.read_config(folder)["training"],
            }
        )  # fmt: skip
    for row in rows:
        print(
            f"{row['model']}: {row['bits_per_sample']:.3f} bits per sample "
            f"(± {row['bits_per_sample_std_of_files']:.3f} over files), {row['parameters']:,} parameters"
        )
    if args.json:
        machine = torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()}, {args.threads} threads"
        about = {**{key: common[key] for key in SAME}, "files": len(test), "samples": sum(samples), "machine": machine}
        Path(args.json).write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
