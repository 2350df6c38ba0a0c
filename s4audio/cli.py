"""The command line: the one place that parses arguments. Wrong input ends in a sentence and exit status 2."""

import argparse
import logging
import re
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from s4audio import __version__, checkpoint
from s4audio.audio import NORMALIZATIONS, AudioError, find_audio, normalize, read_audio, write_audio

USAGE = """usage: s4audio VERB ...

  fit --config RECIPE.yaml      train a model; in an existing run folder, go on with that run
  generate MODEL --from noise   make audio from noise
  generate MODEL --from FILE    make audio from a recording, or from every recording in a folder

`s4audio VERB --help` tells more. A MODEL is a folder such as runs/NAME/best."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a verb; returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    verbs: dict[str, Callable[[list[str]], None]] = {"fit": fit, "generate": generate}
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"s4audio {__version__}")
        return 0
    if arguments[0] not in verbs:
        return _fail(f"{arguments[0]!r} is not a verb; there are {' and '.join(verbs)}.")
    try:
        verbs[arguments[0]](arguments[1:])
    except ValueError as error:  # AudioError and CheckpointError are ValueErrors
        return _fail(str(error))
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}; choose another folder." if error.filename else str(error))
    except RuntimeError as error:
        return _fail(str(error), status=1)
    return 0


def _fail(message: str, status: int = 2) -> int:
    print(f"s4audio: {' '.join(message.split())}", file=sys.stderr)
    return status


def fit(arguments: list[str]) -> None:
    """Trains what a recipe says, or goes on with the run that is already in its folder."""
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    from s4audio.tasks.callbacks import TRAINER_CHECKPOINT

    # Lightning's notes on hardware, loggers and worker counts are not for the person who waits for a sound.
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    if not any(argument.startswith(("--config", "-c", "--help", "-h", "--print_config")) for argument in arguments):
        raise ValueError("fit needs a recipe, for example: s4audio fit --config recipes/debug.yaml")
    try:
        cli = _recipe_cli(arguments)
    except (MisconfigurationException, ImportError) as error:  # ImportError: hardware whose own package is missing
        raise ValueError(f"the trainer refuses the recipe: {error}") from error
    out, data, resume = Path(cli.config["out"]), cli.training, Path(cli.config["out"]) / TRAINER_CHECKPOINT
    print(
        f"data: {data['train_files']} files ({_duration(data['train_seconds'])}) to train on, {data['valid_files']} "
        f"({_duration(data['valid_seconds'])}) held out, {len(data['skipped'])} skipped, at {data['sample_rate']} Hz"
    )
    for sentence in data["skipped"]:
        print(f"skipped: {sentence}")
    recipe = yaml.safe_load(cli.parser.dump(cli.config, skip_validation=True))
    if resume.exists():
        steps = _steps_of(resume)
        _refuse_another_recipe(recipe, out / "recipe.yaml")
        print(f"{out} holds a run of {steps} steps; going on from there to {cli.trainer.max_steps}.")
        if 0 < cli.trainer.max_steps <= steps:
            print("It is finished; nothing was changed. A larger --trainer.max_steps extends it.")
            return
    out.mkdir(parents=True, exist_ok=True)
    (out / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    try:
        cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=str(resume) if resume.exists() else None, weights_only=True)
    except MisconfigurationException as error:
        raise ValueError(f"the trainer refuses the recipe: {error}") from error
    except SystemExit:  # what Lightning makes of Ctrl-C, after the run folder has saved
        print(f"\nstopped at step {cli.trainer.global_step} and saved {out / 'last'}; the same command goes on from there.")
        raise SystemExit(130) from None
    best = checkpoint.read_config(out / "best")["training"]
    chosen = (
        f"step {best['steps']}, best on the held-out clips"
        if "valid/loss" in best["scores"]
        else "not scored on held-out clips"
    )
    print(f"\nmodel:    {out / 'best'} ({chosen}) and {out / 'last'}")
    print(f"curves:   tensorboard --logdir {out}")
    print(f"generate: s4audio generate {out / 'best'} --from noise --num 4 --seconds 10 --out generated")


def _recipe_cli(arguments: list[str]) -> Any:
    """The trainer, the task and the data that a recipe and the options after it describe.

    Raises:
        ValueError: a key that does not exist, a wrong value, or parts that do not fit each other.
    """
    import jsonargparse
    import lightning
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
    from lightning.pytorch.loggers import TensorBoardLogger

    from s4audio.tasks.callbacks import Progress, RunFolder

    class RecipeCLI(LightningCLI):
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            parser.add_argument(
                "--out", type=str, required=True, help="run folder; if it holds a run already, that run goes on"
            )
            parser.add_argument("--save_every", type=int, default=500, help="steps between checkpoints")

        def instantiate_classes(self) -> None:
            """Adds what the run writes and shows to the trainer that the recipe describes."""
            out, trainer = Path(self.config["out"]), self.config["trainer"]
            if trainer["devices"] not in (1, "1", "auto"):
                raise ValueError(f"trainer.devices is {trainer['devices']}; this version trains on one device.")
            if trainer["logger"] is not None:
                raise ValueError("trainer.logger is set; a run always writes TensorBoard files into its folder.")
            try:
                self.config_init = self.parser.instantiate(self.config)
            except ValueError as error:
                raise ValueError(f"the recipe is refused: {_innermost(error)}") from error
            self.datamodule, self.model = self.config_init["data"], self.config_init["model"]
            data, model = self.datamodule, self.model.model
            if not hasattr(model, "training_losses"):
                raise ValueError(f"the model is a {type(model).__name__}, which is no generator; fit trains generators.")
            if data.sample_rate != model.sample_rate:
                raise ValueError(
                    f"the data is at {data.sample_rate} Hz and the model at {model.sample_rate} Hz; make both one value."
                )
            if model.channels != 1:
                raise ValueError(f"the model has {model.channels} channels and the clips of AudioFolder have 1 (mono).")
            data.setup()
            self.training = data.describe()
            ours = [Progress(data.sample_rate), RunFolder(out, self.config["save_every"], self.training)]
            self.trainer = self.instantiate_trainer(
                logger=TensorBoardLogger(out, name="tensorboard", version=""),
                callbacks=[*(self.config_init["trainer"]["callbacks"] or []), *ours],
                enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, num_sanity_val_steps=0,
                check_val_every_n_epoch=None, use_distributed_sampler=False,
            )  # fmt: skip

    # Not Lightning's "auto", which takes every GPU there is, or Apple's, which has no float64.
    hardware = {"accelerator": "cuda" if torch.cuda.is_available() else "cpu", "devices": 1}
    try:
        return RecipeCLI(
            lightning.LightningModule, lightning.LightningDataModule, subclass_mode_model=True, subclass_mode_data=True,
            save_config_callback=None, seed_everything_default=0, run=False, args=arguments, trainer_defaults=hardware,
            auto_configure_optimizers=False,  # the task has its own
            parser_kwargs={"exit_on_error": False, "prog": "s4audio fit"},
        )  # fmt: skip
    except jsonargparse.ArgumentError as error:
        raise ValueError(f"the recipe or an option is refused: {_innermost(error)}") from error


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.1f} s"


def _steps_of(trainer_checkpoint: Path) -> int:
    """How many steps the run has made.

    Raises:
        ValueError: the file is not a trainer's checkpoint.
    """
    try:
        return int(torch.load(trainer_checkpoint, weights_only=True, map_location="cpu")["global_step"])
    except Exception as error:  # whatever a damaged file makes of the unpickler
        raise ValueError(
            f"{trainer_checkpoint} is damaged ({type(error).__name__}), so this run cannot go on. Its models are in best "
            "and last; remove the file, or choose another --out, to begin anew."
        ) from error


def _refuse_another_recipe(recipe: dict[str, Any], stored: Path) -> None:
    """A run goes on as it began: optimizer and schedule come from its checkpoint, whatever the recipe says now.

    Raises:
        ValueError: the model, the task, the data or the seed differ from the run's own recipe; names the key.
    """
    if not stored.exists():
        return
    before = yaml.safe_load(stored.read_text())
    for section in ("seed_everything", "model", "data"):
        key = _first_difference(before.get(section), recipe.get(section), section)
        if key:
            raise ValueError(
                f"{key} is not what it was when the run in {stored.parent} began (its recipe.yaml has the old value); "
                "go on with that, or choose another --out."
            )


def _first_difference(before: Any, now: Any, key: str) -> str | None:
    if isinstance(before, dict) and isinstance(now, dict):
        differences = (_first_difference(before.get(k), now.get(k), f"{key}.{k}") for k in {**before, **now})
        return next((difference for difference in differences if difference), None)
    return None if before == now else key


def _innermost(error: BaseException) -> str:
    """What was wrong, from under the alternatives that jsonargparse tried as well, with the key if it names one."""
    key = ""
    while True:
        named = re.search(r'Parser key "([^"]+)"', str(error))
        key = named[1] if named else key
        cause = error.__cause__ or error.__context__
        if cause is None:
            return f"{key}: {error}" if key and str(error).startswith("Expected") else str(error)
        error = cause


def generate(arguments: list[str]) -> None:
    """Writes audio made by a model, with a picture of each clip."""
    parser = argparse.ArgumentParser(prog="s4audio generate", description="Make audio from noise or from recordings.")
    parser.add_argument("model", help="model folder, such as runs/NAME/best")
    parser.add_argument("--from", dest="source", required=True, metavar="noise|FILE|FOLDER", help="what to start from")
    parser.add_argument("--num", type=int, default=4, help="clips to make from noise (default 4)")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of a clip made from noise (default 10)")
    parser.add_argument(
        "--variation", type=float, default=0.0, help="0 (default) reconstructs; up to 1, more noise in the latent"
    )
    parser.add_argument("--normalize", choices=NORMALIZATIONS, help="level of the recordings; default: as in training")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same clips (default 0)")
    parser.add_argument("--batch-size", type=int, default=4, help="clips from noise at a time (default 4)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--out", default="generated", help="folder for the WAV and PNG files (default generated)")
    args = parser.parse_args(arguments)
    if args.num < 1 or args.batch_size < 1 or args.seed < 0 or not 0 < args.seconds < float("inf"):
        raise ValueError("--num and --batch-size must be at least 1, --seconds positive and --seed not negative.")
    if not 0 <= args.variation <= 1:
        raise ValueError(f"--variation is {args.variation}; wanted 0 (reconstruction) to 1 (only noise).")
    if args.source == "noise" and args.variation:
        raise ValueError("--variation mixes noise into a recording; with --from noise there is none.")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is cuda, but torch finds no CUDA device here; leave --device out to use the CPU.")
    sources = None if args.source == "noise" else find_audio(args.source)
    model: Any = checkpoint.load(args.model, args.device)
    if not hasattr(model, "sample"):
        raise ValueError(f"{args.model} is a {type(model).__name__}, which classifies; generate needs an autoencoder.")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
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
    names = [f"{name}_variation_{args.variation:g}" if args.variation else name for name in _distinct_names(files)]
    originals = {file.resolve() for file in files}
    for name in names:
        if (out / f"{name}.wav").resolve() in originals:
            raise ValueError(f"{out / name}.wav is a recording to read and would be overwritten; choose another --out.")
    print(f"{len(files)} recordings, mono at {model.sample_rate} Hz, level: {'as they are' if how == 'none' else how}")
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
        audio = normalize(audio, how)
        estimate = model.vary(audio.unsqueeze(0).to(args.device), args.variation, [_generator(args.seed, index)])[0].cpu()
        title = "output, reconstructed" if args.variation == 0 else f"output, variation {args.variation:g}"
        _write(out, name, {"input": audio, title: estimate}, model.sample_rate)
        seconds += audio.shape[-1] / model.sample_rate
    if len(failures) == len(files):
        raise AudioError(f"none of the {len(files)} recordings could be read.")
    return seconds


def _write(out: Path, name: str, clips: dict[str, Tensor], sample_rate: int) -> None:
    """NAME.wav from the last clip and NAME.png from all."""
    from s4audio.report import save_clips_figure

    *_, audio = clips.values()
    clipped = write_audio(out / f"{name}.wav", audio, sample_rate)
    save_clips_figure(out / f"{name}.png", clips, sample_rate)
    note = f" ({clipped} samples beyond full scale were clipped)" if clipped else ""
    print(f"{out / name}.wav and .png{note}", flush=True)


def _generator(seed: int, index: int) -> torch.Generator:
    """The noise of one clip, from (seed, index) alone."""
    state: Any = np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]) % 2**63)


def _distinct_names(files: list[Path]) -> list[str]:
    """A name for each file's output: its stem, with a number where that is taken."""
    names: list[str] = []
    for file in files:
        name, count = file.stem, 1
        while name in names:
            count += 1
            name = f"{file.stem}_{count}"
        names.append(name)
    return names


if __name__ == "__main__":
    sys.exit(main())
