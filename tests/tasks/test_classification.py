"""The average of a classifier's weights."""

import lightning
import pytest
import torch
from torch.nn.utils import parameters_to_vector

from s4audio.models import S4Model
from s4audio.tasks import ClassificationTask
from s4audio.tasks.classification import count_pairs


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("batches_a_step", [1, 2])
def test_the_average_takes_its_share_of_the_weights_once_a_step(batches_a_step):
    torch.manual_seed(0)
    task = ClassificationTask(S4Model(1, 2, 4, 1, d_state=4), ema_decay=0.6)
    wanted = parameters_to_vector(task.model.parameters()).detach().clone()
    after = {}  # of each step

    class Watch(lightning.Callback):
        def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
            after[trainer.global_step] = parameters_to_vector(task.model.parameters()).detach().clone()

    batches = [(torch.randn(4, 1, 8), torch.tensor([0, 1, 0, 1])) for _ in range(20 * batches_a_step)]
    trainer = lightning.Trainer(
        max_steps=20, accumulate_grad_batches=batches_a_step, accelerator="cpu", logger=False, callbacks=[Watch()],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(task, torch.utils.data.DataLoader(batches, batch_size=None))
    for step in range(1, 21):
        share = max(0.4, 9 / (9 + step))
        wanted = (1 - share) * wanted + share * after[step]
    torch.testing.assert_close(parameters_to_vector(task.scored_model.parameters()), wanted)


def classification(**options) -> ClassificationTask:
    return ClassificationTask(S4Model(1, 3, 4, 1, d_state=4), **options)


def test_smoothing_spreads_its_share_over_all_classes():
    task, u, label = classification(label_smoothing=0.3), torch.randn(5, 1, 16), torch.tensor([0, 1, 2, 0, 1])
    log_p = task.model(u).log_softmax(1)
    wanted = -(0.7 * log_p[torch.arange(5), label] + 0.3 * log_p.mean(1)).mean()
    torch.testing.assert_close(task.losses(u, label)["cross_entropy"], wanted)


def test_rows_are_classes_and_columns_what_they_are_taken_for():
    logits = torch.eye(3)[[0, 2, 2, 1]]
    assert count_pairs(logits, torch.tensor([0, 0, 1, 1])).tolist() == [[1, 0, 1], [0, 1, 1], [0, 0, 0]]


def test_each_validation_counts_anew_what_the_average_says(monkeypatch):
    task, logged = classification(ema_decay=0.5), {}
    monkeypatch.setattr(task, "log", lambda name, value, **_: logged.update({name: float(value)}))
    monkeypatch.setattr(task.average, "forward", lambda u: torch.eye(3)[u[:, 0, 0].long()])
    for _ in range(2):
        task.on_validation_epoch_start()
        task.validation_step((torch.tensor([0.0, 0, 0, 0, 1, 0]).view(-1, 1, 1), torch.tensor([0, 0, 0, 0, 1, 1])), 0)
        task.on_validation_epoch_end()
        assert logged["valid/accuracy"] == pytest.approx(5 / 6) and logged["valid/worst_class"] == pytest.approx(0.5)
        assert task.confusion.sum() == 6
