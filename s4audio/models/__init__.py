"""Models: what can be trained, saved, loaded and asked for sound."""

from s4audio.models.autoencoder import (
    CausalAutoencoder,
    S4DAutoencoder,
    StreamState,
    advance_stream,
    begin_stream,
    finish_stream,
    stream_blocks,
    stream_latency,
)
from s4audio.models.classifier import Classifier, PatchS4Model, S4Model
from s4audio.models.discriminator import Discriminator
from s4audio.models.vae import S4DVAE, ConvVAE

__all__ = [
    "S4DVAE",
    "CausalAutoencoder",
    "Classifier",
    "ConvVAE",
    "Discriminator",
    "PatchS4Model",
    "S4DAutoencoder",
    "S4Model",
    "StreamState",
    "advance_stream",
    "begin_stream",
    "finish_stream",
    "stream_blocks",
    "stream_latency",
]
