"""What the verbs share: a parser whose complaints are one sentence, the models they take, and what the package brings."""

import argparse
from pathlib import Path
from typing import Any, NoReturn

import torch

from s4audio import checkpoint


class Parser(argparse.ArgumentParser):
    """argparse's, with a ValueError in place of the usage text and the exit."""

    def error(self, message: str) -> NoReturn:
        """Raises: ValueError, always."""
        raise ValueError(f"{message}; `{self.prog} --help` shows what it takes.")


def load_autoencoder(path: str, device: str = "cpu") -> Any:
    """The model in a folder.

    Raises:
        ValueError: there is none, it is not an autoencoder, or the device is not here.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is cuda, but torch finds no CUDA device here; leave --device out to use the CPU.")
    model = checkpoint.load(path, device)
    if not hasattr(model, "decode"):
        raise ValueError(f"{path} is a {type(model).__name__}, which classifies; this needs an autoencoder.")
    return model


def load_streaming(path: str, verb: str, device: str = "cpu") -> Any:
    """The model in a folder, for a verb that streams.

    Raises:
        ValueError: as `load_autoencoder`; or it cannot stream, or hears more than one channel.
    """
    model = load_autoencoder(path, device)
    if not hasattr(model, "stream") or model.bidirectional:
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
