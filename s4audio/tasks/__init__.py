"""Training tasks: the Lightning modules, and what a run writes and shows."""

from s4audio.tasks.callbacks import Progress, RunFolder
from s4audio.tasks.generative import GenerativeTask
from s4audio.tasks.optim import parameter_groups

__all__ = ["GenerativeTask", "Progress", "RunFolder", "parameter_groups"]
