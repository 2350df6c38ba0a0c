"""Audio in and out: reading, writing, resampling, levels. Nothing else here imports soundfile, soxr, librosa or torchaudio.

Audio is a float32 tensor (channels, samples) with full scale at 1; rates are in Hz.
"""

import io
import math
import os
import shutil
import stat
import struct
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from s4audio.files import replacing

EXTENSIONS = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aif", ".aiff", ".au", ".caf", ".w64", ".m4a")
LIBROSA_TOO = (".m4a", ".opus", ".mp3", ".caf")  # what librosa may read where libsndfile cannot
NORMALIZATIONS = ("none", "peak")
QUANTIZATIONS = ("linear", "mu_law")
NOT_AUDIO = "not audio"  # the reason of an AudioError
MAX_CHANNELS = 8  # 7.1 surround; more is data of another kind, or a damaged header
MIN_RATE, MAX_RATE = 100, 768_000  # Hz; what says another is damaged, and at 1 Hz a second would become hours
MAX_LEVEL = 1e10  # of a sample, full scale being 1: floats may be beyond it, but not beyond integers of 32 bits
BLOCK_SECONDS = 4.0  # decoded at once
CLIPPED_RUN, CLIPPED_LEVEL = 3, 0.999  # samples in a row at full scale
DC_OFFSET = 0.01  # -40 dB; a mean beyond it is one
SILENT_PEAK = 1e-4  # -80 dB; a recording that stays below it is as good as silent
LIBROSA = threading.Lock()  # one thread at a time, since warnings are switched off for all of them
PCM_FORMATS = {"s16": "<i2", "f32": "<f4"}  # of raw samples, in numpy's words
RESAMPLER = "soxr, high quality"
WAV_HEADER = struct.Struct("<4sI4s4sIHHIIHH4sI")  # RIFF, fmt and data, for PCM
OPEN_LENGTH = 2**31 - 2**16  # of a WAV file's samples: programs that do not know it write 2^31 or 2^32, less a little
WAV_BYTES = 2**32 - WAV_HEADER.size  # of samples that the header can say


class AudioError(ValueError):
    """A file that cannot be used as audio; the message says why and what to do, `reason` the why in a word or two."""

    def __init__(self, message: str, reason: str = "unreadable") -> None:
        super().__init__(message)
        self.reason = reason

    @property
    def passing(self) -> bool:
        """Whether it may be over at the next try, the file being as it is: the system refused, or another wrote to it."""
        return self.reason == "changed" or isinstance(self.__cause__, (OSError, MemoryError))


def find_audio(path: str | Path) -> list[Path]:
    """The audio files at `path`, a file or a folder searched recursively, sorted by name.

    Raises:
        AudioError: nothing is there, or nothing with a known extension that can be reached.
    """
    files, others = list_folder(path)
    if not files:
        barred = [error for error in others.values() if error.reason != NOT_AUDIO]
        more = f" What else is there cannot be used; the first: {barred[0]}" if barred else ""
        raise AudioError(
            f"{path} holds no audio file (looked for {', '.join(EXTENSIONS)}, in subfolders too).{more}", "no files"
        )
    return files


def list_folder(path: str | Path) -> tuple[list[Path], dict[Path, AudioError]]:
    """The audio files at `path`, by their extension, and why everything else there is none; both sorted by name.

    Subfolders are searched. Links to folders are not followed, lest one makes it run in circles. No file is opened.

    Raises:
        AudioError: nothing is there.
    """
    path = Path(path)
    if os.path.isfile(path):
        return [path], {}
    if not os.path.isdir(path):
        raise AudioError(f"{path} does not exist; give an audio file or a folder of audio files.", "missing")
    files: list[Path] = []
    others: dict[Path, AudioError] = {}

    def barred(error: OSError) -> None:
        others[Path(error.filename)] = AudioError(f"{error.filename} cannot be listed ({error.strerror}).", "no permission")

    for folder, subfolders, names in os.walk(path, onerror=barred):
        for link in (Path(folder) / name for name in subfolders if os.path.islink(os.path.join(folder, name))):
            advice = "which is not followed; give that folder itself, or copy it"
            others[link] = AudioError(f"{link} is a link to a folder, {advice}.", "link to a folder")
        for file in (Path(folder) / name for name in names):
            if file.suffix.lower() not in EXTENSIONS:
                what = f"the extension {file.suffix}" if file.suffix else "no extension"
                others[file] = AudioError(f"{file} has {what}, so it is not taken for audio.", NOT_AUDIO)
            elif os.path.islink(file) and not os.path.exists(file):
                others[file] = AudioError(f"{file} is a link that leads to no file.", "broken link")
            else:
                files.append(file)
    return sorted(files), dict(sorted(others.items()))


def sample_rate_of(path: str | Path) -> int | None:
    """The rate in Hz that a file's header says; None where only decoding tells, or nothing does."""
    import soundfile

    try:
        return int(soundfile.info(os.fsencode(path)).samplerate)
    except (soundfile.LibsndfileError, OSError):
        return None


def read_audio(path: str | Path, sample_rate: int | None = None, mono: bool = True) -> tuple[Tensor, int]:
    """A whole file as (channels, samples) float32, and its rate in Hz.

    Args:
        path: WAV, FLAC, OGG, MP3 and what else libsndfile reads; other formats through librosa where a decoder is installed.
        sample_rate: resample to this rate in Hz; None keeps the file's.
        mono: average the channels into one.

    Raises:
        AudioError: as `open_audio`.
    """
    blocks, rate = open_audio(path)
    audio = torch.cat([to_mono(block) if mono else block for block in blocks], dim=-1)
    if sample_rate is not None and rate != sample_rate:
        audio, rate = resample(audio, rate, sample_rate), sample_rate
    return audio, rate


def read_blocks(
    path: str | Path, sample_rate: int | None = None, mono: bool = True, block_seconds: float = 1.0
) -> Iterator[Tensor]:
    """The samples of `read_audio` in blocks (channels, samples), one at a time: memory does not grow with the file.

    Formats that only librosa reads (M4A) are decoded whole first. The blocks of a resampled file have varying lengths.

    Args:
        path: as `read_audio`.
        sample_rate: as `read_audio`.
        mono: as `read_audio`.
        block_seconds: of the file in each block.

    Raises:
        AudioError: as `open_audio`, at the block where it shows.
    """
    import soxr

    blocks, rate = open_audio(path, block_seconds)
    target = sample_rate or rate
    resampler, read, given = None, 0, 0
    for audio in blocks:
        if mono:
            audio = to_mono(audio)
        read += audio.shape[-1]
        if target != rate:
            resampler = resampler or soxr.ResampleStream(rate, target, audio.shape[0], dtype="float32", quality="HQ")
            audio = torch.from_numpy(resampler.resample_chunk(audio.numpy().T).T.copy())
        given += audio.shape[-1]
        if audio.shape[-1]:
            yield audio
    if resampler is not None:
        rest = resampler.resample_chunk(np.zeros((0, audio.shape[0]), dtype=np.float32), last=True)
        missing = _resampled_length(read, rate, target) - given
        yield torch.nn.functional.pad(torch.from_numpy(rest.T.copy()), (0, missing - len(rest)))


def missing_bytes(path: str | Path) -> int:
    """How many bytes of samples the header of a WAV file promises beyond the end of the file.

    0 for files of other kinds, and where the header leaves the length open, as what is written into a pipe does.
    """
    with open(path, "rb") as file:
        riff, _, wave = struct.unpack("<4sI4s", file.read(12).ljust(12, b"\0"))
        while (riff, wave) == (b"RIFF", b"WAVE") and len(head := file.read(8)) == 8:
            name, length = struct.unpack("<4sI", head)
            if name == b"data":
                return 0 if length >= OPEN_LENGTH else max(0, file.tell() + length - os.fstat(file.fileno()).st_size)
            file.seek(length + length % 2, os.SEEK_CUR)
    return 0


def open_audio(path: str | Path, block_seconds: float = BLOCK_SECONDS) -> tuple[Iterator[Tensor], int]:
    """The samples of a file as they are, in blocks (channels, samples) float32, one sample or more; and its rate in Hz.

    What the header says is not believed: no more memory is taken than a block wants, and every block is looked at.

    Raises:
        AudioError: the file is missing, may not be read, is unreadable, empty, of more than 8 channels, at a rate that no
            recording has, holds a value that is not finite or far beyond full scale, or changes while it is read; at the
            block where it shows.
    """
    path = Path(path)
    before = _look(path)
    with _in_a_sentence(path):
        blocks, channels, rate = _decode_blocks(path, block_seconds)
    if channels > MAX_CHANNELS:
        raise AudioError(f"{path} has {channels} channels; recordings of up to {MAX_CHANNELS} can be used.", "channels")
    if not MIN_RATE <= rate <= MAX_RATE:
        wanted = f"recordings of {MIN_RATE} to {MAX_RATE:,} Hz can be used"
        raise AudioError(f"{path} says that its sample rate is {rate:,} Hz; {wanted}.", "sample rate")

    def checked() -> Iterator[Tensor]:
        read = 0
        while True:
            with _in_a_sentence(path):
                samples = next(blocks, None)
            if samples is None:
                break
            sound = np.abs(samples).max(axis=0) <= MAX_LEVEL  # not where it is nan
            if not sound.all():
                first = int(sound.argmin())
                what, reason = "that are not finite numbers", "not finite"
                if np.isfinite(samples[:, first]).all():
                    what, reason = f"beyond {MAX_LEVEL:.0e} times full scale", "level"
                raise AudioError(f"{path} holds samples {what}, from {(read + first) / rate:.3f} s on.", reason)
            read += samples.shape[-1]
            yield torch.from_numpy(samples)
        if _look(path) != before:
            raise AudioError(f"{path} changed while it was read; give the command again when it is whole.", "changed")
        if read == 0:
            raise AudioError(f"{path} holds no samples.", "no samples")

    return checked(), rate


def write_audio(path: str | Path, audio: Tensor, sample_rate: int) -> int:
    """Writes (channels, samples) as a 16-bit WAV or FLAC file; returns how many samples were clipped.

    Nothing is rescaled: what is beyond full scale is clipped, and counted. The file appears whole or not at all.

    Raises:
        AudioError: the audio is empty, or not of that shape or of floating-point numbers; a value is not finite; or the
            format or the rate is unknown.
        OSError: the file cannot be written.
    """
    path = Path(path)
    if audio.dim() != 2 or not audio.numel() or not audio.is_floating_point():
        raise AudioError(
            f"{path}: the audio is {audio.dtype} of shape {tuple(audio.shape)}; wanted floating-point numbers of shape "
            "(channels, samples), with 1 for full scale."
        )
    if sample_rate < 1:
        raise AudioError(f"{path}: the sample rate is {sample_rate}; wanted at least 1 Hz.")
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


def to_mono(audio: Tensor) -> Tensor:
    """(1, samples), the mean of (channels, samples); the same bits whatever the length."""
    return torch.from_numpy(audio.numpy().mean(axis=0, keepdims=True))


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


def readers() -> str:
    """All that `read_audio` reads and resamples with, and its versions: the same has the same samples of the same file."""
    library, formats = decoders()
    return f"{library}, librosa {version('librosa')}; {', '.join(formats)}; {RESAMPLER}, {version('soxr')}"


def normalize(audio: Tensor, how: str) -> Tensor:
    """The audio at another level: `none` leaves it, `peak` brings the loudest sample to full scale. Silence stays silence.

    Raises:
        ValueError: an unknown way.
    """
    if how not in NORMALIZATIONS:
        raise ValueError(f"normalize is {how!r}; choose one of {', '.join(NORMALIZATIONS)}.")
    peak = audio.abs().amax()
    return audio if how == "none" or peak == 0 else audio / peak


def quantize(audio: Tensor, num_levels: int = 256, how: str = "mu_law") -> Tensor:
    """The nearest of num_levels levels, as whole numbers 0 … num_levels - 1 of the audio's shape; beyond full scale clipped.

    num_levels / 2 is silence, exactly; as in PCM, 0 is full scale below and the highest level one step less than it above.

    Args:
        audio: in [-1, 1].
        num_levels: an even number.
        how: `linear`, in equal steps; or `mu_law`, in steps that grow with the level: for 256 of them from 1 / 5,760 near
            silence to 1 / 25 at full scale.

    Raises:
        ValueError: an unknown way, or a number of levels that is odd or below 4.

    Source: ITU-T G.711, for the shape of mu-law; its mu is num_levels - 1, as in van den Oord et al. 2016, "WaveNet".
    """
    check_quantization(num_levels, how)
    scaled = audio.clamp(-1, 1)
    if how == "mu_law":
        mu = num_levels - 1
        scaled = scaled.sign() * torch.log1p(mu * scaled.abs()) / math.log1p(mu)
    half = num_levels // 2
    return ((half * scaled).round() + half).clamp_max(num_levels - 1).long()


def dequantize(codes: Tensor, num_levels: int = 256, how: str = "mu_law") -> Tensor:
    """The audio of whole numbers as `quantize` gives them, whose arguments and errors it has; float32 in [-1, 1)."""
    check_quantization(num_levels, how)
    half, mu = num_levels // 2, num_levels - 1
    scaled = (codes - half).float() / half
    return scaled if how == "linear" else scaled.sign() * torch.expm1(scaled.abs() * math.log1p(mu)) / mu


def check_quantization(num_levels: int, how: str) -> None:
    """Refuse what `quantize` cannot do, with a ValueError."""
    if how not in QUANTIZATIONS:
        raise ValueError(f"quantization is {how!r}; choose one of {', '.join(QUANTIZATIONS)}.")
    if num_levels < 4 or num_levels % 2:
        raise ValueError(f"num_levels is {num_levels}; wanted an even number of at least 4.")


def clipped_runs(audio: Tensor) -> int:
    """How often 3 samples or more in a row are at full scale, in whichever channel of (channels, samples)."""
    full = np.abs(audio.numpy()) >= CLIPPED_LEVEL
    if not full.any():  # as nearly always
        return 0
    places = np.lib.stride_tricks.sliding_window_view(np.pad(full, ((0, 0), (1, CLIPPED_RUN))), 1 + CLIPPED_RUN, axis=-1)
    return int((~places[..., 0] & places[..., 1:].all(axis=-1)).sum())  # where one begins


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


def _look(path: Path) -> tuple[int, int]:
    """Size and time of a file that can be read.

    Raises:
        AudioError: there is none, or it is empty.
    """
    try:
        status = os.stat(path)
        if stat.S_ISREG(status.st_mode):  # opening anything else may wait for ever
            with open(path, "rb"):
                pass
    except FileNotFoundError as error:
        raise AudioError(f"{path} does not exist.", "missing") from error
    except PermissionError as error:
        raise AudioError(f"{path} may not be read ({error.strerror}).", "no permission") from error
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        raise AudioError(f"{path} cannot be opened ({getattr(error, 'strerror', None) or error}).") from error
    if not stat.S_ISREG(status.st_mode):
        what = "a folder" if stat.S_ISDIR(status.st_mode) else "no ordinary file"
        raise AudioError(f"{path} is {what}; give an audio file.", "no file")
    if status.st_size == 0:
        raise AudioError(f"{path} is an empty file.", "empty file")
    return status.st_size, status.st_mtime_ns


@contextmanager
def _in_a_sentence(path: Path) -> Iterator[None]:
    """Turns whatever a decoder raises into an AudioError."""
    try:
        yield
    except Exception as error:  # the decoders raise what they please; the reader of the message wants one sentence
        said = str(getattr(error, "error_string", error)).strip().rstrip(".") or type(error).__name__
        raise AudioError(f"{path} cannot be read as audio ({said}).") from error


def _resampled_length(length: int, from_rate: int, to_rate: int) -> int:
    return -(-length * to_rate // from_rate)


def _decode_blocks(path: Path, block_seconds: float) -> tuple[Iterator[np.ndarray], int, int]:
    """Blocks (channels, samples) float32, the number of channels, and the rate."""
    import soundfile

    class InOrder(soundfile.SoundFile):
        """soundfile seeks after each read where a file can seek, and an MP3 decoder that seeks forgets what it carried."""

        def seekable(self) -> bool:
            return False

    try:
        file = InOrder(os.fsencode(path))  # bytes, since a name need not be text
    except soundfile.LibsndfileError:
        if path.suffix.lower() not in LIBROSA_TOO:
            raise
        samples, rate = _decode_by_librosa(path)
        length = max(1, round(block_seconds * rate))
        return iter(np.split(samples, range(length, samples.shape[1], length), axis=1)), len(samples), rate

    def blocks() -> Iterator[np.ndarray]:
        length = max(1, min(round(block_seconds * file.samplerate), file.frames))
        with file:
            while len(samples := file.read(length, dtype="float32", always_2d=True)):
                yield np.ascontiguousarray(samples.T)

    return blocks(), file.channels, file.samplerate


def _decode_by_librosa(path: Path) -> tuple[np.ndarray, int]:
    """(channels, samples) float32 and the rate, of formats that libsndfile does not know."""
    import librosa

    with LIBROSA, warnings.catch_warnings():  # that it falls back on another decoder is what we ask of it
        warnings.simplefilter("ignore")
        samples, rate = librosa.load(path, sr=None, mono=False, dtype=np.float32)
    return np.atleast_2d(samples), int(rate)


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
    """(samples, channels) 16-bit numbers, those that were read where nothing has changed. Rounding here, not in the encoder,
    makes them the same whatever the format."""
    return np.clip(np.round(_finite(audio) * 32768), -32768, 32767).astype(np.int16).T
