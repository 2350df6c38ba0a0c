"""`s4audio generate`: audio from noise or from recordings."""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from s4audio import checkpoint
from s4audio.audio import NORMALIZATIONS, AudioError, find_audio, normalize, read_audio, write_audio
from s4audio.cli.arguments import Parser, load_autoencoder
from s4audio.files import replacing

RECORD = "generated.json"  # which model made which file of the folder
LEVELS = {"none": "their own level", "peak": "a peak of full scale, and its output is brought back to theirs"}


def generate(arguments: list[str]) -> None:
    """Writes audio made by a model, with a picture of each clip."""
    parser = Parser(prog="s4audio generate", description="Make audio from noise or from recordings.")
    parser.add_argument("model", help="model folder, such as runs/NAME/best")
    parser.add_argument("--from", dest="source", required=True, metavar="noise|FILE|FOLDER", help="what to start from")
    parser.add_argument("--num", type=int, help="clips to make from noise (default 4)")
    parser.add_argument("--seconds", type=float, help="length of a clip made from noise (default 10)")
    parser.add_argument(
        "--variation", type=float, default=0.0, help="noise mixed into the latent: 0 (default), only reconstructs, to 1"
    )
    parser.add_argument("--normalize", choices=NORMALIZATIONS, help="level of the recordings; default: as in training")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same clips (default 0)")
    parser.add_argument("--batch-size", type=int, default=4, help="clips from noise at a time (default 4)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--out", default="generated", help="folder for the WAV and PNG files (default generated)")
    args = parser.parse_args(arguments)
    if args.source != "noise" and (args.num is not None or args.seconds is not None):
        raise ValueError("--num and --seconds are for --from noise; a recording gives one clip, as long as it is.")
    args.num, args.seconds = 4 if args.num is None else args.num, 10.0 if args.seconds is None else args.seconds
    if args.num < 1 or args.batch_size < 1 or args.seed < 0 or not 0 < args.seconds <= 3600:
        raise ValueError("--num and --batch-size must be at least 1, --seconds positive, at most 3600, --seed not negative.")
    if not 0 <= args.variation <= 1:
        raise ValueError(f"--variation is {args.variation}; wanted 0 (reconstruction) to 1 (only noise).")
    if args.source == "noise" and args.variation:
        raise ValueError("--variation mixes noise into a recording; with --from noise there is none.")
    sources = None if args.source == "noise" else find_audio(args.source)
    model = load_autoencoder(args.model, args.device)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    _record(out, args)
    started = time.monotonic()
    if sources is None:
        seconds = _from_noise(model, args, out)
    else:
        how = args.normalize or checkpoint.read_config(args.model)["training"].get("normalize", "none")
        seconds = _from_recordings(model, args, sources, how, out)
    took = time.monotonic() - started
    print(f"{seconds:.1f} s of audio in {took:.1f} s, at {model.sample_rate} Hz, in {out}")


@torch.no_grad()
def _from_noise(model: Any, args: argparse.Namespace, out: Path) -> float:
    num_samples = max(1, round(args.seconds * model.sample_rate))
    for first in range(0, args.num, args.batch_size):
        indices = range(first, min(first + args.batch_size, args.num))
        generators = [_generator(args.seed, index) for index in indices]
        clips = model.sample(len(generators), num_samples, generator=generators).cpu()
        for index, clip in zip(indices, clips, strict=True):
            _write(out, f"noise_{args.seed}_{index:03d}", {"output, from noise": clip}, model.sample_rate)
    return args.num * num_samples / model.sample_rate


@torch.no_grad()
def _from_recordings(model: Any, args: argparse.Namespace, files: list[Path], how: str, out: Path) -> float:
    # Every name has an ending, so that no recording beside the one that was given can be in the way.
    ending = f"variation_{args.variation:g}" if args.variation else "reconstructed"
    names = [f"{name}_{ending}" for name in _distinct_names(files, Path(args.source))]
    for target in (out / f"{name}.wav" for name in names):
        if target.exists() and any(target.samefile(file) for file in files):
            raise ValueError(f"{target} is a recording to read and would be overwritten; choose another --out.")
    print(f"{len(files)} to read, as mono at {model.sample_rate} Hz; the model hears them at {LEVELS[how]}")
    seconds, failures = 0.0, []
    for index, (file, name) in enumerate(zip(files, names, strict=True)):
        try:
            audio, _ = read_audio(file, model.sample_rate, mono=model.channels == 1)
            if audio.shape[0] != model.channels:
                raise AudioError(f"{file} has {audio.shape[0]} channels; the model wants {model.channels}.")
        except AudioError as error:
            failures.append(str(error))
            print(f"skipped: {error}", file=sys.stderr)
            continue
        heard = normalize(audio, how)
        estimate = model.vary(heard.unsqueeze(0).to(args.device), args.variation, [_generator(args.seed, index)])[0].cpu()
        if heard.abs().max() > 0:
            estimate = estimate * (audio.abs().max() / heard.abs().max())  # back at the level of the recording
        title = "output, reconstructed" if args.variation == 0 else f"output, variation {args.variation:g}"
        _write(out, name, {"input": audio, title: estimate}, model.sample_rate)
        seconds += audio.shape[-1] / model.sample_rate
    if len(failures) == len(files):
        raise AudioError(f"none of the {len(files)} recordings could be read.")
    return seconds


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


def _write(out: Path, name: str, clips: dict[str, Tensor], sample_rate: int) -> None:
    """NAME.wav from the last clip and NAME.png from all."""
    from s4audio.report import clips_figure, save_figure

    *_, audio = clips.values()
    clipped = write_audio(out / f"{name}.wav", audio, sample_rate)
    save_figure(out / f"{name}.png", clips_figure(clips, sample_rate))
    note = f" ({clipped} samples beyond full scale were clipped)" if clipped else ""
    print(f"{out / name}.wav and .png{note}", flush=True)


def _generator(seed: int, index: int) -> torch.Generator:
    """The noise of one clip, from (seed, index) alone."""
    state: Any = np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]) % 2**63)


def _distinct_names(files: list[Path], folder: Path) -> list[str]:
    """A name for each file's output: its path inside the folder without extension, with a number where that is taken."""
    names: list[str] = []
    for file in files:
        own = str((file.relative_to(folder) if file != folder else Path(file.name)).with_suffix(""))
        name, count = own, 1
        while name.casefold() in (taken.casefold() for taken in names):  # A.wav and a.wav are one file on some systems
            count += 1
            name = f"{own}_{count}"
        names.append(name)
    return names
