"""The task that trains a generator and, from some step on, a discriminator against it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from s4audio.losses import adversarial_loss, discriminator_accuracy, discriminator_loss, feature_loss
from s4audio.models.discriminator import Discriminator
from s4audio.tasks.generative import GenerativeTask


class AdversarialTask(GenerativeTask):
    """Trains an autoencoder by its own losses first, and from `adversarial_start_step` on by a discriminator too.

    Generator and discriminator make each step together, both from the networks as they were before it: the generator by its
    own losses, `adversarial` (what it made should pass for a recording) and `feature` (and look like this one inside of the
    discriminator), the discriminator by `discriminator`. All of it is one sum, of which each network gets the gradient of
    its own terms; so one AdamW, one CUDA graph, one checkpoint and one look for numbers that are none hold both, and the
    norm of each network's gradient is clipped by itself. `accuracy` is the share of the discriminator's scores on the right
    side: 0.5 guesses, 1 sees through everything, and a generator learns little from either.

    Losses of different steps cannot be compared when a discriminator learns too, so the best model is the latest.

    Args:
        model: an autoencoder with `estimate_and_losses(audio)`.
        discriminator: scores and features of audio; it is kept in the trainer's checkpoint, not in the model's folder.
        adversarial_start_step: the first step that has a discriminator.
        adversarial_weight: of the `adversarial` loss.
        feature_weight: of the `feature` loss.
        discriminator_lr: learning rate of the discriminator, under the same schedule.
        loss_weights: as all of what follows, of GenerativeTask; of the model's own losses.

    Raises:
        ValueError: as GenerativeTask; the model is no autoencoder, or adversarial_start_step is negative.
    """

    best_score = "validated_step"
    higher_is_better = True

    def __init__(
        self,
        model: nn.Module,
        discriminator: Discriminator,
        adversarial_start_step: int,
        adversarial_weight: float = 1.0,
        feature_weight: float = 1.0,
        discriminator_lr: float = 3e-4,
        loss_weights: dict[str, float] | None = None,
        loss_warmup_steps: dict[str, int] | None = None,
        lr: float = 1e-3,
        ssm_lr: float = 1e-3,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.8, 0.99),
        schedule: str = "cosine",
        warmup_steps: int = 0,
        decay_steps: int | None = None,
        cuda_graph: bool = True,
        compile: bool = False,
        on_nan: str = "stop",
    ) -> None:
        super().__init__(
            model, loss_weights=loss_weights, loss_warmup_steps=loss_warmup_steps, lr=lr, ssm_lr=ssm_lr,
            weight_decay=weight_decay, betas=betas, schedule=schedule, warmup_steps=warmup_steps, decay_steps=decay_steps,
            cuda_graph=cuda_graph, compile=compile, on_nan=on_nan,
        )  # fmt: skip
        if not hasattr(model, "estimate_and_losses"):
            raise ValueError(f"the model is a {type(model).__name__}, which is no autoencoder; AdversarialTask needs one.")
        if adversarial_start_step < 0:
            raise ValueError(f"adversarial_start_step is {adversarial_start_step}; wanted 0 or more.")
        self.discriminator, self.discriminator_lr = discriminator, discriminator_lr
        self.adversarial_start_step = adversarial_start_step
        self.ours = {  # the weights of what a discriminator adds to the losses
            "adversarial": adversarial_weight, "feature": feature_weight, "discriminator": 1.0, "accuracy": 0.0,
        }  # fmt: skip
        self.judged = False  # whether the discriminator takes part

    @property
    def networks(self) -> dict[str, nn.Module]:
        return {"model": self.model, "discriminator": self.discriminator}

    def parameter_groups(self) -> list[dict[str, Any]]:
        judge = {"params": list(self.discriminator.parameters()), "lr": self.discriminator_lr, "weight_decay": 0.0}
        return [*super().parameter_groups(), judge]

    def on_fit_start(self) -> None:
        if self.trainer.world_size > 1:
            raise ValueError(f"AdversarialTask trains on one device, and trainer.devices is {self.trainer.world_size}.")
        super().on_fit_start()
        self.judged = False
        if 0 <= self.trainer.max_steps <= self.adversarial_start_step:
            self.news.append(
                f"the discriminator will take no part, since it begins at step {self.adversarial_start_step} "
                f"(adversarial_start_step) and the training ends at {self.trainer.max_steps}."
            )

    def losses(self, *batch: Tensor) -> dict[str, Tensor]:
        """The model's own; of the discriminator too, when it takes part."""
        audio, *_ = batch  # a label changes nothing
        estimate, losses = self.model.estimate_and_losses(audio)
        if not self.judged:
            return losses
        scores, features = self.discriminator(torch.cat([audio, estimate.detach()]))
        real, made = zip(*(score.chunk(2) for score in scores), strict=True)
        # The generator's terms see the discriminator's weights as constants.
        weights = {name: parameter.detach() for name, parameter in self.discriminator.named_parameters()}
        passed, felt = functional_call(self.discriminator, weights, (estimate,))
        wanted = [feature.chunk(2)[0].detach() for feature in features]
        return {
            **losses, "adversarial": adversarial_loss(passed), "feature": feature_loss(wanted, felt),
            "discriminator": discriminator_loss(real, made), "accuracy": discriminator_accuracy(real, made),
        }  # fmt: skip

    def weights(self, names: list[str], step: int | None) -> list[float]:
        own = [name for name in names if name not in self.ours]
        weights = {**self.ours, **dict(zip(own, super().weights(own, step), strict=True))}
        return [weights[name] for name in names]

    def training_step(self, batch: Tensor | Sequence[Tensor], batch_idx: int) -> Any:
        """One batch of clips (B, 1, T); the total, and what the discriminator makes of it."""
        if not self.judged and self.global_step >= self.adversarial_start_step:
            self.judged, self.graph = True, None  # whose losses are others
            self.news.append(
                f"the discriminator takes part, as from step {self.adversarial_start_step} on; an accuracy of 0.5 guesses, "
                "and 1 sees through everything."
            )
        total = super().training_step(batch, batch_idx)
        _, _, losses = self.seen[-1]
        return {"loss": total, **{name: losses[name] for name in ("discriminator", "accuracy") if name in losses}}

    def on_validation_epoch_end(self) -> None:
        self.log("validated_step", float(self.global_step))
