"""kill -9 at any moment, and the same command goes on to the same end."""

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from s4audio.cli import main
from s4audio.cli.run_page import read_curves
from s4audio.tasks import Progress
from tests.cli.commands import RECIPE, without_pictures
from tests.cli.test_fit_adversarial import adversarial
from tests.cli.test_fit_images import RECIPE as CLASSIFIER
from tests.cli.test_fit_images import images  # noqa: F401, a fixture

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is a Unix thing")
SAVE_EVERY, STEPS = 5, 26


def command(arguments: list[str], log: Path, die_at: tuple[int, str]) -> None:
    """Runs in a process of its own; kills itself where a file takes its name: before the so manieth whose path ends so.

    Pictures are left out, which would take most of the time, and every step is told.
    """
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout.reconfigure(line_buffering=True)
    torch.set_num_threads(1)
    replace, replaced = os.replace, 0

    def counted(source: Path, path: Path) -> None:
        nonlocal replaced
        replaced += str(path).endswith(die_at[1])
        if replaced == die_at[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, path)

    os.replace = counted
    without_pictures(pytest.MonkeyPatch())
    Progress.__init__.__defaults__ = (0.0,)  # seconds between lines
    sys.exit(main(arguments))


class Run:
    """A training in a folder, by processes that are forked from one that has imported everything."""

    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["tests.cli.test_kill", "lightning.pytorch.cli", "tensorboard", "matplotlib.pyplot"])

    def __init__(self, recipe: list[str], out: Path) -> None:
        self.arguments, self.out, self.told = ["fit", *recipe, "--out", str(out)], out, ""
        self.save_every = int(recipe[-1])
        self.reached = 0  # steps

    def go_on(self, seconds: float | None = None, die_at: tuple[int, str] = (0, "")) -> bool:
        """Gives the command; kills it after so many seconds. Whether it came to its end."""
        log = self.out.with_suffix(".log")
        log.write_text("")
        process = self.processes.Process(target=command, args=(self.arguments, log, die_at))
        process.start()
        process.join(seconds)
        process.kill()
        process.join()
        self.told = log.read_text()
        assert process.exitcode in (0, -signal.SIGKILL), self.told
        went_on = re.search(r"holds a run of (\d+) steps; going on from there", self.told)
        steps = [int(step) for step in re.findall(r"^step (\d+) of", self.told, flags=re.MULTILINE)]
        if went_on or steps:
            assert self.reached - (int(went_on[1]) if went_on else 0) <= self.save_every, self.told
        self.reached = max(self.reached, *steps, 0)
        return process.exitcode == 0

    def models(self) -> dict[str, bytes]:
        return {name: (self.out / name / "model.safetensors").read_bytes() for name in ("best", "last")}

    def records(self) -> dict[str, dict]:
        found = {name: json.loads((self.out / name / "config.json").read_text()) for name in ("best", "last")}
        for record in found.values():
            del record["training"]["wall_seconds"]
        return found


def same_end(run: Run, whole: Run) -> None:
    """The models are those of the run that nothing stopped, bit for bit, and so is what is known of them."""
    assert run.models() == whole.models()
    assert run.records() == whole.records()
    ours, theirs = read_curves(run.out), read_curves(whole.out)
    for name in theirs:
        values = dict(zip(*theirs[name], strict=True))
        assert ours[name][0] == sorted(set(ours[name][0]))  # each step once
        assert {step: values[step] for step in ours[name][0]} == dict(zip(*ours[name], strict=True))
        missing = set(theirs[name][0]) - set(ours[name][0])
        assert all((step + 1) % run.save_every == 0 for step in missing), (name, missing)  # it is told after the save
    assert not [path for path in run.out.rglob(".*") if path.is_file()]


def generator(folder: Path) -> list[str]:
    data = ["--train", str(folder), "--data.init_args.batch_size", "2", "--data.init_args.clip_seconds", "0.25"]
    schedule = ["--model.init_args.warmup_steps", "4", "--model.init_args.decay_steps", str(STEPS)]
    trainer = ["--steps", str(STEPS), "--trainer.val_check_interval", "4", "--trainer.log_every_n_steps", "1"]
    return ["--config", RECIPE, *data, *schedule, *trainer, "--save_every", str(SAVE_EVERY)]


def judged(audio: Path, folder: Path) -> list[str]:
    """A generator with a discriminator from step 5 on."""
    (folder / "recipe.yaml").write_text(yaml.safe_dump(adversarial(audio)))
    return ["--config", str(folder / "recipe.yaml"), "--steps", str(STEPS), "--save_every", str(SAVE_EVERY)]


def classifier(images: Path, folder: Path) -> list[str]:  # noqa: F811
    """With dropout, an average of the weights, accumulated gradients and early stopping, at step 20 of 60."""
    recipe = json.loads(json.dumps(CLASSIFIER))
    recipe["data"]["init_args"]["root"] = str(images)
    recipe["model"]["init_args"]["ema_decay"] = 0.8
    stopping = {"monitor": "valid/accuracy", "mode": "max", "patience": 4, "min_delta": 1.0}
    recipe["trainer"] = {
        "max_steps": 60, "val_check_interval": 8, "accumulate_grad_batches": 2, "log_every_n_steps": 1,
        "callbacks": [{"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": stopping}],
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return ["--config", str(folder / "recipe.yaml"), "--save_every", str(SAVE_EVERY)]


def whole_run(recipe: list[str], out: Path) -> tuple[Run, float]:
    """What it comes to when nothing stops it, and its seconds."""
    server = Run.processes.Process(target=int)
    server.start()
    server.join()  # it has imported everything now
    whole, start = Run(recipe, out), time.monotonic()
    assert whole.go_on()
    return whole, time.monotonic() - start


def kill_at_random(recipe: list[str], out: Path, whole: Run, seconds: float, moments: random.Random) -> int:
    """Kills a run at random moments, at least once, and lets it come to its end; how often."""
    run, kills = Run(recipe, out), 0
    while not run.go_on(moments.uniform(0, seconds) if not kills or moments.random() < 0.5 else None):
        kills += 1
    same_end(run, whole)
    assert run.go_on() and "It is finished; nothing was changed" in run.told
    same_end(run, whole)
    if not kills:  # it was too quick
        shutil.rmtree(out)
        return kill_at_random(recipe, out, whole, 0.9 * seconds, moments)
    return kills


def kill_at(die_at: tuple[int, str], run: Run, whole: Run) -> bool:
    """Kills a run before a file takes its name, and lets it go on; whether there is such a file."""
    killed = not run.go_on(die_at=die_at)
    if killed:
        without = (run.out / "trainer.previous.ckpt").exists() and not (run.out / "trainer.ckpt").exists()
        assert run.go_on()
        assert ("trainer.ckpt is missing; taking the checkpoint before it" in run.told) == without
        same_end(run, whole)
    return killed


def test_a_generator_killed_at_a_random_moment(folder, tmp_path):
    recipe = generator(folder)
    whole, seconds = whole_run(recipe, tmp_path / "whole")
    assert kill_at_random(recipe, tmp_path / "run", whole, seconds, random.Random(0)) >= 1


def test_a_generator_and_its_discriminator_killed_at_a_random_moment(folder, tmp_path):
    recipe = judged(folder, tmp_path)
    whole, seconds = whole_run(recipe, tmp_path / "whole")
    assert kill_at_random(recipe, tmp_path / "run", whole, seconds, random.Random(1)) >= 1


def test_a_classifier_killed_between_its_files(images, tmp_path):  # noqa: F811
    """Before the record of the first best model, before that of last, and without trainer.ckpt."""
    recipe = classifier(images, tmp_path)
    whole, _ = whole_run(recipe, tmp_path / "whole")
    assert whole.records()["last"]["training"]["steps"] == 20  # it stopped early
    for save_every, die_at in ((2, (1, "best/config.json")), (4, (1, "last/config.json")), (4, (2, "trainer.ckpt"))):
        run = Run([*recipe, "--save_every", str(save_every)], tmp_path / f"run{save_every}{die_at[1].replace('/', '_')}")
        assert kill_at(die_at, run, whole)
        assert ("trainer.ckpt is missing" in run.told) == (die_at[1] == "trainer.ckpt")


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "trials"), [("generator", 50), ("classifier", 15)])
def test_killed_at_random_moments_many_times(kind, trials, folder, images, tmp_path):  # noqa: F811
    recipe = generator(folder) if kind == "generator" else classifier(images, tmp_path)
    whole, seconds = whole_run(recipe, tmp_path / "whole")
    again, _ = whole_run(recipe, tmp_path / "again")
    same_end(again, whole)
    moments = random.Random(0)
    kills = [kill_at_random(recipe, tmp_path / f"run{i}", whole, seconds, moments) for i in range(trials)]
    print(f"{sum(kills)} kills in {trials} trials; a run takes {seconds:.1f} s")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["generator", "classifier"])
def test_killed_wherever_a_file_takes_its_name(kind, folder, images, tmp_path):  # noqa: F811
    recipe = generator(folder) if kind == "generator" else classifier(images, tmp_path)
    whole, _ = whole_run(recipe, tmp_path / "whole")
    files = 1
    while kill_at((files, ""), Run(recipe, tmp_path / f"run{files}"), whole):
        files += 1
    assert files > 20
