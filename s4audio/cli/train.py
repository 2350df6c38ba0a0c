"""`s4audio train`: from a folder of recordings to a model, a few sounds, scores and a page, in one command."""

import argparse
import contextlib
import io
import json
import math
import shlex
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning
import torch
import yaml
from torch import Tensor

from s4audio import checkpoint
from s4audio.audio import find_audio, write_audio
from s4audio.cli import fit_audio
from s4audio.cli.arguments import Parser, check_cuda, check_name, load_generator
from s4audio.cli.check import report_folder
from s4audio.cli.evaluate import evaluate, paired_table, score_table, verdict
from s4audio.cli.fit import CHECK, holds_a_checkpoint, read_recipe, recipe_file, refuse_foreign, train_run
from s4audio.cli.generate import generate
from s4audio.cli.run_page import PAGE
from s4audio.models.sashimi import RunawayError
from s4audio.report import Section

RECIPE = "recipe.yaml"  # of a run
FEW_STEPS = 100  # of a training that cannot come to anything
PILOT_STEPS, WARM_UP_STEPS = 16, 6  # that show how long a step takes, at least, and those of them that are not counted
PILOT_SHARE = 0.02  # of --minutes, for as many such steps as fit: ten of a GPU's are over in a blink, and tell little
CLOSING_SECONDS = 30.0  # of --minutes, kept for the sounds, the scores and the page
VALIDATIONS, THEIR_SHARE = 8, 0.15  # in a run, at most; and of its time
NOISE_CLIPS, NOISE_SECONDS = 4, 10.0
HELD_OUT_CLIPS, HELD_OUT_SECONDS = 16, 10.0
SCORED = {  # folder of sounds -> what it is, and its file of scores
    "reconstructed": ("Held-out recordings through the model, against themselves", "scores.json"),
    "noise": ("Sounds from noise, against held-out recordings", "scores_noise.json"),
}


def train(arguments: list[str]) -> None:
    """Checks the folder, trains, makes a few sounds, scores them and writes the page; or goes on where that stopped."""
    parser = Parser(
        prog="s4audio train",
        description="From a folder of recordings to a model. Checks the recordings, prepares a cache, trains, keeps the "
        "model that is best on held-out recordings, makes sounds from noise and from held-out recordings, scores them, and "
        "writes OUT/report.html. The same command goes on where it was stopped; a larger --steps extends a run. `s4audio "
        "fit` has all other settings.",
    )
    parser.add_argument("folder", help="folder of recordings, searched in subfolders too, or one file")
    parser.add_argument("--recipe", help="a recipe's name or file (default autoencoder_16k on a GPU, else demo)")
    parser.add_argument("--from-model", metavar="MODEL", help="begin with the weights of this model, and with its size")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, help="take about this long, all in all; planned at the start")
    length.add_argument("--steps", type=int, help="length of the training (default: the recipe's)")
    parser.add_argument("--valid", metavar="FOLDER", help="recordings to score on (default: some of the others)")
    parser.add_argument("--out", help="the run folder (default runs/ and the folder's name)")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is a GPU")
    parser.add_argument("--on-nan", choices=["stop", "skip"], help="what a loss that is no number does (default stop)")
    args = parser.parse_args(arguments)
    began = time.monotonic()
    for name in filter(None, (args.folder, args.valid, args.out)):
        check_name(name)
    if args.minutes is not None and not 0.5 <= args.minutes < math.inf:
        raise ValueError(f"--minutes is {args.minutes:g}; wanted half a minute or more.")
    if args.device == "cuda":
        check_cuda()
    if args.steps is not None and args.steps < 1:
        raise ValueError(f"--steps is {args.steps}; wanted at least 1.")
    out = Path(args.out or Path("runs") / Path(args.folder).resolve().stem)
    if holds_a_checkpoint(out):
        options = _of_the_run(out, args)
        run = read_recipe(options)
    else:
        refuse_foreign(out)
        if args.valid and Path(args.valid).resolve() in (out.resolve(), *out.resolve().parents):
            raise ValueError(f"{out} is inside {args.valid}, where nothing is written; choose another folder with --out.")
        if args.valid:
            find_audio(args.valid)  # refuses a wrong one now, before the recordings are read
        options = _of_a_new_run(out, args)
        report_folder(args.folder, out / CHECK)
        run = read_recipe(options)
        if args.minutes is not None:
            options += _planned(options, 60 * args.minutes - (time.monotonic() - began))
            run = read_recipe(options)
    if train_run(run, options) or not (out / "sounds").exists():
        not_scored = _make_sounds(out, run.datamodule)
        fit_audio.finish(out, run.datamodule, _scores(out, not_scored))
    best = checkpoint.read_config(out / "best")["training"]
    print(f"\nmodel:    {out / 'best'} (step {best['steps']}, best on what was held out) and {out / 'last'}")
    print(f"sounds:   {out / 'sounds'}, from noise and of what was held out")
    print(f"page:     {out / PAGE}, to open in a browser: sounds, scores, curves")
    best_model = shlex.quote(str(out / "best"))
    if not hasattr(run.model.model, "sample"):
        print(f"next:     s4audio info {best_model}")
        return
    varies = hasattr(run.model.model, "vary")
    print(f"next:     s4audio generate {best_model} --from {'MY_RECORDING.wav --variation 0.1' if varies else 'noise'}")


def _of_a_new_run(out: Path, args: argparse.Namespace) -> list[str]:
    """The options of `fit`."""
    recipe = args.recipe or ("autoencoder_16k" if torch.cuda.is_available() and args.device != "cpu" else "demo")
    file = recipe_file(recipe if recipe.endswith((".yaml", ".yml")) else f"recipes/{recipe}.yaml")
    contents = _read_yaml(file)
    try:
        contents["data"]["init_args"]["sample_rate"], contents["model"]["init_args"]["model"]["class_path"]
    except (TypeError, KeyError) as error:
        raise ValueError(f"{recipe} does not train on a folder of recordings; choose another --recipe.") from error
    print(f"recipe:   {file.stem}" + ("" if args.recipe else ", since none was named"))
    trains = contents["model"]["init_args"]["model"]["class_path"].rpartition(".")[2]
    options = ["--config", str(file), "--train", str(Path(args.folder).absolute()), f"--out={out}"]
    # Without --valid not the folder that the recipe names, which is that of its own data.
    options += ["--valid", str(Path(args.valid).absolute()) if args.valid else "null", *_given("--on-nan", args.on_nan)]
    options += _given("--trainer.accelerator", args.device)
    if args.steps:
        options += _length(args.steps, _batches(contents))
    if args.from_model:
        given = load_generator(args.from_model)  # refuses a wrong one now, before the recordings are read
        if type(given).__name__ != trains:
            raise ValueError(
                f"{args.from_model} is a {type(given).__name__} and the recipe {file.stem} trains a {trains}; choose a "
                "recipe for it with --recipe."
            )
        config = checkpoint.read_config(args.from_model)
        model = _for_a_recipe(config)
        options += ["--model.init_args.model", json.dumps(model), "--from_model", str(Path(args.from_model).absolute())]
        options += _given("--data.init_args.sample_rate", config["arguments"].get("sample_rate"))
        options += _given("--data.init_args.normalize", config["training"].get("normalize"))
    return options


def _read_yaml(file: Path) -> Any:
    """Raises: ValueError, if it is none."""
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        raise ValueError(f"{file} is no YAML" + (f", from line {where.line + 1} on" if where else "") + ".") from error


def _for_a_recipe(described: dict[str, Any]) -> dict[str, Any]:
    """A model, and those among its arguments, from config.json's words in a recipe's."""
    arguments = {
        key: _for_a_recipe(value) if isinstance(value, dict) else value for key, value in described["arguments"].items()
    }
    return {"class_path": f"s4audio.models.{described['class']}", "init_args": arguments}


def _of_the_run(out: Path, args: argparse.Namespace) -> list[str]:
    """The options of `fit` that go on with a run as it began.

    Raises:
        ValueError: it was another run.
    """
    recipe = _read_yaml(out / RECIPE)
    try:
        began, planned = recipe["data"]["init_args"], recipe["trainer"]["max_steps"]
        began_with = {"folder": began["train"], "--valid": began.get("valid"), "--from-model": recipe.get("from_model")}
    except (TypeError, KeyError) as error:
        raise ValueError(f"{out} holds a run that is not on a folder of recordings; choose a new one with --out.") from error
    for what, given in (("folder", args.folder), ("--valid", args.valid), ("--from-model", args.from_model)):
        before = began_with[what]
        if given is not None and (before is None or Path(before).resolve() != Path(given).resolve()):
            told = f"began with {what} {before}" if before else f"began without {what}"
            raise ValueError(f"the run in {out} {told}; choose a new folder with --out for {given}.")
    options = ["--config", str(out / RECIPE), f"--out={out}", *_given("--on-nan", args.on_nan)]
    options += _given("--trainer.accelerator", args.device)
    if args.minutes is not None:
        print(f"{out} was planned for {planned} steps, which stays; --steps extends it.")
    elif args.steps:
        options += _length(args.steps, _batches(recipe))
    return options


def _given(option: str, value: Any) -> list[str]:
    return [] if value is None else [option, str(value)]


def _length(steps: int, batches: int, validations: int = VALIDATIONS) -> list[str]:
    """So many steps of so many batches, with the learning rates down at the end and a few validations on the way."""
    every = max(1, steps // validations)  # down, so that the weights of the end are judged, or those of a few steps before
    return [
        "--steps", str(steps), "--model.init_args.decay_steps", str(steps), "--save_every", str(every),
        "--trainer.val_check_interval", str(every * batches),
    ]  # fmt: skip


def _batches(recipe: dict[str, Any]) -> int:
    """Of a step, whose gradients add up."""
    return recipe.get("trainer", {}).get("accumulate_grad_batches") or 1


class _Stopwatch(lightning.Callback):
    """How long steps and a validation take, over so many seconds."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.times: list[float] = []
        self.validation_began = self.validation = 0.0

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        self.times.append(time.monotonic())
        ends = len(self.times) >= PILOT_STEPS and self.times[-1] - self.times[WARM_UP_STEPS] >= self.seconds
        # Only where a clock is read that counts: a GPU that is waited for at every step is slower than in the training.
        if trainer.strategy.root_device.type == "cuda" and (ends or len(self.times) <= WARM_UP_STEPS + 1):
            torch.cuda.synchronize()
            self.times[-1] = time.monotonic()
        if ends:  # and where not, whoever else wants a stop keeps it
            trainer.should_stop = True  # after a validation

    def on_validation_start(self, *_: Any) -> None:
        self.validation_began = time.monotonic()

    def on_validation_end(self, *_: Any) -> None:
        self.validation = time.monotonic() - self.validation_began


def _planned(options: list[str], seconds: float) -> list[str]:
    """The options for as many steps as fit into so many seconds, by the time that a few of them take."""
    from s4audio.tasks import AdversarialTask, DivergenceError
    from s4audio.tasks.callbacks import Progress

    print("measuring how long a step takes", flush=True)
    began, watch, never = time.monotonic(), _Stopwatch(PILOT_SHARE * seconds), str(10**9)
    with tempfile.TemporaryDirectory() as pilot:
        shortly = ["--steps", never, "--trainer.val_check_interval", never, "--save_every", never, "--trainer.devices", "1"]
        run = read_recipe([*options, *shortly, "--trainer.accumulate_grad_batches", "1", "--out", pilot])
        if isinstance(run.model, AdversarialTask):
            run.model.adversarial_start_step = 0  # with a discriminator steps take longer, and most have one
        run.trainer.callbacks = [*(c for c in run.trainer.callbacks if not isinstance(c, Progress)), watch]
        try:
            run.trainer.fit(run.model, run.datamodule)
            if run.trainer.strategy.root_device.type == "cuda":  # where the first compiled kernels, which is not its time
                run.trainer.validate(run.model, run.datamodule, verbose=False)
        except SystemExit:  # what Lightning makes of Ctrl-C
            raise KeyboardInterrupt from None
        except DivergenceError as error:
            raise RuntimeError(f"while it was measured how long a step takes, {str(error).partition('. ')[0]}.") from error
    counted = watch.times[WARM_UP_STEPS:]
    batches = _batches(yaml.safe_load(Path(options[1]).read_text()))
    step = batches * (counted[-1] - counted[0]) / (len(counted) - 1)
    left = max(0.0, seconds - (time.monotonic() - began) - CLOSING_SECONDS)
    validations = min(VALIDATIONS, max(1, int(THEIR_SHARE * left / max(watch.validation, 1e-3))))
    steps = max(PILOT_STEPS, int((left - validations * watch.validation) / step))
    print(
        f"a step takes {1e3 * step:.0f} ms, a validation {watch.validation:.1f} s: {steps} steps, {validations} validations"
    )
    if steps < FEW_STEPS:
        print(f"in {steps} steps a model learns next to nothing: give it more --minutes, a GPU, or a smaller recipe")
    return _length(steps, batches, validations)


def _make_sounds(out: Path, data: Any) -> dict[str, str]:
    """Writes OUT/sounds: held-out recordings, what the model makes of them, and of noise; and the scores of both.

    Returns:
        Of what could not be scored, by its file of scores, why.
    """
    not_scored = {}
    model, sounds, rate = str(out / "best"), out / "sounds", data.sample_rate
    for made in ("held_out", "varied", *SCORED):
        shutil.rmtree(sounds / made, ignore_errors=True)
    print("\nmaking sounds and scoring them", flush=True)
    for number, (name, clip) in enumerate(_held_out(data)):
        readable = "".join(c if c.isascii() and c.isalnum() else "_" for c in Path(name).stem)[:40]
        write_audio(sounds / "held_out" / f"{number:02d}_{readable}.wav", clip, rate)
    net: Any = checkpoint.load(model)
    of_recordings = [str(sounds / "held_out"), "--normalize", data.normalize, "--out"]
    longest = max(audio.shape[-1] for audio in [*data.train_clips, *data.valid_clips]) / rate
    seconds = data.clip_seconds if getattr(net, "classes", ()) and data.clip_seconds else min(NOISE_SECONDS, longest)
    from_noise = ["--num", str(NOISE_CLIPS), "--seconds", str(seconds), "--out", str(sounds / "noise")]
    with contextlib.redirect_stdout(io.StringIO()):  # the names of all files
        if hasattr(net, "encode"):
            generate([model, "--from", *of_recordings, str(sounds / "reconstructed")])
        elif hasattr(net, "vary"):
            generate([model, "--from", *of_recordings, str(sounds / "varied"), "--variation", str(fit_audio.VARIATION)])
        try:
            if hasattr(net, "sample"):
                generate([model, "--from", "noise", *from_noise])
        except RunawayError as error:
            print(f"no sounds from noise: {error}", file=sys.stderr)
    for folder, (what, file) in SCORED.items():
        (out / file).unlink(missing_ok=True)
        if not (sounds / folder).exists():
            continue
        paired = ["--paired"] if folder == "reconstructed" else []
        print(f"\n{what}")
        try:
            evaluate([str(sounds / folder), str(sounds / "held_out"), "--json", str(out / file), *paired])
        except (ValueError, RuntimeError) as error:  # too few, too short, or nothing here that reckons mel bands
            print(f"not scored: {error}")
            not_scored[file] = str(error)
    return not_scored


def _held_out(data: Any) -> list[tuple[str, Tensor]]:
    """Clips from all over the held-out recordings, with the name of each one's recording."""
    length = round(HELD_OUT_SECONDS * data.sample_rate)
    clips = [
        (name, audio[..., start : start + length])
        for name, audio in zip(data.valid_names, data.valid_clips, strict=True)
        for start in range(0, max(1, audio.shape[-1] - length // 2), length)
    ]
    number = min(HELD_OUT_CLIPS, len(clips))
    return [clips[index * len(clips) // number] for index in range(number)]


def _scores(out: Path, not_scored: dict[str, str]) -> list[Section]:
    """For the page: what the scores say that there are, and why others are not."""
    sections = []
    for what, file in SCORED.values():
        if (out / file).exists():
            scores = json.loads((out / file).read_text())
            rows = paired_table(scores["paired"]) if "paired" in scores else score_table(scores)
            sections.append(Section(what, [verdict(scores)], table=rows))
        elif file in not_scored:
            sections.append(Section(what, [f"Not scored: {not_scored[file]}"]))
    return sections
