"""A card of what an embedding hears."""

import numpy as np
import pytest
import soundfile
import torch

from s4audio import Evaluator
from s4audio.metrics.sensitivity import DAMAGES, ONE_KIND, _heard, card, sensitivity


@pytest.fixture
def folder(tmp_path):
    generator = np.random.default_rng(0)
    for index in range(24):
        time = np.arange(8000) / 8000
        tone = sum(np.sin(2 * np.pi * k * generator.uniform(200, 400) * time) / k for k in range(1, 6))
        soundfile.write(tmp_path / f"{index}.wav", 0.2 * tone * np.exp(-generator.uniform(1, 4) * time), 8000)
    return tmp_path


def test_log_mel_hears_damage_and_more_of_it_more(folder):
    rows = {row.damage: row for row in sensitivity(Evaluator(), folder)}
    assert list(rows) == ["nothing, real against real", *DAMAGES, ONE_KIND]
    for what in ("white noise, 30 dB", "white noise, 0 dB", "low-pass at 0.25", "clipped at 0.2", "reversed", "silence"):
        assert next(row for name, row in rows.items() if name.startswith(what)).noticed, what
    noise = [rows[f"white noise, {snr} dB below"].kad for snr in (40, 30, 20, 10, 0)]
    assert noise == sorted(noise)
    assert rows["silence"].fid > 2 * rows["nothing, real against real"].fid and rows["silence"].kad > 50
    assert not {"silence", "reversed", "white noise, 20 dB below"} & set(card(list(rows.values()))["better_than_real"])
    assert not rows["6 dB quieter"].noticed  # every clip is brought to a peak of 1
    found = card(list(rows.values()))
    assert "6 dB quieter" in found["not_noticed"] and "silence" not in found["not_noticed"]


def test_an_embedding_that_hears_nothing_is_caught(folder):
    class Deaf:
        name, sample_rate = "deaf", 8000

        def __call__(self, audio):
            return torch.randn(1, 1, 4, generator=torch.Generator().manual_seed(int(1e6 * audio.std())))

    found = card(sensitivity(Evaluator(Deaf(), normalize="none"), folder))
    assert len(found["not_noticed"]) >= len(DAMAGES) - 2 and len(found["better_than_real"]) <= 2


def test_lower_in_every_split_and_by_more_than_they_vary_is_better_than_real():
    real = torch.tensor([[2.0, 0.1, 0.5]] * 10) + 0.01 * torch.randn(10, 3)
    lower_fid, lower_kad = real - torch.tensor([0.1, 0, 0]), real - torch.tensor([0, 0.1, 0])
    assert _heard("x", lower_fid, real).better_than_real and _heard("x", lower_kad, real).better_than_real
    assert not _heard("x", real - 0.001, real).better_than_real  # less than they vary
    lower_fid[0, 0] = 3.0
    assert not _heard("x", lower_fid, real).better_than_real and not _heard("x", real, real).better_than_real


def test_needs_sixteen_clips(tmp_path):
    for index in range(15):
        soundfile.write(tmp_path / f"{index}.wav", np.random.default_rng(index).standard_normal(8000) * 0.1, 8000)
    with pytest.raises(ValueError, match="has 15 clips; a sensitivity card needs 16"):
        sensitivity(Evaluator(), tmp_path)


def test_a_semitone_is_higher_and_faster():
    tone = torch.sin(2 * torch.pi * 400 * torch.arange(8000) / 8000)[None]
    made = DAMAGES["a semitone higher and faster"](tone, 8000)
    assert made.shape[-1] == pytest.approx(8000 / 2 ** (1 / 12), abs=2)
    assert torch.fft.rfft(made[0], 8000).abs().argmax().item() == pytest.approx(400 * 2 ** (1 / 12), abs=2)
