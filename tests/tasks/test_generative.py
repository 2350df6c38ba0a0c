"""Loss weights of the generative task, and their warm-up."""

import math

import lightning
import pytest
import torch

from s4audio import ConvVAE, Flow
from s4audio.tasks import GenerativeTask


def task(**arguments) -> GenerativeTask:
    model = ConvVAE(8000, strides=(2,), widths=(2, 2), latent_channels=1, num_blocks=1)
    return GenerativeTask(model, **arguments)


def test_a_warmed_up_loss_rises_to_its_weight():
    losses = {"l1": torch.tensor(1.0), "kl": torch.tensor(10.0)}
    warming = task(loss_weights={"kl": 0.5}, loss_warmup_steps={"kl": 100})
    totals = [warming.total_loss(losses, step).item() for step in (0, 50, 100, 1000)]
    assert totals == pytest.approx([1.0, 3.5, 6.0, 6.0])
    assert warming.total_loss(losses).item() == pytest.approx(6.0)  # validation: the weight it ends at


@pytest.mark.parametrize("argument", ["loss_weights", "loss_warmup_steps"])
def test_a_loss_that_does_not_exist_is_refused(argument):
    with pytest.raises(ValueError, match=rf"{argument} names \['k1'\], but the model has the losses \['l1'\]"):
        task(**{argument: {"k1": 1}}).total_loss({"l1": torch.tensor(1.0)})


@pytest.mark.parametrize("algorithm, size", [("norm", lambda g: g.norm()), ("value", lambda g: g.abs().max()), (None, None)])
def test_gradients_are_clipped_by_their_norm_or_their_values(algorithm, size, monkeypatch):
    clipping = task()
    monkeypatch.setattr(clipping, "_trainer", lightning.Trainer(logger=False, accelerator="cpu"))
    for parameter in clipping.model.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    clipping.configure_gradient_clipping(None, 0.5 if algorithm else None, algorithm)
    gradient = torch.cat([parameter.grad.flatten() for parameter in clipping.model.parameters()])
    if size:
        assert size(gradient).item() == pytest.approx(0.5, rel=1e-4)
    else:
        assert (gradient == 3).all()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_average_of_the_weights_is_scored_and_labels_reach_the_model(monkeypatch):
    """Validation gives the losses of the average, with its own weights, not of what is trained."""
    averaged = GenerativeTask(
        Flow(1000, strides=(2,), widths=(4, 4), num_blocks=1, d_state=4, classes=("a", "b")), lr=0.1, ema_decay=0.9
    )
    seen = []
    losses = averaged.average.training_losses
    monkeypatch.setattr(averaged.average, "training_losses", lambda *batch: seen.append(batch) or losses(*batch))
    batches = torch.utils.data.DataLoader([(torch.randn(1, 32), k % 2) for k in range(12)], 4)
    trainer = lightning.Trainer(
        max_steps=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(averaged, batches, batches)
    assert averaged.scored_model is averaged.average and averaged.model.num_batches == averaged.average.num_batches == 3
    assert all(parameter.is_leaf for parameter in averaged.average.parameters())  # no graph grows from step to step
    assert len(seen) == 3 and all(torch.equal(label, torch.tensor([0, 1, 0, 1])) for _, label in seen)
    averaged.eval()
    with torch.no_grad():
        wanted = torch.stack([losses(audio, label)["flow"] for audio, label in seen]).mean()
        trained = torch.stack([averaged.model.training_losses(*batch)["flow"] for batch in seen]).mean()
    assert trainer.callback_metrics["valid/loss"] == pytest.approx(wanted) and wanted != trained


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_an_average_that_forgets_nothing_or_more_is_refused(decay):
    with pytest.raises(ValueError, match=f"ema_decay is {decay}; wanted at least 0 and below 1"):
        task(ema_decay=decay)


@torch.no_grad()
def test_a_silent_clip_has_no_sdr(monkeypatch):
    scoring, logged, audio = task(), {}, torch.randn(3, 1, 64)
    audio[1] = 0
    monkeypatch.setattr(scoring, "log", lambda name, value, **o: logged.update({name: (float(value), o.get("batch_size"))}))
    scoring._reconstruct(scoring.model, audio, 1)
    score, number = logged["valid/si_sdr_db"]
    assert math.isfinite(score) and number == 2
    logged.clear()
    scoring._reconstruct(scoring.model, 0 * audio, 1)
    assert "valid/si_sdr_db" not in logged


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_validation_weighs_clips_alike_and_losses_as_they_end(monkeypatch):
    validated, seen = task(loss_weights={"kl": 3.0}, loss_warmup_steps={"kl": 1000}), []
    losses = validated.model.training_losses
    monkeypatch.setattr(
        validated.model, "training_losses", lambda audio: seen.append((len(audio), losses(audio))) or seen[-1][1]
    )
    trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.validate(validated, torch.utils.data.DataLoader(list(torch.randn(6, 1, 64)), 4), verbose=False)
    wanted = sum(size * float(sum(v * (3 if name == "kl" else 1) for name, v in of.items())) for size, of in seen) / 6
    assert [size for size, _ in seen] == [4, 2]
    assert float(trainer.callback_metrics["valid/loss"]) == pytest.approx(wanted, rel=1e-5)
