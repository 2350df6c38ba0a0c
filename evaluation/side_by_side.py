"""Trains several runs at once, spread over the GPUs there are, or on the CPU: the seeds of a table in the time of one.

    python evaluation/side_by_side.py --out RUNS --minutes 9 vae_classical:100 vae_classical:0 classical_3k:0@cpu \\
        -- --train FOLDER --valid FOLDER
    python evaluation/side_by_side.py --out RUNS scifar_study_1:0 scifar_study_1,discretization=bilinear:0 -- --root FOLDER

Each run is a recipe, what is changed in it (an argument of the model, or a whole path such as data.init_args.fraction), and
its seed; it goes to RUNS/RECIPE,CHANGES_SEED. What follows -- is given to each `s4audio fit`. All run at the same time, or
--at_once of them. After --minutes all are stopped as by Ctrl-C, and the same command goes on where they were: for machines
that are lent by the quarter of an hour. What a run prints is in its log beside it. Exit status 1 if a run failed.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]


def split(job: str) -> tuple[str, dict[str, str], str, str]:
    """Recipe, changes, seed and device of RECIPE[,KEY=VALUE...]:SEED[@cpu].

    Raises:
        ValueError: it is not of that form, or there is no such recipe.
    """
    run, _, device = job.partition("@")
    what, colon, seed = run.rpartition(":")
    recipe, *changes = what.split(",")
    if (
        not (ROOT / "recipes" / f"{recipe}.yaml").exists()
        or not colon
        or not seed.isdigit()
        or not all("=" in c for c in changes)
    ):
        raise ValueError(f"{job!r} is no run; wanted RECIPE:SEED or RECIPE,KEY=VALUE:SEED of a recipe in recipes/.")
    return recipe, dict(change.split("=", 1) for change in changes), seed, device


def gpus() -> list[str]:
    """Those that may be used, as CUDA_VISIBLE_DEVICES names them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",") if given else [str(device) for device in range(torch.cuda.device_count())]


def start(job: str, gpu: str | None, args: argparse.Namespace) -> tuple[str, subprocess.Popen[bytes]]:
    """The run's name, and `s4audio fit` on it in a process of its own; on the CPU if there is no GPU for it."""
    recipe, changes, seed, _ = split(job)
    name = f"{job.partition('@')[0].rpartition(':')[0]}_{seed}".replace("/", "-")
    command = [sys.executable, "-m", "s4audio", "fit", "--config", f"recipes/{recipe}.yaml", "--out", f"{args.out}/{name}"]
    command += ["--seed_everything", seed, *args.options]
    for key, value in changes.items():
        command += [f"--{key}" if "." in key else f"--model.init_args.model.init_args.{key}", value]
    if args.steps:
        command += ["--steps", str(args.steps)]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    if gpu is None:
        command += ["--trainer.accelerator", "cpu"]
    else:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    with open(Path(args.out) / f"{name}.log", "ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
    return name, process


def last_lines(log: Path, number: int) -> list[str]:
    """What a run printed last."""
    return log.read_text(errors="replace").strip().splitlines()[-number:]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", nargs="+", metavar="RECIPE[,KEY=VALUE...]:SEED[@cpu]")
    parser.add_argument("--out", required=True, help="folder of the runs")
    parser.add_argument("--minutes", type=float, help="stop after this long; the same command goes on")
    parser.add_argument("--at_once", type=int, help="runs at the same time; without it, all")
    parser.add_argument("--steps", type=int, help="length of every run, in place of the recipe's")
    given = sys.argv[1:]
    end = given.index("--") if "--" in given else len(given)
    args = parser.parse_args(given[:end])
    args.options = given[end + 1 :]
    if args.at_once is not None and args.at_once < 1:
        parser.error(f"--at_once is {args.at_once}; wanted at least 1 run.")
    for job in args.jobs:
        try:
            split(job)
        except ValueError as error:
            parser.error(str(error))
    Path(args.out).mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    waiting, runs = list(args.jobs), {}
    on_gpu: list[tuple[str, subprocess.Popen[bytes]]] = []
    try:
        while waiting or any(process.poll() is None for process in runs.values()):
            if args.minutes and time.monotonic() - began > 60 * args.minutes:
                break
            running = sum(process.poll() is None for process in runs.values())
            if waiting and (not args.at_once or running < args.at_once):
                job, gpu = waiting.pop(0), None
                if torch.cuda.is_available() and not job.endswith("@cpu"):  # the one with the fewest runs
                    busy = [of for of, process in on_gpu if process.poll() is None]
                    gpu = min(gpus(), key=busy.count)
                name, runs_it = start(job, gpu, args)
                runs[name] = runs_it
                if gpu is not None:
                    on_gpu.append((gpu, runs_it))
            else:
                time.sleep(0.5)
    finally:
        for process in runs.values():
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
        codes = {name: process.wait() for name, process in runs.items()}
    for job in waiting:
        print(f"{job}: not begun")
    for name, code in codes.items():
        state = {0: "finished", 130: "stopped"}.get(code, f"failed with status {code}")
        print(f"{name}: {state}", *last_lines(Path(args.out) / f"{name}.log", 2), sep="\n  ", flush=True)
    return int(any(code not in (0, 130) for code in codes.values()))


if __name__ == "__main__":
    sys.exit(main())
