"""What `s4audio fit` checks, says and shows when it trains a classifier of images read as sequences."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from s4audio import checkpoint
from s4audio.cli.info import describe, describe_training, memories
from s4audio.cli.run_page import PAGE, memory_section, training_section
from s4audio.data import ImageSequences
from s4audio.report import Section, bars_figure, confusion_figure, write_page
from s4audio.tasks.classification import confusion_matrix

SEVERAL_DEVICES = False  # each would draw the same images
UNIT, ITEMS = "images", "images"
BATCH = 250  # images at a time when a model is tested


def check(model: Any, data: Any) -> None:
    """Refuse a model and data that do not fit each other.

    Raises:
        ValueError: the data are no images, or their pixels have another number of channels than the model reads.
    """
    if not isinstance(data, ImageSequences):
        raise ValueError(f"the data is {type(data).__name__}, and a classifier is trained on ImageSequences.")
    if data.channels != model.d_input:
        raise ValueError(
            f"the images have {data.channels} channels and the model reads {model.d_input} (d_input); "
            "data.init_args.grey makes them 1, and else they are 3."
        )
    patch = getattr(model, "patch", 1)
    if data.size % patch:
        raise ValueError(f"images of {data.size} x {data.size} pixels do not divide into patches of {patch} x {patch}.")


def prepare(model: Any, data: ImageSequences) -> None:
    """Tells the model what its inputs look like.

    Raises:
        ValueError: there are more classes than the model has outputs.
    """
    classes = len(data.sets["train"].classes)
    if classes != model.num_classes:
        raise ValueError(f"the images have {classes} classes and the model {model.num_classes} (num_classes).")
    model.set_moments(*data.moments())


def size(batch: tuple[Tensor, Tensor], data: ImageSequences) -> float:
    """Images."""
    return float(len(batch[1]))


def announce(data: ImageSequences) -> list[str]:
    """What was read, for the terminal."""
    train, valid, test = (f"{len(data.sets[name].labels):,}" for name in ("train", "valid", "test"))
    pixels, colour = data.size**2, "grey" if data.grey else "RGB"
    return [
        f"data: {train} images to train on, {valid} held out, {test} to test the best model on; sequences of {pixels:,} "
        f"{colour} pixels",
        f"classes: {', '.join(data.sets['train'].classes)}",
    ]


def stopped(out: Path) -> list[str]:
    """What to do with a run that was stopped."""
    return [f"look at:  s4audio info {shlex.quote(str(out / 'last'))}"]


def finish(out: Path, data: ImageSequences) -> list[str]:
    """Tests the best model, and writes the page of a finished run; returns what came out and what to do next."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = checkpoint.load(out / "best", device)
    test = data.sets["test"]
    batches = zip(test.pixels.to(device).split(BATCH), test.labels.to(device).split(BATCH), strict=True)
    matrix = confusion_matrix(model, ((data.sequence(pixels), label) for pixels, label in batches)).cpu()
    accuracy, error = accuracy_of(matrix)
    training = checkpoint.read_config(out / "best")["training"]
    facts = [
        ("", ""), ("test", f"{accuracy:.2%} ± {error:.2%} of {len(test.labels):,} images (± is the standard error)"),
        *describe(model), *describe_training(training),
    ]  # fmt: skip
    each = accuracy_by_class(matrix, test.classes)
    sections = [
        Section("The model", table=facts),
        training_section(out),
        Section(
            "What it gets right", ["On the test images, which had no say in the training or in the choice of the model."],
            figures=[
                ("Share of each class that it gets right.", bars_figure(each, "accuracy")),
                ("What it takes the images of each class for, in % of the class.", confusion_figure(matrix, test.classes)),
            ],
        ),
        *([memory_section(model.cpu())] if memories(model.cpu()) else []),
        Section("What to type next", commands=[("Look inside:", f"s4audio info {shlex.quote(str(out / 'best'))}")]),
    ]  # fmt: skip
    lead = "A classifier that reads images pixel by pixel, and how well it tells those apart that it was not trained on."
    write_page(out / PAGE, f"The run {out.name}", lead, sections)
    return [f"test:     {accuracy:.2%} ± {error:.2%} of {len(test.labels):,} images", *stopped(out)]


def accuracy_by_class(matrix: Tensor, classes: Sequence[str]) -> dict[str, float]:
    """The share of each class that is right, of those that there are images of."""
    of_class = zip(classes, matrix.diagonal().tolist(), matrix.sum(1).tolist(), strict=True)
    return {name: right / number for name, right, number in of_class if number}


def accuracy_of(matrix: Tensor) -> tuple[float, float]:
    """Accuracy and its standard error from a confusion matrix of counts."""
    total, right = matrix.sum().item(), matrix.diagonal().sum().item()
    share = right / total
    return share, (share * (1 - share) / total) ** 0.5
