"""Times whole training steps (forward, backward, AdamW) of system 4, as seconds of audio trained per second.

    python evaluation/bench/train_step.py

Clips of 30 s at 3,000 Hz, float32; the median over the repeats after three warm-up steps.
"""

import argparse
import os
import statistics
import time

import torch

import s4audio
from s4audio.tasks import parameter_groups

SECONDS, SAMPLE_RATE = 30, 3000


def seconds_per_step(batch_size: int, repeats: int) -> float:
    """Median seconds of one training step."""
    torch.manual_seed(0)
    model = s4audio.S4DAutoencoder(SAMPLE_RATE)
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-2, ssm_lr=1e-3, weight_decay=0.0))
    audio = 0.1 * torch.randn(batch_size, 1, SECONDS * SAMPLE_RATE)

    def step() -> float:
        start = time.perf_counter()
        optimizer.zero_grad()
        model.training_losses(audio)["mse"].backward()
        optimizer.step()
        return time.perf_counter() - start

    for _ in range(3):
        step()
    return statistics.median(step() for _ in range(repeats))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    print(f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for batch_size in (1, 8):
        seconds = seconds_per_step(batch_size, args.repeats)
        speed = batch_size * SECONDS / seconds
        print(f"system 4, batch {batch_size}: {seconds * 1e3:.1f} ms a step, {speed:,.0f} times real time")


if __name__ == "__main__":
    main()
