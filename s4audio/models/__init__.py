"""Models: what can be trained, saved, loaded and asked for sound."""

from s4audio.models.autoencoder import (
    CausalAutoencoder,
    S4DAutoencoder,
    StreamState,
    WaveformAutoencoder,
    advance_stream,
    begin_stream,
    finish_stream,
    stream_blocks,
    stream_latency,
)
from s4audio.models.classifier import Classifier, PatchS4Model, S4Model
from s4audio.models.discriminator import Discriminator
from s4audio.models.flow import Flow
from s4audio.models.samplers import euler, heun, multistep
from s4audio.models.sashimi import Generated, SaShiMi, SaShiMiState
from s4audio.models.vae import S4DVAE, ConvVAE
from s4audio.models.wavenet import WaveNet

__all__ = [
    "S4DVAE",
    "CausalAutoencoder",
    "Classifier",
    "ConvVAE",
    "Discriminator",
    "Flow",
    "Generated",
    "PatchS4Model",
    "S4DAutoencoder",
    "S4Model",
    "SaShiMi",
    "SaShiMiState",
    "StreamState",
    "WaveNet",
    "WaveformAutoencoder",
    "advance_stream",
    "begin_stream",
    "euler",
    "finish_stream",
    "heun",
    "multistep",
    "stream_blocks",
    "stream_latency",
]
