"""Data sets, as Lightning data modules."""

from s4audio.data.audio_folder import AudioFolder

__all__ = ["AudioFolder"]
