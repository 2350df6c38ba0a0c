"""Models: what can be trained, saved, loaded and asked for sound."""

from s4audio.models.autoencoder import CausalAutoencoder, S4DAutoencoder, stream_blocks
from s4audio.models.classifier import S4Model

__all__ = ["CausalAutoencoder", "S4DAutoencoder", "S4Model", "stream_blocks"]
