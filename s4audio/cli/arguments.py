"""What the verbs share: a parser whose complaints are one sentence, a progress bar, the models that they take, where they
write, and what the package brings."""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

from s4audio import checkpoint
from s4audio.files import replacing
from s4audio.metrics.comparison import Progress
from s4audio.models import CausalAutoencoder


class Parser(argparse.ArgumentParser):
    """argparse's, with a ValueError in place of the usage text and the exit."""

    def error(self, message: str) -> NoReturn:
        """Raises: ValueError, always."""
        raise ValueError(f"{message}; `{self.prog} --help` shows what it takes.")


def check_cuda() -> None:
    """Raises: ValueError, if --device cuda cannot be had here."""
    if not torch.cuda.is_available():
        raise ValueError("--device is cuda, but torch finds no CUDA device here; leave --device out to use the CPU.")


def load_generator(path: str, device: str = "cpu") -> Any:
    """The model of audio in a folder, or the pretrained one of this name.

    Raises:
        ValueError: there is none, it makes no sound, or the device is not here.
    """
    if device == "cuda":
        check_cuda()
    model = checkpoint.load(path, device)
    if not hasattr(model, "sample"):
        raise ValueError(f"{path} is a {type(model).__name__}, which makes no sound; this needs a model that does.")
    return model


def load_streaming(path: str, verb: str, device: str = "cpu") -> Any:
    """The autoencoder in a folder, for a verb that streams.

    Raises:
        ValueError: as `load_generator`; or it cannot stream, or hears more than one channel.
    """
    model = load_generator(path, device)
    if not isinstance(model, CausalAutoencoder) or model.bidirectional:
        why = "hears the future and " if hasattr(model, "stream") else ""
        raise ValueError(f"{path} is a {type(model).__name__}, which {why}cannot stream; `s4audio generate` takes it.")
    if model.channels != 1:
        raise ValueError(f"the model has {model.channels} channels; {verb} takes models of 1 (mono).")
    return model


def shipped(name: str) -> Path:
    """A file or folder that comes with the package, such as recipes/demo.yaml.

    In a checkout it stands beside the package, in a wheel inside it.

    Raises:
        ValueError: it is in neither.
    """
    package = Path(__file__).parents[1]
    for root in (package, package.parent):
        if (root / name).exists():
            return root / name
    raise ValueError(f"{name} is not part of this installation of s4audio.")


def check_name(name: str) -> None:
    """Raises: ValueError, if a recipe, which is UTF-8, cannot hold the name."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ValueError(f"the name {name!a} is not UTF-8, as a recipe must be; rename the folder.") from None


def check_place(file: Path) -> None:
    """Raises: ValueError, if no file can be written there, or what is there is none."""
    parent = next((folder for folder in file.absolute().parents if folder.exists()), file)
    if (file.exists() and not file.is_file()) or not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"{file} is no place where a file can be written; choose another.")


def write_json(path: str, content: dict[str, Any]) -> None:
    """Writes a file that holds no NaN, whole or not at all."""
    with replacing(path) as file:
        file.write((json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A progress bar on a terminal; elsewhere a line every ten seconds."""
    console = Console(stderr=True)
    if not console.is_terminal:
        last = time.monotonic()

        def say(what: str, done: int, total: int) -> None:
            nonlocal last
            if time.monotonic() - last > 10:
                last = time.monotonic()
                print(f"{what}, {done} of {total}", file=sys.stderr, flush=True)

        yield say
        return
    with Bar(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), console=console, transient=True) as bar:
        row = bar.add_task("")
        yield lambda what, done, total: bar.update(row, description=what, completed=done, total=total)
