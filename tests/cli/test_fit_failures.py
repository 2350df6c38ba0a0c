"""What goes wrong in a training: numbers that are none, memory and disks that are full, checkpoints that are damaged."""

import json
import os
import shutil
import struct
import subprocess
from pathlib import Path

import lightning
import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file
from torch.utils.tensorboard import SummaryWriter

from s4audio import CausalAutoencoder, load
from s4audio.cli.fit import _last_checkpoint
from s4audio.cli.run_page import read_curves
from tests.cli.commands import fit, without_pictures
from tests.cli.test_fit import Crash, weights, with_callback

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
SHORT = ["--data.init_args.clip_seconds", "0.25", "--save_every", "2", "--trainer.val_check_interval", "6"]


@pytest.fixture(autouse=True, scope="module")
def no_pictures():
    with pytest.MonkeyPatch.context() as patch:
        without_pictures(patch)
        yield


class Spoil(lightning.Callback):
    """Makes a sample of the second clip infinite."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, task, batch, batch_idx) -> None:
        if trainer.global_step == self.step:
            batch[1, 0, 10] = float("inf")


def test_divergence_keeps_the_batch_and_the_last_checkpoint_and_skip_goes_on(folder, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    monkeypatch.setattr(lightning.Trainer, "fit", with_callback(Spoil(3)))
    assert fit(folder, run, "--steps", "6", *SHORT) == 1
    said = capsys.readouterr().err
    assert said.startswith("s4audio: the l1 loss is nan at step 3, and so is its batch. Try a smaller lr or ssm_lr")
    assert said.endswith(f"The batch is in {run}/diverged. The last checkpoint is {run}/trainer.ckpt, of step 2.\n")
    batch = load_file(run / "diverged" / "batch.safetensors")["batch0.part0"]
    assert batch.shape == (4, 1, 1000) and batch[1, 0, 10] == float("inf")
    heard = [soundfile.read(run / "diverged" / f"clip{number}.wav")[0] for number in range(4)]
    batch[1, 0, 10] = 1.0
    assert np.abs(np.stack(heard) - batch[:, 0].numpy()).max() < 1e-4  # half a step of 16 bits, and full scale just below 1
    assert torch.load(run / "trainer.ckpt", weights_only=True)["global_step"] == 2

    assert fit(folder, run, "--steps", "6", *SHORT, "--on-nan", "skip") == 0
    said = capsys.readouterr().out
    assert "holds a run of 2 steps" in said
    assert "an update was left out, 1 so far: the l1 loss is nan at step 3, and so is its batch.\n" in said
    record = json.loads((run / "last" / "config.json").read_text(), parse_constant=None)["training"]
    assert record["steps"] == 6 and np.isfinite(list(record["scores"].values())).all()
    assert torch.load(run / "trainer.ckpt", weights_only=True)["task"] == {"parts": 1, "skipped": 1, "skipped_in_a_row": 0}


def test_a_training_that_diverges_at_once_has_no_checkpoint(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lightning.Trainer, "fit", with_callback(Spoil(1)))
    assert fit(folder, tmp_path / "run", "--steps", "6", *SHORT) == 1
    assert capsys.readouterr().err.endswith(f"The batch is in {tmp_path}/run/diverged. There is no checkpoint yet.\n")


def test_a_batch_that_does_not_fit_is_divided_also_when_the_run_goes_on(folder, tmp_path, monkeypatch, capsys):
    losses, refused = CausalAutoencoder.training_losses, []

    def limited(model, audio):
        if model.training and len(audio) > 2:
            refused.append(len(audio))
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return losses(model, audio)

    monkeypatch.setattr(CausalAutoencoder, "training_losses", limited)
    crash = pytest.MonkeyPatch()
    crash.setattr(lightning.Trainer, "fit", with_callback(Crash(3)))
    assert fit(folder, tmp_path / "run", "--steps", "4", *SHORT) == 1
    crash.undo()
    said = capsys.readouterr().out
    assert "step 1: a batch does not fit into memory; going on with each in 2 parts, whose gradients add up to the" in said
    assert refused == [4]
    assert fit(folder, tmp_path / "run", "--steps", "4", *SHORT) == 0
    assert "does not fit" not in capsys.readouterr().out and refused == [4]
    assert fit(folder, tmp_path / "whole", "--steps", "4", *SHORT) == 0
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


def test_a_run_without_a_checkpoint_begins_anew_and_says_so(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".recipe.yaml.new").write_text("half of a recipe")  # what kill -9 leaves
    monkeypatch.setattr(lightning.Trainer, "fit", with_callback(Crash(1)))
    assert fit(folder, tmp_path / "run", "--steps", "2", *SHORT) == 1
    assert "begins anew" not in capsys.readouterr().out
    monkeypatch.undo()
    assert fit(folder, tmp_path / "run", "--steps", "2", *SHORT) == 0
    assert f"{tmp_path}/run holds a run that was stopped before its first checkpoint; it begins" in capsys.readouterr().out


@pytest.fixture(scope="module")
def stopped(folder, tmp_path_factory) -> Path:
    """A run of 6 steps, with checkpoints of 6 and 4."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    assert fit(folder, run, "--steps", "6", *SHORT) == 0
    return run


@pytest.fixture(scope="module")
def longer(stopped, folder, tmp_path_factory) -> bytes:
    """What 10 steps make of it."""
    run = tmp_path_factory.mktemp("longer") / "run"
    shutil.copytree(stopped, run)
    assert fit(folder, run, "--steps", "10", *SHORT) == 0
    return weights(run)


def flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


DAMAGE = {
    "truncated": lambda content: content[: len(content) // 2],
    "one bit": flip,
    "empty": lambda content: b"",
    "zeros": lambda content: bytes(len(content)),
    "missing": lambda content: None,
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_checkpoint_is_replaced_by_the_one_before(stopped, tmp_path, how, capsys):
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    assert _last_checkpoint(run) == (run / "trainer.ckpt", 6, False) and capsys.readouterr().out == ""
    content = DAMAGE[how]((run / "trainer.ckpt").read_bytes())
    (run / "trainer.ckpt").unlink()
    if content is not None:
        (run / "trainer.ckpt").write_bytes(content)
    assert _last_checkpoint(run) == (run / "trainer.previous.ckpt", 4, False)
    state = "missing" if how == "missing" else "damaged (BadZipFile)"
    said = capsys.readouterr().out
    assert said == f"{run}/trainer.ckpt is {state}; taking the checkpoint before it, {run}/trainer.previous.ckpt.\n"
    (run / "trainer.previous.ckpt").write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"trainer\.previous\.ckpt is damaged \(BadZipFile\), so this run cannot go on"):
        _last_checkpoint(run)


def test_a_finished_run_has_a_page_of_its_last_state(stopped, folder, tmp_path, capsys):
    """Also when it was killed in front of the page, after it was extended."""
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    page = run / "report.html"
    for make, made in ((page.unlink, True), (lambda: os.utime(page, (0, 0)), True), (lambda: None, False)):
        make()
        assert fit(folder, run, "--steps", "6", *SHORT) == 0
        said = capsys.readouterr().out
        assert "It is finished; nothing was changed." in said and (f"page:     {page}" in said) == made
        assert page.stat().st_mtime >= (run / "trainer.ckpt").stat().st_mtime


def test_from_the_checkpoint_before_it_comes_to_the_same_end(stopped, folder, tmp_path, capsys):
    run, wanted = tmp_path / "run", weights(stopped)
    shutil.copytree(stopped, run)
    (run / "trainer.ckpt").write_bytes(flip((run / "trainer.ckpt").read_bytes()))
    assert fit(folder, run, "--steps", "6", *SHORT) == 0
    assert f"{run} holds a run of 4 steps; going on from there to 6" in capsys.readouterr().out
    assert weights(run) == wanted
    assert _last_checkpoint(run) == (run / "trainer.ckpt", 6, False)
    assert torch.load(run / "trainer.previous.ckpt", weights_only=True)["global_step"] == 4


def test_a_checkpoint_that_would_run_code_is_refused(stopped, tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    (run / "trainer.previous.ckpt").unlink()
    torch.save({"global_step": 6, "callbacks": Evil()}, run / "trainer.ckpt")
    with pytest.raises(ValueError, match=r"trainer\.ckpt is damaged \(UnpicklingError\)"):
        _last_checkpoint(run)
    assert not (tmp_path / "ran").exists()


def test_curves_have_each_step_once_and_the_last_value(tmp_path):
    """Also where the process before was killed while it wrote."""
    for start, value in ((0, 1.0), (3, 2.0)):
        writer = SummaryWriter(tmp_path / "tensorboard", filename_suffix=str(start))
        for step in range(start, start + 5):
            writer.add_scalar("loss", value, step)
        writer.close()
        first, *others = sorted((tmp_path / "tensorboard").iterdir())
        if not others:
            content = first.read_bytes()
            (length,) = struct.unpack_from("<Q", content)
            first.unlink()
            (tmp_path / "tensorboard" / "events.out.tfevents.1.first").write_bytes(content[:-5])
            assert length and read_curves(tmp_path) == {"loss": ([0, 1, 2, 3], [1.0] * 4)}
    assert read_curves(tmp_path) == {"loss": ([0, 1, 2, 3, 4, 5, 6, 7], [1.0] * 3 + [2.0] * 5)}


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 3 MB, where the tests may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(place)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("only root can mount a disk")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("left", [0, 60_000], ids=["curves", "trainer"])
def test_a_full_disk_ends_a_run_in_a_sentence_and_with_room_it_goes_on(stopped, longer, folder, small_disk, left, capsys):
    run = small_disk / "run"
    shutil.copytree(stopped, run)
    free = shutil.disk_usage(small_disk).free
    (small_disk / "ballast").write_bytes(bytes(free - left))
    assert fit(folder, run, "--steps", "10", *SHORT) == 1
    said = capsys.readouterr().err
    assert "the disk is full" in said and "make room, then give the command again" in said
    assert not [path for path in run.rglob(".*") if path.is_file()]
    for name in ("best", "last"):
        load(run / name)
    assert _last_checkpoint(run)[1] >= 6
    (small_disk / "ballast").unlink()
    assert fit(folder, run, "--steps", "10", *SHORT) == 0
    assert weights(run) == longer
