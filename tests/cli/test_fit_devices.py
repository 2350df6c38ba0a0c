"""Two devices are one with twice the batch: CPU processes that talk by gloo."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from s4audio.cli.run_page import read_curves
from tests.cli.commands import RECIPE, refused

STEPS = ["--trainer.log_every_n_steps", "1", "--save_every", "5", "--trainer.val_check_interval", "5"]
TWO = ["--data.init_args.batch_size", "2", "--trainer.devices", "2"]
ONE = ["--data.init_args.batch_size", "4"]


def command(folder: Path, out: Path, *options: str) -> list[str]:
    given = ["--config", RECIPE, "--train", str(folder), "--out", str(out), *options]
    return [sys.executable, "-m", "s4audio", "fit", *given]


def fit(folder: Path, out: Path, *options: str) -> str:
    done = subprocess.run(command(folder, out, *options), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_two_devices_train_as_one_with_twice_the_batch_and_go_on_where_they_stopped(folder, tmp_path):
    """Without the STFT loss, with which even another order of the clips in a batch is seen after 4 steps."""
    calm = ["--model.init_args.loss_weights.stft", "0", *STEPS]
    fit(folder, tmp_path / "one", *ONE, *calm, "--steps", "10")
    said = fit(folder, tmp_path / "two", *TWO, *calm, "--steps", "10")
    assert said.count("data: ") == said.count("step 5: held out") == said.count("model: ") == 1
    curves = [read_curves(tmp_path / name) for name in ("one", "two")]
    for tag in ("train/loss", "train/l1", "valid/loss", "valid/l1", "valid/si_sdr_db"):
        (steps, one), (same_steps, two) = (curve[tag] for curve in curves)
        assert steps == same_steps and len(one) == (10 if "train" in tag else 2)
        torch.testing.assert_close(torch.tensor(two), torch.tensor(one), rtol=1e-5, atol=0)
    weights = [load_file(tmp_path / name / "last" / "model.safetensors") for name in ("one", "two")]
    for name, tensor in weights[0].items():
        if not name.startswith("latent_"):  # what a model remembers of its latents is of the first device's
            torch.testing.assert_close(weights[1][name], tensor, rtol=1e-3, atol=1e-5, msg=name)

    fit(folder, tmp_path / "parts", *TWO, *calm, "--steps", "5")
    assert "holds a run of 5 steps; going on" in fit(folder, tmp_path / "parts", *TWO, *calm, "--steps", "10")
    assert (tmp_path / "parts" / "last" / "model.safetensors").read_bytes() == (
        tmp_path / "two" / "last" / "model.safetensors"
    ).read_bytes()


@pytest.mark.slow
def test_ctrl_c_and_divergence_end_both_devices(folder, tmp_path):
    diverging = command(folder, tmp_path / "a", *TWO, "--steps", "50", "--model.init_args.lr", "1e30")
    done = subprocess.run(diverging, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and done.stderr.count("loss is nan at step 1") == 1
    running = command(folder, tmp_path / "b", *TWO, "--steps", "100000", "--save_every", "5")
    process = subprocess.Popen(running, stdout=subprocess.PIPE, text=True)
    while not (tmp_path / "b" / "trainer.ckpt").exists():
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and f"saved {tmp_path / 'b' / 'last'} of step" in said


GRADIENT = """
import sys, torch
import torch.distributed as dist
from s4audio.losses import multi_resolution_stft
rank, path = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{path}/meet", rank=rank, world_size=2)
generator = torch.Generator().manual_seed(0)
estimate, reference = torch.randn(2, 4, 1, 3000, generator=generator) * torch.tensor([1, 0.1, 0.01, 1e-5])[:, None, None]
share = estimate[2 * rank : 2 * rank + 2].clone().requires_grad_()
loss = multi_resolution_stft(share, reference[2 * rank : 2 * rank + 2])
loss.backward()
with torch.no_grad():
    alone = multi_resolution_stft(share, reference[2 * rank : 2 * rank + 2])
torch.save((loss.detach(), share.grad / 2, alone), f"{path}/{rank}.pt")  # the trainer averages over two
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_the_stft_loss_of_two_devices_is_that_of_the_whole_batch(tmp_path):
    from s4audio.losses import multi_resolution_stft

    processes = [subprocess.Popen([sys.executable, "-c", GRADIENT, str(rank), str(tmp_path)]) for rank in range(2)]
    assert [process.wait(120) for process in processes] == [0, 0]
    losses, gradients, alone = zip(*(torch.load(tmp_path / f"{rank}.pt") for rank in range(2)), strict=True)
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([1, 0.1, 0.01, 1e-5])[:, None, None]
    estimate, reference = torch.randn(2, 4, 1, 3000, generator=generator) * scale
    estimate.requires_grad_()
    whole = multi_resolution_stft(estimate, reference)
    whole.backward()
    torch.testing.assert_close(torch.stack(losses).mean(), whole.detach(), rtol=1e-5, atol=0)
    error = (torch.cat(gradients) - estimate.grad).norm(dim=(1, 2)) / estimate.grad.norm(dim=(1, 2))
    assert error.max() < 1e-4, error  # float32; the last clip is hardly louder than the floor of the magnitudes
    with torch.no_grad():  # scored without its gradient a share is a whole batch
        torch.testing.assert_close(alone[0], multi_resolution_stft(estimate[:2], reference[:2]), rtol=1e-5, atol=0)


def test_what_is_for_one_device_or_one_machine_says_so(capsys, folder, tmp_path):
    options = ["fit", "--config", RECIPE, "--train", str(folder), "--out", str(tmp_path / "run")]
    assert "trainer.num_nodes is 2; this version trains on one machine" in refused(
        capsys, *options, "--trainer.num_nodes", "2"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_each_device_draws_noise_of_its_own_and_goes_on_with_it(folder, tmp_path):
    """Of a VAE, whose latent is drawn."""
    model = "--model.init_args.model"
    options = [model + ".class_path", "s4audio.ConvVAE", model + ".init_args.sample_rate", "4000", *TWO, *STEPS]
    for length, out in (("10", "whole"), ("5", "parts"), ("10", "parts")):
        fit(folder, tmp_path / out, *options, "--steps", length)
    weights = [(tmp_path / name / "last" / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert weights[0] == weights[1]
    kept = torch.load(tmp_path / "whole" / "trainer.ckpt", weights_only=True)["callbacks"]["RunFolder"]["random_states"]
    assert len(kept) == 2 and not torch.equal(kept[0][0], kept[1][0])
