"""A model on disk: a folder with config.json (the class and its arguments), model.safetensors (the weights), and a card.

An argument that is itself a model, such as the autoencoder of a flow, stands in config.json as its class and its arguments;
its weights are among the others, so that a folder needs no other folder.

Loading builds a class of this package from a list below and fills in numbers; nothing in the folder is executed.
"""

import hashlib
import inspect
import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from s4audio.card import card
from s4audio.files import replacing
from s4audio.layers import S4D
from s4audio.metrics.embeddings import EncoderWindows
from s4audio.models import (
    S4DVAE,
    CausalAutoencoder,
    ConvVAE,
    Flow,
    PatchS4Model,
    S4DAutoencoder,
    S4Model,
    SaShiMi,
    StreamState,
    WaveformAutoencoder,
    WaveNet,
    advance_stream,
    begin_stream,
)

MODELS: dict[str, type[nn.Module]] = {
    model.__name__: model
    for model in (CausalAutoencoder, ConvVAE, Flow, PatchS4Model, S4DAutoencoder, S4DVAE, S4Model, SaShiMi, WaveNet)
}
DEPTHS = ("num_blocks", "num_layers", "num_stacks")  # arguments that count layers, each with tensors of its own
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
PRETRAINED = Path(__file__).parent / "pretrained"  # a folder for each model that comes with the package
STREAM = "s4audio stream 1"  # what a state file says that it holds
NUMBERS = (  # what a description of a training may hold, of those that are shown
    "steps", "wall_seconds", "train_files", "train_seconds", "valid_files", "valid_seconds", "train_images", "valid_images",
)  # fmt: skip
TRAINING_DATA = ("train_files", "train_seconds", "sample_rate", "normalize", "clip_seconds", "steps")


class CheckpointError(ValueError):
    """A model folder that cannot be used; the message says why and what to do."""


def save(model: nn.Module, path: str | Path, training: dict[str, Any] | None = None) -> None:
    """Writes the three files of the model folder; each appears whole, in the place of an older one, or not at all.

    README.md, the card, is for people and for the hub: it is written from config.json, and `load` does not read it.

    The weights come first. What ends the process between the two leaves new weights beside the older record of their
    training, never the record of weights that are not there.

    Args:
        model: one of MODELS. Every constructor argument must stand as an attribute of the same name.
        path: the folder.
        training: what the model was trained on and how, in JSON's types; kept in config.json for people and for `generate`.

    Raises:
        CheckpointError: the model is none of MODELS.
    """
    # As it will be read again: tuples are lists then.
    config = json.loads(json.dumps({**_described(model), "training": training or {}}))
    texts = {CONFIG: json.dumps(config, indent=2) + "\n", CARD: card(config)}
    weights = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    path = Path(path)
    with ExitStack() as files:  # whose files take their places from the last to the first
        new = {name: files.enter_context(replacing(path / name, durable=True)) for name in (*texts, WEIGHTS)}
        new[WEIGHTS].write(to_bytes(weights))  # not save_file, which makes files that only their owner can read
        for name, text in texts.items():
            new[name].write(text.encode())
        for file in new.values():
            file.flush()  # a full disk shows here, before any takes its place


def load(path: str | Path, device: str | torch.device = "cpu") -> nn.Module:
    """The model in a folder written by `save`, ready to use (in eval mode).

    Args:
        path: the folder; or, if there is none, the name of a model that comes with the package.
        device: where to.

    Raises:
        CheckpointError: the folder or a file is missing or damaged, the class is unknown, or the weights do not fit.
    """
    path = located(path)
    config = read_config(path)
    weights = _read_tensors(path / WEIGHTS)
    try:
        _refuse_more_layers(config["arguments"], len(weights))
        with torch.device("meta"):  # shapes without memory, so that a damaged size costs nothing
            model = _built(config["class"], config["arguments"])
    except Exception as error:  # whatever a constructor makes of a damaged argument
        raise CheckpointError(f"{path / CONFIG}: the arguments do not fit {config['class']} ({error}).") from error
    wanted = model.state_dict()
    for name in sorted(wanted.keys() | weights.keys()):
        if _form(wanted.get(name)) != _form(weights.get(name)):
            older = "" if name in weights else " An older s4audio may have written it: train the model again."
            raise CheckpointError(
                f"{path / WEIGHTS} does not fit {config['class']}: it has {_form(weights.get(name))} where "
                f"{_form(wanted.get(name))} is wanted as {name}.{older}"
            )
    # Copies: what load_file gives is the file itself, mapped into memory.
    own = {name: value.to(wanted[name].dtype, copy=True) for name, value in weights.items()}
    model.load_state_dict(own, assign=True)
    return model.to(device).eval()


def load_autoencoder(path: str) -> WaveformAutoencoder:
    """The autoencoder in a folder; a recipe names this function where a model is built on a trained autoencoder.

    Raises:
        CheckpointError: as `load`; or that is another kind of model, or not trained yet.
    """
    if not located(path).exists():
        raise CheckpointError(
            f"the autoencoder that this model works on, {path}, is not there; train it first, with a recipe of its own and "
            f"--out {Path(path).parent}."
        )
    model = load(path)
    if not isinstance(model, WaveformAutoencoder):
        raise CheckpointError(f"{path} is a {type(model).__name__}; wanted an autoencoder.")
    return model


def pretrained() -> list[str]:
    """The names of the models that come with the package."""
    return sorted(path.parent.name for path in PRETRAINED.glob(f"*/{CONFIG}"))


def located(path: str | Path) -> Path:
    """The folder of a model: the path itself, or that of the pretrained model of this name where there is no such folder."""
    return PRETRAINED / path if str(path) in pretrained() and not Path(path).exists() else Path(path)


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Gives a model the weights of the one in a folder.

    Raises:
        CheckpointError: as `load`; or that is another kind of model, or one of another size.
    """
    other, wanted = load(path).state_dict(), model.state_dict()
    for name in sorted(wanted.keys() | other.keys()):
        if _form(wanted.get(name)) != _form(other.get(name)):
            raise CheckpointError(
                f"the model in {path} is another than the {type(model).__name__} of the recipe: it has "
                f"{_form(other.get(name))} where {_form(wanted.get(name))} is wanted as {name}."
            )
    model.load_state_dict(other)


def read_config(path: str | Path) -> dict[str, Any]:
    """config.json of a model folder, checked: `class`, `arguments` and `training`.

    Raises:
        CheckpointError: it is missing, is not JSON of that form, or names an unknown class or argument.
    """
    path = located(path)
    if not (path / CONFIG).is_file():
        others = [p for p in (path.parent / "last", path / "best", path / "last") if (p / CONFIG).is_file()]
        hint = f"there is one in {others[0]}" if others else "a training run keeps its models in RUN/best and RUN/last"
        if not path.exists() and pretrained():
            hint = f"{hint}, and {' and '.join(pretrained())} come with the package"
        raise CheckpointError(f"{path} is not a model: it has no {CONFIG}; {hint}.")
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        name, arguments, training = config["class"], dict(config["arguments"]), dict(config.get("training", {}))
        unknown = [argument for argument in arguments if argument not in _signature(name)]
        if odd := [key for key in NUMBERS if not isinstance(training.get(key, 0), int | float)]:
            raise TypeError(f"training: {odd[0]} is {training[odd[0]]!r}")
        dict(training.get("scores", {}))
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path / CONFIG} is damaged or from another program ({error!r}).") from error
    if unknown:
        raise CheckpointError(f"{path / CONFIG}: {name} has no argument {unknown[0]!r}.")
    return {"class": name, "arguments": arguments, "training": training}


def fingerprint(path: str | Path) -> str:
    """SHA-256 of the weights file of a model folder.

    Raises:
        CheckpointError: there is none.
    """
    file = located(path) / WEIGHTS
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise CheckpointError(f"{file} is missing or unreadable ({error}).") from error


def save_state(state: StreamState, path: str | Path, model_sha256: str) -> None:
    """Writes where a stream stands, as one safetensors file that appears whole or not at all.

    Args:
        state: what `advance_stream` returned.
        path: the file.
        model_sha256: the `fingerprint` of the model that streams.
    """
    about = {"holds": STREAM, "model": model_sha256, "owed": str(state.owed)}
    with replacing(path) as file:
        file.write(to_bytes(_stored(state), about))


def load_state(path: str | Path, model: CausalAutoencoder, model_sha256: str) -> StreamState:
    """The state in a file written by `save_state`, from which the stream goes on bit for bit as if it had not ended.

    Args:
        path: the file.
        model: one that streams.
        model_sha256: its `fingerprint`.

    Raises:
        CheckpointError: the file is missing or damaged, or is no state of this model.
    """
    path = Path(path)
    tensors = _read_tensors(path)
    with safe_open(path, "pt") as file:
        about = file.metadata() or {}
    if about.get("holds") != STREAM:
        raise CheckpointError(f"{path} is not the state of a stream; `s4audio stream --save-state FILE` writes one.")
    if about.get("model") != model_sha256:
        raise CheckpointError(
            f"{path} is the state of another model: its weights have the SHA-256 {about.get('model', '')[:12]}…, and this "
            f"model's {model_sha256[:12]}…. Go on with that model, or begin without a state."
        )
    start, owed, waiting = begin_stream(model), str(about.get("owed")), tensors.get("waiting", torch.empty(0))
    fits = owed in map(str, range(model.hop_length)) and waiting.dim() == 2
    if fits:  # a stream that has heard as many samples beyond a whole frame has a state of the same form
        _, template = advance_stream(model, start.waiting.new_zeros(model.channels, int(owed)), start)
        wanted = _stored(template._replace(waiting=start.waiting.new_zeros(model.channels, waiting.shape[1])))
        fits = {name: _form(value) for name, value in tensors.items()} == {n: _form(v) for n, v in wanted.items()}
    if not fits or not all(value.isfinite().all() for value in tensors.values()):
        raise CheckpointError(f"{path} is damaged: it does not hold what a stream of this model remembers.")
    values = (value.to(wanted[name].dtype, copy=True) for name, value in sorted(tensors.items()))
    return StreamState(_filled(template.model, values), next(values), int(owed))


def load_embedding(path: str | Path, device: str | torch.device = "cpu") -> EncoderWindows:
    """The encoder of the model in a folder, for `Evaluator`; known by the SHA-256 of its weights.

    Of a flow on latents it is the encoder of the autoencoder that it works on.

    Raises:
        CheckpointError: there is no model, it has no encoder, or it hears more than one channel.
    """
    model: Any = load(path, device)
    config, sha256 = read_config(path), fingerprint(path)
    model = getattr(model, "autoencoder", None) or model
    if not hasattr(model, "encode"):
        raise CheckpointError(f"{path} is a {config['class']}, which has no encoder; an embedding needs one.")
    if model.channels != 1:
        raise CheckpointError(f"the model in {path} hears {model.channels} channels; an embedding hears one (mono).")
    for layer in model.modules():
        if isinstance(layer, S4D):
            layer.freeze()  # a folder is many calls with the same weights
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


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file, mapped into memory.

    Raises:
        CheckpointError: it is missing, unreadable or damaged.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is missing, unreadable or damaged ({error}).") from error


def _stored(state: StreamState) -> dict[str, Tensor]:
    """The tensors of a state in the order of their names; complex ones as (..., 2) real numbers."""
    leaves = [torch.view_as_real(leaf) if leaf.is_complex() else leaf for leaf in _leaves(state.model)]
    tensors = {f"state.{index:04}": leaf.detach().cpu().contiguous() for index, leaf in enumerate(leaves)}
    return {**tensors, "waiting": state.waiting.detach().cpu().contiguous()}


def _leaves(state: Any) -> list[Tensor]:
    """The tensors of nested tuples, first to last; None holds none."""
    if isinstance(state, Tensor):
        return [state]
    return [leaf for part in state or () for leaf in _leaves(part)]


def _filled(template: Any, values: Iterator[Tensor]) -> Any:
    """Nested tuples like the template, with these tensors as `_stored` makes them."""
    if template is None:
        return None
    if isinstance(template, Tensor):
        return torch.view_as_complex(next(values)) if template.is_complex() else next(values)
    parts = [_filled(part, values) for part in template]
    return type(template)(*parts) if hasattr(template, "_fields") else tuple(parts)


def _described(model: nn.Module) -> dict[str, Any]:
    """Class and arguments of a model, and of the models among the arguments.

    Raises:
        CheckpointError: one is none of MODELS.
    """
    name = type(model).__name__
    if name not in MODELS:
        raise CheckpointError(f"{name} is not a model that can be saved; known are {', '.join(MODELS)}.")
    arguments = {argument: getattr(model, argument) for argument in _signature(name)}
    nested = {key: _described(value) for key, value in arguments.items() if isinstance(value, nn.Module)}
    return {"class": name, "arguments": {**arguments, **nested}}


def _built(name: str, arguments: dict[str, Any]) -> nn.Module:
    """A model from what `_described` says; errors are whatever the classes make of damaged arguments."""
    # A dict can only be a model: no argument of MODELS is another.
    return MODELS[name](**{key: _built(**_part(v)) if isinstance(v, dict) else v for key, v in arguments.items()})


def _part(described: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `_built` for a model among the arguments of another."""
    if described.keys() != {"class", "arguments"} or not isinstance(described["arguments"], dict):
        raise ValueError(f"{str(described)[:50]} describes no model")
    return {"name": described["class"], "arguments": described["arguments"]}


def _refuse_more_layers(arguments: dict[str, Any], num_tensors: int) -> None:
    """Raises: ValueError, if there are more layers than tensors: to build such a model could take hours."""
    for name, value in arguments.items():
        if isinstance(value, dict):
            _refuse_more_layers(_part(value)["arguments"], num_tensors)
            continue
        if isinstance(value, list) and all(isinstance(entry, str) for entry in value):
            continue  # names: of classes, of which there may be more than tensors, or of losses
        entries = value if isinstance(value, list) else [value]
        if len(entries) > num_tensors or (name in DEPTHS and max(entries, default=0) > num_tensors):
            raise ValueError(f"{name} is {str(value)[:50]}, and the weights are {num_tensors} tensors")


def _form(tensor: Tensor | None) -> str:
    """What must agree between the weights of a file and those of a model, in words."""
    if tensor is None:
        return "nothing"
    return f"{'numbers' if tensor.is_floating_point() else str(tensor.dtype)} of shape {tuple(tensor.shape)}"


def _signature(name: str) -> list[str]:
    return [argument for argument in inspect.signature(MODELS[name].__init__).parameters if argument != "self"]
