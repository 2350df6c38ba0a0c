"""s4audio: audio generation on structured state spaces."""

from s4audio.checkpoint import load, load_embedding, save
from s4audio.layers import S4, S4D
from s4audio.metrics import Evaluator
from s4audio.models import S4DVAE, CausalAutoencoder, ConvVAE, Flow, S4DAutoencoder, S4Model, SaShiMi, stream_blocks
from s4audio.ssm import backend

__version__ = "0.1.0"

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
    "backend",
    "load",
    "load_embedding",
    "save",
    "stream_blocks",
]
