"""A folder of recordings and a small model that streams."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from s4audio import CausalAutoencoder, save


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """Three decaying tones of 2 s, and one that is shorter than a clip."""
    path = tmp_path_factory.mktemp("audio")
    for number, seconds in enumerate((2.0, 2.0, 2.0, 0.2)):
        time = np.arange(round(8000 * seconds)) / 8000
        tone = 0.4 * np.sin(2 * np.pi * 110 * (number + 2) * time) * np.exp(-time)
        soundfile.write(path / f"tone{number}.wav", tone, 8000)
    return path


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("models") / "model"
    save(CausalAutoencoder(4000, strides=(2, 4), widths=(4, 6, 8), d_state=8), path, training={"normalize": "peak"})
    return path
