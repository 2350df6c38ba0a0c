"""The average of a classifier's weights."""

import lightning
import pytest
import torch
from torch.nn.utils import parameters_to_vector

from s4audio.models import S4Model
from s4audio.tasks import ClassificationTask


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
