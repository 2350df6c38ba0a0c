"""Data sets, as Lightning data modules."""

from s4audio.data.audio_folder import AudioFolder
from s4audio.data.audio_shards import AudioShards, write_shards
from s4audio.data.check import check_folder
from s4audio.data.images import ImageError, Images, ImageSequences, read_images

__all__ = [
    "AudioFolder",
    "AudioShards",
    "ImageError",
    "ImageSequences",
    "Images",
    "check_folder",
    "read_images",
    "write_shards",
]
