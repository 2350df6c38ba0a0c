"""`s4audio train`: one command from a folder to a model, sounds, scores and a page; again, and again with more steps."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml

from s4audio import S4Model, checkpoint
from s4audio.cli import main
from s4audio.cli import train as module
from tests import hostile
from tests.cli.commands import ROOT, refused

QUICK = ("--recipe", "debug")


def train(folder: Path, out: Path, *options: str) -> int:
    return main(["train", str(folder), "--out", str(out), *QUICK, *options])


def contents(folder: Path) -> dict[str, str]:
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "run"
    assert train(folder, out, "--steps", "6") == 0
    return out


def test_one_command_makes_all_of_it(run, folder):
    assert {path.name for path in run.iterdir()} >= {
        "best", "check", "last", "recipe.yaml", "report.html", "sounds", "trainer.ckpt"
    }  # fmt: skip
    assert json.loads((run / "check" / "check.json").read_text())["kept"] == 4
    config = checkpoint.read_config(run / "last")["training"]
    assert config["steps"] == 6 and config["train_files"] + config["valid_files"] == 4
    rate = checkpoint.read_config(run / "last")["arguments"]["sample_rate"]
    held_out = sorted((run / "sounds" / "held_out").glob("*.wav"))
    assert len(held_out) == config["valid_files"] == 1 and "tone" in held_out[0].name
    longest = max(soundfile.info(path).duration for path in folder.rglob("*.wav"))
    for kind, number in (("held_out", 1), ("reconstructed", 1), ("noise", 4)):
        files = sorted((run / "sounds" / kind).glob("*.wav"))
        assert len(files) == number
        for file in files:
            audio, found = soundfile.read(file)
            assert found == rate and rate // 10 < len(audio) <= longest * rate + 1 and audio.any()
    page = (run / "report.html").read_text()
    assert page.count("<audio") >= 3 and "How it trained" in page
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    assert recipe["model"]["init_args"]["decay_steps"] == 6 == recipe["trainer"]["max_steps"]


def test_again_changes_nothing_and_more_steps_extend_it(run, folder, capsys):
    before = contents(run)
    assert train(folder, run, "--steps", "6") == 0
    assert "It is finished; nothing was changed. A larger --steps extends it." in capsys.readouterr().out
    assert train(folder, run) == 0 and contents(run) == before
    assert main(["train", str(folder), "--out", str(run), "--minutes", "3"]) == 0
    assert "was planned for 6 steps, which stays; --steps extends it" in capsys.readouterr().out
    assert contents(run) == before
    assert train(folder, run, "--steps", "9") == 0
    assert "holds a run of 6 steps; going on from there to 9." in capsys.readouterr().out
    assert checkpoint.read_config(run / "last")["training"]["steps"] == 9


def weights(model: Path) -> torch.Tensor:
    return torch.cat([value.flatten() for value in checkpoint.load(model).parameters()])


@pytest.mark.parametrize("clips", [1, 5])
def test_scores_are_of_what_was_held_out(tmp_path, clips):
    """Of one long recording its end is held out, and cut into clips of 10 s; fewer than 3 cannot be scored."""
    rate, seconds = 4000, 100 * clips
    generator = np.random.default_rng(0)
    soundfile.write(tmp_path / "long.wav", 0.1 * generator.standard_normal(rate * seconds).clip(-4, 4), rate)
    assert train(tmp_path / "long.wav", tmp_path / "run", "--steps", "2") == 0
    held_out = [soundfile.read(file)[0] for file in sorted((tmp_path / "run" / "sounds" / "held_out").glob("*.wav"))]
    assert len(held_out) == clips
    audio = np.concatenate(held_out) / np.abs(np.concatenate(held_out)).max()
    original = soundfile.read(tmp_path / "long.wav")[0][-len(audio) :]
    assert np.corrcoef(audio, original)[0, 1] > 0.999
    page = (tmp_path / "run" / "report.html").read_text()
    scored = (tmp_path / "run" / "scores.json").exists()
    assert scored == (clips >= 3) == ("pairs, mean" in page)
    if scored:
        scores = json.loads((tmp_path / "run" / "scores.json").read_text())
        assert scores["paired"]["pairs"] == clips and f"{clips} pairs, mean" in page


def test_minutes_are_planned_as_steps(folder, tmp_path, capsys):
    assert train(folder, tmp_path / "run", "--minutes", "0.5") == 0  # all of it for the sounds and the page
    told = capsys.readouterr().out
    assert "measuring how long a step takes" in told and ": 16 steps, 1 validations" in told
    assert "in 16 steps a model learns next to nothing: give it more --minutes" in told
    assert checkpoint.read_config(tmp_path / "run" / "last")["training"]["steps"] == 16


def test_steps_are_measured_for_as_long_as_was_asked(monkeypatch):
    clock = iter(range(1000))  # a second a step
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    trainer = types.SimpleNamespace(should_stop=False, strategy=types.SimpleNamespace(root_device=torch.device("cpu")))
    for seconds, steps in ((0.0, module.PILOT_STEPS), (60.0, 60 + module.WARM_UP_STEPS + 1)):
        watch, trainer.should_stop = module._Stopwatch(seconds), False
        while not trainer.should_stop:
            watch.on_train_batch_end(trainer)
        assert len(watch.times) == steps


@pytest.mark.parametrize("steps", [1, 7, 16, 100, 6132])
def test_the_end_of_a_run_is_judged(steps):
    options = module._length(steps, 4)
    every = int(options[options.index("--save_every") + 1])
    assert int(options[options.index("--trainer.val_check_interval") + 1]) == 4 * every
    assert 0 <= steps % every < module.VALIDATIONS  # steps that nobody judges, when the learning rates are down


def test_a_run_that_was_stopped_goes_on(folder, tmp_path, capsys, monkeypatch):

    def stop(*_):
        raise RuntimeError("stopped here")

    with monkeypatch.context() as patch:
        patch.setattr(module, "_make_sounds", stop)
        assert train(folder, tmp_path / "run", "--steps", "2") == 1
    assert not (tmp_path / "run" / "report.html").exists()
    capsys.readouterr()
    assert train(folder, tmp_path / "run", "--steps", "2") == 0
    assert "It is finished" in capsys.readouterr().out
    assert (tmp_path / "run" / "report.html").exists() and (tmp_path / "run" / "sounds" / "noise").exists()


def test_begins_with_the_weights_of_a_model(folder, model, tmp_path, capsys):
    assert train(folder, tmp_path / "run", "--from-model", str(model), "--steps", "1", "--on-nan", "skip") == 0
    trained, given = checkpoint.read_config(tmp_path / "run" / "last"), checkpoint.read_config(model)
    assert trained["class"] == given["class"] and trained["arguments"] == given["arguments"]
    assert trained["training"]["normalize"] == "peak"
    recipe = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    change = (weights(tmp_path / "run" / "last") - weights(model)).abs().max()
    assert 0 < change <= 2 * recipe["model"]["init_args"]["lr"]  # AdamW's first step
    other = tmp_path / "classifier"
    checkpoint.save(S4Model(3, 10, 8, 1), other)
    options = "--out", str(tmp_path / "b"), *QUICK, "--from-model"
    assert "S4Model" in refused(capsys, "train", str(folder), *options, str(other))
    assert not (tmp_path / "b").exists()
    assert "no is not a model" in refused(capsys, "train", str(folder), *options, str(tmp_path / "no"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes and links are a Unix thing")
def test_a_hostile_folder_is_trained_on(tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    expected = hostile.make(data)
    before = sorted(str(path) for path in data.rglob("*"))
    assert train(data, tmp_path / "run", "--steps", "1") == 0
    hostile.assert_every_reject_is_named(capsys.readouterr().out, data, expected)
    assert sorted(str(path) for path in data.rglob("*")) == before
    assert (tmp_path / "run" / "report.html").exists()


def test_two_at_once_on_one_folder_both_finish(folder, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "S4AUDIO_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "s4audio", "train", str(folder), *QUICK, "--steps", "2", "--out"]
    runs = [
        subprocess.Popen([*command, str(tmp_path / name)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for name in "ab"
    ]
    told = [run.communicate()[0].decode() for run in runs]
    assert [run.returncode for run in runs] == [0, 0], told
    assert torch.equal(weights(tmp_path / "a" / "last"), weights(tmp_path / "b" / "last"))


@pytest.mark.parametrize("name", ["Bach: Suites", "[x]", "null", "12"])
def test_a_folder_may_have_any_name(folder, tmp_path, name, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "_make_sounds", lambda *_: {})
    Path(name).mkdir()
    for number in range(2):
        noise = 0.1 * np.random.default_rng(number).standard_normal(8000)
        soundfile.write(Path(name) / f"{number}.wav", noise, 8000)
    for given in ("train", "held"):
        (tmp_path / given).mkdir()
        options = ["--valid", name] if given == "held" else []
        assert (
            main(["train", str(folder) if options else name, "--steps", "1", "--out", f"{given}/a run", *QUICK, *options])
            == 0
        )
        recipe = yaml.safe_load((tmp_path / given / "a run" / "recipe.yaml").read_text())["data"]["init_args"]
        assert Path(recipe["valid" if options else "train"]).name == name
        assert f"next:     s4audio generate '{given}/a run/best' --from" in capsys.readouterr().out


def test_held_out_recordings_of_the_training_are_named(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "_make_sounds", lambda *_: {})
    for valid, noted in ((folder, True), (None, False)):
        options = ["--valid", str(valid)] if valid else []
        assert train(folder, tmp_path / str(noted), "--steps", "1", *options) == 0
        assert ("the held-out recordings are those of the training" in capsys.readouterr().out) == noted


def test_a_busy_machine_is_said(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "_make_sounds", lambda *_: {})
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    for load, noted in ((3.1, True), (1.9, False)):
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, 0.0, 0.0))
        assert train(folder, tmp_path / str(noted), "--steps", "1") == 0
        assert ("busy (load 3.1, 2 cores); OMP_NUM_THREADS=1" in capsys.readouterr().out) == noted


def test_what_cannot_be_scored_here_is_said_and_the_page_is_written(folder, tmp_path, monkeypatch, capsys):
    def without_torchaudio(arguments):
        raise RuntimeError("mel filters need torchaudio")

    monkeypatch.setattr(module, "evaluate", without_torchaudio)
    assert train(folder, tmp_path / "run", "--steps", "1") == 0
    assert capsys.readouterr().out.count("not scored: mel filters need torchaudio") == 2
    assert (tmp_path / "run" / "report.html").read_text().count("Not scored: mel filters need torchaudio") == 2


def test_wrong_input_is_a_sentence_and_leaves_nothing(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torn = tmp_path.parent / "torn.yaml"
    torn.write_text("model: {\nx: }]")
    for options, sentence in (
        (["nowhere"], "nowhere does not exist"),
        ([str(folder), "--minutes", "0"], "--minutes is 0; wanted half a minute or more"),
        ([str(folder), "--steps", "0"], "--steps is 0; wanted at least 1"),
        ([str(folder), "--steps", "1", "--minutes", "1"], "not allowed with argument"),
        ([str(folder), "--recipe", "nothing"], "nothing.yaml does not exist"),
        ([str(folder), "--recipe", "scifar_quick"], "does not train on a folder of recordings"),
        ([str(folder), "--out", str(folder / "run")], "is inside"),
        ([str(folder), "--recipe", str(torn)], "torn.yaml is no YAML, from line 2 on."),
        ([str(folder), "--valid", "nothere"], "nothere does not exist"),
        ([str(folder), "--device", "cuda"], "--device is cuda, but torch finds no CUDA device here"),
        (["caf\udce9"], r"the name 'caf\udce9' is not UTF-8"),
    ):
        assert sentence in refused(capsys, "train", *options)
    assert list(tmp_path.iterdir()) == [] or sorted(os.listdir()) == ["runs"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.wav").touch()
    assert "none of the 1 files in empty can be used" in refused(capsys, "train", "empty")


def test_another_folder_needs_another_run(run, folder, model, tmp_path, capsys):
    soundfile.write(tmp_path / "other.wav", np.linspace(-0.5, 0.5, 8000), 8000)
    before = contents(run)
    error = refused(capsys, "train", str(tmp_path / "other.wav"), "--out", str(run))
    assert f"began with folder {folder}; choose a new folder with --out" in error
    error = refused(capsys, "train", str(folder), "--out", str(run), "--from-model", str(model))
    assert "began without --from-model" in error and contents(run) == before


def test_other_recordings_would_be_another_split(folder, tmp_path, capsys):
    data, out = tmp_path / "data", tmp_path / "run"
    shutil.copytree(folder, data)
    assert train(data, out, "--steps", "1") == 0
    soundfile.write(data / "new.wav", np.linspace(-0.5, 0.5, 8000), 8000)
    error = refused(capsys, "train", str(data), "--out", str(out), "--steps", "2")
    assert "4 files to train on, and it had 3" in error and str(out / "best") in error


def test_a_run_that_was_moved_goes_on_where_it_is(folder, tmp_path, capsys):
    assert train(folder, tmp_path / "first", "--steps", "1") == 0
    shutil.copytree(tmp_path / "first", tmp_path / "copy")
    (tmp_path / "copy" / "sounds" / "mine.wav").touch()
    before = contents(tmp_path / "first")
    assert train(folder, tmp_path / "copy", "--steps", "2") == 0
    assert contents(tmp_path / "first") == before and (tmp_path / "copy" / "sounds" / "mine.wav").exists()
    assert checkpoint.read_config(tmp_path / "copy" / "last")["training"]["steps"] == 2


def test_what_is_no_run_is_left_alone(folder, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    assert "holds files that are no run" in refused(capsys, "train", str(folder), "--out", str(tmp_path / "mine"))
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    options = "--valid", str(tmp_path), "--out", str(tmp_path / "run")
    assert f"is inside {tmp_path}, where nothing is written" in refused(capsys, "train", str(folder), *options)


def test_the_schedule_gets_a_new_end_with_a_new_length_only(folder, tmp_path, capsys):
    assert train(folder, tmp_path / "run", "--steps", "2") == 0
    again = "fit", "--config", str(tmp_path / "run" / "recipe.yaml"), "--model.init_args.decay_steps", "5", "--steps"
    assert "model.init_args.decay_steps is not what it was" in refused(capsys, *again, "2")
    assert main([*again, "4"]) == 0 and checkpoint.read_config(tmp_path / "run" / "last")["training"]["steps"] == 4


def test_a_recipe_that_names_held_out_recordings_of_its_own_takes_some_of_the_folder(folder, tmp_path):
    recipe = yaml.safe_load((ROOT / "recipes" / "debug.yaml").read_text())
    recipe["data"]["init_args"]["valid"] = "data/elsewhere"
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(recipe))
    assert (
        main(
            ["train", str(folder), "--out", str(tmp_path / "run"), "--recipe", str(tmp_path / "other.yaml"), "--steps", "1"]
        )
        == 0
    )
    config = checkpoint.read_config(tmp_path / "run" / "last")["training"]
    assert config["valid_files"] > 0 and config["train_files"] + config["valid_files"] == 4


def test_validations_are_spread_over_a_run_and_the_last_is_at_its_end():
    def said(*arguments: int) -> dict[str, int]:
        options = module._length(*arguments)
        return {name.lstrip("-"): int(value) for name, value in zip(options[::2], options[1::2], strict=True)}

    assert said(80, 3, 8)["trainer.val_check_interval"] == 30 and said(80, 3, 8)["save_every"] == 10
    assert said(95, 1, 10)["save_every"] == 9  # the tenth after 90 steps, and not one after 100
    assert said(3, 1, 10)["save_every"] == 1


def test_clips_to_hear_are_from_all_over_what_is_held_out():
    rate, length = 100, round(100 * module.HELD_OUT_SECONDS)
    audio = torch.arange(40.0 * length).view(1, -1)
    data = types.SimpleNamespace(sample_rate=rate, valid_names=["a"], valid_clips=[audio])
    starts = [int(clip[0, 0]) // length for _, clip in module._held_out(data)]
    assert starts == [40 * index // module.HELD_OUT_CLIPS for index in range(module.HELD_OUT_CLIPS)]
