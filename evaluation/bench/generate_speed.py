"""Times SaShiMi as it generates, and the memory of a training step on a long clip; or any other model, as it makes clips.

    python evaluation/bench/generate_speed.py --device cuda --json FILE [--model classical-16k --seconds 10]

The model is that of recipes/sashimi_classical.yaml with fresh weights, on which speed does not depend. For each batch size:
the first call, of two frames of samples, and what such a call takes afterwards (`start_s`: it freezes the systems and, on a
GPU, captures the graph of a frame); then the milliseconds of each further step, and samples a second of all clips together.
The best of --repeats. On a GPU also the peak of the memory of a training step with AdamW on one clip of 131,072 samples
(--train_samples).

With --model, a model's folder or the name of one that comes with the package, that one instead: seconds that a clip of
--seconds from noise takes, alone and at the default settings, first and at best, and how many times faster than real time
the best is.
"""

import argparse
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import torch
import yaml

import s4audio
from s4audio.checkpoint import fingerprint
from s4audio.models import SaShiMi
from s4audio.tasks import parameter_groups

RECIPE = Path(__file__).parents[2] / "recipes" / "sashimi_classical.yaml"


def recipe_model(device: str) -> SaShiMi:
    """The model of the recipe."""
    arguments = yaml.safe_load(RECIPE.read_text())["model"]["init_args"]["model"]["init_args"]
    torch.manual_seed(0)
    return SaShiMi(**arguments).to(device).eval()


def took(model: SaShiMi, batch_size: int, num_samples: int) -> float:
    """Seconds of one call; the codes that it returns were looked at on the CPU, so nothing is still running."""
    start = time.perf_counter()
    model.generate(batch_size, num_samples).codes.cpu()
    return time.perf_counter() - start


def speed(model: SaShiMi, batch_size: int, num_samples: int, repeats: int) -> dict[str, float]:
    """Of one batch size."""
    few = 2 * math.prod(model.pools)  # of two frames one runs as it is, and one as the graph
    first = took(model, batch_size, few)
    short = min(took(model, batch_size, few) for _ in range(repeats))
    seconds = min(took(model, batch_size, few + num_samples) for _ in range(repeats)) - short
    return {
        "batch": batch_size, "first_call_s": first, "start_s": short, "ms_a_step": 1e3 * seconds / num_samples,
        "samples_a_second": batch_size * num_samples / seconds,
    }  # fmt: skip


def clip_speed(model: Any, seconds: float, repeats: int) -> dict[str, float]:
    """Of one clip from noise."""
    took = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        model.sample(1, round(seconds * model.sample_rate), generator=torch.Generator().manual_seed(0)).cpu()
        took.append(time.perf_counter() - start)
    best = min(took[1:])
    return {"seconds": seconds, "first_call_s": took[0], "s": best, "times_real_time": seconds / best}


def training_memory(model: SaShiMi, num_samples: int) -> dict[str, float]:
    """Peak memory in GiB and seconds of one training step on one clip; the second of two, when AdamW's moments are there."""
    model.train()
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-3, ssm_lr=1e-3, weight_decay=0.0))
    audio = 0.3 * torch.randn(1, 1, num_samples, device="cuda")
    for _ in range(2):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        optimizer.zero_grad()
        model.training_losses(audio)["nll"].backward()
        optimizer.step()
        torch.cuda.synchronize()
    return {"samples": num_samples, "peak_gib": torch.cuda.max_memory_allocated() / 2**30, "s": time.perf_counter() - start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--batch", type=int, nargs="*", help="batch sizes (default: 1 and 8; on a GPU 1, 32, 256, 1024, 4096)"
    )
    parser.add_argument("--samples", type=int, default=4096, help="of each clip, in a timed call (default 4096)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--train_samples", type=int, default=131_072)
    parser.add_argument("--model", help="time this model's clips from noise instead")
    parser.add_argument("--seconds", type=float, default=10.0, help="of such a clip (default 10)")
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    on_gpu = args.device == "cuda"
    machine = torch.cuda.get_device_name() if on_gpu else f"CPU, {args.threads} of {os.cpu_count()} threads"
    model: Any = s4audio.load(args.model, args.device) if args.model else recipe_model(args.device)
    parameters = sum(p.numel() for p in model.parameters())
    result: dict[str, Any] = {"machine": f"{machine}, torch {torch.__version__}", "parameters": parameters, "rows": []}
    if args.model:
        result |= {"model": args.model, "sha256": fingerprint(args.model)}
        result["rows"].append(clip_speed(model, args.seconds, args.repeats))
        print(", ".join(f"{key} {value:,.4g}" for key, value in result["rows"][-1].items()))
    for batch_size in () if args.model else args.batch or ((1, 32, 256, 1024, 4096) if on_gpu else (1, 8)):
        result["rows"].append(speed(model, batch_size, args.samples, args.repeats))
        print(", ".join(f"{key} {value:,.4g}" for key, value in result["rows"][-1].items()), flush=True)
    if on_gpu and not args.model:
        result["training_step"] = training_memory(model, args.train_samples)
        print("a training step: " + ", ".join(f"{key} {value:,.4g}" for key, value in result["training_step"].items()))
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
