"""The task that trains every classifier: cross entropy, and accuracy on held-out sequences."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from s4audio.tasks.training import TrainingTask


class ClassificationTask(TrainingTask):
    """Trains a classifier with AdamW; the best model is the most accurate on the held-out sequences.

    Args:
        model: sequences (B, channels, L) -> logits (B, num_classes).
        label_smoothing: share of the target that is spread over all classes.
        ema_decay: as all of what follows, of TrainingTask.

    Raises:
        ValueError: as TrainingTask; label_smoothing is not in [0, 1).
    """

    best_score = "valid/accuracy"
    higher_is_better = True

    def __init__(
        self,
        model: nn.Module,
        label_smoothing: float = 0.0,
        ema_decay: float | None = None,
        lr: float = 1e-2,
        ssm_lr: float = 1e-3,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.999),
        schedule: str = "cosine",
        warmup_steps: int = 0,
        decay_steps: int | None = None,
        cuda_graph: bool = True,
        compile: bool = False,
        on_nan: str = "stop",
    ) -> None:
        super().__init__(
            model, lr, ssm_lr, weight_decay, betas, schedule, warmup_steps, decay_steps, cuda_graph, compile, on_nan,
            ema_decay,
        )  # fmt: skip
        if not hasattr(model, "num_classes"):
            raise ValueError(
                f"the model is a {type(model).__name__}, which is no classifier; choose S4Model or PatchS4Model."
            )
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing is {label_smoothing}; wanted at least 0 and below 1.")
        self.label_smoothing = label_smoothing
        classes = self.model.num_classes
        self.confusion: Tensor
        self.register_buffer("confusion", torch.zeros(classes, classes), persistent=False)

    def losses(self, *batch: Tensor) -> dict[str, Tensor]:
        """Cross entropy, and how many of the batch were right before the step."""
        u, label = batch
        logits = self.model(u).float()
        loss = F.cross_entropy(logits, label, label_smoothing=self.label_smoothing)
        return {"cross_entropy": loss, "accuracy": (logits.argmax(1) == label).float().mean()}

    def weights(self, names: list[str], step: int | None) -> list[float]:
        return [float(name == "cross_entropy") for name in names]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """One batch of sequences (B, channels, L) and labels (B,)."""
        loss, found = self.total_and_losses(*batch)
        trainer: Any = self.trainer
        every = trainer.log_every_n_steps
        if every and (self.global_step + 1) % every == 0:  # when the logger writes: it costs time
            self.log_dict({"train/loss": loss.detach(), "train/accuracy": found["accuracy"]})
        return loss

    def on_validation_epoch_start(self) -> None:
        self.confusion.zero_()

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Counts what each class is taken for."""
        u, label = batch
        logits = self.scored_model(u).float()
        self.log("valid/loss", F.cross_entropy(logits, label), batch_size=len(label), on_epoch=True)
        self.confusion += count_pairs(logits, label)

    def on_validation_epoch_end(self) -> None:
        right = self.confusion.diagonal()
        self.log("valid/accuracy", right.sum() / self.confusion.sum())
        number = self.confusion.sum(1)
        self.log("valid/worst_class", torch.where(number > 0, right / number.clamp_min(1), torch.ones_like(right)).min())


def count_pairs(logits: Tensor, label: Tensor) -> Tensor:
    """(classes, classes): how many of each class, a row, are taken for which, a column."""
    classes = logits.shape[1]
    return torch.bincount(label * classes + logits.argmax(1), minlength=classes**2).view(classes, classes)


@torch.no_grad()
def confusion_matrix(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """`count_pairs` over all batches of sequences and labels; the model should be in eval mode."""
    counts = [count_pairs(model(u), label) for u, label in batches]
    return torch.stack(counts).sum(0)
