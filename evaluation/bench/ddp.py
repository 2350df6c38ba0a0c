"""Two devices against one: the same loss curve at half the batch each, and how much more audio a second.

    python evaluation/bench/ddp.py --device cuda --json FILE
    python evaluation/bench/ddp.py --device cpu --recipe recipes/debug.yaml --batch_size 2 --steps 8

Trains a recipe by `s4audio fit` on noise that is written for it: one device with the whole batch, twice, the second time
with the clips of each batch in the opposite order, which changes rounding and nothing else; then several devices that share
the batch. Says how far apart their losses are, over all steps and over three, with the recipe's losses and with L1 alone.
Then one device against several with as large a batch each, in seconds of audio a second once they are warm.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml

sys.path.insert(0, str(Path(__file__).parent))
from loader import write_recordings

REVERSED = """
import sys
import s4audio.data.audio_folder as audio_folder
from s4audio.cli import main
pad_batch = audio_folder.pad_batch
audio_folder.pad_batch = lambda clips: pad_batch(clips[::-1])
sys.exit(main(sys.argv[1:]))
"""
# Seconds a step between two steps of a run, by a clock in the process that has the first device.
TIMED = """
import sys, time
import lightning, torch
from s4audio.cli import main
from s4audio.tasks import Progress
first, last = int(sys.argv[1]), int(sys.argv[2])
class Clock:
    start = 0.0
original = Progress.on_train_batch_end
def timed(self, trainer, *arguments):
    original(self, trainer, *arguments)
    if trainer.global_step in (first, last):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if trainer.global_step == last:
            print("seconds a step:", (time.perf_counter() - Clock.start) / (last - first))
        Clock.start = time.perf_counter()
Progress.on_train_batch_end = timed
sys.exit(main(sys.argv[3:]))
"""


def fit(
    program: list[str], recipe: str, folder: Path, out: Path, device: str, batch: int, devices: int, *options: str
) -> str:
    """Trains, and returns what was said."""
    command = [sys.executable, *program, "fit", "--config", recipe, "--train", str(folder), "--out", str(out)]
    command += ["--trainer.accelerator", device, "--trainer.devices", str(devices), "--save_every", "1000000"]
    command += ["--data.init_args.batch_size", str(batch), "--trainer.log_every_n_steps", "1"]
    done = subprocess.run([*command, "--trainer.limit_val_batches", "0", *options], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def losses(out: Path) -> list[float]:
    from s4audio.cli.run_page import read_curves

    return read_curves(out)["train/loss"][1]


def largest_difference(curve: list[float], other: list[float]) -> float:
    """Relative."""
    return max(abs(a - b) / abs(a) for a, b in zip(curve, other, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--recipe", default="recipes/autoencoder_16k.yaml")
    parser.add_argument("--batch_size", type=int, default=16, help="of each device")
    parser.add_argument("--steps", type=int, default=40, help="of the loss curves")
    parser.add_argument("--timed_steps", type=int, default=200)
    parser.add_argument("--files", type=int, default=40)
    parser.add_argument("--json", help="also write the figures to this file")
    args = parser.parse_args()
    recipe = yaml.safe_load(Path(args.recipe).read_text())
    rate, clip_seconds = (recipe["data"]["init_args"][key] for key in ("sample_rate", "clip_seconds"))
    whole, each = args.batch_size * args.devices, args.batch_size
    on_gpu = args.device == "cuda"
    machine = torch.cuda.get_device_name() if on_gpu else f"{os.cpu_count()} cores"
    result: dict[str, Any] = {
        "machine": f"{args.devices} of: {machine}, torch {torch.__version__}", "recipe": args.recipe,
        "batch_size_of_each": each, "devices": args.devices, "curves": [],
    }  # fmt: skip

    def keep() -> None:
        if args.json:
            Path(args.json).write_text(json.dumps(result, indent=1) + "\n")

    module, reverse = ["-m", "s4audio"], ["-c", REVERSED]
    with tempfile.TemporaryDirectory() as place:
        folder, runs = Path(place) / "recordings", Path(place) / "runs"
        folder.mkdir()
        os.environ["S4AUDIO_CACHE"] = str(Path(place) / "cache")
        write_recordings(folder, args.files, max(10.0, 2 * clip_seconds), rate)
        weights = recipe["model"]["init_args"]["loss_weights"]
        l1_alone = [f"--model.init_args.loss_weights.{name}={float(name == 'l1')}" for name in weights]
        for name, options in (("all losses", []), ("L1 alone", l1_alone)):
            common = [*options, "--steps", str(args.steps)]
            fit(module, args.recipe, folder, runs / f"one {name}", args.device, whole, 1, *common)
            if not options:
                fit(reverse, args.recipe, folder, runs / "reversed", args.device, whole, 1, *common)
            fit(module, args.recipe, folder, runs / f"several {name}", args.device, each, args.devices, *common)
            one, several = (losses(runs / f"{kind} {name}") for kind in ("one", "several"))
            row = {
                "losses": name, "one_device": one, "several_devices": several,
                "largest_difference": largest_difference(one, several),
                "largest_difference_in_3_steps": largest_difference(one[:3], several[:3]),
            }  # fmt: skip
            if not options:
                row["largest_difference_of_another_order_on_one"] = largest_difference(one, losses(runs / "reversed"))
            result["curves"].append(row)
            print(", ".join(f"{key} {value if isinstance(value, str) else f'{value:.2g}'}"
                            for key, value in row.items() if not isinstance(value, list)), flush=True)  # fmt: skip
            keep()
        first, last = max(1, args.timed_steps // 4), args.timed_steps
        timed = ["-c", TIMED, str(first), str(last)]
        for name, devices in (("one_device", 1), ("several_devices", args.devices)):
            said = fit(timed, args.recipe, folder, runs / name, args.device, each, devices, "--steps", str(args.timed_steps))
            seconds = float(said.partition("seconds a step: ")[2].split()[0])
            result[f"{name}_audio_a_second"] = devices * each * clip_seconds / seconds
            print(f"{name}: {result[f'{name}_audio_a_second']:,.0f} s of audio a second", flush=True)
            keep()
        result["scaling"] = result["several_devices_audio_a_second"] / result["one_device_audio_a_second"]
        print(f"scaling {result['scaling']:.2f}")
        keep()


if __name__ == "__main__":
    main()
