"""Tests a classifier on the test images of CIFAR-10, on the CPU.

    python evaluation/scifar_check.py evaluation/checkpoints/small CIFAR10

CIFAR10 is a folder as recipes/scifar_*.yaml take it. A model of more than a million parameters is tested on the first 1,000
images unless --all. The last line is the accuracy and its standard error.
"""

import argparse
import sys
import time

import torch

from s4audio import checkpoint
from s4audio.cli.fit_images import accuracy_by_class, accuracy_of
from s4audio.data import ImageSequences, read_images
from s4audio.tasks.classification import confusion_matrix

LARGE, FEW, BATCH = 1_000_000, 1000, 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="model folder")
    parser.add_argument("data", help="folder with the test images")
    parser.add_argument("--all", action="store_true", help="all test images, whatever the size of the model")
    args = parser.parse_args()
    try:
        model, training = checkpoint.load(args.model), checkpoint.read_config(args.model)["training"]
        if "classes" not in training:
            raise ValueError(f"{args.model} is no classifier of images.")
        images = read_images(args.data, "test", training["size"])
    except ValueError as error:
        print(f"scifar_check: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    parameters = sum(parameter.numel() for parameter in model.parameters())
    number = len(images.labels) if args.all or parameters <= LARGE else min(FEW, len(images.labels))
    print(f"{parameters:,} parameters, trained on {training['train_images']:,} images; testing {number:,}")
    data, start, matrix = ImageSequences(args.data, training["size"], training["grey"]), time.monotonic(), None
    for first in range(0, number, BATCH):
        part = slice(first, min(first + BATCH, number))
        counts = confusion_matrix(model, [(data.sequence(images.pixels[part]), images.labels[part])])
        matrix = counts if matrix is None else matrix + counts
        if first % (10 * BATCH) == 0 or part.stop == number:
            share, seconds = accuracy_of(matrix)[0], time.monotonic() - start
            left = seconds / part.stop * (number - part.stop)
            print(
                f"{part.stop:,} images: {share:.2%} right, {1e3 * seconds / part.stop:.1f} ms an image, {left:.0f} s left",
                flush=True,
            )
    for name, right in accuracy_by_class(matrix, images.classes).items():
        print(f"  {name:12} {right:.1%}")
    share, error = accuracy_of(matrix)
    print(f"accuracy {100 * share:.2f} % ± {100 * error:.2f}")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
