"""`s4audio fit`: trains what a recipe says, and writes a page about what came out."""

import difflib
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import yaml

from s4audio import checkpoint
from s4audio.cli.arguments import shipped
from s4audio.cli.run_page import PAGE
from s4audio.files import replacing

SHORT = {
    "--train": "--data.init_args.train",
    "--valid": "--data.init_args.valid",
    "--root": "--data.init_args.root",
    "--steps": "--trainer.max_steps",
}
HELP = """usage: s4audio fit --config RECIPE.yaml [--KEY VALUE ...]

Trains what a recipe says.

  --train FOLDER               recordings to train on (WAV, FLAC, OGG, MP3; M4A with ffmpeg), searched in subfolders too
  --valid FOLDER               recordings to score on; without it, some of the others are set aside
  --root FOLDER                images to train a classifier on, in place of these two
  --out FOLDER                 the run folder; if it holds a run already, that run goes on
  --steps N                    length of the training
  --trainer.accelerator cpu    the CPU, also where there is a GPU
  --save_every N               steps between checkpoints
  --print_config               the whole recipe as it would run, and nothing else

Everything in a recipe can be set by its path, as in --model.init_args.lr 0.001; the first three and --steps are short for
--data.init_args.train, .valid and .root, and for --trainer.max_steps.

The run folder gets best and last (models), report.html (a page to see and hear), TensorBoard's files and the recipe.
Ctrl-C stops; the same command goes on. `s4audio fit --help-all` lists every key that exists."""
DATA_HINTS = {  # options that are right for the other kind of data
    "train": "; images are given with --root FOLDER",
    "valid": "; images are given with --root FOLDER",
    "root": "; recordings are given with --train FOLDER",
}
SPEED_KEYS = {"cuda_graph", "compile", "cache"}  # of a recipe: they change how fast it trains, not what


def fit(arguments: list[str]) -> None:
    """Trains what a recipe says, or goes on with the run that is already in its folder."""
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    from s4audio.tasks.callbacks import TRAINER_CHECKPOINT

    # Lightning's notes on hardware, loggers and worker counts are not for the person who waits for a sound.
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    if {"-h", "--help"} & set(arguments):
        print(HELP)
        return
    if not any(argument.startswith(("--config", "-c", "--help-all", "--print_config")) for argument in arguments):
        raise ValueError("fit needs a recipe, for example: s4audio fit --config recipes/demo.yaml --train FOLDER")
    try:
        cli = _recipe_cli(_in_full(arguments))
    except (MisconfigurationException, ImportError) as error:  # ImportError: hardware whose own package is missing
        raise ValueError(f"the trainer refuses the recipe: {error}") from error
    out, resume = Path(cli.config["out"]), Path(cli.config["out"]) / TRAINER_CHECKPOINT
    kind = _kind(cli.model)
    if not _is_first():
        _take_part(cli, resume)
        return
    print(*kind.announce(cli.datamodule), sep="\n")
    recipe = yaml.safe_load(cli.parser.dump(cli.config, skip_validation=True))
    if resume.exists():
        steps, stopped_early = _progress_of(resume)
        _refuse_another_recipe(recipe, out / "recipe.yaml")
        print(f"{out} holds a run of {steps} steps; going on from there to {cli.trainer.max_steps}.")
        if stopped_early or 0 <= cli.trainer.max_steps <= steps:
            extended = "It stopped early, when it gained no more" if stopped_early else "A larger --steps extends it"
            print(f"It is finished; nothing was changed. {extended}.")
            if not (out / PAGE).exists():
                kind.finish(out, cli.datamodule)
            return
    elif out.is_dir() and any(out.iterdir()) and not (out / "recipe.yaml").exists():
        raise ValueError(f"{out} holds files that are no run of s4audio; choose a new folder with --out.")
    with replacing(out / "recipe.yaml") as file:
        file.write(yaml.safe_dump(recipe, sort_keys=False).encode())
    try:
        with _quiet_threads(), _repeatable(arguments, cli.trainer):
            cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=str(resume) if resume.exists() else None, weights_only=True)
    except MisconfigurationException as error:
        raise ValueError(f"the trainer refuses the recipe: {error}") from error
    except SystemExit:  # what Lightning makes of Ctrl-C, after the run folder has saved
        saved = f"saved {out / 'last'}" if cli.trainer.world_size == 1 else f"keep the last save in {out}"
        print(f"\nstopped at step {cli.trainer.global_step} and {saved}; the same command goes on from there.")
        print(*kind.stopped(out), sep="\n")
        raise SystemExit(130) from None
    closing = kind.finish(out, cli.datamodule)
    best = checkpoint.read_config(out / "best")["training"]
    validated = "valid/loss" in best["scores"]
    chosen = (
        f"step {best['steps']}, best on the held-out {kind.ITEMS}" if validated else f"not scored on held-out {kind.ITEMS}"
    )
    print(f"\nmodel:    {out / 'best'} ({chosen}) and {out / 'last'}")
    print(f"page:     {out / PAGE}, to open in a browser")
    print(f"curves:   tensorboard --logdir {out}")
    print(*closing, sep="\n")


def _is_first() -> bool:
    """Whether this process has the only device or the first of several: that one speaks and writes."""
    return int(os.environ.get("LOCAL_RANK", 0)) == 0


def _kind(task: Any) -> Any:
    """What is particular to audio or to images: a module with the same functions."""
    from s4audio.cli import fit_audio, fit_images
    from s4audio.tasks import ClassificationTask

    return fit_images if isinstance(task, ClassificationTask) else fit_audio


@contextmanager
def _quiet_threads() -> Iterator[None]:
    """Without the stack trace of TensorBoard's writing thread: its OSError reaches the trainer, which stops with it."""
    before = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if not isinstance(args.exc_value, OSError):
            before(args)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


def _take_part(cli: Any, resume: Path) -> None:
    """The training on a further device: it says and writes nothing, and ends when the first one does."""
    from s4audio.tasks import DivergenceError

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=str(resume) if resume.exists() else None, weights_only=True)
    except DivergenceError:  # the first one says it too
        raise SystemExit(1) from None
    finally:
        _leave()


@contextmanager
def _repeatable(arguments: list[str], trainer: Any) -> Iterator[None]:
    """Where several devices train, Lightning repeats this program's command for each further one; makes that `s4audio fit`.

    What ends the training here ends the others.
    """
    main: Any = sys.modules["__main__"]
    before = sys.argv, main.__spec__, dict(os.environ)
    if trainer.world_size > 1:
        sys.argv, main.__spec__ = [sys.argv[0], "fit", *arguments], find_spec("s4audio.__main__")
    finished = False
    try:
        yield
        finished = True
    finally:
        sys.argv, main.__spec__ = before[:2]
        others = list(getattr(trainer.strategy.launcher, "procs", []))
        if others:
            trainer.strategy.launcher.procs.clear()  # Lightning would kill this process too
        for process in others:
            with suppress(subprocess.TimeoutExpired):
                process.wait(10 if finished else 0)
            process.kill()
            process.wait()
        _leave()
        for key in os.environ.keys() - before[2].keys():  # the address of the others
            del os.environ[key]


def _leave() -> None:
    """Ends the talk between devices."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _in_full(arguments: list[str]) -> list[str]:
    """The arguments with short options spelled out and the recipe's path where it really is.

    Raises:
        ValueError: there is no such recipe, or it is no text.
    """
    full: list[str] = []
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if full and full[-1] in ("--config", "-c"):
            argument = str(_recipe_file(argument))
        elif option in ("--config", "-c") and equals:
            argument = f"{option}={_recipe_file(value)}"
        elif option in SHORT:
            argument = SHORT[option] + equals + value
        full.append("--help" if argument == "--help-all" else argument)
    return full


def _recipe_file(name: str) -> Path:
    """The recipe, or the one of this name that comes with the package if there is no such file here."""
    path = Path(name)
    if not path.exists():
        recipes = shipped("recipes")
        path = recipes / path.name
        if not path.exists():
            known = ", ".join(f"recipes/{file.name}" for file in sorted(recipes.glob("*.yaml")))
            raise ValueError(f"{name} does not exist; the recipes that come with s4audio are {known}.")
    try:
        path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is no recipe: it is not a text file.") from error
    return path


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
            if self.config["save_every"] < 1:
                raise ValueError(f"save_every is {self.config['save_every']}; wanted at least 1 step.")
            if trainer["num_nodes"] != 1:
                raise ValueError(f"trainer.num_nodes is {trainer['num_nodes']}; this version trains on one machine.")
            if 0 < trainer["max_steps"] < (trainer["val_check_interval"] or 0):
                trainer["val_check_interval"] = trainer["max_steps"]  # a short run is scored too, at its end
            if trainer["logger"] is not None:
                raise ValueError("trainer.logger is set; a run always writes TensorBoard files into its folder.")
            try:
                self.config_init = self.parser.instantiate(self.config)
            except ValueError as error:
                raise ValueError(f"the recipe is refused: {_innermost(error)}") from error
            self.datamodule, self.model = self.config_init["data"], self.config_init["model"]
            data, model, kind = self.datamodule, self.model.model, _kind(self.model)
            kind.check(model, data)
            data.setup()
            kind.prepare(model, data)
            progress = Progress(lambda batch: kind.size(batch, data) * self.trainer.world_size, kind.UNIT)
            ours: list[lightning.Callback] = [RunFolder(out, self.config["save_every"], data.describe())]
            if _is_first():
                ours = [progress, *ours]
            self.trainer = self.instantiate_trainer(
                logger=TensorBoardLogger(out, name="tensorboard", version=""),
                callbacks=[*(self.config_init["trainer"]["callbacks"] or []), *ours],
                enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, num_sanity_val_steps=0,
                check_val_every_n_epoch=None, use_distributed_sampler=False,
            )  # fmt: skip
            if self.trainer.world_size > 1 and not kind.SEVERAL_DEVICES:
                raise ValueError(f"trainer.devices is {trainer['devices']}; {type(data).__name__} is for one device.")

    # Not Lightning's "auto", which takes every GPU there is, or Apple's, which has no float64.
    hardware: dict[str, Any] = {"accelerator": "cpu", "devices": 1}
    if torch.cuda.is_available():  # benchmark: cuDNN tries its convolutions once, since its guess can be the slowest
        hardware |= {"accelerator": "cuda", "benchmark": True}
    try:
        return RecipeCLI(
            lightning.LightningModule, lightning.LightningDataModule, subclass_mode_model=True, subclass_mode_data=True,
            save_config_callback=None, seed_everything_default=0, run=False, args=arguments, trainer_defaults=hardware,
            auto_configure_optimizers=False,  # the task has its own
            parser_kwargs={"exit_on_error": False, "prog": "s4audio fit"},
        )  # fmt: skip
    except jsonargparse.ArgumentError as error:
        raise ValueError(f"the recipe or an option is refused: {_innermost(error)}{_hint(error, arguments)}") from error


def _progress_of(trainer_checkpoint: Path) -> tuple[int, bool]:
    """How many steps the run has made, and whether early stopping has ended it.

    Raises:
        ValueError: the file is not a trainer's checkpoint.
    """
    try:
        state = torch.load(trainer_checkpoint, weights_only=True, map_location="cpu")
        stopping = (of for name, of in state["callbacks"].items() if name.startswith("EarlyStopping"))
        return int(state["global_step"]), any(of["wait_count"] >= of["patience"] for of in stopping)
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
        keys = before.keys() - SPEED_KEYS  # what a later version has added stands at its default
        differences = (_first_difference(before.get(k), now.get(k), f"{key}.{k}") for k in sorted(keys))
        return next((difference for difference in differences if difference), None)
    return None if before == now else key


def _hint(error: BaseException, arguments: list[str]) -> str:
    """A key of the recipe that is spelled like the one that was refused."""
    refused = re.search(r"Option '([^']+)' is not accepted|unrecognized arguments: --(\w+)", _innermost(error))
    recipe = next(
        (a.partition("=")[2] or b for a, b in pairwise([*arguments, ""]) if a.startswith(("--config", "-c"))), None
    )
    if not refused or not recipe:
        return ""
    word = (refused[1] or refused[2]).split(".")[0]
    if word in DATA_HINTS:
        return DATA_HINTS[word]
    near = difflib.get_close_matches(word, [*_keys(yaml.safe_load(Path(recipe).read_text())), "valid", "steps"], 1)
    return f"; did you mean {near[0]}?" if near and near[0] != word else ""


def _keys(recipe: Any) -> list[str]:
    if not isinstance(recipe, dict):
        return []
    return [*recipe, *(key for value in recipe.values() for key in _keys(value))]


def _innermost(error: BaseException) -> str:
    """What was wrong, from under the alternatives that jsonargparse tried as well, with the key if it names one."""
    key = ""
    while True:
        named = re.search(r'Parser key "([^"]+)"', str(error))
        key = named[1] if named else key
        cause = error.__cause__ or error.__context__
        if cause is None:
            said = str(error).replace("a <class 'int'>", "a whole number").replace("a <class 'float'>", "a number")
            return f"{key}: {said}" if key and said.startswith("Expected") else said
        error = cause
