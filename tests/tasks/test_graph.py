"""CUDA graphs of the training step against the same training without."""

import copy
from typing import Any

import lightning
import pytest
import torch
from torch.nn.utils import parameters_to_vector

from s4audio import S4DVAE, CausalAutoencoder, ConvVAE, Flow
from s4audio.models import PatchS4Model, S4Model
from s4audio.tasks import ClassificationTask, DivergenceError, GenerativeTask, TrainingTask
from s4audio.tasks.graph import LossGraph, laid_out


def train(task: TrainingTask, batches: Any, steps: int, accelerator: str = "cuda", **options) -> list[float]:
    """The losses of the first steps."""
    torch.manual_seed(0)
    losses = []

    class Watch(lightning.Callback):
        def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
            losses.append(float(outputs["loss"]))

    trainer = lightning.Trainer(
        max_steps=steps, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[Watch()], gradient_clip_val=1.0, accelerator=accelerator, devices=1, **options,
    )  # fmt: skip
    trainer.fit(task, batches)
    return losses


def generative(index: int, **options) -> GenerativeTask:
    return GenerativeTask(models()[index], lr=1e-3, ssm_lr=1e-4, **options)


def clips(number: int, length: int) -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(torch.randn(number, 1, length), 4)


def models() -> list[torch.nn.Module]:
    torch.manual_seed(1)
    autoencoder = CausalAutoencoder(8000, strides=(4,), widths=(8, 16), num_blocks=(0, 1), latent_channels=4, d_state=8)
    size = {"strides": (4,), "widths": (8, 16), "latent_channels": 4, "num_blocks": 1}
    vae = ConvVAE(8000, **size)
    flow = Flow(8000, autoencoder=copy.deepcopy(vae), strides=(4,), widths=(8, 16), num_blocks=1, d_state=8)
    return [autoencoder, vae, S4DVAE(8000, **size, d_state=8, losses=("l1", "stft", "mel")), flow]


def classifying(index: int, dropout: float = 0.1, **options) -> ClassificationTask:
    torch.manual_seed(1)
    model = [
        S4Model(3, 10, 16, 2, block="post_norm", dropout=dropout), PatchS4Model(3, 10, 16, 2, patch=4, dropout=dropout),
        S4Model(3, 10, 16, 2, layer="S4", d_state=8, discretization="zoh", bidirectional=True, dropout=dropout),
    ][index]  # fmt: skip
    return ClassificationTask(model, label_smoothing=0.1, ema_decay=0.9, lr=1e-3, **options)


def images() -> torch.utils.data.DataLoader:
    """Batches whose label is the brightness, which a few steps learn."""
    labels = [torch.arange(8) % 10 for _ in range(11)]
    batches = [(0.1 * torch.rand(8, 3, 256) + 0.1 * label.view(8, 1, 1), label) for label in labels]
    return torch.utils.data.DataLoader(batches, batch_size=None)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_on_the_cpu_the_options_change_nothing(captured):
    batches = clips(8, 512)
    plain, graphed = (train(task, batches, 2, "cpu") for task in (generative(0, cuda_graph=False), generative(0)))
    assert plain == graphed and not captured


@pytest.fixture
def captured(monkeypatch) -> list[LossGraph]:
    """Grows by one whenever a graph is replayed."""
    replayed: list[LossGraph] = []
    real = LossGraph.__call__
    monkeypatch.setattr(LossGraph, "__call__", lambda self, *given: replayed.append(self) or real(self, *given))
    return replayed


def compare(plain: TrainingTask, task: TrainingTask, batches: Any, captured: list[LossGraph], replays: int) -> None:
    """What 11 steps change is the same, `replays` of them in a graph."""
    start = parameters_to_vector(plain.scored_model.parameters()).detach().clone()
    wanted = train(plain, batches, 11)
    assert not captured
    found = train(task, batches, 11)
    assert len(captured) == replays
    assert found == pytest.approx(wanted, rel=2e-3)
    ours, theirs = (parameters_to_vector(t.scored_model.parameters()).cpu() - start for t in (task, plain))
    assert theirs.norm() > 0
    assert (ours - theirs).norm() < 0.1 * theirs.norm()


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("index", [0, 1, 2, 3])
def test_gpu_the_graph_trains_the_same_generator(index, captured):
    batches = clips(42, 4096)  # the last of eleven is smaller, and not in the graph
    compare(generative(index, cuda_graph=False), generative(index), batches, captured, 10)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("index", [0, 1, 2])
def test_gpu_the_graph_trains_the_same_classifier(index, captured):
    compare(classifying(index, cuda_graph=False), classifying(index), images(), captured, 11)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_gpu_the_graph_holds_a_compiled_model_in_bfloat16(captured):
    batches = images()
    wanted = train(classifying(0, dropout=0.0, cuda_graph=False), batches, 11)  # torch.compile draws other dropout
    assert not captured
    found = train(classifying(0, dropout=0.0, compile=True), batches, 11, precision="bf16-mixed")
    assert found == pytest.approx(wanted, rel=0.02)
    assert len(captured) == 11


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_gpu_a_loss_that_is_no_number_ends_the_training_at_the_next_step():
    batches = [(torch.rand(8, 3, 256), torch.arange(8)) for _ in range(6)]
    batches[3][0][0, 0, 0] = float("nan")
    with pytest.raises(DivergenceError, match="the cross_entropy loss is nan at step 3, and so is its batch"):
        train(classifying(0), torch.utils.data.DataLoader(batches, batch_size=None), 6)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_gpu_accumulated_gradients_are_not_captured(monkeypatch):
    monkeypatch.setattr(LossGraph, "__call__", None)
    train(generative(0), clips(16, 4096), 2, accumulate_grad_batches=2)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_gpu_a_model_that_reads_back_is_refused_with_the_way_out():
    model = models()[0].cuda()

    def losses(batch):
        return {"l1": (model(batch) - batch).abs().mean() * float(batch.mean())}

    with pytest.raises(RuntimeError, match=r"cannot be captured.*Train with --model.init_args.cuda_graph false"):
        LossGraph(model, losses, (torch.randn(2, 1, 512, device="cuda"),))


def test_gradients_lie_in_memory_as_their_parameters_do():
    model = models()[0]
    loss = model.training_losses(torch.randn(2, 1, 512))["l1"]
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(loss, parameters)
    assert any(g.stride() != p.stride() for g, p in zip(gradients, parameters, strict=True))  # what autograd makes of views
    for gradient, parameter in zip(gradients, parameters, strict=True):
        found = laid_out(gradient, parameter)
        assert found.stride() == parameter.stride() and torch.equal(found, gradient)
