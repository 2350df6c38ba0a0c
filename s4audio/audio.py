"""Audio in and out: reading, writing, resampling, levels. Nothing else here imports soundfile, soxr, librosa or torchaudio.

Audio is a float32 tensor (channels, samples) with full scale at 1; rates are in Hz.
"""

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

EXTENSIONS = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aif", ".aiff", ".au", ".caf", ".w64", ".m4a")
NORMALIZATIONS = ("none", "peak")


class AudioError(ValueError):
    """A file that cannot be used as audio; the message says why and what to do."""


def find_audio(path: str | Path) -> list[Path]:
    """The audio files at `path`, a file or a folder searched recursively, sorted by name.

    Raises:
        AudioError: nothing is there, or nothing with a known extension.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise AudioError(f"{path} does not exist; give an audio file or a folder of audio files.")
    # os.walk does not follow links to folders, so a link to a parent folder cannot make it run in circles.
    found = [Path(folder) / name for folder, _, names in os.walk(path) for name in names]
    files = sorted(file for file in found if file.suffix.lower() in EXTENSIONS and file.is_file())
    if not files:
        raise AudioError(f"{path} holds no audio file (looked for {', '.join(EXTENSIONS)}, in subfolders too).")
    return files


def read_audio(path: str | Path, sample_rate: int | None = None, mono: bool = True) -> tuple[Tensor, int]:
    """A whole file as (channels, samples) float32, and its rate in Hz.

    Args:
        path: WAV, FLAC, OGG, MP3 and what else libsndfile reads; other formats through librosa where a decoder is installed.
        sample_rate: resample to this rate in Hz; None keeps the file's.
        mono: average the channels into one.

    Raises:
        AudioError: the file is missing, unreadable, empty, or holds a value that is not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise AudioError(f"{path} does not exist.")
    try:
        samples, rate = _decode(path)
    except Exception as error:  # the decoders raise what they please; the reader of the message wants one sentence
        raise AudioError(f"{path} cannot be read as audio ({str(error).strip() or type(error).__name__}).") from error
    if samples.shape[-1] == 0:
        raise AudioError(f"{path} holds no samples.")
    audio = torch.from_numpy(samples)
    if not torch.isfinite(audio).all():
        raise AudioError(f"{path} holds {int((~torch.isfinite(audio)).sum())} samples that are not finite numbers.")
    if mono:
        audio = audio.mean(0, keepdim=True)
    if sample_rate is not None and rate != sample_rate:
        audio, rate = resample(audio, rate, sample_rate), sample_rate
    return audio, rate


def write_audio(path: str | Path, audio: Tensor, sample_rate: int) -> int:
    """Writes (channels, samples) as a 16-bit WAV or FLAC file; returns how many samples were clipped.

    Nothing is rescaled: what is beyond full scale is clipped, and counted. The file appears whole or not at all.

    Raises:
        AudioError: a value is not finite, or the format is unknown.
    """
    import soundfile

    path = Path(path)
    samples = audio.detach().cpu().float().numpy()
    if not np.isfinite(samples).all():
        raise AudioError(f"the audio for {path} holds values that are not finite numbers; nothing was written.")
    kind = path.suffix.lstrip(".").upper()
    if kind not in ("WAV", "FLAC"):
        raise AudioError(f"{path}: {path.suffix or 'no extension'} is not a format this can write; use .wav or .flac.")
    path.parent.mkdir(parents=True, exist_ok=True)
    num_clipped = int((np.abs(samples) > 1).sum())
    # Rounding here, not in the encoder, makes the bytes the same whatever the format.
    pcm = np.clip(np.round(samples * 32767), -32768, 32767).astype(np.int16)
    temporary = path.with_name(f".{path.name}.new")
    try:
        with open(temporary, "wb") as file:
            soundfile.write(file, pcm.T, sample_rate, format=kind, subtype="PCM_16")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return num_clipped


def resample(audio: Tensor, from_rate: int, to_rate: int) -> Tensor:
    """(channels, samples) at another rate, by soxr at its high quality; ceil(samples * to / from) samples."""
    import soxr

    if from_rate == to_rate:
        return audio
    length = -(-audio.shape[-1] * to_rate // from_rate)
    resampled = torch.from_numpy(soxr.resample(audio.numpy().T, from_rate, to_rate, quality="HQ").T.copy())
    return torch.nn.functional.pad(resampled, (0, length - resampled.shape[-1]))


def normalize(audio: Tensor, how: str) -> Tensor:
    """The audio at another level: `none` leaves it, `peak` brings the loudest sample to full scale. Silence stays silence.

    Raises:
        ValueError: an unknown way.
    """
    if how not in NORMALIZATIONS:
        raise ValueError(f"normalize is {how!r}; choose one of {', '.join(NORMALIZATIONS)}.")
    peak = audio.abs().amax()
    return audio if how == "none" or peak == 0 else audio / peak


def mel_filterbank(sample_rate: int, n_fft: int, n_mels: int) -> Tensor:
    """(n_fft / 2 + 1, n_mels) triangular filters on the Slaney mel scale, from 0 Hz to half the rate.

    Raises:
        RuntimeError: torchaudio cannot be imported.
    """
    try:
        from torchaudio.functional import melscale_fbanks
    except (ImportError, OSError, RuntimeError) as error:  # a CPU-only torch fails in torchaudio's own library loading
        raise RuntimeError(
            "mel filters need torchaudio, which cannot be imported here (it wants the torch build it was made for: "
            f"torch 2.11 with torchaudio 2.11 from the same source). Everything else works without it. [{error}]"
        ) from error
    return melscale_fbanks(n_fft // 2 + 1, 0.0, sample_rate / 2, n_mels, sample_rate, norm="slaney", mel_scale="slaney")


def _decode(path: Path) -> tuple[np.ndarray, int]:
    """(channels, samples) float32 and the rate, by soundfile, or by librosa for what soundfile does not know."""
    import soundfile

    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
        return np.ascontiguousarray(samples.T), rate
    except soundfile.LibsndfileError:
        if path.suffix.lower() not in (".m4a", ".opus", ".mp3", ".caf"):
            raise
    import librosa

    samples, rate = librosa.load(path, sr=None, mono=False, dtype=np.float32)
    return np.atleast_2d(samples), int(rate)
