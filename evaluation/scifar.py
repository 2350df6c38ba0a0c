"""Scores classifiers of CIFAR-10 on its test images, over seeds, and draws how they learned.

    python evaluation/side_by_side.py --out RUNS scifar_s4d_small:0 scifar_s4d_small:1 -- --root CIFAR10
    python evaluation/scifar.py --runs RUNS --data CIFAR10 --name "CIFAR-10 (JPEG copy)" --json FILE --pictures FOLDER

Every run in RUNS, one folder for each RECIPE,CHANGES_SEED, is a row: the model that was best on the held-out images, tested
on the test images, with its size, what its training took, and what an image takes (at batches of 1 and 256, median). A row
of a recipe is the mean and the standard deviation over its seeds.
"""

import argparse
import json
import statistics
import subprocess
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import yaml

from s4audio import checkpoint
from s4audio.cli.fit_images import accuracy_by_class, accuracy_of
from s4audio.cli.info import memories
from s4audio.cli.run_page import read_curves
from s4audio.data import ImageSequences, read_images
from s4audio.report import bars_figure, curves_figure, histogram_figure, poles_figure, save_figure
from s4audio.tasks.classification import confusion_matrix

BATCH = 250
MEASURED = ("test_accuracy", "valid_accuracy", "train_accuracy", "wall_seconds", "images_a_second")


def milliseconds_an_image(model: torch.nn.Module, u: torch.Tensor) -> float:
    """Median over ten calls, after two to warm up."""
    times = []
    with torch.no_grad():
        for _ in range(12):
            start = time.perf_counter()
            model(u).cpu()
            times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[2:]) / len(u)


def score(run: Path, data: str, device: str) -> dict[str, Any]:
    """The row of one run."""
    model: Any = checkpoint.load(run / "best", device)
    training, recipe = checkpoint.read_config(run / "best")["training"], yaml.safe_load((run / "recipe.yaml").read_text())
    last = checkpoint.read_config(run / "last")["training"]
    images, sequences = read_images(data, "test", training["size"]), ImageSequences(data, training["size"], training["grey"])
    parts = zip(images.pixels.to(device).split(BATCH), images.labels.to(device).split(BATCH), strict=True)
    matrix = confusion_matrix(model, ((sequences.sequence(pixels), label) for pixels, label in parts)).cpu()
    accuracy, error = accuracy_of(matrix)
    batch_size, curves = recipe["data"]["init_args"]["batch_size"], read_curves(run)
    name, _, seed = run.name.rpartition("_")
    u = sequences.sequence(images.pixels[:256]).to(device)
    return {
        "recipe": name, "seed": int(seed), "test_accuracy": accuracy, "standard_error": error,
        "valid_accuracy": training["scores"]["valid/accuracy"],
        "train_accuracy": statistics.fmean(curves["train/accuracy"][1][-50:]),
        "per_class": accuracy_by_class(matrix, images.classes),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "epochs": round(last["steps"] * batch_size / training["train_images"], 1), "best_step": training["steps"],
        "wall_seconds": last["wall_seconds"], "images_a_second": last["steps"] * batch_size / last["wall_seconds"],
        "trained_on": training["device"], "ms_an_image_alone": milliseconds_an_image(model, u[:1]),
        "ms_an_image_of_256": milliseconds_an_image(model, u), "sha256": checkpoint.fingerprint(run / "best"),
    }  # fmt: skip


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over the seeds of each recipe."""
    of_recipe = defaultdict(list)
    for row in rows:
        of_recipe[row["recipe"]].append(row)
    found = []
    for recipe, seeds in of_recipe.items():
        line = {"recipe": recipe, "seeds": len(seeds), "parameters": seeds[0]["parameters"]}
        line["epochs"] = round(statistics.fmean(seed["epochs"] for seed in seeds), 1)
        for key in MEASURED:
            values = [seed[key] for seed in seeds]
            line[key] = statistics.fmean(values)
            line[f"{key}_std"] = statistics.stdev(values) if len(values) > 1 else None
        found.append(line)
    return found


def initial(run: Path) -> Any:
    """The model of a run before its first step."""
    config = checkpoint.read_config(run / "best")
    torch.manual_seed(int(run.name.rpartition("_")[2]))
    return checkpoint.MODELS[config["class"]](**config["arguments"])


def draw(runs: list[Path], rows: list[dict[str, Any]], folder: Path) -> None:
    """Curves, classes, step sizes and poles of the first run, and the recipes side by side."""
    folder.mkdir(parents=True, exist_ok=True)
    run = runs[0]
    curves = read_curves(run)
    for score_name, log in (("loss", True), ("accuracy", False)):
        lines = {"training": curves[f"train/{score_name}"], "held out": curves[f"valid/{score_name}"]}
        save_figure(folder / f"scifar_{score_name}.png", curves_figure(lines, score_name, log))
    save_figure(folder / "scifar_classes.png", bars_figure(rows[0]["per_class"], f"test accuracy, {rows[0]['recipe']}"))
    means = {line["recipe"].replace(",", ", "): line["test_accuracy"] for line in summary(rows)}
    save_figure(folder / "scifar_recipes.png", bars_figure(means, "test accuracy, mean over seeds"))
    before, after = memories(initial(run)), memories(checkpoint.load(run / "best"))
    steps = {
        name: torch.cat([m.layer.log_dt.detach().exp().log10() for m in found])
        for name, found in (("before", before), ("after", after))
    }
    save_figure(folder / "scifar_steps.png", histogram_figure(steps, "log10 of the step size", "channels"))
    poles = {
        f"{m.name} {when}": (m.frequency, m.decay) for pair in zip(before, after, strict=True)
        for m, when in zip(pair, ("before", "after"), strict=True)
    }  # fmt: skip
    save_figure(folder / "scifar_poles.png", poles_figure(poles, in_time=False))


def commit() -> str | None:
    """Of this checkout."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return done.stdout.strip() or None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", required=True, help="folder of run folders")
    parser.add_argument("--data", required=True, help="folder with the test images")
    parser.add_argument("--name", default="CIFAR-10", help="of the data")
    parser.add_argument("--commit", help="of the code, where this is no checkout of it")
    parser.add_argument("--json", help="file for the scores")
    parser.add_argument("--pictures", help="folder for the figures")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    runs = sorted(path.parent.parent for path in Path(args.runs).glob("*/best/config.json"))
    if not runs:
        raise SystemExit(f"{args.runs} holds no runs; side_by_side.py makes them.")
    rows = []
    for run in runs:
        rows.append(score(run, args.data, device))
        row = rows[-1]
        print(
            f"{run.name}: test {row['test_accuracy']:.2%} ± {row['standard_error']:.2%}, held out "
            f"{row['valid_accuracy']:.2%}, training {row['train_accuracy']:.2%}, {row['parameters']:,} parameters, "
            f"{row['epochs']:g} epochs in {row['wall_seconds']:.0f} s",
            flush=True,
        )
    if args.json:
        scored_on = torch.cuda.get_device_name() if device == "cuda" else "CPU"
        result = {
            "data": args.name, "commit": args.commit or commit(), "scored_on": scored_on, "recipes": summary(rows),
            "rows": rows,
        }  # fmt: skip
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
    if args.pictures:
        draw(runs, rows, Path(args.pictures))


if __name__ == "__main__":
    main()
