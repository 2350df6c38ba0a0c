from . import audio, checkpoint, data, layers, losses, metrics, models, report, ssm, tasks
from .checkpoint import load, load_embedding, save
from .layers import S4, S4D
from .metrics import Evaluator
from .models import S4DVAE, CausalAutoencoder, ConvVAE, Flow, S4DAutoencoder, S4Model, SaShiMi, stream_blocks
from .ssm import backend

__version__: str
__all__ = [
    "S4",
    "S4D",
    "S4DVAE",
    "CausalAutoencoder",
    "ConvVAE",
    "Evaluator",
    "Flow",
    "S4DAutoencoder",
    "S4Model",
    "SaShiMi",
    "audio",
    "backend",
    "checkpoint",
    "data",
    "layers",
    "load",
    "load_embedding",
    "losses",
    "metrics",
    "models",
    "report",
    "save",
    "ssm",
    "stream_blocks",
    "tasks",
]
