"""What training will make of a folder: the files it uses, why it leaves out the others, and what to look at."""

import hashlib
import math
import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from s4audio.audio import (
    CLIPPED_RUN,
    DC_OFFSET,
    SILENT_PEAK,
    AudioError,
    clipped_runs,
    list_folder,
    missing_bytes,
    open_audio,
    read_audio,
    resample,
    to_mono,
)
from s4audio.data.loudness import LOWEST_RATE, STEP_SECONDS, integrated_loudness, k_weighting

SHORTEST_SECONDS = 0.01  # what is shorter is no recording
SHORT_SECONDS = 0.1  # what is shorter is mostly padding in a clip
SILENT_LEVEL = 1e-3  # -60 dB; 0.1 s with a lower level (RMS) count as silence
OVER = 2.0  # times full scale; decoders of MP3 and OGG go a little over it, floats may hold anything
MOSTLY_SILENT = 0.5  # of a recording
WARNINGS = {  # of a recording that training uses all the same
    "clipped": f"{CLIPPED_RUN} samples or more in a row at full scale",
    "over full scale": f"a peak above {OVER} times full scale",
    "DC offset": f"a mean farther than {DC_OFFSET} from 0",
    "near silent": "a peak below -80 dB",
    "mostly silent": "below -60 dB more than half of the time",
    "cut short": "the header promises more than is there",
    "short": f"less than {SHORT_SECONDS} s, padded with zeros",
}
FORMAT = 1  # of the report as JSON


class Sound(NamedTuple):
    """What was measured of a file, every sample of it; full scale is 1, or 0 dB."""

    seconds: float
    sample_rate: int  # Hz
    channels: int
    peak: float  # of the loudest channel
    loudness_lufs: float | None  # of all channels; None below 0.4 s, 4,000 Hz or -70 LUFS
    silent_share: float  # of the steps of 0.1 s, as mono, with a level (RMS) below -60 dB
    dc_offset: float  # the mean of the channel where it is farthest from 0
    clipped_runs: int  # of 3 samples or more at full scale
    silent: bool  # as mono, throughout
    cut_short: bool  # the header of a WAV file promises more
    fingerprint: str


class Recording(NamedTuple):
    """A file that training can use."""

    audio: Tensor  # (1, samples) mono, float32
    fingerprint: str  # of its samples as mono, at its own rate


class CheckedFile(NamedTuple):
    """One file, or one link or folder that cannot be entered."""

    path: Path
    rejected: AudioError | None  # None: training uses it
    warnings: tuple[str, ...]  # of a file that is used
    sound: Sound | None  # None if it could not be read to its end


def check_folder(
    folder: str | Path, workers: int | None = None, progress: Callable[[int, int], None] = lambda done, total: None
) -> list[CheckedFile]:
    """Every file of a folder, sorted by name, with what `AudioFolder` will do with it.

    A file is read in blocks, so memory does not grow with its length.

    Args:
        folder: searched recursively; links to folders are named, not followed. One file is taken too.
        workers: threads that read; None takes one for each core.
        progress: called with (files done, files in all).

    Raises:
        AudioError: nothing is there.
        ValueError: workers below 1.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"workers is {workers}; wanted at least 1.")
    files, others = list_folder(folder)
    found = [CheckedFile(path, error, (), None) for path, error in others.items()]
    seen: dict[str, Path] = {}
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        try:
            for number, (path, sound) in enumerate(zip(files, pool.map(_measure_or_refuse, files), strict=True), start=1):
                progress(number, len(files))
                if isinstance(sound, AudioError):
                    found.append(CheckedFile(path, sound, (), None))
                    continue
                error = refusal(path, sound.seconds, sound.silent) or copy_of(path, sound.fingerprint, seen)
                found.append(CheckedFile(path, error, () if error else warnings_about(sound), sound))
        finally:
            pool.shutdown(cancel_futures=True)  # after Ctrl-C, do not read the rest first
    return sorted(found)


def summarize(files: list[CheckedFile]) -> dict[str, Any]:
    """What `check_folder` found, in JSON's types: counts, minutes, ranges over the files that are kept, and every file.

    The length of a file that cannot be read to its end is not known, so its minutes are not in `found_minutes`.
    """
    kept = [file for file in files if file.rejected is None]
    sounds = [file.sound for file in kept if file.sound is not None]
    found_minutes, kept_minutes = (
        sum(file.sound.seconds for file in some if file.sound is not None) / 60 for some in (files, kept)
    )
    return {
        "format": FORMAT,
        "found": len(files), "read": sum(file.sound is not None for file in files), "kept": len(kept),
        "found_minutes": found_minutes, "kept_minutes": kept_minutes,
        "kept_share": kept_minutes / found_minutes if found_minutes else 0.0,
        "skipped": dict(Counter(file.rejected.reason for file in files if file.rejected is not None).most_common()),
        "warnings": dict(Counter(warning for file in kept for warning in file.warnings).most_common()),
        "sample_rates": dict(Counter(str(sound.sample_rate) for sound in sounds).most_common()),
        "channels": dict(Counter(str(sound.channels) for sound in sounds).most_common()),
        "lowest_median_highest": {
            "seconds": _range([sound.seconds for sound in sounds]),
            "peak_db": _range([decibels(sound.peak) for sound in sounds]),
            "loudness_lufs": _range([sound.loudness_lufs for sound in sounds if sound.loudness_lufs is not None]),
            "silent_share": _range([sound.silent_share for sound in sounds]),
            "dc_offset": _range([sound.dc_offset for sound in sounds]),
        },
        "files": [
            {
                "path": str(file.path),
                "reason": file.rejected.reason if file.rejected else None,
                "sentence": str(file.rejected) if file.rejected else None,
                "warnings": list(file.warnings),
                "sound": file.sound._asdict() if file.sound else None,
            }
            for file in files
        ],
    }  # fmt: skip


def read_recording(path: Path, sample_rate: int) -> Recording:
    """A file as training takes it, at `sample_rate` in Hz.

    Raises:
        AudioError: it cannot be read or is of no use; the same as `check_folder` says.
    """
    audio, rate = read_audio(path)
    error = refusal(path, audio.shape[-1] / rate, not audio.any())
    if error:
        raise error
    fingerprint = _fingerprint(rate)
    fingerprint.update(audio.numpy())
    return Recording(resample(audio, rate, sample_rate), fingerprint.hexdigest())


def refusal(path: Path, seconds: float, silent: bool) -> AudioError | None:
    """Why a recording that can be read is of no use to training; None if it is."""
    if seconds < SHORTEST_SECONDS:
        return AudioError(f"{path} is shorter than {SHORTEST_SECONDS} s.", "too short")
    if silent:
        return AudioError(f"{path} is silent.", "silent")
    return None


def copy_of(path: Path, fingerprint: str, seen: dict[str, Path]) -> AudioError | None:
    """Why a recording is left out if one before it, in `seen`, is the same; else None, and it is added to `seen`.

    With one copy in the training files and one held out, the score would be that of a good memory.
    """
    if fingerprint in seen:
        return AudioError(f"{path} holds the same samples as {seen[fingerprint]}.", "duplicate")
    seen[fingerprint] = path
    return None


def warnings_about(sound: Sound) -> tuple[str, ...]:
    """Which of `WARNINGS` hold."""
    found = {
        "clipped": sound.clipped_runs > 0,
        "over full scale": sound.peak > OVER,
        "DC offset": abs(sound.dc_offset) > DC_OFFSET * max(1.0, sound.peak),
        "near silent": sound.peak < SILENT_PEAK,
        "mostly silent": sound.silent_share > MOSTLY_SILENT,
        "cut short": sound.cut_short,
        "short": sound.seconds < SHORT_SECONDS,
    }
    return tuple(warning for warning in WARNINGS if found[warning])


def measure(path: Path) -> Sound:
    """What is in a file, read in blocks.

    Raises:
        AudioError: it cannot be read to its end.
    """
    from scipy.signal import sosfilt

    blocks, rate = open_audio(path)
    fingerprint, weighting = _fingerprint(rate), k_weighting(rate) if rate >= LOWEST_RATE else None
    length, num_clipped, peak, silent = 0, 0, 0.0, True
    squares: list[np.ndarray] = []  # of the K-weighted channels and of the mono mix, (2, samples) of a block
    powers, step = [np.zeros((2, 0))], round(STEP_SECONDS * rate)  # their means over each step
    for audio in blocks:
        samples, mono = audio.numpy(), to_mono(audio).numpy()
        if length == 0:
            channels, before = len(samples), audio[:, :0]
            total, state = np.zeros(channels), np.zeros((2, channels, 2))
        length += samples.shape[-1]
        total += samples.sum(axis=-1, dtype=np.float64)
        peak, silent = max(peak, float(np.abs(samples).max())), silent and not mono.any()
        joined = torch.cat([before, audio], dim=-1)  # a run may have begun in the block before
        num_clipped += clipped_runs(joined) - clipped_runs(before)
        before = joined[:, -CLIPPED_RUN:]
        fingerprint.update(mono)
        weighted = np.zeros(mono.shape)
        if weighting is not None:
            weighted, state = sosfilt(weighting, samples, zi=state)
        squares.append(np.stack([np.square(weighted).sum(axis=0), np.square(mono[0], dtype=np.float64)]))
        ready = np.concatenate(squares, axis=-1)
        whole = ready.shape[-1] // step * step
        powers.append(ready[:, :whole].reshape(2, -1, step).mean(axis=-1))
        squares = [ready[:, whole:]]
    weighted_powers, mono_powers = np.concatenate(powers, axis=-1)
    if length < step:
        mono_powers = squares[0][1].mean(keepdims=True)
    return Sound(
        seconds=length / rate, sample_rate=rate, channels=channels, peak=peak,
        loudness_lufs=integrated_loudness(weighted_powers) if weighting is not None else None,
        silent_share=float((mono_powers < SILENT_LEVEL**2).mean()), dc_offset=float(total[np.abs(total).argmax()] / length),
        clipped_runs=num_clipped, silent=silent, cut_short=missing_bytes(path) > 0, fingerprint=fingerprint.hexdigest(),
    )  # fmt: skip


def decibels(level: float) -> float:
    """Of a level where 1 is full scale."""
    return 20 * math.log10(level)


def _range(values: list[float]) -> list[float] | None:
    return [float(value) for value in np.percentile(values, [0, 50, 100])] if values else None


def _measure_or_refuse(path: Path) -> Sound | AudioError:
    try:
        return measure(path)
    except AudioError as error:
        return error


def _fingerprint(sample_rate: int) -> Any:
    """The beginning of a hash of mono samples at a rate, the same for the same recording in WAV and in FLAC."""
    return hashlib.sha256(f"{sample_rate} Hz ".encode())
