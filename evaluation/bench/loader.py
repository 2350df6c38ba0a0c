"""How long a training waits for its clips: the loader alone, and its share of whole training steps.

    python evaluation/bench/loader.py
    python evaluation/bench/loader.py --device cuda --recipe recipes/autoencoder_16k.yaml --json FILE

The recordings are noise, written for it as FLAC files. First the cache: how long decoding them took, and how long the next
start. Then clips a second that the loader gives to nobody, for each number of worker processes. Then the training of a
recipe by Lightning, as `s4audio fit` does it, CUDA graphs included: milliseconds a step, the share of them in which the loop
waits for the next batch, and milliseconds a step on one batch that is there already. On a GPU the loop runs ahead of the
device, so that a wait costs nothing until the device has caught up: the difference of the two steps is what it costs.
"""

import argparse
import itertools
import json
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import soundfile
import torch
import yaml

from s4audio.cli.fit import _in_full, _recipe_cli
from s4audio.data import AudioFolder


class Timed:
    """The batches of a loader, and the seconds that whoever asked for them has waited."""

    def __init__(self, loader: Any, fixed: bool) -> None:
        self.loader, self.fixed, self.waited = loader, fixed, 0.0

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.loader)
        batch = next(batches)
        while True:
            yield batch
            if not self.fixed:
                start = time.perf_counter()
                batch = next(batches)
                self.waited += time.perf_counter() - start


class Window(lightning.Callback):
    """Seconds from after step `first` to the end, the device's work included."""

    def __init__(self, first: int, batches: Timed) -> None:
        self.first, self.batches, self.seconds = first, batches, 0.0

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        if trainer.global_step == self.first:
            _synchronize()
            self.start, self.batches.waited = time.perf_counter(), 0.0

    def on_train_end(self, *_: Any) -> None:
        _synchronize()
        self.seconds = time.perf_counter() - self.start


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def write_recordings(folder: Path, files: int, seconds: float, sample_rate: int) -> None:
    generator = np.random.default_rng(0)
    for number in range(files):
        noise = generator.uniform(-0.5, 0.5, round(seconds * sample_rate))
        soundfile.write(folder / f"{number}.flac", noise, sample_rate)


def open_folder(options: dict[str, Any], folder: Path, num_workers: int) -> AudioFolder:
    data = AudioFolder(**{**options, "train": str(folder), "valid": None, "num_workers": num_workers})
    data.setup()
    return data


def clips_a_second(data: AudioFolder, seconds: float) -> float:
    batches = iter(data.train_dataloader())
    for _ in range(3):
        next(batches)
    start = time.perf_counter()
    for number in itertools.count(1):
        next(batches)
        if (passed := time.perf_counter() - start) > seconds:
            return number * data.batch_size / passed
    raise AssertionError


def train(recipe: str, folder: Path, device: str, num_workers: int, steps: int, fixed: bool) -> dict[str, float]:
    """Seconds a step of a training without validations and saves, and how much of it the loop waits."""
    warm_up = 10
    with tempfile.TemporaryDirectory() as out:
        arguments = ["--config", recipe, "--train", str(folder), "--out", out, "--steps", str(steps + warm_up)]
        arguments += ["--save_every", "1000000", "--trainer.limit_val_batches", "0", "--trainer.accelerator", device]
        cli = _recipe_cli(_in_full([*arguments, "--data.init_args.num_workers", str(num_workers)]))
        batches = Timed(cli.datamodule.train_dataloader(), fixed)
        window = Window(warm_up, batches)
        trainer = lightning.Trainer(
            accelerator=device, devices=1, max_steps=steps + warm_up, logger=False, callbacks=[window], limit_val_batches=0,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            gradient_clip_val=cli.trainer.gradient_clip_val, precision=cli.trainer.precision,
            benchmark=device == "cuda", use_distributed_sampler=False,
        )  # fmt: skip
        trainer.fit(cli.model, batches)
    return {"ms_a_step": window.seconds / steps * 1e3, "waiting": batches.waited / window.seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--recipe", default="recipes/demo.yaml")
    parser.add_argument("--files", type=int, default=200)
    parser.add_argument("--file_seconds", type=float, default=20.0)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=5.0, help="of the loader alone, for each number of workers")
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--json", help="also write the figures to this file")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    options = yaml.safe_load(Path(args.recipe).read_text())["data"]["init_args"]
    on_gpu = args.device == "cuda"
    machine = torch.cuda.get_device_name() if on_gpu else f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    result: dict[str, Any] = {
        "machine": f"{machine}, torch {torch.__version__}", "recipe": args.recipe, "batch_size": options["batch_size"],
        "clip_seconds": options["clip_seconds"], "files": args.files, "file_seconds": args.file_seconds, "workers": [],
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as cache:
        os.environ["S4AUDIO_CACHE"] = cache
        write_recordings(Path(folder), args.files, args.file_seconds, options["sample_rate"])
        for name in ("seconds_to_decode", "seconds_to_start_again"):
            start = time.perf_counter()
            open_folder(options, Path(folder), 0)
            result[name] = time.perf_counter() - start
            print(f"{name} {result[name]:.3g}", flush=True)
        for number in args.workers:
            alone = clips_a_second(open_folder(options, Path(folder), number), args.seconds)
            trained = train(args.recipe, Path(folder), args.device, number, args.steps, fixed=False)
            row = {"num_workers": number, "clips_a_second": alone, **trained}
            result["workers"].append(row)
            print(", ".join(f"{key} {value:.4g}" for key, value in row.items()), flush=True)
        fixed = train(args.recipe, Path(folder), args.device, 0, args.steps, fixed=True)
        result["ms_a_step_on_one_batch"] = fixed["ms_a_step"]
        print(f"ms_a_step_on_one_batch {fixed['ms_a_step']:.4g}")
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
