"""`s4audio fit`: trains what a recipe says, and writes a page about what came out."""

import difflib
import json
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import yaml

from s4audio import checkpoint
from s4audio.cli.arguments import check_name, shipped
from s4audio.cli.run_page import PAGE
from s4audio.files import replacing

FOLDERS = {"--train": "train", "--valid": "valid", "--root": "root"}  # of the data
SHORT = {
    **{option: f"--data.init_args.{key}" for option, key in FOLDERS.items()},
    "--steps": "--trainer.max_steps",
    "--on-nan": "--model.init_args.on_nan",
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
  --from_model MODEL           begin with the weights of a model of the same kind and size
  --on-nan skip                leave out an update whose loss or gradient is no number, in place of stopping there
  --print_config               the whole recipe as it would run, and nothing else

Everything in a recipe can be set by its path, as in --model.init_args.lr 0.001; the first three, --steps and --on-nan are
short for --data.init_args.train, .valid and .root, for --trainer.max_steps and --model.init_args.on_nan.

The run folder gets best and last (models), report.html (a page to see and hear), TensorBoard's files and the recipe.
Ctrl-C stops, and whatever stopped a run, the same command goes on. `s4audio fit --help-all` lists every key that exists."""
DATA_HINTS = {  # options that are right for the other kind of data
    "train": "; images are given with --root FOLDER",
    "valid": "; images are given with --root FOLDER",
    "root": "; recordings are given with --train FOLDER",
}
FREE_KEYS = {"cache", "compile", "cuda_graph", "on_nan"}  # of a recipe: they may change while a run goes on
CHECK = "check"  # in a run folder: what `check` said of its recordings


def fit(arguments: list[str]) -> None:
    """Trains what a recipe says, or goes on with the run that is already in its folder."""
    if {"-h", "--help"} & set(arguments):
        print(HELP)
        return
    if not any(argument.startswith(("--config", "-c", "--help-all", "--print_config")) for argument in arguments):
        raise ValueError("fit needs a recipe, for example: s4audio fit --config recipes/demo.yaml --train FOLDER")
    run = read_recipe(arguments)
    if not train_run(run, arguments):
        return
    out, kind = Path(run.config["out"]), _kind(run.model)
    closing = kind.finish(out, run.datamodule)
    best = checkpoint.read_config(out / "best")["training"]
    validated = "valid/loss" in best["scores"]
    chosen = (
        f"step {best['steps']}, best on the held-out {kind.ITEMS}" if validated else f"not scored on held-out {kind.ITEMS}"
    )
    print(f"\nmodel:    {out / 'best'} ({chosen}) and {out / 'last'}")
    print(f"page:     {out / PAGE}, to open in a browser")
    print(f"curves:   tensorboard --logdir {shlex.quote(str(out))}")
    print(*closing, sep="\n")


def read_recipe(arguments: list[str]) -> Any:
    """The trainer, the task (`model`), the data (`datamodule`) and the `config` of a run, by fit's arguments; data is read.

    Raises:
        ValueError: something in them is wrong.
    """
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    # Lightning's notes on hardware, loggers and worker counts are not for the person who waits for a sound.
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    try:
        return _recipe_cli(_in_full(arguments))
    except (MisconfigurationException, ImportError) as error:  # ImportError: hardware whose own package is missing
        raise ValueError(f"the trainer refuses the recipe: {error}") from error


def train_run(run: Any, arguments: list[str]) -> bool:
    """Trains what `read_recipe` gave, or goes on with the run in its folder; whether its page is still to be written."""
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    from s4audio.tasks.callbacks import TRAINER_CHECKPOINT

    out, kind, trainer = Path(run.config["out"]), _kind(run.model), run.trainer
    if not _is_first():
        _take_part(run, out / TRAINER_CHECKPOINT)
        return False
    print(*kind.announce(run.datamodule), *_busy(trainer), sep="\n")
    recipe = yaml.safe_load(run.parser.dump(run.config, skip_validation=True))
    resume, steps, stopped_early = _last_checkpoint(out)
    if resume:
        _refuse_another_recipe(recipe, out / "recipe.yaml")
        _refuse_other_data(run.datamodule.describe(), out / "last")
        if stopped_early or 0 <= trainer.max_steps <= steps:
            extended = "It stopped early, when it gained no more" if stopped_early else "A larger --steps extends it"
            print(f"{out} holds a run of {steps} steps. It is finished; nothing was changed. {extended}.")
            return not (out / PAGE).exists() or (out / PAGE).stat().st_mtime < resume.stat().st_mtime
        print(f"{out} holds a run of {steps} steps; going on from there to {trainer.max_steps}.")
        if resume.name != TRAINER_CHECKPOINT:
            resume = resume.replace(out / TRAINER_CHECKPOINT)  # in the place of the damaged one
    elif (out / "recipe.yaml").exists():
        print(f"{out} holds a run that was stopped before its first checkpoint; it begins anew.")
    else:
        refuse_foreign(out)
    for part in out.rglob(".*.new"):  # what a run that was killed had begun to write
        part.unlink(missing_ok=True)
    with replacing(out / "recipe.yaml", durable=True) as file:
        file.write(yaml.safe_dump(recipe, sort_keys=False).encode())
    try:
        with _quiet_threads(), _repeatable(arguments, trainer):
            trainer.fit(run.model, run.datamodule, ckpt_path=resume, weights_only=True)
    except MisconfigurationException as error:
        raise ValueError(f"the trainer refuses the recipe: {error}") from error
    except SystemExit:  # what Lightning makes of Ctrl-C, after the run folder has saved
        _, steps, _ = _last_checkpoint(out)
        if steps:
            print(f"\nstopped, and saved {out / 'last'} of step {steps}; the same command goes on from there.")
            print(*kind.stopped(out), sep="\n")
        else:
            print("\nstopped before anything was saved; the same command begins anew.")
        raise SystemExit(130) from None
    return True


def _busy(trainer: Any) -> list[str]:
    """What to do where other programs keep all cores busy: threads that wait for each other make a training far slower."""
    load, cores = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0, os.cpu_count() or 1
    if trainer.strategy.root_device.type != "cpu" or torch.get_num_threads() == 1 or load <= cores:
        return []
    return [
        f"note: this machine is busy (load {load:.1f}, {cores} cores); OMP_NUM_THREADS=1 may make this many times faster"
    ]


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
    """The arguments with short options spelled out, folders in JSON, and the recipe's path where it really is.

    Raises:
        ValueError: there is no such recipe, or it is no text; or a folder's name is not UTF-8.
    """
    full: list[str] = []
    waiting = list(reversed(arguments))
    while waiting:
        argument = waiting.pop()
        option, equals, value = argument.partition("=")
        if option in FOLDERS and (equals or (waiting and not waiting[-1].startswith("--"))):
            full += _folder(FOLDERS[option], value if equals else waiting.pop())
            continue
        if full and full[-1] in ("--config", "-c"):
            argument = str(recipe_file(argument))
        elif option in ("--config", "-c") and equals:
            argument = f"{option}={recipe_file(value)}"
        elif option in SHORT:
            argument = SHORT[option] + equals + value
        full.append("--help" if argument == "--help-all" else argument)
    return full


def _folder(key: str, name: str) -> list[str]:
    """The option that gives the data a folder: in JSON, since YAML would take names such as `Bach: Suites` apart.

    Raises:
        ValueError: the name is not UTF-8.
    """
    check_name(name)
    return ["--data.init_args", json.dumps({key: None if (key, name) == ("valid", "null") else name})]


def recipe_file(name: str) -> Path:
    """The recipe, or the one of this name that comes with the package if there is no such file here."""
    path = Path(name)
    if not path.exists():
        recipes = shipped("recipes")
        path = recipes / path.name
        if not path.exists():
            known = [file.stem for file in sorted(recipes.glob("*.yaml"))]
            near = difflib.get_close_matches(path.stem, known, 1)
            others = f"did you mean recipes/{near[0]}.yaml?" if near else f"there are {', '.join(known)}."
            raise ValueError(f"the recipe {name} does not exist; {others}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is no recipe: it is not a text file.") from error
    with suppress(yaml.YAMLError):  # which is said, with its line, when the recipe is read
        if isinstance(yaml.safe_load(text), str):
            raise ValueError(f"{name} is no recipe: wanted YAML with model, data and trainer.")
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
            parser.add_argument(
                "--from_model", type=str | None, default=None, help="begin with the weights of the model in this folder"
            )

        def instantiate_classes(self) -> None:
            """Adds what the run writes and shows to the trainer that the recipe describes."""
            out, trainer = Path(self.config["out"]), self.config["trainer"]
            every = {"save_every": self.config["save_every"], "trainer.val_check_interval": trainer["val_check_interval"]}
            for name, steps in every.items():
                if steps is not None and steps <= 0:
                    raise ValueError(f"{name} is {steps}; wanted at least 1 step.")
            if trainer["num_nodes"] != 1:
                raise ValueError(f"trainer.num_nodes is {trainer['num_nodes']}; this version trains on one machine.")
            batches = trainer["max_steps"] * (trainer["accumulate_grad_batches"] or 1)
            if 0 < batches < (trainer["val_check_interval"] or 0):
                trainer["val_check_interval"] = batches  # a short run is scored too, at its end
            if trainer["logger"] is not None:
                raise ValueError("trainer.logger is set; a run always writes TensorBoard files into its folder.")
            if trainer["fast_dev_run"]:
                raise ValueError("trainer.fast_dev_run writes no run; to try a recipe out, give --steps 2.")
            try:
                _name_classes(self.config)
                self.config_init = self.parser.instantiate(self.config)
            except ValueError as error:
                raise ValueError(f"the recipe is refused: {_innermost(error)}") from error
            self.datamodule, self.model = self.config_init["data"], self.config_init["model"]
            data, model, kind = self.datamodule, self.model.model, _kind(self.model)
            kind.check(model, data)
            if self.config["from_model"] and not holds_a_checkpoint(out):
                for each in {model, self.model.scored_model}:  # the average of the weights begins there too
                    checkpoint.load_weights(each, self.config["from_model"])
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


def _name_classes(config: Any) -> None:
    """Gives a model whose recipe leaves its classes empty those of the folder that it is trained on.

    Raises:
        AudioError: a recording is in no subfolder.
    """
    from s4audio.audio import find_audio
    from s4audio.data.audio_folder import class_of

    model, data = (config[part].get("init_args") or {} for part in ("model", "data"))
    inner = model.get("model", {}).get("init_args") or {}
    if data.get("labels") and "classes" in inner and not inner["classes"]:
        folder = data["train"]
        inner["classes"] = sorted({class_of(str(file), folder) for file in find_audio(folder)})


def holds_a_checkpoint(out: Path) -> bool:
    """Whether a run in a folder goes on from where it was."""
    from s4audio.tasks.callbacks import PREVIOUS_CHECKPOINT, TRAINER_CHECKPOINT

    return (out / TRAINER_CHECKPOINT).exists() or (out / PREVIOUS_CHECKPOINT).exists()


def refuse_foreign(out: Path) -> None:
    """Raises: ValueError, if a folder holds files that are no run."""
    ours = (out / "recipe.yaml").exists()
    if not ours and out.is_dir() and any(not path.name.startswith(".") and path.name != CHECK for path in out.iterdir()):
        raise ValueError(f"{out} holds files that are no run of s4audio; choose a new folder with --out.")


def _last_checkpoint(out: Path) -> tuple[Path | None, int, bool]:
    """The trainer's checkpoint to go on from, how many steps it has made, and whether early stopping has ended it.

    The one before the last takes the place of one that is damaged or missing, and that is said.

    Raises:
        ValueError: there are some, and all are damaged.
    """
    from s4audio.tasks.callbacks import PREVIOUS_CHECKPOINT, TRAINER_CHECKPOINT

    paths = [out / TRAINER_CHECKPOINT, out / PREVIOUS_CHECKPOINT]
    problems: list[str] = []
    for path in paths:
        try:
            found = path, *_progress_of(path)
        except FileNotFoundError:
            problems.append(f"{path} is missing")
        except Exception as error:  # whatever a damaged file makes of the unpickler
            problems.append(f"{path} is damaged ({type(error).__name__})")
        else:
            if problems:
                print(f"{problems[0]}; taking the checkpoint before it, {path}.")
            return found
    if not any(path.exists() for path in paths):
        return None, 0, False
    raise ValueError(
        f"{' and '.join(problems)}, so this run cannot go on. Its models are in best and last; remove the file, or choose "
        "another --out, to begin anew."
    )


def _progress_of(trainer_checkpoint: Path) -> tuple[int, bool]:
    """How many steps the run has made, and whether early stopping has ended it; an error if the file is damaged."""
    with zipfile.ZipFile(trainer_checkpoint) as file:  # torch.load does not look at the checksums
        if damaged := file.testzip():
            raise zipfile.BadZipFile(damaged)
    state = torch.load(trainer_checkpoint, weights_only=True, map_location="cpu")
    stopping = (of for name, of in state["callbacks"].items() if name.startswith("EarlyStopping"))
    return int(state["global_step"]), any(of["wait_count"] >= of["patience"] for of in stopping)


def _refuse_another_recipe(recipe: dict[str, Any], stored: Path) -> None:
    """A run goes on as it began; only with another length the learning rates may come down elsewhere (decay_steps).

    Raises:
        ValueError: the model, the task, the data or the seed differ from the run's own recipe; names the key.
    """
    if not stored.exists():
        return
    before = yaml.safe_load(stored.read_text())
    extended = before["trainer"]["max_steps"] != recipe["trainer"]["max_steps"]
    free = FREE_KEYS | ({"decay_steps"} if extended else set())  # the learning rates come down at the new end
    for section in ("seed_everything", "model", "data"):
        key = _first_difference(before.get(section), recipe.get(section), section, free)
        if key:
            raise ValueError(
                f"{key} is not what it was when the run in {stored.parent} began (its recipe.yaml has the old value); "
                "go on with that, or choose another --out."
            )


def _refuse_other_data(described: dict[str, Any], last: Path) -> None:
    """With other recordings the split is another too: some that were trained on would be held out.

    Raises:
        ValueError: there are more or fewer recordings than when the run began.
    """
    before = checkpoint.read_config(last)["training"]
    for key, what in (("train_files", "files to train on"), ("valid_files", "held-out files"), ("train_seconds", "seconds")):
        if before.get(key) != described.get(key):
            raise ValueError(
                f"the recordings are not those that the run in {last.parent} began with: {described.get(key)} {what}, and "
                f"it had {before.get(key)}. Begin another with a new --out; its --from_model can be {last.parent / 'best'}."
            )


def _first_difference(before: Any, now: Any, key: str, free: set[str]) -> str | None:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = before.keys() - free  # what a later version has added stands at its default
        differences = (_first_difference(before.get(k), now.get(k), f"{key}.{k}", free) for k in sorted(keys))
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
