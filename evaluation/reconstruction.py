"""Scores how well a trained autoencoder reconstructs recordings, per split, beside what needs no training.

    python evaluation/reconstruction.py MODEL --split train=FOLDER --split test=FOLDER --json FILE

MSE, SI-SDR, log-spectral distance and multi-resolution STFT distance of whole files, mono at the model's rate, at the level
it was trained on. Each score is the mean over files, with the standard deviation over files behind it. Beside the model
stand silence, whose MSE is that of the audio itself, and a low-pass that keeps as many numbers a second as the latent holds
(where that is fewer than there are samples). The real-time factor is that of the whole forward pass on --threads threads.
"""

import argparse
import json
import platform
import time
from collections import defaultdict
from pathlib import Path

import torch

import s4audio
from s4audio.audio import band_limit, find_audio, normalize, read_audio
from s4audio.checkpoint import read_config
from s4audio.losses import multi_resolution_stft
from s4audio.metrics.signal import log_spectral_distance, si_sdr
from s4audio.report import clips_figure, save_figure


@torch.no_grad()
def score(model: torch.nn.Module, folder: str, level: str, device: str) -> dict[str, float]:
    """Mean and deviation over the files of each score."""
    scores: dict[str, list[float]] = defaultdict(list)
    numbers = model.latent_channels * model.sample_rate // model.hop_length
    seconds, took = 0.0, 0.0
    for file in find_audio(folder):
        audio = normalize(read_audio(file, model.sample_rate)[0], level)
        start = time.perf_counter()
        estimate = model(audio.unsqueeze(0).to(device))[0].cpu()
        took += time.perf_counter() - start
        seconds += audio.shape[-1] / model.sample_rate
        scores["silence_mse"].append(audio.square().mean().item())
        ways = {"": estimate}
        if numbers < model.sample_rate:
            ways["low_pass_"] = band_limit(audio, model.sample_rate, numbers)
        for way, result in ways.items():
            scores[f"{way}mse"].append((result - audio).square().mean().item())
            scores[f"{way}si_sdr_db"].append(si_sdr(result, audio).mean().item())
            scores[f"{way}log_spectral_distance_db"].append(log_spectral_distance(result, audio).mean().item())
            scores[f"{way}multi_resolution_stft"].append(multi_resolution_stft(result, audio).item())
    summary: dict[str, float] = {
        "files": len(scores["mse"]),
        "latent_numbers_a_second": numbers,
        "seconds": round(seconds, 1),
        "real_time_factor": round(seconds / took, 1),
    }
    for name, values in scores.items():
        of_files = torch.tensor(values, dtype=torch.float64)
        summary[name] = of_files.mean().item()
        summary[f"{name}_std"] = of_files.std().item() if len(values) > 1 else 0.0
    return summary


@torch.no_grad()
def draw(model: torch.nn.Module, folder: str, level: str, device: str, path: str) -> None:
    """Ten seconds of the folder's first file and of its reconstruction."""
    audio = normalize(read_audio(find_audio(folder)[0], model.sample_rate)[0], level)[..., : 10 * model.sample_rate]
    estimate = model(audio.unsqueeze(0).to(device))[0].cpu()
    save_figure(path, clips_figure({"recording": audio, "through the model": estimate}, model.sample_rate))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="model folder")
    parser.add_argument("--split", action="append", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--json", help="also write the scores to this file")
    parser.add_argument("--picture", help="also draw the first ten seconds of the last split's first file, in and out (PNG)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
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
            f"multi-resolution STFT {s['multi_resolution_stft']:.3f}, "
            f"{s['files']} files, {s['real_time_factor']:.0f}x real time"
        )
        if "low_pass_mse" in s:
            print(
                f"        low-pass of as many numbers: SI-SDR {s['low_pass_si_sdr_db']:.2f} dB, log-spectral distance "
                f"{s['low_pass_log_spectral_distance_db']:.2f} dB, "
                f"multi-resolution STFT {s['low_pass_multi_resolution_stft']:.3f}"
            )
    if args.picture:
        draw(model, args.split[-1].partition("=")[2], level, args.device, args.picture)
    if args.json:
        result = {
            "model": {"class": config["class"], "arguments": config["arguments"]},
            "training": {key: value for key, value in config["training"].items() if key != "skipped"},
            "splits": splits,
            "threads": args.threads,
            "versions": {"s4audio": s4audio.__version__, "torch": torch.__version__, "python": platform.python_version()},
        }
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
