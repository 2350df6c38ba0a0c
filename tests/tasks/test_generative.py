"""Loss weights of the generative task, and their warm-up."""

import lightning
import pytest
import torch

from s4audio import ConvVAE
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
