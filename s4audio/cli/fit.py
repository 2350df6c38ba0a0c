"""`s4audio fit`: trains what a recipe says, and writes a page about what came out."""

import difflib
import logging
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from s4audio import checkpoint
from s4audio.cli.arguments import shipped
from s4audio.cli.info import describe, describe_training, memories
from s4audio.files import replacing
from s4audio.report import Clip, Section, curves_figure, poles_figure, write_page

SHORT = {"--train": "--data.init_args.train", "--valid": "--data.init_args.valid", "--steps": "--trainer.max_steps"}
HELP = """usage: s4audio fit --config RECIPE.yaml [--KEY VALUE ...]

Trains what a recipe says.

  --train FOLDER               recordings to train on (WAV, FLAC, OGG, MP3; M4A with ffmpeg), searched in subfolders too
  --valid FOLDER               recordings to score on; without it, some of the others are set aside
  --out FOLDER                 the run folder; if it holds a run already, that run goes on
  --steps N                    length of the training
  --trainer.accelerator cpu    the CPU, also where there is a GPU
  --save_every N               steps between checkpoints
  --print_config               the whole recipe as it would run, and nothing else

Everything in a recipe can be set by its path, as in --model.init_args.lr 0.001; the first two and --steps are short for
--data.init_args.train, --data.init_args.valid and --trainer.max_steps.

The run folder gets best and last (models), report.html (a page to see and hear), TensorBoard's files and the recipe.
Ctrl-C stops; the same command goes on. `s4audio fit --help-all` lists every key that exists."""
SPEED_KEYS = {"cuda_graph", "compile"}  # of a recipe: they change how fast it trains, not what
PAGE = "report.html"
LISTEN = (
    "First a recording that the model was not trained on (its first ten seconds), then what it makes of it. Listen for the "
    "attack of the notes, the brightness, and a haze or hiss that was not there."
)
CLIP_SECONDS = 10.0


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
    out, data, resume = Path(cli.config["out"]), cli.training, Path(cli.config["out"]) / TRAINER_CHECKPOINT
    train_files = _count(data["train_files"], "file")
    print(
        f"data: {train_files} ({_duration(data['train_seconds'])}) to train on, {data['valid_files']} "
        f"({_duration(data['valid_seconds'])}) held out, {len(data['skipped'])} skipped; mono at {data['sample_rate']} Hz"
    )
    print(f"held out: {', '.join(Path(name).name for name in cli.datamodule.valid_names[:5])}")
    for sentence in data["skipped"]:
        print(f"skipped: {sentence}")
    recipe = yaml.safe_load(cli.parser.dump(cli.config, skip_validation=True))
    if resume.exists():
        steps = _steps_of(resume)
        _refuse_another_recipe(recipe, out / "recipe.yaml")
        print(f"{out} holds a run of {steps} steps; going on from there to {cli.trainer.max_steps}.")
        if 0 <= cli.trainer.max_steps <= steps:
            print("It is finished; nothing was changed. A larger --trainer.max_steps extends it.")
            if not (out / PAGE).exists():
                _write_run_page(out, cli.datamodule)
            return
    elif out.is_dir() and any(out.iterdir()) and not (out / "recipe.yaml").exists():
        raise ValueError(f"{out} holds files that are no run of s4audio; choose a new folder with --out.")
    with replacing(out / "recipe.yaml") as file:
        file.write(yaml.safe_dump(recipe, sort_keys=False).encode())
    try:
        with _quiet_threads():
            cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=str(resume) if resume.exists() else None, weights_only=True)
    except MisconfigurationException as error:
        raise ValueError(f"the trainer refuses the recipe: {error}") from error
    except SystemExit:  # what Lightning makes of Ctrl-C, after the run folder has saved
        print(f"\nstopped at step {cli.trainer.global_step} and saved {out / 'last'}; the same command goes on from there.")
        print(f"listen:   s4audio generate {out / 'last'} --from MY_RECORDING.wav")
        raise SystemExit(130) from None
    _write_run_page(out, cli.datamodule)
    best = checkpoint.read_config(out / "best")["training"]
    validated = "valid/loss" in best["scores"]
    chosen = f"step {best['steps']}, best on the held-out clips" if validated else "not scored on held-out clips"
    print(f"\nmodel:    {out / 'best'} ({chosen}) and {out / 'last'}")
    print(f"page:     {out / PAGE}, to open in a browser")
    print(f"curves:   tensorboard --logdir {out}")
    print(f"listen:   s4audio generate {out / 'best'} --from MY_RECORDING.wav")


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


def _write_run_page(out: Path, data: Any) -> None:
    lead = "A model of raw audio, and what it makes of recordings that it was not trained on."
    held_out = dict(zip(data.valid_names, data.valid_clips, strict=True))
    write_page(out / PAGE, f"The run {out.name}", lead, run_sections(out, held_out))


@torch.no_grad()
def run_sections(out: Path, held_out: dict[str, Tensor]) -> list[Section]:
    """What a finished run has to show: sounds, figures, curves, poles and what to type next.

    Args:
        out: the run folder.
        held_out: name -> recording (1, T) at the model's rate and level.
    """
    model: Any = checkpoint.load(out / "best")
    training, rate = checkpoint.read_config(out / "best")["training"], model.sample_rate
    clips = []
    for path, audio in list(held_out.items())[:2]:
        audio, name = audio[..., : round(CLIP_SECONDS * rate)], Path(path).name
        clips += [Clip(name, audio, rate), Clip(f"{name} through the model", model(audio.unsqueeze(0))[0], rate)]
    generator = torch.Generator().manual_seed(0)
    sample = model.sample(1, round(CLIP_SECONDS / 2 * rate), generator=generator)[0]
    facts = [("", ""), *describe(model), *describe_training(training)]
    return [
        Section("Listen", [LISTEN], clips=clips),
        Section(
            "From noise", ["A latent of noise alone, decoded: a model that learned sound frame by frame gives texture."],
            clips=[Clip("a random latent", sample, rate)],
        ),
        Section("The model", table=facts),
        training_section(out),
        *([memory_section(model)] if memories(model) else []),
        Section("What to type next", commands=next_commands(model, out / "best")),
    ]  # fmt: skip


def training_section(out: Path) -> Section:
    """The losses and scores of a run over its steps."""
    curves = read_curves(out)
    losses = {name: curves[tag] for name, tag in (("training", "train/loss"), ("held out", "valid/loss")) if tag in curves}
    figures = [("Loss: lower is better.", curves_figure(losses, "loss"))] if losses else []
    if "valid/si_sdr_db" in curves:
        scores = {"held out": curves["valid/si_sdr_db"]}
        figures.append(("SI-SDR on the held-out recordings: higher is better.", curves_figure(scores, "dB", log=False)))
    return Section("How it trained", figures=figures)


def memory_section(model: torch.nn.Module) -> Section:
    """What the layers of a model remember, as a picture."""
    poles = {memory.name: (memory.frequency, memory.decay) for memory in memories(model)}
    text = (
        "Each point is a resonance inside the model: how fast it swings, and how long it rings until 1/e is left. Points "
        "high up remember long, points to the right hear fine detail."
    )
    return Section("What it remembers", [text], figures=[("Poles of each state-space layer.", poles_figure(poles))])


def next_commands(model: torch.nn.Module, path: Path) -> list[tuple[str, str]]:
    """What to do with a model in a folder, and how."""
    commands = [
        ("Hear a recording with noise in its latent:", f"s4audio generate {path} --from MY_RECORDING.wav --variation 0.1"),
        ("Score what it makes of recordings:",
            f"s4audio generate {path} --from MY_RECORDINGS --out reconstructed\n"
            "s4audio evaluate reconstructed MY_RECORDINGS --paired --report score"),
        ("Look inside:", f"s4audio info {path}"),
        ("Train on recordings of your own:",
            "s4audio fit --config recipes/demo.yaml --train MY_RECORDINGS --out runs/mine"),
    ]  # fmt: skip
    if hasattr(model, "stream"):
        streamed = f"s4audio reconstruct {path} MY_RECORDING.wav out.wav"
        commands.insert(0, ("Send a recording of any length through it:", streamed))
    return commands


def read_curves(out: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Steps and values of everything that a run logged, by name."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    curves = {}
    for tag in events.Tags()["scalars"]:
        points = events.Scalars(tag)
        curves[tag] = [point.step for point in points], [point.value for point in points]
    return curves


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
            if trainer["devices"] not in (1, "1", "auto"):
                raise ValueError(f"trainer.devices is {trainer['devices']}; this version trains on one device.")
            if 0 < trainer["max_steps"] < (trainer["val_check_interval"] or 0):
                trainer["val_check_interval"] = trainer["max_steps"]  # a short run is scored too, at its end
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
        keys = {**before, **now}.keys() - SPEED_KEYS
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
    near = difflib.get_close_matches(word, [*_keys(yaml.safe_load(Path(recipe).read_text())), "valid", "steps"], 1)
    return f"; did you mean {near[0]}?" if near and near[0] != word else ""


def _keys(recipe: Any) -> list[str]:
    if not isinstance(recipe, dict):
        return []
    return [*recipe, *(key for value in recipe.values() for key in _keys(value))]


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


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
