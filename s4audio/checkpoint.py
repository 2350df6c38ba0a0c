"""A model on disk: a folder with config.json (the class and its arguments) and model.safetensors (the weights).

Loading builds a class of this package from a list below and fills in numbers; nothing in the folder is executed.
"""

import hashlib
import inspect
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import nn

from s4audio.files import replacing
from s4audio.metrics.embeddings import EncoderWindows
from s4audio.models import CausalAutoencoder, ConvVAE, PatchS4Model, S4DAutoencoder, S4Model

MODELS: dict[str, type[nn.Module]] = {
    model.__name__: model for model in (CausalAutoencoder, ConvVAE, PatchS4Model, S4DAutoencoder, S4Model)
}
CONFIG, WEIGHTS = "config.json", "model.safetensors"
TRAINING_DATA = ("train_files", "train_seconds", "sample_rate", "normalize", "clip_seconds", "steps")


class CheckpointError(ValueError):
    """A model folder that cannot be used; the message says why and what to do."""


def save(model: nn.Module, path: str | Path, training: dict[str, Any] | None = None) -> None:
    """Writes the two files of the model folder; each appears whole, in the place of an older one, or not at all.

    The weights come first. What ends the process between the two leaves new weights beside the older record of their
    training, never the record of weights that are not there.

    Args:
        model: one of MODELS. Every constructor argument must stand as an attribute of the same name.
        path: the folder.
        training: what the model was trained on and how, in JSON's types; kept in config.json for people and for `generate`.

    Raises:
        CheckpointError: the model is none of MODELS.
    """
    name = type(model).__name__
    if name not in MODELS:
        raise CheckpointError(f"{name} is not a model that can be saved; known are {', '.join(MODELS)}.")
    arguments = {argument: getattr(model, argument) for argument in _signature(name)}
    config = json.dumps({"class": name, "arguments": arguments, "training": training or {}}, indent=2) + "\n"
    weights = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    path = Path(path)
    with replacing(path / CONFIG, durable=True) as new_config, replacing(path / WEIGHTS, durable=True) as new_weights:
        new_weights.write(to_bytes(weights))  # not save_file, which makes files that only their owner can read
        new_config.write(config.encode())
        for file in (new_weights, new_config):
            file.flush()  # a full disk shows here, before either takes its place


def load(path: str | Path, device: str | torch.device = "cpu") -> nn.Module:
    """The model in a folder written by `save`, ready to use (in eval mode).

    Raises:
        CheckpointError: the folder or a file is missing or damaged, the class is unknown, or the weights do not fit.
    """
    path, config = Path(path), read_config(path)
    try:
        model = MODELS[config["class"]](**config["arguments"])
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path / CONFIG}: the arguments do not fit {config['class']} ({error}).") from error
    try:
        weights = load_file(path / WEIGHTS)
        model.load_state_dict(weights)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path / WEIGHTS} is missing, unreadable or damaged ({error}).") from error
    except RuntimeError as error:
        raise CheckpointError(
            f"{path / WEIGHTS} does not fit {config['class']}: {str(error).splitlines()[-1].strip()}"
        ) from error
    return model.to(device).eval()


def read_config(path: str | Path) -> dict[str, Any]:
    """config.json of a model folder, checked: `class`, `arguments` and `training`.

    Raises:
        CheckpointError: it is missing, is not JSON of that form, or names an unknown class or argument.
    """
    path = Path(path)
    if not (path / CONFIG).is_file():
        others = [p for p in (path.parent / "last", path / "best", path / "last") if (p / CONFIG).is_file()]
        hint = f"there is one in {others[0]}" if others else "a training run keeps its models in RUN/best and RUN/last"
        raise CheckpointError(f"{path} is not a model: it has no {CONFIG}; {hint}.")
    try:
        config = json.loads((path / CONFIG).read_text())
        name, arguments = config["class"], config["arguments"]
        unknown = [argument for argument in arguments if argument not in _signature(name)]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path / CONFIG} is damaged or from another program ({error!r}).") from error
    if unknown:
        raise CheckpointError(f"{path / CONFIG}: {name} has no argument {unknown[0]!r}.")
    return {"class": name, "arguments": arguments, "training": config.get("training", {})}


def fingerprint(path: str | Path) -> str:
    """SHA-256 of the weights file of a model folder.

    Raises:
        CheckpointError: there is none.
    """
    try:
        return hashlib.sha256((Path(path) / WEIGHTS).read_bytes()).hexdigest()
    except OSError as error:
        raise CheckpointError(f"{Path(path) / WEIGHTS} is missing or unreadable ({error}).") from error


def load_embedding(path: str | Path, device: str | torch.device = "cpu") -> EncoderWindows:
    """The encoder of the model in a folder, for `Evaluator`; known by the SHA-256 of its weights.

    Raises:
        CheckpointError: there is no model, it has no encoder, or it hears more than one channel.
    """
    model: Any = load(path, device)
    config, sha256 = read_config(path), fingerprint(path)
    if not hasattr(model, "encode"):
        raise CheckpointError(f"{path} is a {config['class']}, which has no encoder; an embedding needs one.")
    if model.channels != 1:
        raise CheckpointError(f"the model in {path} hears {model.channels} channels; an embedding hears one (mono).")
    details = {
        "sha256": sha256, "class": config["class"], "arguments": config["arguments"],
        "training_data": {key: config["training"][key] for key in TRAINING_DATA if key in config["training"]},
    }  # fmt: skip
    name = f"{config['class']} {sha256[:12]}"
    return EncoderWindows(lambda audio: model.encode(audio.to(device)), model.sample_rate, model.hop_length, name, details)


def kind(path: str | Path) -> str:
    """SHA-256 of a model's class, arguments and training data: the same for the models of one run, and of its other seeds.

    Raises:
        CheckpointError: there is no model.
    """
    config = read_config(path)
    told = [
        config["class"],
        config["arguments"],
        {key: config["training"].get(key) for key in TRAINING_DATA if key != "steps"},
    ]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _signature(name: str) -> list[str]:
    return [argument for argument in inspect.signature(MODELS[name].__init__).parameters if argument != "self"]
