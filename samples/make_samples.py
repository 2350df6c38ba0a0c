"""Makes the clips of this folder: public-domain tunes, typed in below, played by a small synthesizer.

    python samples/make_samples.py [NAME ...] [--out FOLDER]

Everything comes from the scores and from SEED: the same versions of numpy and scipy make the same files.

A score is a line of notes: `C#4/2` is a pitch for two beats, `C4+E4` a chord, `-` a rest; a length holds until the next one
is given, and `!0.5` sets the loudness (0 to 1) from there on. Instruments are sums of partials: struck and plucked ones ring
and decay, each partial at its own rate; blown and bowed ones hold, with breath, bow noise and vibrato.
"""

import argparse
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.signal import butter, fftconvolve, sosfilt

from s4audio.audio import write_audio

SEED = 20
SAMPLE_RATE = 16_000
HERE = Path(__file__).parent

Random = np.random.Generator
Instrument = Callable[[float, float, float, Random], np.ndarray]  # Hz, seconds held, loudness, random -> samples


# ------------------------------------------------------------------------------------------------------------ instruments


def partials(
    frequencies: np.ndarray, amplitudes: np.ndarray, decays: np.ndarray, time: np.ndarray, rng: Random
) -> np.ndarray:
    """Damped sinusoids: Hz, amplitude and seconds to 1/e of each; those above 0.47 of the sample rate are left out."""
    heard = frequencies < 0.47 * SAMPLE_RATE
    f, a, d = (values[heard, None] for values in (frequencies, amplitudes, decays))
    phase = rng.uniform(0, 2 * np.pi, f.shape)
    return (a * np.exp(-time / d) * np.sin(2 * np.pi * f * time + phase)).sum(0)


def ringing(seconds: float, tail: float, damping: float) -> tuple[np.ndarray, np.ndarray]:
    """The time of a struck note, and the damper's envelope: open while the note is held, then falling in `damping` s."""
    time = np.arange(round((seconds + tail) * SAMPLE_RATE)) / SAMPLE_RATE
    return time, np.exp(-np.maximum(0, time - seconds) / damping) * np.minimum(1, time / 0.002)


def piano(frequency: float, seconds: float, loudness: float, rng: Random) -> np.ndarray:
    """Stiff strings, two of them a little apart, that decay fast at first and then slowly; a felt knock."""
    time, damper = ringing(seconds, 0.5, 0.09)
    k = np.arange(1, 36)
    stretched = k * frequency * np.sqrt(1 + 3e-4 * k**2)
    bright = np.exp(-stretched / (1200 + 4200 * loudness))
    amplitude = np.abs(np.sin(np.pi * k / 8.3)) / k**0.7 * bright
    slow = 7.0 * (110 / frequency) ** 0.6 / (1 + stretched / 1500)
    tone = partials(stretched, 0.6 * amplitude, 0.25 * slow, time, rng)
    tone += partials(stretched * 1.0006, 0.4 * amplitude, slow, time, rng)
    knock = np.exp(-time / 0.012) * rng.standard_normal(time.shape) * 0.05 * loudness
    return (tone + low_pass(knock, 1800)) * damper


def plucked(
    frequency: float, seconds: float, loudness: float, rng: Random, place: float = 0.28, ring: float = 1.0
) -> np.ndarray:
    """A string pulled at `place` of its length and let go: guitar and harp; `ring` scales how long."""
    time, damper = ringing(seconds, 0.8, 0.25)
    k = np.arange(1, 40)
    amplitude = np.abs(np.sin(np.pi * k * place)) / k**1.3 * np.exp(-k * frequency / (1500 + 4000 * loudness))
    decay = ring * 1.6 * (220 / frequency) ** 0.4 / (1 + k * frequency / 2500)
    return partials(k * frequency * np.sqrt(1 + 5e-5 * k**2), 1.6 * amplitude, decay, time, rng) * damper


def harp(frequency: float, seconds: float, loudness: float, rng: Random) -> np.ndarray:
    """Plucked in the middle, so that even partials are weak, and left to ring."""
    return plucked(frequency, seconds + 0.8, loudness, rng, place=0.46, ring=1.5)


def harpsichord(frequency: float, seconds: float, loudness: float, rng: Random) -> np.ndarray:
    """Plucked near the end: bright and even, whatever the touch, with an octave stop."""
    return 0.8 * plucked(frequency, seconds, 0.9, rng, 0.12, 0.8) + 0.35 * plucked(
        2 * frequency, seconds, 0.9, rng, 0.1, 0.7
    )


def bass(frequency: float, seconds: float, loudness: float, rng: Random) -> np.ndarray:
    """A low plucked string with a soft finger."""
    return 1.3 * plucked(frequency, seconds, 0.4 * loudness, rng, place=0.2, ring=0.5)


def music_box(frequency: float, seconds: float, loudness: float, rng: Random) -> np.ndarray:
    """Steel tongues: the modes of a bar clamped at one end, far from harmonic."""
    time, damper = ringing(seconds + 1.2, 0.4, 0.3)
    modes, amplitudes, decays = np.array([1, 6.27, 17.55]), np.array([1, 0.35, 0.12]), np.array([0.9, 0.16, 0.05])
    return partials(frequency * modes, amplitudes, decays * (880 / frequency) ** 0.5, time, rng) * damper


def vibraphone(frequency: float, seconds: float, loudness: float, rng: Random) -> np.ndarray:
    """Tuned bars (the second mode two octaves up) over tubes that a motor opens and closes."""
    time, damper = ringing(seconds, 0.6, 0.15)
    tone = partials(
        frequency * np.array([1, 4, 10.2]),
        np.array([1, 0.3 * loudness, 0.12 * loudness]),
        np.array([1.8, 0.4, 0.1]),
        time,
        rng,
    )
    return tone * (1 + 0.25 * np.sin(2 * np.pi * 5.2 * time)) * damper


def held(seconds: float, attack: float, release: float) -> tuple[np.ndarray, np.ndarray]:
    """The time of a blown or bowed note, and its envelope."""
    time = np.arange(round((seconds + release) * SAMPLE_RATE)) / SAMPLE_RATE
    rise = np.minimum(1, time / min(attack, max(seconds, 0.02)))
    fall = np.clip(1 - (time - seconds) / release, 0, 1)
    return time, np.sin(0.5 * np.pi * rise) ** 2 * fall**2


def sung(frequency: float, time: np.ndarray, amplitudes: np.ndarray, vibrato: float, rng: Random) -> np.ndarray:
    """Harmonics of one swaying pitch: a vibrato of `vibrato` (a share of the frequency) that sets in late, and a drift."""
    sway = vibrato * np.sin(2 * np.pi * rng.uniform(4.8, 5.8) * time + rng.uniform(0, 6)) * np.clip((time - 0.2) / 0.4, 0, 1)
    drift = 0.0015 * low_pass(rng.standard_normal(time.shape), 4) * 60
    phase = 2 * np.pi * np.cumsum(frequency * (1 + sway + drift)) / SAMPLE_RATE
    k = np.arange(1, len(amplitudes) + 1)
    k = k[k * frequency * 1.03 < 0.47 * SAMPLE_RATE]
    return (amplitudes[: len(k), None] * np.sin(k[:, None] * phase + rng.uniform(0, 6, (len(k), 1)))).sum(0)


def flute(frequency: float, seconds: float, loudness: float, rng: Random) -> np.ndarray:
    """Few harmonics, and breath around them."""
    time, envelope = held(seconds, 0.07, 0.1)
    tone = sung(frequency, time, np.array([1, 0.35 + 0.3 * loudness, 0.15, 0.06, 0.03]), 0.004, rng)
    return (tone + 0.25 * band_pass(rng.standard_normal(time.shape), frequency * 0.8, frequency * 3)) * envelope


def trumpet(frequency: float, seconds: float, loudness: float, rng: Random) -> np.ndarray:
    """The louder, the brighter; each note opens up as it begins."""
    time, envelope = held(seconds, 0.03, 0.08)
    k = np.arange(1, 24)
    soft = sung(frequency, time, np.exp(-k / 2.0), 0.002, rng)
    loud = sung(frequency, time, np.exp(-k / (2.5 + 5 * loudness)), 0.002, rng)
    opening = np.minimum(1, time / 0.09) * (0.4 + 0.6 * loudness)
    return 0.6 * (soft * (1 - opening) + loud * opening) * envelope


def strings(frequency: float, seconds: float, loudness: float, rng: Random) -> np.ndarray:
    """Three players a little apart; sawtooth-like, through a body with three resonances."""
    time, envelope = held(seconds, 0.09, 0.14)
    k = np.arange(1, 40)
    f = k * frequency
    body = 0.35 + sum(np.exp(-(((f - centre) / width) ** 2)) for centre, width in ((290, 120), (560, 200), (2400, 900)))
    amplitudes = body / k * np.exp(-f / (1800 + 3500 * loudness))
    players = [sung(frequency * (1 + cents * 6e-4), time, amplitudes, 0.005, rng) for cents in (-5, 0, 6)]
    bow = band_pass(rng.standard_normal(time.shape), 900, 3500) * 0.12 * loudness
    return (0.45 * np.sum(players, axis=0) + bow) * envelope


def organ(frequency: float, seconds: float, loudness: float, rng: Random) -> np.ndarray:
    """Pipes an octave, a twelfth and two octaves above each other, steady, with a chiff at the start."""
    time, envelope = held(seconds, 0.03, 0.12)
    stops = ((1, 1.0), (2, 0.6), (3, 0.25), (4, 0.35 * loudness))
    tone = sum(level * sung(frequency * foot, time, np.array([1, 0.4, 0.2, 0.08]), 0.0, rng) for foot, level in stops)
    chiff = np.exp(-time / 0.03) * band_pass(rng.standard_normal(time.shape), 2 * frequency, 6 * frequency)
    return (0.5 * tone + 0.5 * chiff) * envelope


def drums(frequency: float, seconds: float, loudness: float, rng: Random) -> np.ndarray:
    """C2 is a kick, D2 a snare, F#2 a closed and A2 an open hi-hat, by frequency."""
    time = np.arange(round(0.6 * SAMPLE_RATE)) / SAMPLE_RATE
    noise = rng.standard_normal(time.shape)
    if frequency < 70:  # C2
        phase = 2 * np.pi * (48 * time + 90 * 0.03 * (1 - np.exp(-time / 0.03)))
        return 2.2 * np.sin(phase) * np.exp(-time / 0.16) + 0.1 * high_pass(noise, 2000) * np.exp(-time / 0.004)
    if frequency < 80:  # D2
        body = np.sin(2 * np.pi * 190 * time) * np.exp(-time / 0.07)
        return 0.8 * body + 0.6 * band_pass(noise, 1200, 7000) * np.exp(-time / 0.11)
    return 0.45 * high_pass(noise, 5200) * np.exp(-time / (0.035 if frequency < 100 else 0.2))


def low_pass(x: np.ndarray, hz: float) -> np.ndarray:
    return sosfilt(butter(2, hz, "lowpass", fs=SAMPLE_RATE, output="sos"), x)


def high_pass(x: np.ndarray, hz: float) -> np.ndarray:
    return sosfilt(butter(2, hz, "highpass", fs=SAMPLE_RATE, output="sos"), x)


def band_pass(x: np.ndarray, low: float, high: float) -> np.ndarray:
    return sosfilt(butter(2, (low, min(high, 0.45 * SAMPLE_RATE)), "bandpass", fs=SAMPLE_RATE, output="sos"), x)


# ----------------------------------------------------------------------------------------------------------------- scores


class Part(NamedTuple):
    """One instrument's line."""

    instrument: Instrument
    level: float
    score: str


class Piece(NamedTuple):
    """Beats a minute, and the parts that play together."""

    tempo: float
    parts: tuple[Part, ...]
    source: str


def broken(chords: str, pattern: str) -> str:
    """Each chord's notes in the order of the pattern's digits, one note each."""
    return " ".join(chord.split("+")[int(digit)] for chord in chords.split() for digit in pattern)


GUITAR = (
    "A2+E3+A3+C4 G2+D3+G3+B3 A2+E3+A3+C4 E2+B2+E3+G#3 A2+E3+A3+C4 G2+D3+G3+B3 E2+B2+E3+G#3 A2+E3+A3+C4 "
    "C3+G3+C4+E4 G2+D3+G3+B3 A2+E3+A3+C4 E2+B2+E3+G#3 A2+E3+A3+C4"
)
CANON = "!0.5 F#5/1 E5 D5 C#5 B4 A4 B4 C#5 !0.6 D5 C#5 B4 A4 G4 F#4 G4 E4 !0.7 D4/.5 F#4 A4 G4 F#4 D4 F#4 E4 D4 B3 D4 A4 G4 B4 A4 G4 "
ELISE = "E5 D#5 E5 B4 D5 C5 A4/2 -/1 C4 E4 A4 B4/2 -/1 E4 G#4 B4 C5/2 -/1 E4 E5 D#5 E5 D#5 E5 B4 D5 C5 A4/2 -/1 C4 E4 A4 B4/2 -/1 "
ELISE_LEFT = "-/6 A2/1 E3 A3 -/3 E2/1 E3 G#3 -/3 A2/1 E3 A3 -/3 -/6 A2/1 E3 A3 -/3 E2/1 E3 G#3 -/3 A2/1 E3 A3 -/3 "
SPRING = "G#5 G#5 G#5 F#5/.5 E5 B5/3 B5/.5 A5 G#5/1 G#5 G#5 F#5/.5 E5 B5/3 B5/.5 A5 G#5/1 A5/.5 B5 A5/1 G#5 F#5/3 "
SPRING_SECOND = "E5 E5 E5 D#5/.5 C#5 G#5/3 G#5/.5 F#5 E5/1 E5 E5 D#5/.5 C#5 G#5/3 G#5/.5 F#5 E5/1 F#5/.5 G#5 F#5/1 E5 D#5/3 "
SPRING_BASS = "E3 E3 E3 E3 E3 E3 E3 E3 E3 E3 E3 E3 E3 E3 E3 E3 E3 E3 A2 A2 B2/3 "
WALK = "{0}/.67 {0}/.33 {1}/.67 {1}/.33 {2}/.67 {2}/.33 {1}/.67 {1}/.33 "
BLUES_A, BLUES_D, BLUES_E = (WALK.format(*notes.split()) for notes in ("A2 C#3 E3", "D3 F#3 A3", "E3 G#3 B3"))
BEAT = (
    "!0.9 C2+F#2/.67 !0.3 F#2/.33 !0.8 D2+F#2/.67 !0.3 F#2/.33 !0.9 C2+F#2/.67 !0.5 C2+F#2/.33 !0.8 D2+F#2/.67 !0.4 A2/.33 "
)
RIFF = "!0.8 A4/.67 C5/.33 C#5/.67 E5/.33 F#5/.67 E5/1.33 !0.6 -/.67 A5/.33 G5/.67 E5/.33 C#5/1 A4/1 "
RIFF_D = "!0.8 D5/.67 F5/.33 F#5/.67 A5/.33 B5/.67 A5/1.33 !0.6 -/.67 D5/.33 C5/.67 A4/.33 F#4/1 D4/1 "

PIECES: dict[str, Piece] = {
    "train/bach_prelude_harp": Piece(
        68,
        (
            Part(harp, 1.0, "!0.6 " + broken(
                "C4+E4+G4+C5+E5 C4+D4+A4+D5+F5 B3+D4+G4+D5+F5 C4+E4+G4+C5+E5 C4+E4+A4+E5+A5 C4+D4+F#4+A4+D5 B3+D4+G4+D5+G5",
                "0123423401234234",
            ).replace(" ", "/.25 ", 1) + " C4+E4+G4+C5/4"),
        ),
        "J. S. Bach, Prelude in C, BWV 846 (1722), the opening",
    ),
    "train/minuet_harpsichord": Piece(
        132,
        (
            Part(harpsichord, 1.0,
                "!0.7 D5/1 G4/.5 A4 B4 C5 D5/1 G4 G4 E5 C5/.5 D5 E5 F#5 G5/1 G4 G4 C5 D5/.5 C5 B4 A4 B4/1 C5/.5 B4 A4 G4 "
                "F#4/1 G4/.5 A4 B4 G4 A4/3 D5/1 G4/.5 A4 B4 C5 D5/1 G4 G4 E5 C5/.5 D5 E5 F#5 G5/1 G4 G4 C5 D5/.5 C5 B4 A4 "
                "B4/1 C5/.5 B4 A4 G4 A4/1 B4/.5 A4 G4 F#4 G4/3"),
            Part(harpsichord, 0.8,
                "!0.6 G3+B3+D4/2 A3/1 B3/3 C4 B3 A3 G3 D4/1 B3 G3 D4 D3/.5 C4 B3 A3 B3/2 A3/1 G3 B3 G3 C4/3 B3/1 C4/.5 B3 A3 G3 "
                "A3/2 F#3/1 G3/2 B3/1 C4 D4 D3 G3/2 G2/1"),
        ),
        "C. Petzold, Minuet in G, BWV Anh. 114 (about 1725)",
    ),
    "train/canon_strings": Piece(
        66,
        (
            Part(strings, 0.8, CANON),
            Part(strings, 0.6, "-/8 " + CANON.split("!0.7")[0]),
            Part(strings, 0.9, "!0.5 " + "D3/1 A2 B2 F#2 G2 D2 G2 A2 " * 3 + "D3/3"),
            Part(harpsichord, 0.35, "!0.5 " + "D4+F#4/1 C#4+E4 B3+D4 A3+C#4 G3+B3 F#3+A3 G3+B3 A3+C#4 " * 3 + "D4+F#4+A4/3"),
        ),
        "J. Pachelbel, Canon in D (about 1690), the first entries",
    ),
    "train/ode_trumpet_organ": Piece(
        116,
        (
            Part(trumpet, 0.9,
                "!0.3 E4/1 E4 F4 G4 G4 F4 E4 D4 !0.4 C4 C4 D4 E4 E4/1.5 D4/.5 D4/2 !0.6 E4/1 E4 F4 G4 G4 F4 E4 D4 "
                "!0.8 C4 C4 D4 E4 D4/1.5 C4/.5 C4/2 !0.5 D4/1 D4 E4 C4 D4 E4/.5 F4 E4/1 C4 !0.7 D4 E4/.5 F4 E4/1 D4 C4 D4 G3/1 "
                "!1 E4/1 E4 E4 F4 G4 G4 F4 E4 D4 C4 C4 D4 E4 D4/1.5 C4/.5 C4/3"),
            Part(organ, 0.5,
                "!0.4 C3+G3+C4/4 G2+G3+B3 A2+A3+C4 C3+G3+C4/2 G2+G3+B3 !0.6 C3+G3+C4/4 G2+G3+B3 A2+A3+C4 G2+G3+B3/2 C3+G3+C4 "
                "!0.5 G2+G3+B3 C3+G3+C4 G2+G3+B3 C3+G3+C4 !0.7 G2+G3+B3 E3+G#3+B3 A2+A3+C4/1 D3+A3+C4 G2+G3+B3 "
                "!0.9 C3+G3+C4/5 G2+G3+B3/3 A2+A3+C4/1 G2+G3+B3/4 C3+G3+C4+E4/4"),
        ),
        "L. van Beethoven, theme of the Ninth Symphony's finale (1824)",
    ),
    "train/gymnopedie_flute_piano": Piece(
        80,
        (
            Part(flute, 0.6, "-/7 !0.5 F#5/1 A5 G5 F#5 C#5 B4 C#5 D5 A4/3 !0.4 F#4/9 -/1 !0.55 F#5/1 A5 G5 F#5 C#5 !0.35 B4 C#5 D5 A4/3"),
            Part(piano, 0.8, "!0.35 " + "G2/1 B3+D4+F#4/2 D2/1 A3+C#4+F#4/2 " * 6 + "D2+A3+C#4+F#4/3"),
        ),
        "E. Satie, first Gymnopédie (1888), the opening",
    ),
    "train/greensleeves_guitar_flute": Piece(
        168,
        (
            Part(flute, 0.5,
                "-/5 !0.5 A4/1 C5/2 D5/1 E5/1.5 F#5/.5 E5/1 D5/2 B4/1 G4/1.5 A4/.5 B4/1 C5/2 A4/1 A4/1.5 G#4/.5 A4/1 "
                "B4/2 G#4/1 E4/2 A4/1 C5/2 D5/1 E5/1.5 F#5/.5 E5/1 D5/2 B4/1 G4/1.5 A4/.5 B4/1 C5/1.5 B4/.5 A4/1 G#4/1.5 F#4/.5 G#4/1 "
                "A4/6 !0.8 G5/3 G5/1.5 F#5/.5 E5/1 D5/2 B4/1 G4/1.5 A4/.5 B4/1 !0.6 C5/2 A4/1 A4/1.5 G#4/.5 A4/1 B4/2 G#4/1 E4/3 A4/4"),
            Part(plucked, 0.9, "!0.5 " + broken("A2+E3+A3+C4 " + GUITAR, "012321").replace(" ", "/1 ", 1)),
        ),
        "Greensleeves (traditional, 1580)",
    ),
    "train/moonlight_piano": Piece(
        58,
        (
            Part(piano, 0.7, "!0.35 " + broken(
                "G#3+C#4+E4 G#3+C#4+E4 G#3+C#4+E4 G#3+C#4+E4 G#3+C#4+E4 G#3+C#4+E4 G#3+C#4+E4 G#3+C#4+E4 "
                "A3+C#4+E4 A3+C#4+E4 A3+D4+F#4 A3+D4+F#4 G#3+C4+F#4 G#3+C#4+E4 G#3+C#4+D#4 F#3+C4+D#4 "
                "E3+G#3+C#4 G#3+C#4+E4 G#3+C#4+E4 G#3+C#4+E4 G#3+D#4+F#4 G#3+D#4+F#4 G#3+D#4+F#4 G#3+D#4+F#4", "012",
            ).replace(" ", "/.3333 ", 1) + " G#3+C#4+E4/3"),
            Part(piano, 0.8, "!0.4 C#2+C#3/4 B1+B2 A1+A2/2 F#1+F#2 G#1+G#2/4 C#2+C#3/4 C2+C3/4 C#2+C#3/3"),
            Part(piano, 0.9, "-/19 !0.6 G#4/.75 G#4/.25 G#4/3 G#4/.75 G#4/.25 G#4/3"),
        ),
        "L. van Beethoven, Piano Sonata op. 27 no. 2 (1801), the opening",
    ),
    "train/blues_band": Piece(
        126,
        (
            Part(bass, 1.0, "!0.8 " + BLUES_A * 4 + BLUES_D * 2 + BLUES_A * 2 + BLUES_E + BLUES_D + BLUES_A + "A2/4"),
            Part(drums, 0.55, BEAT * 5 + BEAT * 5 + BEAT + BEAT[: BEAT.index("!0.8")]),
            Part(vibraphone, 0.6, "-/8 " + RIFF + RIFF_D + RIFF + "!0.9 E5/.67 G5/.33 G#5/.67 B5/2.33 A5/.67 F#5/.33 D5/3 !0.7 "
                + RIFF.split("-/.67")[0] + "A4+C#5+G5/4"),
            Part(organ, 0.14, "!0.4 " + "G3+C#4/.67 -/1.33 " * 8 + "F#3+C4/.67 -/1.33 " * 4 + "G3+C#4/.67 -/1.33 " * 4
                + "G#3+D4/.67 -/1.33 " * 2 + "F#3+C4/.67 -/1.33 " * 2 + "G3+C#4/.67 -/1.33 " * 2 + "G3+C#4/4"),
        ),
        "a twelve-bar blues of our own",
    ),
    "train/silent_night_music_box": Piece(
        108,
        (
            Part(music_box, 0.8,
                "!0.6 G5/1.5 A5/.5 G5/1 E5/3 G5/1.5 A5/.5 G5/1 E5/3 D6/2 D6/1 B5/3 C6/2 C6/1 G5/3 A5/2 A5/1 C6/1.5 B5/.5 A5/1 "
                "G5/1.5 A5/.5 G5/1 E5/3"),
            Part(music_box, 0.4, "!0.5 " + broken("C4+G4+E5 C4+G4+E5 C4+G4+E5 C4+G4+E5 G4+D5+F5 G4+D5+F5 C4+G4+E5 C4+G4+E5 "
                "F4+C5+A5 F4+C5+A5 C4+G4+E5 C4+G4+E5", "012").replace(" ", "/1 ", 1)),
        ),
        "F. X. Gruber, Silent Night (1818)",
    ),
    "valid/fur_elise_piano": Piece(
        290,
        (
            Part(piano, 0.9, "!0.45 E5/1 D#5 " + ELISE + "E4 C5 B4 !0.5 A4/2 -/1 B4 C5 D5 !0.7 E5/3 G4/1 F5 E5 D5/3 F4/1 E5 D5 "
                "!0.55 C5/3 E4/1 D5 C5 B4/2 -/1 E4/1 E5 -/1 !0.35 E5/1 D#5 " + ELISE
                + "E4 C5 B4 A4/4"),
            Part(piano, 0.7, "!0.35 -/2 " + ELISE_LEFT + "C3/1 G3 C4 -/3 G2/1 G3 B3 -/3 A2/1 E3 A3 -/3 E2/1 E3 E4 -/5 " + ELISE_LEFT),
        ),
        "L. van Beethoven, Bagatelle WoO 59 (1810), the opening",
    ),
    "valid/spring_strings": Piece(
        112,
        (
            Part(strings, 0.8, "!0.9 E5/1 " + SPRING + "!0.45 E5/1 " + SPRING + "E5/3"),
            Part(strings, 0.6, "!0.8 G#4/1 " + SPRING_SECOND + "!0.4 G#4/1 " + SPRING_SECOND + "G#4/3"),
            Part(strings, 0.7, "!0.7 E3/1 " + SPRING_BASS + "!0.4 E3/1 " + SPRING_BASS + "E2+E3/3"),
            Part(harpsichord, 0.3, ("!0.5 G#3+B3+E4/1 " + "G#3+B3+E4/2 " * 9 + "A3+C#4+E4 F#3+B3+D#4/3 ") * 2 + "G#3+B3+E4/3"),
        ),
        "A. Vivaldi, Spring (1725), the opening",
    ),
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- playing


def pitch(name: str) -> float:
    """Hz of a note such as C#4, equal temperament, A4 at 440."""
    letter, accidental, octave = re.fullmatch(r"([A-G])([#b]?)(\d)", name).groups()
    semitone = {"C": -9, "D": -7, "E": -5, "F": -4, "G": -2, "A": 0, "B": 2}[letter] + {"#": 1, "b": -1, "": 0}[accidental]
    return 440.0 * 2 ** (semitone / 12 + int(octave) - 4)


def notes(score: str) -> list[tuple[float, float, float, float]]:
    """(start in beats, length in beats, Hz, loudness) of every note of a line."""
    found, now, beats, loudness = [], 0.0, 1.0, 0.6
    for token in score.split():
        if token.startswith("!"):
            loudness = float(token[1:])
            continue
        names, _, length = token.partition("/")
        beats = float(length) if length else beats
        found += [(now, beats, pitch(name), loudness) for name in names.split("+") if name != "-"]
        now += beats
    return found


def play(piece: Piece, seed: int) -> np.ndarray:
    """The piece as samples with a peak of 0.7: every part, a little late or early as people are, and the room."""
    rng = np.random.default_rng([SEED, seed])
    beat = 60 / piece.tempo
    lines = [notes(part.score) for part in piece.parts]
    end = max(start + length for line in lines for start, length, _, _ in line) * beat
    mix = np.zeros(round((end + 2.5) * SAMPLE_RATE))
    for part, line in zip(piece.parts, lines, strict=True):
        for start, length, frequency, loudness in line:
            touch = np.clip(loudness * rng.uniform(0.9, 1.1), 0.05, 1.0)
            samples = part.instrument(frequency, 0.95 * length * beat, touch, rng)
            first = round(max(0, start * beat + rng.normal(0, 0.006)) * SAMPLE_RATE)
            samples = samples[: len(mix) - first]
            mix[first : first + len(samples)] += part.level * (0.25 + touch) ** 2 * samples
    mix = room(mix, rng)
    last = round((end + 1.2) * SAMPLE_RATE)
    mix = mix[:last] * np.minimum(1, (last - np.arange(last)) / (0.8 * SAMPLE_RATE))
    return 0.7 * mix / np.abs(mix).max()


def seed_of(name: str) -> int:
    """A number for each piece, the same everywhere."""
    return zlib.crc32(name.encode())


def room(dry: np.ndarray, rng: Random) -> np.ndarray:
    """A small hall: noise that decays over 1.1 s, duller as it fades, behind the direct sound."""
    time = np.arange(round(1.1 * SAMPLE_RATE)) / SAMPLE_RATE
    noise = rng.standard_normal(time.shape)
    tail = low_pass(noise, 4500) * np.exp(-time / 0.09) + low_pass(noise, 1600) * np.exp(-time / 0.2)
    tail *= np.minimum(1, time / 0.012)
    return dry + 0.32 * fftconvolve(dry, tail / np.sqrt((tail**2).sum()))[: len(dry)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"which clips; all if none is named: {', '.join(PIECES)}")
    parser.add_argument("--out", type=Path, default=HERE, help="folder for the clips (default: this one)")
    args = parser.parse_args()
    for name in args.names or PIECES:
        audio = play(PIECES[name], seed_of(name))
        write_audio(args.out / f"{name}.flac", torch.from_numpy(audio).unsqueeze(0), SAMPLE_RATE)
        print(f"{args.out / name}.flac  {len(audio) / SAMPLE_RATE:5.1f} s  {PIECES[name].source}", flush=True)


if __name__ == "__main__":
    main()
