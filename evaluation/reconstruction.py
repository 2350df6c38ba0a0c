"""Scores how well a trained autoencoder reconstructs recordings: MSE, SI-SDR and log-spectral distance, per split.

    python evaluation/reconstruction.py MODEL --split train=FOLDER --split test=FOLDER --json FILE

Whole files, mono at the model's rate, at the level it was trained on. Each score is the mean over files, with the standard
deviation over files behind it; the model's output is compared with doing nothing useful: silence has the MSE of the audio
itself, and an SI-SDR of 0 dB means that half of the output's energy is error.
"""

import argparse
import json
import platform
import time
from pathlib import Path

import torch

import s4audio
from s4audio.audio import find_audio, normalize, read_audio
from s4audio.checkpoint import read_config
from s4audio.metrics.signal import log_spectral_distance, si_sdr


@torch.no_grad()
def score(model: torch.nn.Module, folder: str, level: str, device: str) -> dict[str, float]:
    """Mean and deviation over the files of each score."""
    scores: dict[str, list[float]] = {"mse": [], "silence_mse": [], "si_sdr_db": [], "log_spectral_distance_db": []}
    seconds, took = 0.0, 0.0
    for file in find_audio(folder):
        audio = normalize(read_audio(file, model.sample_rate)[0], level)
        start = time.perf_counter()
        estimate = model(audio.unsqueeze(0).to(device))[0].cpu()
        took += time.perf_counter() - start
        seconds += audio.shape[-1] / model.sample_rate
        scores["mse"].append((estimate - audio).square().mean().item())
        scores["silence_mse"].append(audio.square().mean().item())
        scores["si_sdr_db"].append(si_sdr(estimate, audio).mean().item())
        scores["log_spectral_distance_db"].append(log_spectral_distance(estimate, audio).mean().item())
    result: dict[str, float] = {
        "files": len(scores["mse"]),
        "seconds": round(seconds, 1),
        "real_time_factor": round(seconds / took, 1),
    }
    for name, values in scores.items():
        of_files = torch.tensor(values, dtype=torch.float64)
        result[name], result[f"{name}_std"] = of_files.mean().item(), of_files.std().item()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="model folder")
    parser.add_argument("--split", action="append", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", help="also write the scores to this file")
    args = parser.parse_args()
    model, config = s4audio.load(args.model, args.device), read_config(args.model)
    level = config["training"].get("normalize", "none")
    splits = {
        name: score(model, folder, level, args.device) for name, _, folder in (split.partition("=") for split in args.split)
    }
    print(
        f"{config['class']}, {sum(p.numel() for p in model.parameters())} parameters, {model.sample_rate} Hz, level: {level}"
    )
    for name, s in splits.items():
        print(
            f"{name:>6}: MSE {s['mse']:.3g} (silence {s['silence_mse']:.3g}), "
            f"SI-SDR {s['si_sdr_db']:.2f} ± {s['si_sdr_db_std']:.2f} dB, "
            f"log-spectral distance {s['log_spectral_distance_db']:.2f} dB, "
            f"{s['files']} files, {s['real_time_factor']:.0f}x real time"
        )
    if args.json:
        result = {
            "model": {"class": config["class"], "arguments": config["arguments"]},
            "training": {key: value for key, value in config["training"].items() if key != "skipped"},
            "splits": splits,
            "versions": {"s4audio": s4audio.__version__, "torch": torch.__version__, "python": platform.python_version()},
        }
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
