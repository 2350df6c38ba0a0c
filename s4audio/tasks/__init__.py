"""Training tasks: the Lightning modules, and what a run writes and shows."""

from s4audio.tasks.adversarial import AdversarialTask
from s4audio.tasks.callbacks import Progress, RunFolder
from s4audio.tasks.classification import ClassificationTask
from s4audio.tasks.generative import GenerativeTask
from s4audio.tasks.optim import parameter_groups
from s4audio.tasks.training import DivergenceError, TrainingTask

__all__ = [
    "AdversarialTask",
    "ClassificationTask",
    "DivergenceError",
    "GenerativeTask",
    "Progress",
    "RunFolder",
    "TrainingTask",
    "parameter_groups",
]
