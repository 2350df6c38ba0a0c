"""What `s4audio fit` checks, says and shows when it trains a generator of audio."""

import shlex
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from s4audio import checkpoint
from s4audio.cli.info import describe, describe_training, memories
from s4audio.cli.run_page import PAGE, memory_section, next_commands, training_section
from s4audio.data import AudioFolder, AudioShards
from s4audio.data.cache import size as size_of
from s4audio.models.sashimi import RunawayError
from s4audio.report import Clip, Section, write_page

UNIT, ITEMS = "s of audio", "clips"
SEVERAL_DEVICES = True
LISTEN = (
    "First a recording that the model was not trained on (its first ten seconds), then what it makes of it. Listen for the "
    "attack of the notes, the brightness, and a haze or hiss that was not there."
)
VARIED = (
    "First a recording that the model was not trained on (its first ten seconds), then what it makes of it half way from "
    "noise: another sound of the same kind."
)
VARIATION, CLIP_SECONDS = 0.5, 10.0


def check(model: Any, data: Any) -> None:
    """Refuse a model and data that do not fit each other.

    Raises:
        ValueError: the model makes no audio, or hears it otherwise than the data has it.
    """
    if not hasattr(model, "training_losses"):
        raise ValueError(f"the model is a {type(model).__name__}, which is no generator; use ClassificationTask for it.")
    if not isinstance(data, AudioFolder | AudioShards):
        raise ValueError(f"the data is {type(data).__name__}, and a generator of audio is trained on AudioFolder.")
    if data.sample_rate != model.sample_rate:
        raise ValueError(
            f"the data is at {data.sample_rate} Hz and the model at {model.sample_rate} Hz; make both one value."
        )
    if model.channels != 1:
        raise ValueError(f"the model has {model.channels} channels and the clips of {type(data).__name__} have 1 (mono).")

    labelled, classes = getattr(data, "labels", None), getattr(model, "classes", ())
    if labelled and not hasattr(model, "classes"):
        raise ValueError(f"data.init_args.labels is {labelled}, and {type(model).__name__} takes no labels; make it null.")
    if classes and not labelled:
        raise ValueError(f"the model has the classes {', '.join(classes)} and the data no labels; set labels: folder.")
    if isinstance(data, AudioFolder):
        data.progress = decoding


def prepare(model: Any, data: Any) -> None:
    """Looks whether labels mean the same to the model and to the data.

    Raises:
        ValueError: they have other classes.
    """
    if getattr(data, "labels", None) and list(model.classes) != data.classes:
        missing = ", ".join(name for name in model.classes if name not in data.classes)
        raise ValueError(
            f"the recordings are of the classes {', '.join(data.classes)}, "
            f"and the model's (classes) are {', '.join(model.classes)}; make them the same, in this order."
            + (f" Of {missing} there is no recording that can be used." if missing else "")
        )


def decoding(files: Iterable[Any], total: int) -> Iterator[Any]:
    """The files, with a bar on a terminal that shows how many of so many are decoded."""
    console = Console()
    yield from track(files, "decoding into the cache", total, console=console, disable=not (total and console.is_terminal))


def size(batch: Tensor | Sequence[Tensor], data: AudioFolder | AudioShards) -> float:
    """Seconds of audio."""
    batch = batch if isinstance(batch, Tensor) else batch[0]
    return batch.shape[0] * batch.shape[-1] / data.sample_rate


def announce(data: AudioFolder | AudioShards) -> list[str]:
    """What was read, for the terminal."""
    read: dict[str, Any] = data.describe()
    train = f"{_count(read['train_files'], 'file')} ({_duration(read['train_seconds'])}) to train on"
    held_out = f"{read['valid_files']} ({_duration(read['valid_seconds'])}) held out"
    return [
        f"data: {train}, {held_out}, {len(read['skipped'])} skipped; mono at {read['sample_rate']} Hz",
        f"held out: {', '.join(Path(name).name for name in data.valid_names[:5])}",
        *_of_the_same(data),
        *(f"skipped: {sentence}" for sentence in read["skipped"]),
        *data.notes,
        *_describe_cache(data),
    ]


def _of_the_same(data: AudioFolder | AudioShards) -> list[str]:
    valid = getattr(data, "valid", None)
    if valid is None or not isinstance(data, AudioFolder) or Path(valid).resolve() != Path(data.train).resolve():
        return []
    return ["note: the held-out recordings are those of the training; the scores say what it can learn by heart, no more"]


def _describe_cache(data: AudioFolder | AudioShards) -> list[str]:
    homes = set(data.caches)
    if not homes:
        return []
    root = data.caches[0].parent
    used, held = sum(size_of(home) for home in homes) / 1e6, size_of(root) / 1e6
    return [f"cache: {used:,.1f} MB of the {held:,.1f} MB in {root}; it can be deleted at any time"]


def stopped(out: Path) -> list[str]:
    """What to do with a run that was stopped."""
    return [_listen(out / "last")]


def finish(out: Path, data: AudioFolder | AudioShards, scores: Sequence[Section] = ()) -> list[str]:
    """Writes the page of a finished run, with its scores if there are any; returns what to do with it."""
    lead = "A model of raw audio, and what it makes of recordings that it was not trained on."
    held_out = dict(zip(data.valid_names, data.valid_clips, strict=True))
    write_page(out / PAGE, f"The run {out.name}", lead, _sections(out, held_out, scores))
    return [_listen(out / "best")]


def _listen(model: Path) -> str:
    """What to type to hear a model."""
    of, folder = checkpoint.MODELS[checkpoint.read_config(model)["class"]], shlex.quote(str(model))
    if not hasattr(of, "sample"):
        return f"it gives probabilities and makes no sound: s4audio info {folder}"
    encodes = hasattr(of, "encode")
    return f"listen:   s4audio generate {folder} --from {'MY_RECORDING.wav' if encodes else 'noise'}"


@torch.no_grad()
def _sections(out: Path, held_out: dict[str, Tensor], scores: Sequence[Section]) -> list[Section]:
    """What a finished run has to show: sounds, figures, curves, poles and what to type next.

    Args:
        out: the run folder.
        held_out: name -> recording (1, T) at the model's rate and level.
        scores: sections that come after the sounds.
    """
    model: Any = checkpoint.load(out / "best")
    training, rate = checkpoint.read_config(out / "best")["training"], model.sample_rate
    strength, text, ending = VARIATION, VARIED, f"with variation {VARIATION}"
    source, name = "What it makes of noise alone, by no recording.", "from noise"
    if hasattr(model, "encode"):
        strength, text, ending = 0.0, LISTEN, "through the model"
        source = "A latent of noise alone, decoded: a model that learned sound frame by frame gives texture."
        name = "a random latent"
    clips = []
    for path, audio in list(held_out.items())[:2] if hasattr(model, "vary") else ():
        audio = audio[..., : round(CLIP_SECONDS * rate)]
        made = model.vary(audio.unsqueeze(0), strength, torch.Generator().manual_seed(0))[0]
        clips += [Clip(Path(path).name, audio, rate), Clip(f"{Path(path).name} {ending}", made, rate)]
    from_noise = []
    if hasattr(model, "sample"):
        in_training = training.get("clip_seconds") if getattr(model, "classes", ()) else None
        num_samples = round((in_training or CLIP_SECONDS / 2) * rate)
        try:
            sample = model.sample(1, num_samples, generator=torch.Generator().manual_seed(0))[0]
            from_noise = [Section("From noise", [source], clips=[Clip(name, sample, rate)])]
        except RunawayError as error:  # the page of a training that went wrong shows where
            from_noise = [Section("From noise", [f"There is nothing to hear: {error}"])]
    facts = [("", ""), *describe(model), *describe_training(training)]
    return [
        *([Section("Listen", [text], clips=clips)] if clips else []),
        *from_noise,
        *scores,
        Section("The model", table=facts),
        training_section(out),
        *([memory_section(model)] if memories(model) else []),
        Section("What to type next", commands=next_commands(model, out / "best")),
    ]  # fmt: skip


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.1f} s"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"
