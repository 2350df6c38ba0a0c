"""Audio in and out: reading, writing, resampling, levels. Nothing else here imports soundfile, soxr, librosa or torchaudio.

Audio is a float32 tensor (channels, samples) with full scale at 1; rates are in Hz.
"""

import io
import os
import shutil
import struct
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from s4audio.files import replacing

EXTENSIONS = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aif", ".aiff", ".au", ".caf", ".w64", ".m4a")
LIBROSA_TOO = (".m4a", ".opus", ".mp3", ".caf")  # what librosa may read where libsndfile cannot
NORMALIZATIONS = ("none", "peak")
MAX_CHANNELS = 8  # 7.1 surround; more is data of another kind, or a damaged header
PCM_FORMATS = {"s16": "<i2", "f32": "<f4"}  # of raw samples, in numpy's words
RESAMPLER = "soxr, high quality"
WAV_HEADER = struct.Struct("<4sI4s4sIHHIIHH4sI")  # RIFF, fmt and data, for PCM
WAV_BYTES = 2**32 - WAV_HEADER.size  # of samples that the header can say


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


def sample_rate_of(path: str | Path) -> int | None:
    """The rate in Hz that a file's header says; None where only decoding tells, or nothing does."""
    import soundfile

    try:
        return int(soundfile.info(path).samplerate)
    except (soundfile.LibsndfileError, OSError):
        return None


def read_audio(path: str | Path, sample_rate: int | None = None, mono: bool = True) -> tuple[Tensor, int]:
    """A whole file as (channels, samples) float32, and its rate in Hz.

    Args:
        path: WAV, FLAC, OGG, MP3 and what else libsndfile reads; other formats through librosa where a decoder is installed.
        sample_rate: resample to this rate in Hz; None keeps the file's.
        mono: average the channels into one.

    Raises:
        AudioError: the file is missing, unreadable, empty, of more than 8 channels, or holds a value that is not finite.
    """
    path = Path(path)
    with _in_a_sentence(path):
        samples, rate = _decode(path)
    if samples.shape[-1] == 0:
        raise AudioError(f"{path} holds no samples.")
    audio = torch.from_numpy(samples)
    _check(path, audio)
    if mono:
        audio = audio.mean(0, keepdim=True)
    if sample_rate is not None and rate != sample_rate:
        audio, rate = resample(audio, rate, sample_rate), sample_rate
    return audio, rate


def read_blocks(
    path: str | Path, sample_rate: int | None = None, mono: bool = True, block_seconds: float = 1.0
) -> Iterator[Tensor]:
    """The samples of `read_audio` in blocks (channels, samples), one at a time: memory does not grow with the file.

    Formats that only librosa reads (M4A) are decoded whole first. A file that is damaged in its middle is refused, also
    where another decoder would get over it. The blocks of a resampled file have varying lengths.

    Args:
        path: as `read_audio`.
        sample_rate: as `read_audio`.
        mono: as `read_audio`.
        block_seconds: of the file in each block.

    Raises:
        AudioError: as `read_audio`, at the block where it shows.
    """
    import soxr

    blocks, rate = _decode_blocks(Path(path), block_seconds)
    target = sample_rate or rate
    resampler, read, given = None, 0, 0
    for samples in blocks:
        audio = torch.from_numpy(samples)
        _check(Path(path), audio)
        if mono:
            audio = audio.mean(0, keepdim=True)
        read += audio.shape[-1]
        if target != rate:
            resampler = resampler or soxr.ResampleStream(rate, target, audio.shape[0], dtype="float32", quality="HQ")
            audio = torch.from_numpy(resampler.resample_chunk(audio.numpy().T).T.copy())
        given += audio.shape[-1]
        if audio.shape[-1]:
            yield audio
    if read == 0:
        raise AudioError(f"{path} holds no samples.")
    if resampler is not None:
        rest = resampler.resample_chunk(np.zeros((0, audio.shape[0]), dtype=np.float32), last=True)
        missing = _resampled_length(read, rate, target) - given
        yield torch.nn.functional.pad(torch.from_numpy(rest.T.copy()), (0, missing - len(rest)))


def write_audio(path: str | Path, audio: Tensor, sample_rate: int) -> int:
    """Writes (channels, samples) as a 16-bit WAV or FLAC file; returns how many samples were clipped.

    Nothing is rescaled: what is beyond full scale is clipped, and counted. The file appears whole or not at all.

    Raises:
        AudioError: a value is not finite, or the format is unknown.
        OSError: the file cannot be written.
    """
    path = Path(path)
    kind = path.suffix.lstrip(".").upper()
    if kind not in ("WAV", "FLAC"):
        raise AudioError(f"{path}: {path.suffix or 'no extension'} is not a format this can write; use .wav or .flac.")
    if kind == "WAV":
        return write_blocks(path, [audio], sample_rate)
    encoded = encode(audio, sample_rate, "FLAC")  # in memory, since libsndfile turns a full disk into an assertion
    with replacing(path) as file:
        file.write(encoded)
    return int((audio.abs() > 1).sum())


def encode(audio: Tensor, sample_rate: int, file_format: str) -> bytes:
    """(channels, samples) as the bytes of a 16-bit FLAC or WAV file; what is beyond full scale is clipped.

    Raises:
        AudioError: a value is not finite.
    """
    import soundfile

    encoded = io.BytesIO()
    soundfile.write(encoded, _to_pcm(audio), sample_rate, format=file_format, subtype="PCM_16")
    return encoded.getvalue()


def write_blocks(path: str | Path, blocks: Iterable[Tensor], sample_rate: int) -> int:
    """Writes blocks (channels, samples) one after the other as one 16-bit WAV file; returns how many samples were clipped.

    The blocks are asked for one at a time. If that or the writing fails, no file is left.

    Raises:
        AudioError: a value is not finite, or the file would be longer than WAV can say (4 GiB).
        OSError: the file cannot be written.
    """
    path = Path(path)
    num_bytes, num_clipped, channels = 0, 0, 1
    with replacing(path) as file:
        file.write(bytes(WAV_HEADER.size))
        for block in blocks:
            pcm = _to_pcm(block)
            num_bytes, num_clipped = num_bytes + pcm.nbytes, num_clipped + int((block.abs() > 1).sum())
            channels = pcm.shape[1]
            if num_bytes > WAV_BYTES:
                raise AudioError(f"{path} would be longer than the 4 GiB that a WAV file can hold; use shorter recordings.")
            file.write(pcm.astype("<i2").tobytes())
        frame = 2 * channels
        file.seek(0)
        file.write(
            WAV_HEADER.pack(
                b"RIFF", num_bytes + WAV_HEADER.size - 8, b"WAVE", b"fmt ", 16, 1, channels, sample_rate,
                sample_rate * frame, frame, 16, b"data", num_bytes,
            )
        )  # fmt: skip
    return num_clipped


def resample(audio: Tensor, from_rate: int, to_rate: int) -> Tensor:
    """(channels, samples) at another rate, by soxr at its high quality; ceil(samples * to / from) samples."""
    import soxr

    if from_rate == to_rate:
        return audio
    length = _resampled_length(audio.shape[-1], from_rate, to_rate)
    resampled = torch.from_numpy(soxr.resample(audio.numpy().T, from_rate, to_rate, quality="HQ").T.copy())
    return torch.nn.functional.pad(resampled, (0, length - resampled.shape[-1]))


def band_limit(audio: Tensor, sample_rate: int, kept_rate: int) -> Tensor:
    """(channels, samples) as kept_rate numbers a second can say it, by resampling there and back; a baseline."""
    back = resample(resample(audio, sample_rate, kept_rate), kept_rate, sample_rate)[..., : audio.shape[-1]]
    return torch.nn.functional.pad(back, (0, audio.shape[-1] - back.shape[-1]))


def decoders() -> tuple[str, list[str]]:
    """The version of the library that reads audio files, and the formats that can be read here."""
    import soundfile

    known = soundfile.available_formats()
    formats = [name for name, key in (("WAV", "WAV"), ("FLAC", "FLAC"), ("OGG", "OGG"), ("MP3", "MP3")) if key in known]
    if shutil.which("ffmpeg"):  # what librosa's own fallback calls
        formats.append("M4A")
    return f"libsndfile {soundfile.__libsndfile_version__} through soundfile {soundfile.__version__}", formats


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


@contextmanager
def _in_a_sentence(path: Path) -> Iterator[None]:
    """Turns whatever a decoder raises into an AudioError."""
    if not path.is_file():
        raise AudioError(f"{path} does not exist." if not path.exists() else f"{path} is a folder; give an audio file.")
    if path.stat().st_size == 0:
        raise AudioError(f"{path} is an empty file.")
    try:
        yield
    except Exception as error:  # the decoders raise what they please; the reader of the message wants one sentence
        raise AudioError(f"{path} cannot be read as audio ({str(error).strip() or type(error).__name__}).") from error


def _check(path: Path, audio: Tensor) -> None:
    if audio.shape[0] > MAX_CHANNELS:
        raise AudioError(f"{path} has {audio.shape[0]} channels; recordings of up to {MAX_CHANNELS} can be used.")
    finite = torch.isfinite(audio)
    if not finite.all():
        raise AudioError(f"{path} holds samples that are not finite numbers ({int((~finite).sum())} of them).")


def _resampled_length(length: int, from_rate: int, to_rate: int) -> int:
    return -(-length * to_rate // from_rate)


def _decode(path: Path) -> tuple[np.ndarray, int]:
    """(channels, samples) float32 and the rate, by soundfile, or by librosa for what soundfile does not know."""
    import soundfile

    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
        return np.ascontiguousarray(samples.T), rate
    except soundfile.LibsndfileError:
        if path.suffix.lower() not in LIBROSA_TOO:
            raise
    import librosa

    with warnings.catch_warnings():  # that it falls back on another decoder is what we ask of it
        warnings.simplefilter("ignore")
        samples, rate = librosa.load(path, sr=None, mono=False, dtype=np.float32)
    return np.atleast_2d(samples), int(rate)


def _decode_blocks(path: Path, block_seconds: float) -> tuple[Iterator[np.ndarray], int]:
    """Blocks (channels, samples) float32, and the rate."""
    import soundfile

    class InOrder(soundfile.SoundFile):
        """soundfile seeks after each read where a file can seek, and an MP3 decoder that seeks forgets what it carried."""

        def seekable(self) -> bool:
            return False

    with _in_a_sentence(path):
        try:
            file = InOrder(path)
        except soundfile.LibsndfileError:
            if path.suffix.lower() not in LIBROSA_TOO:
                raise
            samples, rate = _decode(path)
            length = max(1, round(block_seconds * rate))
            return iter([samples[:, i : i + length] for i in range(0, samples.shape[1], length)]), rate

    def blocks() -> Iterator[np.ndarray]:
        length = max(1, round(block_seconds * file.samplerate))
        with file:
            while True:
                with _in_a_sentence(path):
                    samples = file.read(length, dtype="float32", always_2d=True)
                if len(samples) == 0:
                    return
                yield np.ascontiguousarray(samples.T)

    return blocks(), file.samplerate


def from_pcm(data: bytes, sample_format: str) -> Tensor:
    """(1, samples) float32 from the bytes of whole samples, mono and little-endian: `s16` or `f32`, a key of PCM_FORMATS."""
    samples = np.frombuffer(data, PCM_FORMATS[sample_format]).astype(np.float32)
    return torch.from_numpy(samples / 32768 if sample_format == "s16" else samples).unsqueeze(0)


def to_pcm(audio: Tensor, sample_format: str) -> bytes:
    """The bytes of (1, samples), as `from_pcm` reads them; `s16` clips what is beyond full scale.

    Raises:
        AudioError: a value is not finite.
    """
    samples = _to_pcm(audio) if sample_format == "s16" else _finite(audio)
    return samples.astype(PCM_FORMATS[sample_format]).tobytes()


def _finite(audio: Tensor) -> np.ndarray:
    samples = audio.detach().cpu().float().numpy()
    if not np.isfinite(samples).all():
        raise AudioError("the audio to write holds values that are not finite numbers; nothing was written.")
    return samples


def _to_pcm(audio: Tensor) -> np.ndarray:
    """(samples, channels) 16-bit numbers. Rounding here, not in the encoder, makes them the same whatever the format."""
    return np.clip(np.round(_finite(audio) * 32767), -32768, 32767).astype(np.int16).T
