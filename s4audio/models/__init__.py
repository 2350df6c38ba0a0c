"""Models: what can be trained, saved, loaded and asked for sound."""

from s4audio.models.autoencoder import CausalAutoencoder, S4DAutoencoder, stream_blocks
from s4audio.models.classifier import Classifier, PatchS4Model, S4Model
from s4audio.models.vae import ConvVAE

__all__ = ["CausalAutoencoder", "Classifier", "ConvVAE", "PatchS4Model", "S4DAutoencoder", "S4Model", "stream_blocks"]
