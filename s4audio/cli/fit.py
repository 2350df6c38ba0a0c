"""`s4audio fit`: trains what a recipe says, and writes a page about what came out."""

import logging
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
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

HELP = """usage: s4audio fit --config RECIPE.yaml [--KEY VALUE ...]

Trains what a recipe says. Everything in a recipe can be set on the command line by its path:

  --data.init_args.train FOLDER        recordings to train on, in any format, searched in subfolders too
  --data.init_args.valid FOLDER        recordings to score on; `null` sets some of the others aside
  --out FOLDER                         the run folder; if it holds a run already, that run goes on
  --trainer.max_steps N                length of the training
  --trainer.accelerator cpu            the CPU, also where there is a GPU
  --save_every N                       steps between checkpoints
  --print_config                       the whole recipe as it would run, and nothing else

The run folder gets best and last (models), report.html (a page to see and hear), TensorBoard's files and the recipe.
Ctrl-C stops; the same command goes on. `s4audio fit --help-all` lists every key that exists."""
PAGE = "report.html"
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
        raise ValueError(
            "fit needs a recipe, for example: s4audio fit --config recipes/demo.yaml --data.init_args.train FOLDER"
        )
    try:
        cli = _recipe_cli(["--help" if a == "--help-all" else _shipped_recipe(a) for a in arguments])
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
            if not (out / PAGE).exists():
                _write_run_page(out, cli.datamodule.valid_clips)
            return
    with replacing(out / "recipe.yaml") as file:
        file.write(yaml.safe_dump(recipe, sort_keys=False).encode())
    try:
        with _quiet_threads():
            cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=str(resume) if resume.exists() else None, weights_only=True)
    except MisconfigurationException as error:
        raise ValueError(f"the trainer refuses the recipe: {error}") from error
    except SystemExit:  # what Lightning makes of Ctrl-C, after the run folder has saved
        print(f"\nstopped at step {cli.trainer.global_step} and saved {out / 'last'}; the same command goes on from there.")
        raise SystemExit(130) from None
    _write_run_page(out, cli.datamodule.valid_clips)
    best = checkpoint.read_config(out / "best")["training"]
    validated = "valid/loss" in best["scores"]
    chosen = f"step {best['steps']}, best on the held-out clips" if validated else "not scored on held-out clips"
    print(f"\nmodel:    {out / 'best'} ({chosen}) and {out / 'last'}")
    print(f"page:     {out / PAGE}, to open in a browser")
    print(f"curves:   tensorboard --logdir {out}")
    print(f"generate: s4audio generate {out / 'best'} --from noise --num 4 --seconds 10 --out generated")


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


def _write_run_page(out: Path, held_out: list[Tensor]) -> None:
    lead = "A model of raw audio, and what it makes of recordings that it was not trained on."
    write_page(out / PAGE, f"The run {out.name}", lead, run_sections(out, held_out))


@torch.no_grad()
def run_sections(out: Path, held_out: list[Tensor]) -> list[Section]:
    """What a finished run has to show: sounds, figures, curves, poles and what to type next.

    Args:
        out: the run folder.
        held_out: recordings (1, T) at the model's rate and level.
    """
    model: Any = checkpoint.load(out / "best")
    training, rate = checkpoint.read_config(out / "best")["training"], model.sample_rate
    clips = []
    for number, audio in enumerate(held_out[:2], start=1):
        audio = audio[..., : round(CLIP_SECONDS * rate)]
        clips += [
            Clip(f"recording {number}, not trained on", audio, rate),
            Clip(f"recording {number} through the model", model(audio.unsqueeze(0))[0], rate),
        ]
    generator = torch.Generator().manual_seed(0)
    sample = model.sample(1, round(CLIP_SECONDS / 2 * rate), generator=generator)[0]
    facts = [("", ""), *describe(model), *describe_training(training)]
    return [
        Section("Listen", ["First a recording that the model was not trained on, then what it makes of it."], clips=clips),
        Section(
            "From noise", ["An autoencoder learns what a latent means, not which latents sound like music: expect texture."],
            clips=[Clip("a random latent", sample, rate)],
        ),
        Section("The model", table=facts),
        training_section(out),
        memory_section(model),
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
        ("Hear variations of a recording:", f"s4audio generate {path} --from MY_RECORDING.wav --variation 0.3"),
        ("Look inside:", f"s4audio info {path}"),
        ("Train on recordings of your own:",
            "s4audio fit --config recipes/demo.yaml --data.init_args.train MY_RECORDINGS --out runs/mine"),
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


def _shipped_recipe(argument: str) -> str:
    """A recipe's path, or that of the one of this name that comes with the package, if there is no such file here."""
    option, equals, value = argument.rpartition("=")
    if option in ("", "--config", "-c") and value.startswith("recipes/") and not Path(value).exists():
        return option + equals + str(shipped(value))
    return argument


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
