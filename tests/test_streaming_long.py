"""Ten minutes of audio in uneven blocks: the same samples as in one piece, and no more memory than a block needs."""

import pytest
import torch

from s4audio import CausalAutoencoder

resource = pytest.importorskip("resource", reason="Unix only")

pytestmark = pytest.mark.slow


@torch.no_grad()
def test_ten_minutes_stream_without_a_seam():
    model = CausalAutoencoder(8000, strides=(4, 8), widths=(8, 8, 8), latent_channels=4, d_state=16).eval()
    audio = 0.1 * torch.randn(1, 1, 600 * 8000)
    state, outputs, peaks = model.initial_state(1), [], []
    for block in audio.split(30_011, dim=-1):
        y, state = model.stream(block, state)
        outputs.append(y)
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    streamed = torch.cat(outputs, dim=-1)
    assert peaks[-1] - peaks[10] < 60_000  # KiB: the outputs kept here are 19 MB
    whole = model(audio)[..., : streamed.shape[-1]]
    torch.testing.assert_close(streamed, whole, rtol=0, atol=1e-4 * float(whole.abs().max()))
