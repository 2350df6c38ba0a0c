"""Loudness against the standard's table, its own test signals and another package's meter."""

import numpy as np
import pytest
import torch
import torchaudio
from scipy.signal import sosfilt

from s4audio.data.loudness import LOWEST_RATE, integrated_loudness, k_weighting

TABLE = [  # BS.1770-5, tables 1 and 2: 48 kHz, b then a
    [1.53512485958697, -2.69169618940638, 1.19839281085285, 1.0, -1.69065929318241, 0.73248077421585],
    [1.0, -2.0, 1.0, 1.0, -1.99004745483398, 0.99007225036621],
]


def loudness(audio: np.ndarray, rate: int) -> float | None:
    weighted = np.square(sosfilt(k_weighting(rate), audio)).sum(0)
    step = round(rate / 10)
    return integrated_loudness(weighted[: len(weighted) // step * step].reshape(-1, step).mean(-1))


def sine(levels_db: list[float], seconds: list[float], rate: int = 48_000, channels: int = 2) -> np.ndarray:
    """A tone of 1 kHz at one level after the other, the same in every channel."""
    level = np.concatenate([np.full(round(s * rate), 10 ** (db / 20)) for db, s in zip(levels_db, seconds, strict=True)])
    return np.stack([level * np.sin(2 * np.pi * 1000 * np.arange(len(level)) / rate)] * channels)


def test_the_filter_is_the_standards_table():
    np.testing.assert_allclose(k_weighting(48_000), TABLE, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rate", [8000, 16_000, 44_100, 96_000])
def test_the_filter_has_the_same_response_at_every_rate(rate):
    """Up to a quarter of the rate: nearer to half of it the bilinear transform bends the frequencies."""
    from scipy.signal import sosfreqz

    hertz = np.geomspace(20, rate / 4 if rate < 48_000 else 10_000, 50)
    ours, wanted = (20 * np.log10(np.abs(sosfreqz(sos, hertz, fs=fs)[1])) for sos, fs in
        ((k_weighting(rate), rate), (TABLE, 48_000)))  # fmt: skip
    np.testing.assert_allclose(ours, wanted, rtol=0, atol=0.25)


@pytest.mark.parametrize(
    ("levels", "seconds", "wanted"),
    [
        ([-23.0], [20.0], -23.0),
        ([-33.0], [20.0], -33.0),
        ([-36.0, -23.0, -36.0], [10.0, 60.0, 10.0], -23.0),
        ([-72.0, -36.0, -23.0, -36.0, -72.0], [10.0, 10.0, 60.0, 10.0, 10.0], -23.0),
        ([-26.0, -20.0, -26.0], [20.0, 20.1, 20.0], -23.0),
    ],
)
def test_signals_1_to_5_of_ebu_tech_3341(levels, seconds, wanted):
    assert loudness(sine(levels, seconds), 48_000) == pytest.approx(wanted, abs=0.1)  # EBU's tolerance


def test_a_mono_sine_at_full_scale():
    assert loudness(sine([0.0], [1.0], channels=1), 48_000) == pytest.approx(-3.01, abs=0.05)  # the standard's calibration


@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_another_meter_says_the_same(rate):
    """torchaudio rounds the constants of the filter."""
    audio = 0.1 * np.random.default_rng(0).standard_normal((2, 5 * rate)) * np.linspace(0, 1, 5 * rate)
    theirs = torchaudio.functional.loudness(torch.from_numpy(audio), rate).item()
    assert loudness(audio, rate) == pytest.approx(theirs, abs=0.1)


@pytest.mark.parametrize(("level", "seconds"), [(-80.0, 2.0), (-20.0, 0.39)])
def test_silence_and_a_blink_have_no_loudness(level, seconds):
    assert loudness(sine([level], [seconds]), 48_000) is None


def test_the_filter_is_stable_at_the_lowest_rate():
    sections = k_weighting(LOWEST_RATE)
    assert all(np.abs(np.roots(section[3:])).max() < 1 for section in sections)


def test_what_is_faint_but_above_the_absolute_gate_has_a_loudness():
    assert loudness(sine([-65.0], [5.0]), 48_000) == pytest.approx(-65.0, abs=0.1)
