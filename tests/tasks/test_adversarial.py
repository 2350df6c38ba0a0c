"""A generator and a discriminator against each other: the steps of a plain loop, and when they begin."""

import copy
import types

import lightning
import pytest
import torch
from torch import nn

from s4audio import CausalAutoencoder, ConvVAE, S4Model
from s4audio.losses import adversarial_loss, discriminator_accuracy, discriminator_loss, feature_loss
from s4audio.models import Discriminator
from s4audio.tasks import AdversarialTask, DivergenceError, Progress, parameter_groups
from tests.tasks.test_training import Spoil, Watch, clips, equal, train

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]


def adversarial(**options) -> AdversarialTask:
    torch.manual_seed(1)
    model = CausalAutoencoder(8000, strides=(4,), widths=(4, 8), num_blocks=(0, 1), latent_channels=4, d_state=4)
    defaults = {"adversarial_start_step": 0, "lr": 1e-3, "ssm_lr": 1e-4, "discriminator_lr": 2e-3}
    return AdversarialTask(model, Discriminator((64, 16), width=4), **{**defaults, **options})


def plain_step(model: nn.Module, judge: nn.Module, audio: torch.Tensor, task: AdversarialTask, step: int) -> None:
    """Gradients of both networks by two backward passes of their own."""
    estimate, losses = model.estimate_and_losses(audio)
    total = 10 * losses["l1"] + losses["stft"]
    if step >= task.adversarial_start_step:
        passed, felt = judge(estimate)
        _, wanted = judge(audio)
        total = total + 70 * adversarial_loss(passed) + 13 * feature_loss([w.detach() for w in wanted], felt)
    total.backward()
    judge.zero_grad()  # which the generator's losses have reached too
    if step >= task.adversarial_start_step:
        discriminator_loss(judge(audio)[0], judge(estimate.detach())[0]).backward()


@pytest.mark.parametrize("start", [0, 3])
def test_steps_are_those_of_a_plain_loop_with_two_optimizers(start):
    # So large that they matter beside l1 and stft: 77 in place of 70 moves weights by 2e-3, rounding of the audio by 4e-6.
    weights = {"loss_weights": {"l1": 10.0}, "adversarial_weight": 70.0, "feature_weight": 13.0}
    task, batches = adversarial(adversarial_start_step=start, **weights), clips(6)
    model, judge = copy.deepcopy(task.model).train(), copy.deepcopy(task.discriminator).train()
    train(task, batches, gradient_clip_val=0.5)
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-3, 1e-4, 0.0), betas=(0.8, 0.99))
    others = torch.optim.AdamW(judge.parameters(), 2e-3, betas=(0.8, 0.99), weight_decay=0.0)
    for step, batch in enumerate(batches):
        optimizer.zero_grad()
        plain_step(model, judge, batch, task, step)
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        if step >= start:
            nn.utils.clip_grad_norm_(judge.parameters(), 0.5)
            others.step()
    for ours, theirs in ((task.model, model), (task.discriminator, judge)):
        for name, value in theirs.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[name], value, rtol=0, atol=5e-5, msg=name)


def test_before_the_start_it_is_the_generative_task_and_the_discriminator_rests():
    task = adversarial(adversarial_start_step=3)
    before, watch = copy.deepcopy(task.state_dict()), Watch()
    train(task, clips(4), watch)
    names = [name for name in before if name.startswith("discriminator.")]
    assert all(torch.equal(watch.states[2]["weights"][name], before[name]) for name in names)
    assert not any(torch.equal(watch.states[3]["weights"][name], before[name]) for name in names)


class Heard(lightning.Callback):
    """What a step gives to whoever watches."""

    def __init__(self) -> None:
        self.outputs: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx) -> None:
        self.outputs.append({name: float(value) for name, value in outputs.items()})


def test_the_start_is_told_once_and_then_each_line_has_the_discriminator(capsys):
    heard = Heard()
    train(adversarial(adversarial_start_step=2), clips(4), heard, Progress(len, "clips", every_seconds=0.0))
    told = capsys.readouterr().out.splitlines()
    assert sum("the discriminator takes part, as from step 2 on" in line for line in told) == 1
    lines = [line for line in told if line.startswith("step") and " of 4: " in line]
    assert ["accuracy 0." in line for line in lines[:4]] == [False, False, True, True]
    assert [set(outputs) for outputs in heard.outputs[1:3]] == [{"loss"}, {"loss", "discriminator", "accuracy"}]
    assert all(0 <= outputs["accuracy"] <= 1 for outputs in heard.outputs[2:])


@pytest.mark.parametrize("steps", [3, 4])
def test_a_training_that_ends_before_the_start_says_so(steps, capsys):
    train(adversarial(adversarial_start_step=3), clips(steps), Progress(len, "clips", every_seconds=0.0))
    said = "will take no part, since it begins at step 3 (adversarial_start_step) and the training ends at 3."
    assert capsys.readouterr().out.count(said) == (steps == 3)


def test_the_losses_are_those_of_the_networks():
    task, audio = adversarial(loss_weights={"l1": 10.0}, feature_weight=2.0), clips(1)[0]
    task.judged = True
    losses = task.losses(audio)
    with torch.no_grad():
        (real, _), (made, _) = task.discriminator(audio), task.discriminator(task.model(audio))
    wanted = [adversarial_loss(made), discriminator_loss(real, made), discriminator_accuracy(real, made)]
    for name, value in zip(("adversarial", "discriminator", "accuracy"), wanted, strict=True):
        torch.testing.assert_close(losses[name], value)
    assert task.weights(list(losses), 5) == [10.0, 1.0, 1.0, 2.0, 1.0, 0.0]
    assert task.weights(["l1", "stft"], None) == [10.0, 1.0]  # of a validation


@pytest.mark.parametrize("clip", [{"gradient_clip_val": 1.0}, {}], ids=["clipped", "not clipped"])
def test_a_gradient_of_the_discriminator_that_is_no_number_is_named(clip):
    class SpoilJudge(Spoil):
        def on_after_backward(self, trainer, task) -> None:
            if trainer.global_step in self.steps:
                task.get_parameter(self.name).grad.view(-1)[0] = self.value

    name = "discriminator.of_sizes.1.score.bias"
    with pytest.raises(DivergenceError, match=r"the gradient of discriminator\.of_sizes\.1\.score\.bias is nan at step 2"):
        train(adversarial(), clips(4), SpoilJudge(name, float("nan"), {2}), **clip)
    watch, task = Watch(), adversarial(on_nan="skip")
    train(task, clips(4), watch, SpoilJudge(name, float("nan"), {2}), **clip)
    assert task.skipped == 1 and equal(watch.states[1]["weights"], watch.states[2]["weights"])
    assert not equal(watch.states[2]["weights"], watch.states[3]["weights"])


def test_a_batch_that_does_not_fit_is_divided_for_both():
    plain, divided = (adversarial(loss_weights={"stft": 0.0}, feature_weight=0.0) for _ in range(2))
    start = copy.deepcopy(plain.state_dict())
    train(plain, clips(4))
    refused = limit_encode(divided, 2)
    train(divided, clips(4))
    assert refused == [4] and divided.parts == 2
    for name, value in plain.state_dict().items():
        if value.is_floating_point() and not name.startswith("model.latent") and name != "model.num_batches":
            moved = (value - start[name]).norm()
            assert (divided.state_dict()[name] - value).norm() <= 2e-2 * moved + 1e-7, name


def limit_encode(task: AdversarialTask, most: int) -> list[int]:
    """The sizes of the batches that did not fit."""
    encode, refused = type(task.model).encode, []

    def limited(model, audio):
        if len(audio) > most:
            refused.append(len(audio))
            raise torch.OutOfMemoryError("out of memory")
        return encode(model, audio)

    task.model.__class__ = type("Limited", (type(task.model),), {"encode": limited})
    return refused


def test_mixed_precision_computes_the_losses_in_float32():
    task = adversarial()
    task.judged = True
    with torch.autocast("cpu", torch.bfloat16):
        losses = task.losses(clips(1)[0])
    assert {loss.dtype for loss in losses.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adversarial_start_step": -1}, "adversarial_start_step is -1; wanted 0 or more"),
        ({"model": S4Model(1, 2, 4, 1, d_state=4)}, "the model is a S4Model, which is no autoencoder"),
    ],
)
def test_wrong_arguments_are_sentences(options, message):
    model = options.pop("model", None) or ConvVAE(8000, strides=(2,), widths=(2, 2), latent_channels=1, num_blocks=1)
    with pytest.raises(ValueError, match=message):
        AdversarialTask(model, Discriminator((16,), 2), **{"adversarial_start_step": 0, **options})


def test_several_devices_are_refused():
    task = adversarial()
    task._trainer = types.SimpleNamespace(world_size=2)
    with pytest.raises(ValueError, match=r"trains on one device, and trainer\.devices is 2"):
        task.on_fit_start()


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_gpu_captured_steps_are_those_without_a_graph(precision):
    """The graph is captured anew where the discriminator begins. On an H100 the decoders of two float32 runs without a graph
    end 1 to 2 % of their way apart, and that of one with it 1 to 4 % from them; discriminators 0.1 %."""
    start = copy.deepcopy(adversarial().state_dict())
    plain, captured = (adversarial(adversarial_start_step=3, cuda_graph=graph) for graph in (False, True))
    for task in (plain, captured):
        train(task, clips(8), accelerator="cuda", gradient_clip_val=1.0, precision=precision)
    ours, theirs = ({n: v.cpu() for n, v in task.state_dict().items()} for task in (captured, plain))
    for part, most in (("model.decoder", 0.1), ("discriminator", 0.02 if precision == "32-true" else 0.2)):
        moved, apart = (
            torch.cat([(a[name] - b[name]).flatten() for name in a if name.startswith(part)]).norm()
            for a, b in ((theirs, start), (ours, theirs))
        )
        assert moved > 1e-3 and apart < most * moved, part


def test_the_losses_of_each_network_reach_its_own_weights_only():
    task, audio = adversarial(), clips(1)[0]
    task.judged = True
    losses = task.losses(audio)
    for name, other in (("discriminator", task.model), ("adversarial", task.discriminator), ("feature", task.discriminator)):
        gradients = torch.autograd.grad(losses[name], list(other.parameters()), retain_graph=True, allow_unused=True)
        assert all(gradient is None for gradient in gradients), name


def test_the_discriminator_has_a_rate_of_its_own_and_no_decay():
    *_, judge = adversarial(weight_decay=0.1).parameter_groups()
    assert (judge["lr"], judge["weight_decay"]) == (2e-3, 0.0)
