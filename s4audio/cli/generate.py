"""`s4audio generate`: audio from noise or from recordings."""

import argparse
import inspect
import json
import math
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from s4audio import checkpoint
from s4audio.audio import NORMALIZATIONS, AudioError, find_audio, normalize, read_audio, write_audio
from s4audio.cli.arguments import Parser, load_generator
from s4audio.files import replacing

RECORD = "generated.json"  # which model made which file of the folder
LEVELS = {"none": "them as loud as they are", "peak": "them at full scale, and its output is as loud as they were"}
METHODS = {  # of a model -> the option that asks for it
    "sample": "--from noise",
    "vary": "--variation",
    "inpaint": "--inpaint",
    "continue_": "--continue",
    "interpolate": "--interpolate",
}
KEYWORDS = {  # of these methods -> the option that gives it
    "label": "--label",
    "num_steps": "--steps",
    "guidance": "--guidance",
    "temperature": "--temperature",
    "top_p": "--top-p",
}
NUM_CLIPS, NUM_BETWEEN, SECONDS, BATCH_SIZE = 4, 5, 10.0, 4

Made = tuple[str, dict[str, Tensor]]  # the name of a clip, and what is shown of it by their titles; the last is the clip


def generate(arguments: list[str]) -> None:
    """Writes audio made by a model, with a picture of each clip."""
    parser = Parser(
        prog="s4audio generate",
        description="Make audio from noise or from recordings. What a model cannot do it says, and what it can instead.",
    )
    parser.add_argument("model", help="model folder, such as runs/NAME/best, or the name of a pretrained model")
    parser.add_argument("--from", dest="source", metavar="noise|FILE|FOLDER", help="what to start from")
    parser.add_argument("--num", type=int, help="clips to make from noise (default 4), or of an interpolation (default 5)")
    parser.add_argument(
        "--seconds", type=float, help="length of a clip made from noise (default 10; of a model with labels, as in training)"
    )
    parser.add_argument("--label", help="what to make, by the name of a class")
    parser.add_argument(
        "--steps", dest="num_steps", type=int, help="of a flow's solver (default 32): fewer are quicker and fainter"
    )
    parser.add_argument(
        "--guidance", type=float, help="how closely a flow follows the label (default 2): 1 as learned, 4 exaggerates"
    )
    parser.add_argument("--temperature", type=float, help="of each drawn sample: below 1 takes fewer risks")
    parser.add_argument("--top-p", type=float, help="draw each sample among the likeliest, this probability in all")
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--variation", type=float, help="noise mixed into a recording: 0 (default), only reconstructs, to 1, only noise"
    )
    how.add_argument("--inpaint", metavar="START:STOP", help="make this span of a recording anew, in seconds: 2.0:3.5")
    how.add_argument("--continue", dest="more", type=float, metavar="SECONDS", help="go on with a recording for so long")
    how.add_argument("--interpolate", nargs=2, metavar=("A", "B"), help="clips on the way from one recording to another")
    parser.add_argument("--normalize", choices=NORMALIZATIONS, help="level of the recordings; default: as in training")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same clips (default 0)")
    parser.add_argument("--batch-size", type=int, help="clips from noise at a time (default 4)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--out", default="generated", help="folder for the WAV and PNG files (default generated)")
    args = parser.parse_args(arguments)
    method, what = _asked_for(args)
    args.batch_size = args.batch_size or BATCH_SIZE
    sources = [] if method == "sample" else [file for path in args.interpolate or [args.source] for file in find_audio(path)]
    model = load_generator(args.model, args.device)
    options = _options(model, method, args)
    if method == "vary" and not what and options:
        option = next(KEYWORDS[keyword] for keyword in options)
        raise ValueError(f"{option} does nothing where a recording is only reconstructed; give --variation, too.")
    training = checkpoint.read_config(args.model)["training"]
    how_loud = args.normalize or training.get("normalize", "none")
    of_a_label = training.get("clip_seconds") if getattr(model, "classes", ()) else None
    if of_a_label and (method == "continue_" or (args.seconds or 0) > of_a_label):
        print(f"note:     {args.model} learned one label a clip, clips of {of_a_label:g} s; longer ones are unlike them")
    if method == "sample":
        made = _from_noise(model, options, args, args.seconds or of_a_label or SECONDS)
    elif method == "interpolate":
        made = _between(model, options, args, sources, how_loud)
    else:
        made = _from_recordings(model, options, args, sources, how_loud, method, what)
    out, seconds, started = Path(args.out), 0.0, time.monotonic()
    new = [folder for folder in (out, *out.parents) if not folder.exists()]
    out.mkdir(parents=True, exist_ok=True)
    try:
        with torch.no_grad():
            for name, clips in made:
                if not seconds:  # not before: a model may refuse what it is asked for
                    _record(out, args)
                seconds += _write(out, name, clips, model.sample_rate)
    finally:
        for folder in new:
            if not any(folder.iterdir()):
                folder.rmdir()
    took = time.monotonic() - started
    print(f"{seconds:.1f} s of audio in {took:.1f} s, at {model.sample_rate} Hz, in {out}")


def _asked_for(args: argparse.Namespace) -> tuple[str, Any]:
    """The method that is asked for, and what it is told: a strength, a span in seconds, or a number of seconds.

    Raises:
        ValueError: options that exclude each other, or a value outside of its range.
    """
    if args.interpolate and args.source:
        raise ValueError("--interpolate names its two recordings itself; leave --from out.")
    if not args.interpolate and not args.source:
        raise ValueError("--from is missing: noise, a recording, or a folder of them.")
    a_recording = args.source not in ("noise", None)
    for option, value in (("--num", args.num), ("--seconds", args.seconds), ("--batch-size", args.batch_size)):
        if value is not None and (a_recording or (args.interpolate and option != "--num")):
            given = "two recordings give clips as long as they are" if args.interpolate else "a recording gives one clip"
            raise ValueError(f"{option} is for --from noise; {given}.")
    if args.normalize and args.source == "noise":
        raise ValueError("--normalize is the level of recordings; with --from noise there is none.")
    for option, value, least, most in (
        ("--num", args.num, 2 if args.interpolate else 1, math.inf),
        ("--batch-size", args.batch_size, 1, math.inf),
        ("--seed", args.seed, 0, math.inf),
        ("--steps", args.num_steps, 1, 1000),
        ("--guidance", args.guidance, 0, 100),
    ):
        if value is not None and not least <= value <= most:
            up_to = f" and at most {most}" if most < math.inf else ""
            raise ValueError(f"{option} is {value}; wanted at least {least}{up_to}.")
    if args.seconds is not None and not 0 < args.seconds <= 3600:
        raise ValueError(f"--seconds is {args.seconds:g}; wanted a positive number, at most 3600.")
    if args.variation is not None and not 0 <= args.variation <= 1:
        raise ValueError(f"--variation is {args.variation}; wanted 0 (reconstruction) to 1 (only noise).")
    if args.interpolate:
        return "interpolate", None
    if args.source == "noise":
        if args.variation:
            raise ValueError("--variation mixes noise into a recording; with --from noise there is none.")
        if args.inpaint or args.more is not None:
            raise ValueError("--inpaint and --continue need a recording; with --from noise there is none.")
        return "sample", None
    if args.inpaint:
        return "inpaint", _span(args.inpaint)
    if args.more is not None:
        if not 0 < args.more <= 3600:
            raise ValueError(f"--continue is {args.more:g}; wanted a positive number of seconds, at most 3600.")
        return "continue_", args.more
    return "vary", args.variation or 0.0


def _span(text: str) -> tuple[float, float]:
    """Two times in seconds from START:STOP.

    Raises:
        ValueError: it is something else, or the second is not after the first.
    """
    try:
        start, stop = map(float, text.split(":"))
    except ValueError:
        raise ValueError(f"--inpaint is {text}; wanted START:STOP in seconds, such as 2.0:3.5.") from None
    if not 0 <= start < stop < math.inf:
        raise ValueError(f"--inpaint is {text}; wanted a start of at least 0 and a later stop.")
    return start, stop


def _options(model: Any, method: str, args: argparse.Namespace) -> dict[str, Any]:
    """The keywords for a method that the user has given.

    Raises:
        ValueError: the model has no such method, or the method no such keyword, or the model no such class.
    """
    name = type(model).__name__
    if not hasattr(model, method):
        can = ", ".join(option for other, option in METHODS.items() if hasattr(model, other))
        raise ValueError(f"{args.model} is a {name}, which cannot do {METHODS[method]}; it can do {can}.")
    given = {keyword: getattr(args, keyword) for keyword in KEYWORDS if getattr(args, keyword) is not None}
    taken = set(inspect.signature(getattr(model, method)).parameters)
    taken -= set() if getattr(model, "classes", ()) else {"label", "guidance"}
    if unknown := [option for keyword, option in KEYWORDS.items() if keyword in given and keyword not in taken]:
        can = ", ".join(option for keyword, option in KEYWORDS.items() if keyword in taken)
        without = " without labels" if getattr(model, "classes", None) == () else ""
        raise ValueError(
            f"{unknown[0]} does nothing for {METHODS[method]} of {args.model}, a {name}{without}; "
            + (f"it takes {can}." if can else "leave it out.")
        )
    if "guidance" in given and "label" not in given:
        raise ValueError("--guidance says how closely to follow a label, and there is no --label.")
    if "label" in given:
        given["label"] = torch.tensor([_number_of(given["label"], model.classes)], device=args.device)
    return given


def _number_of(label: str, classes: Sequence[str]) -> int:
    """Of a class, from its name; the number itself would say three where a user means 7.

    Raises:
        ValueError: there is no such class.
    """
    if label not in classes:
        raise ValueError(f"--label is {label}; the model knows {', '.join(classes)}.")
    return list(classes).index(label)


def _from_noise(model: Any, options: dict[str, Any], args: argparse.Namespace, seconds: float) -> Iterator[Made]:
    num, num_samples = args.num or NUM_CLIPS, max(1, round(seconds * model.sample_rate))
    name = "noise"
    if "label" in options:  # a number is that of a class, which the files are named by
        label = model.classes[int(options["label"])]
        name = _in_a_name(label)
        print(f"label:    {label}")
    for first in range(0, num, args.batch_size):
        indices = range(first, min(first + args.batch_size, num))
        each = {**options, "label": options["label"].expand(len(indices))} if "label" in options else options
        generators = [noise_of(args.seed, index) for index in indices]
        clips = model.sample(len(generators), num_samples, generator=generators, **each).cpu()
        for index, clip in zip(indices, clips, strict=True):
            yield f"{name}_{args.seed}_{index:03d}", {"output, from noise": clip}


def _from_recordings(
    model: Any, options: dict[str, Any], args: argparse.Namespace, files: list[Path], how: str, method: str, what: Any
) -> Iterator[Made]:
    # Every name has an ending, so that no recording beside the one that was given can be in the way.
    ending = {"vary": "reconstructed", "inpaint": "inpainted", "continue_": "continued"}[method]
    if method == "vary" and what:
        ending = f"variation_{what:g}"
    title = ending.replace("_", " ")
    if method == "inpaint":  # another span is another clip, and so is another label
        ending += f"_{what[0]:g}-{what[1]:g}"
    if method == "continue_":
        ending += f"_{what:g}"
    if args.label:
        ending += f"_{_in_a_name(args.label)}"
    if args.seed and (method != "vary" or what):  # another seed is another clip, beside the first
        ending += f"_seed_{args.seed}"
    names = [f"{name}_{ending}" for name in _distinct_names(files, Path(args.source))]
    _refuse_overwriting([Path(args.out, f"{name}.wav") for name in names], files)
    print(f"{len(files)} to read, as mono at {model.sample_rate} Hz; the model hears {LEVELS[how]}")
    failures = []
    for index, (file, name) in enumerate(zip(files, names, strict=True)):
        generator = [noise_of(args.seed, index)]
        try:
            audio = _read(file, model)
            if not audio.any() and (method != "vary" or what):
                raise AudioError(f"{file} is silent, and there is nothing that the model could fit to; try --from noise.")
            told = _in_samples(method, what, audio, model.sample_rate, file)
        except AudioError as error:
            if len(files) == 1:
                raise
            failures.append(str(error))
            print(f"skipped: {error}", file=sys.stderr)
            continue
        known = audio.clone()
        if method == "inpaint" and told != (0, audio.shape[-1]):
            known[..., told[0] : told[1]] = 0  # what stood in the span has no say in how loud the rest is heard
        gain = _gain(known, normalize(known, how))
        heard = audio / gain
        given = heard.unsqueeze(0).to(args.device)
        estimate = getattr(model, method)(given, *told, generator=generator, **options)[0].cpu()
        if method == "continue_":
            estimate = torch.cat([heard, estimate], dim=-1)
        audio, heard = (F.pad(v, (0, estimate.shape[-1] - v.shape[-1])) for v in (audio, heard))
        # Back at the level of the recording; what the model has left alone is the recording, bit for bit.
        estimate = torch.where(estimate == heard, audio, estimate * gain)
        yield name, {"input": audio, f"output, {title}": estimate}
    if len(failures) == len(files):
        raise AudioError(f"none of the {len(files)} recordings could be used.")
    if failures:
        print(f"skipped {len(failures)} of {len(files)} recordings", file=sys.stderr)


def _in_samples(method: str, what: Any, audio: Tensor, rate: int, file: Path) -> tuple[Any, ...]:
    """What a method is told of a recording, in samples.

    Raises:
        AudioError: the span is not inside of the recording.
    """
    if method == "vary":
        return (what,)
    if method == "continue_":
        return (max(1, round(what * rate)),)
    start, stop = (round(seconds * rate) for seconds in what)
    if start == stop:
        raise AudioError(f"--inpaint asks for {what[0]:g} to {what[1]:g} s, which is not even a sample at {rate} Hz.")
    if stop > audio.shape[-1]:
        length = audio.shape[-1] / rate
        raise AudioError(f"{file} is {length:.2f} s long, and --inpaint asks for {what[0]:g} to {what[1]:g} s.")
    return start, stop


def _between(model: Any, options: dict[str, Any], args: argparse.Namespace, files: list[Path], how: str) -> Iterator[Made]:
    """Clips on the way from one recording to another; the longer one is cut."""
    if len(files) != 2:
        raise ValueError(f"--interpolate takes two recordings, and {' and '.join(args.interpolate)} are {len(files)}.")
    num = args.num or NUM_BETWEEN
    names = [f"{files[0].stem}_to_{files[1].stem}_{index:03d}" for index in range(num)]
    _refuse_overwriting([Path(args.out, f"{name}.wav") for name in names], files)
    audio = [_read(file, model) for file in files]
    heard = [normalize(clip, how) for clip in audio]
    length = min(clip.shape[-1] for clip in heard)
    cut = (
        ""
        if len({clip.shape[-1] for clip in heard}) == 1
        else f", {length / model.sample_rate:.1f} s of each, as the shorter"
    )
    print(f"from {files[0].name} to {files[1].name}{cut}")
    first, last = (clip[..., :length].to(args.device) for clip in heard)
    clips = model.interpolate(first, last, num, **options).cpu()
    gains = [_gain(*pair) for pair in zip(audio, heard, strict=True)]
    for index, (name, clip) in enumerate(zip(names, clips, strict=True)):
        share = index / (num - 1)
        title = f"output, {share:.0%} of the way"
        yield name, {title: clip * ((1 - share) * gains[0] + share * gains[1])}


def _read(file: Path, model: Any) -> Tensor:
    """A recording (channels, T), at the model's rate.

    Raises:
        AudioError: it cannot be read, or has another number of channels.
    """
    audio, _ = read_audio(file, model.sample_rate, mono=model.channels == 1)
    if audio.shape[0] != model.channels:
        raise AudioError(f"{file} has {audio.shape[0]} channels; the model wants {model.channels}.")
    return audio


def _gain(audio: Tensor, heard: Tensor) -> Tensor:
    """What brings a clip back from the level at which a model heard it."""
    return audio.abs().max() / heard.abs().max() if heard.any() else torch.ones(())


def _refuse_overwriting(targets: list[Path], files: list[Path]) -> None:
    """Raises: ValueError, if a file that is to be written is one that is to be read."""
    for target in targets:
        if target.exists() and any(target.samefile(file) for file in files):
            raise ValueError(f"{target} is a recording to read and would be overwritten; choose another --out.")


def made_by(folder: Path) -> tuple[list[dict[str, str]], Path | None]:
    """The models that made files in a folder, as far as `generate` has noted them, and a note that cannot be read."""
    models: list[dict[str, str]] = []
    unreadable = None
    for note in sorted(folder.rglob(RECORD)) if folder.is_dir() else ():
        try:
            listed = json.loads(note.read_text())["models"]
            models += [{key: str(model[key]) for key in ("class", "kind", "sha256")} for model in listed]
        except (OSError, ValueError, KeyError, TypeError):
            unreadable = note
    return models, unreadable


def _record(out: Path, args: argparse.Namespace) -> None:
    """Notes the model beside its output, so that `evaluate` can tell who made it."""
    model = {
        "class": checkpoint.read_config(args.model)["class"], "kind": checkpoint.kind(args.model),
        "sha256": checkpoint.fingerprint(args.model),
    }  # fmt: skip
    models = [*(other for other in made_by(out)[0] if other != model), model]
    with replacing(out / RECORD) as file:
        file.write((json.dumps({"models": models}, indent=1) + "\n").encode())


def _write(out: Path, name: str, clips: dict[str, Tensor], sample_rate: int) -> float:
    """NAME.wav from the last clip and NAME.png from all; returns how long they are, in seconds."""
    from s4audio.report import clips_figure, save_figure

    *_, audio = clips.values()
    older = (out / f"{name}.wav").exists()
    clipped = write_audio(out / f"{name}.wav", audio, sample_rate)
    save_figure(out / f"{name}.png", clips_figure(clips, sample_rate))
    note = f" ({clipped} samples beyond full scale were clipped)" if clipped else ""
    print(f"{out / name}.wav and .png{', in place of older ones' if older else ''}{note}", flush=True)
    return audio.shape[-1] / sample_rate


def _in_a_name(label: str) -> str:
    """The label as it goes into the name of a file."""
    return re.sub(r"\W", "_", label)


def noise_of(seed: int, index: int) -> torch.Generator:
    """What draws the noise of a clip, from (seed, index) alone."""
    state: Any = np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]) % 2**63)


def _distinct_names(files: list[Path], folder: Path) -> list[str]:
    """A name for each file's output: its path inside the folder without extension, with a number where that is taken."""
    names: list[str] = []
    taken: set[str] = set()
    for file in files:
        own = str((file.relative_to(folder) if file != folder else Path(file.name)).with_suffix(""))
        name, count = own, 1
        while name.casefold() in taken:  # A.wav and a.wav are one file on some systems
            count += 1
            name = f"{own}_{count}"
        taken.add(name.casefold())
        names.append(name)
    return names
