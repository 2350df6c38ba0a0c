"""CUDA graphs of the training step against the same training without."""

import lightning
import pytest
import torch

from s4audio import CausalAutoencoder, ConvVAE
from s4audio.tasks import GenerativeTask
from s4audio.tasks.graph import LossGraph


def train(
    model: torch.nn.Module, clips: torch.Tensor, steps: int, accelerator: str = "cuda", **options
) -> tuple[GenerativeTask, list[float]]:
    torch.manual_seed(0)
    losses = []

    class Watch(lightning.Callback):
        def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
            losses.append(float(outputs["loss"]))

    accumulated = options.pop("accumulate_grad_batches", 1)
    task = GenerativeTask(model, lr=1e-3, ssm_lr=1e-4, **options)
    trainer = lightning.Trainer(
        max_steps=steps, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[Watch()], gradient_clip_val=1.0, accumulate_grad_batches=accumulated,
        accelerator=accelerator, devices=1,
    )  # fmt: skip
    trainer.fit(task, torch.utils.data.DataLoader(clips, 4))
    return task, losses


def models() -> list[torch.nn.Module]:
    torch.manual_seed(1)
    autoencoder = CausalAutoencoder(8000, strides=(4,), widths=(8, 16), num_blocks=(0, 1), latent_channels=4, d_state=8)
    return [autoencoder, ConvVAE(8000, strides=(4,), widths=(8, 16), latent_channels=4, num_blocks=1)]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_on_the_cpu_the_options_change_nothing():
    clips = torch.randn(8, 1, 512)
    task, plain = train(models()[0], clips, 2, "cpu", cuda_graph=False)
    again, graphed = train(models()[0], clips, 2, "cpu")
    assert task.graph is None and again.graph is None and plain == graphed


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("index", [0, 1])
def test_gpu_the_graph_trains_the_same_model(index):
    clips = torch.randn(42, 1, 4096)  # the last batch is smaller and not in the graph
    plain, wanted = train(models()[index], clips, 11, cuda_graph=False)
    task, found = train(models()[index], clips, 11)
    assert task.graph is not None and plain.graph is None
    assert found == pytest.approx(wanted, rel=2e-3)
    ours, theirs = (torch.nn.utils.parameters_to_vector(t.model.parameters()) for t in (task, plain))
    assert (ours - theirs).norm() < 0.01 * theirs.norm()


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_gpu_accumulated_gradients_are_not_captured():
    task, _ = train(models()[0], torch.randn(16, 1, 4096), 2, accumulate_grad_batches=2)
    assert task.graph is None


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_gpu_a_model_that_reads_back_is_refused_with_the_way_out():
    model = models()[0].cuda()

    def losses(batch):
        return {"l1": (model(batch) - batch).abs().mean() * float(batch.mean())}

    with pytest.raises(RuntimeError, match=r"cannot be captured.*Train with --model.init_args.cuda_graph false"):
        LossGraph(model, losses, (torch.randn(2, 1, 512, device="cuda"),))
