"""Steps that are no numbers, and batches that do not fit into memory."""

import copy
from typing import Any

import lightning
import pytest
import torch
from torch.nn.utils import parameters_to_vector

from s4audio import CausalAutoencoder
from s4audio.models import S4Model
from s4audio.tasks import ClassificationTask, DivergenceError, GenerativeTask, TrainingTask, parameter_groups

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]


def generative(**options) -> GenerativeTask:
    torch.manual_seed(1)
    model = CausalAutoencoder(8000, strides=(4,), widths=(4, 8), num_blocks=(0, 1), latent_channels=4, d_state=4)
    return GenerativeTask(model, lr=1e-3, ssm_lr=1e-4, **options)


def classifying(**options) -> ClassificationTask:
    torch.manual_seed(1)
    return ClassificationTask(S4Model(1, 2, 4, 1, d_state=4), ema_decay=0.6, decay_steps=20, **options)


def train(task: TrainingTask, batches: list, *callbacks: lightning.Callback, **options) -> lightning.Trainer:
    torch.manual_seed(0)
    trainer = lightning.Trainer(
        max_steps=len(batches) // options.get("accumulate_grad_batches", 1), logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[*callbacks],
        **{"accelerator": "cpu", "devices": 1, **options},
    )  # fmt: skip
    trainer.fit(task, torch.utils.data.DataLoader(batches, batch_size=None))
    return trainer


def clips(number: int, size: int = 4) -> list[torch.Tensor]:
    return list(0.1 * torch.randn(number, size, 1, 256, generator=torch.Generator().manual_seed(2)))


def labelled(number: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(clip, torch.tensor([0, 1, 0, 1])) for clip in clips(number)]


class Spoil(lightning.Callback):
    """Makes one number of a gradient something else, at some steps."""

    def __init__(self, name: str, value: float, steps: set[int]) -> None:
        self.name, self.value, self.steps = name, value, steps

    def on_after_backward(self, trainer, task) -> None:
        if trainer.global_step in self.steps:
            task.model.get_parameter(self.name).grad.view(-1)[0] = self.value


class Watch(lightning.Callback):
    """What the training has come to after each step."""

    def __init__(self) -> None:
        self.states: list[dict[str, Any]] = []

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx) -> None:
        moments = trainer.optimizers[0].state_dict()["state"]
        state = {"weights": task.state_dict(), "moments": moments, "rate": trainer.optimizers[0].param_groups[0]["lr"]}
        self.states.append(copy.deepcopy(state))


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_steps_are_those_of_a_plain_loop():
    task, batches = generative(), clips(6)
    model = copy.deepcopy(task.model).train()
    train(task, batches, gradient_clip_val=1.0)
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-3, 1e-4, 0.0), betas=task.betas)
    for batch in batches:
        optimizer.zero_grad()
        sum(model.training_losses(batch).values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert equal(dict(task.model.state_dict()), dict(model.state_dict()))


def test_the_norm_of_the_gradient_before_clipping_is_logged_when_the_logger_writes():
    class Seen(lightning.Callback):
        def __init__(self) -> None:
            self.wanted: list[float] = []

        def on_before_optimizer_step(self, trainer, task, optimizer) -> None:
            self.wanted.append(float(torch.cat([p.grad.flatten() for p in task.model.parameters()]).norm()))

    seen = Seen()
    trainer = train(generative(), clips(2), seen, gradient_clip_val=0.01, log_every_n_steps=3)
    assert "gradient_norm/model" not in trainer.callback_metrics
    trainer = train(generative(), clips(4), seen, gradient_clip_val=0.01, log_every_n_steps=3)
    assert float(trainer.callback_metrics["gradient_norm/model"]) == pytest.approx(seen.wanted[2 + 2], rel=1e-5)
    assert seen.wanted[2 + 2] > 0.1  # and clipped after that


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_loss_that_is_no_number_stops_before_the_weights_change(accumulated):
    batches = clips(8)
    batches[5][2, 0, 7] = float("nan")
    watch, step = Watch(), 5 // accumulated
    task = generative()
    with pytest.raises(DivergenceError, match=f"the l1 loss is nan at step {step}, and so is its batch. Try a") as caught:
        train(task, batches, watch, accumulate_grad_batches=accumulated)
    assert len(caught.value.batches) == 1 and caught.value.batches[0][0] is batches[5]
    before = watch.states[step * accumulated - 1]["weights"]
    assert all(torch.isfinite(value).all() for value in task.parameters())
    assert all(torch.equal(before[f"model.{name}"], value) for name, value in task.model.named_parameters())


@pytest.mark.parametrize("clip", [{"gradient_clip_val": 1.0}, {}], ids=["clipped", "not clipped"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_no_number_is_named(clip, value):
    spoil = Spoil("decoder.3.conv.weight", value, {2})
    with pytest.raises(
        DivergenceError, match=rf"the gradient of decoder\.3\.conv\.weight is {value} at step 2\. Try"
    ) as caught:
        train(generative(), clips(4), spoil, **clip)
    assert len(caught.value.batches) == 1


def test_of_several_gradients_the_nearest_to_the_loss_is_named():
    names = [name for name, _ in generative().model.named_parameters()]
    spoil = [Spoil(name, float("nan"), {1}) for name in names[2:5]]
    with pytest.raises(DivergenceError, match=rf"the gradient of {names[4]} \(and of 2 before it\) is nan at step 1"):
        train(generative(), clips(4), *spoil)


def test_finite_gradients_of_infinite_size_are_told_too():
    spoil = [
        Spoil(name, 1.5e19, {1}) for name in ("decoder.3.conv.weight", "decoder.3.conv.bias")
    ]  # each square is finite in float32
    with pytest.raises(DivergenceError, match="the norm of the gradient is inf at step 1"):
        train(generative(), clips(4), *spoil)


def test_a_skipped_update_leaves_weights_moments_and_average_and_the_schedule_moves_on():
    watch = Watch()
    task = classifying(on_nan="skip")
    train(task, labelled(6), watch, Spoil("head.weight", float("nan"), {3}), gradient_clip_val=1.0)
    *_, before, skipped, after, _ = watch.states
    assert equal(before["weights"], skipped["weights"]) and equal(before["moments"], skipped["moments"])
    assert not equal(skipped["weights"], after["weights"]) and not equal(skipped["moments"], after["moments"])
    rates = [state["rate"] for state in watch.states]
    assert rates == sorted(set(rates), reverse=True)  # every step has its own
    assert (task.skipped, task.skipped_in_a_row) == (
        1,
        0,
    ) and task.why_skipped == "the gradient of head.weight is nan at step 3"
    assert [int(state["step"]) for state in after["moments"].values()] == [4] * len(after["moments"])


def test_a_skipped_batch_leaves_no_trace_in_what_the_model_counts():
    batches = clips(4)
    batches[2][0, 0, 0] = float("nan")
    watch, task = Watch(), generative(on_nan="skip")
    train(task, batches, watch)
    before, skipped, after = (
        {name: state["weights"][f"model.{name}"] for name, _ in task.model.named_buffers()} for state in watch.states[1:]
    )
    assert {"latent_mean", "latent_std", "num_batches"} <= set(before) and equal(before, skipped)
    assert (int(before["num_batches"]), int(after["num_batches"])) == (2, 3)
    assert all(torch.isfinite(value).all() for value in after.values())


def test_after_ten_skipped_updates_in_a_row_it_stops():
    task = classifying(on_nan="skip")
    train(task, labelled(13), Spoil("head.weight", float("inf"), set(range(1, 11))))
    assert task.skipped == 10
    with pytest.raises(DivergenceError, match=r"11 steps in a row were left out; of the last, the gradient of head\.weight"):
        train(classifying(on_nan="skip"), labelled(13), Spoil("head.weight", float("inf"), set(range(1, 12))))


def test_on_nan_is_stop_or_skip():
    with pytest.raises(ValueError, match="on_nan is 'go'; choose stop or skip"):
        generative(on_nan="go")


class TooLarge(torch.autograd.Function):
    """Nothing, for which there is no memory if more than `most` clips come."""

    @staticmethod
    def forward(ctx, x, most):
        ctx.most = most
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        if gradient.shape[0] > ctx.most:
            raise torch.OutOfMemoryError("out of memory")
        return gradient, None


def limit(task: TrainingTask, most: int, backward: bool = False) -> list[int]:
    """The sizes of the batches that did not fit, as they come."""
    call, refused = type(task.model).forward, []

    def forward(model, u):
        if len(u) > most and task.training:
            refused.append(len(u))
            if not backward:
                raise torch.OutOfMemoryError("out of memory")
        return TooLarge.apply(call(model, u), most)

    task.model.__class__ = type("Limited", (type(task.model),), {"forward": forward})
    return refused


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_batch_that_does_not_fit_is_divided_and_makes_the_same_steps(backward, accumulated):
    """The mean over 7 images is that of parts of 2, 2, 2 and 1; float32 adds in another order, and Adam divides by it."""
    batches = [(torch.randn(7, 1, 32), torch.arange(7) % 2) for _ in range(8)]
    options = {"accumulate_grad_batches": accumulated, "gradient_clip_val": 0.1}
    plain, divided = classifying(), classifying()
    start = parameters_to_vector(plain.model.parameters()).detach().clone()
    train(plain, batches, **options)
    refused = limit(divided, 2, backward)
    train(divided, batches, **options)
    assert refused == [7, 4] and divided.parts == 4
    wanted, found = (parameters_to_vector(task.scored_model.parameters()) - start for task in (plain, divided))
    assert wanted.norm() > 0.01
    assert (found - wanted).norm() < 1e-4 * wanted.norm()


def test_losses_of_parts_are_averaged():
    task = classifying()
    limit(task, 2)
    u, label = torch.randn(7, 1, 32), torch.arange(7) % 2
    task._trainer = lightning.Trainer(logger=False, accelerator="cpu")
    task.on_fit_start()
    _, losses = task.total_and_losses(u, label)
    wanted = classifying().losses(u, label)
    assert losses.keys() == wanted.keys() and task.parts == 4
    assert all(float(losses[name]) == pytest.approx(float(wanted[name]), rel=1e-5) for name in wanted)


def test_one_clip_that_does_not_fit_ends_the_training():
    task = classifying()
    refused = limit(task, 0)
    with pytest.raises(torch.OutOfMemoryError):
        train(task, labelled(2))
    assert refused == [4, 2, 1]


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_gpu_a_gradient_that_is_no_number_is_named_one_step_later(cuda_graph):
    spoil, watch = Spoil("decoder.3.conv.weight", float("nan"), {2}), Watch()
    with pytest.raises(DivergenceError, match=r"the gradient of decoder\.3\.conv\.weight is nan at step 2\. Try") as caught:
        train(generative(cuda_graph=cuda_graph), clips(6), watch, spoil, accelerator="cuda", gradient_clip_val=1.0)
    assert len(watch.states) == 3
    assert torch.equal(caught.value.batches[0][0].cpu(), clips(6)[2])


@pytest.mark.gpu
def test_gpu_a_skipped_update_leaves_weights_moments_and_average():
    watch = Watch()
    task = classifying(on_nan="skip")
    train(task, labelled(6), watch, Spoil("head.weight", float("nan"), {3}), accelerator="cuda", gradient_clip_val=1.0)
    *_, before, skipped, after, _ = watch.states
    assert equal(before["weights"], skipped["weights"]) and equal(before["moments"], skipped["moments"])
    assert not equal(skipped["weights"], after["weights"]) and task.skipped == 1


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_gpu_a_batch_that_does_not_fit_is_divided(cuda_graph):
    """Of 64 clips of 2 s at 8 kHz, with less memory than the whole batch was seen to take."""
    batches = list(0.1 * torch.randn(4, 64, 1, 16000))
    plain, divided = generative(cuda_graph=False), generative(cuda_graph=cuda_graph)
    start = parameters_to_vector(plain.model.parameters()).detach().clone()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    train(plain, batches, accelerator="cuda")
    most = torch.cuda.max_memory_reserved()
    torch.cuda.empty_cache()
    try:
        torch.cuda.set_per_process_memory_fraction(0.7 * most / torch.cuda.mem_get_info()[1])
        train(divided, batches, accelerator="cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert divided.parts > 1
    wanted, found = (parameters_to_vector(task.model.parameters()).cpu() - start for task in (plain, divided))
    assert (found - wanted).norm() < 0.05 * wanted.norm()


def test_accumulated_gradients_are_those_of_all_their_batches_at_once():
    halves = labelled(2)
    whole = tuple(torch.cat(parts) for parts in zip(*halves, strict=True))
    at_once, accumulated = Watch(), Watch()
    train(classifying(), [whole], at_once)
    train(classifying(), halves, accumulated, accumulate_grad_batches=2)
    wanted, found = (
        torch.cat([moments["exp_avg"].flatten() for moments in watch.states[-1]["moments"].values()])
        for watch in (at_once, accumulated)
    )
    assert wanted.norm() > 0 and (found - wanted).norm() < 1e-3 * wanted.norm()


def test_what_was_divided_and_left_out_goes_on_with_a_checkpoint():
    before, after, kept = generative(), generative(), {}
    before.parts, before.skipped, before.skipped_in_a_row = 4, 7, 3
    before.on_save_checkpoint(kept)
    after.on_load_checkpoint(kept)
    assert (after.parts, after.skipped, after.skipped_in_a_row) == (4, 7, 3)


def test_no_batch_of_a_skipped_step_leaves_a_trace_in_what_the_model_counts():
    batches = clips(4)
    batches[3][0, 0, 0] = float("nan")
    watch, task = Watch(), generative(on_nan="skip")
    train(task, batches, watch, accumulate_grad_batches=2)
    before, skipped = (
        {name: watch.states[step]["weights"][f"model.{name}"] for name, _ in task.model.named_buffers()} for step in (1, 3)
    )
    assert int(before["num_batches"]) == 2 and equal(before, skipped)
