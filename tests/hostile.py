"""A folder as real ones are, and worse; what `check` has to say of each file, and so has everything that trains."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile

ROOT = Path(__file__).parents[1]
RATE = 16_000
NOBODY = 65534


class Expected(NamedTuple):
    """What is to be said of a file: nothing and no warnings, or why it is left out, in a word or two and in a sentence."""

    reason: str | None = None
    sentence: str = ""  # its end, after the path
    warnings: tuple[str, ...] = ()


KEPT = Expected()
BROKEN_LINK = Expected("broken link", "is a link that leads to no file.")
EXPECTED = {
    "8 channels.wav": KEPT,
    "9 channels.wav": Expected("channels", "has 9 channels; recordings of up to 8 can be used."),
    "broken header.wav": Expected("unreadable", "cannot be read as audio (Error in WAV file. No 'data' chunk marker)."),
    "clipped.wav": Expected(warnings=("clipped",)),
    "dc.wav": Expected(warnings=("DC offset",)),
    "empty.wav": Expected("empty file", "is an empty file."),
    "folder.wav/inside.wav": KEPT,
    "good.wav": KEPT,
    "good_compressed.flac": Expected("duplicate", "holds the same samples as {folder}/good.wav."),
    "header of 1 Hz.wav": Expected(
        "sample rate", "says that its sample rate is 1 Hz; recordings of 100 to 768,000 Hz can be used."
    ),
    "header of 4 GiB.wav": KEPT,
    "header of no length.flac": KEPT,  # what an encoder writes into a pipe
    "header only.wav": Expected("no samples", "holds no samples."),
    "left minus right.wav": Expected("silent", "is silent."),  # as mono
    "link.wav": Expected("duplicate", "holds the same samples as {folder}/good.wav."),
    "loop": Expected(
        "link to a folder", "is a link to a folder, which is not followed; give that folder itself, or copy it."
    ),
    "lossy.mp3": KEPT,
    "lossy.ogg": KEPT,
    "mostly silent.wav": Expected(warnings=("mostly silent",)),
    "nan.wav": Expected("not finite", "holds samples that are not finite numbers, from 0.250 s on."),
    "near silent.wav": Expected(warnings=("near silent", "mostly silent")),
    'new\nline, and "more".wav': KEPT,
    "notes.txt": Expected("not audio", "has the extension .txt, so it is not taken for audio."),
    "nowhere.wav": BROKEN_LINK,
    "of 0.005 s.wav": Expected("too short", "is shorter than 0.01 s."),
    "of 0.05 s.wav": Expected(warnings=("short",)),
    "over full scale.wav": Expected(warnings=("clipped", "over full scale")),  # 16-bit numbers as floats, unscaled
    "pipe.wav": Expected("no file", "is no ordinary file; give an audio file."),
    "README": Expected("not audio", "has no extension, so it is not taken for audio."),
    "round.wav": BROKEN_LINK,
    "silence.wav": Expected("silent", "is silent."),
    "stereo at 48 kHz.wav": KEPT,
    "text.mp3": Expected("unreadable", "cannot be read as audio ("),
    "truncated.flac": Expected("unreadable", "cannot be read as audio (Error : flac decoder lost sync)."),
    "truncated.wav": Expected(warnings=("cut short",)),
    "UPPER.WAV": KEPT,
    "日本語 ☃ é.wav": KEPT,
    "x" * 251 + ".wav": KEPT,
    "é" * 125 + "x.wav": KEPT,  # 255 bytes
}
if sys.platform == "linux":
    EXPECTED[os.fsdecode(b"\xff no text.wav")] = KEPT
LOCKED = {  # what a user says who may not read them
    "locked": Expected("no permission", "cannot be listed (Permission denied)."),
    "locked.wav": Expected("no permission", "may not be read (Permission denied)."),
    "no way in/behind.wav": Expected("no permission", "may not be read (Permission denied)."),
}


def make(folder: Path) -> dict[str, Expected]:
    """Fills an empty folder; what is expected of each file, by its path inside the folder."""

    def write(name: str, samples: np.ndarray, rate: int = RATE, subtype: str | None = None) -> Path:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / name, samples, rate, subtype=subtype)
        return folder / name

    def patch(path: Path, start: int, value: bytes) -> None:
        content = bytearray(path.read_bytes())
        content[start : start + len(value)] = value
        path.write_bytes(content)

    notes = iter(range(100))

    def sound(seconds: float = 0.5, channels: int | None = None) -> np.ndarray:
        """A tone that no other file has; a peak of 0.3."""
        time = np.arange(round(seconds * RATE)) / RATE
        tone = 0.3 * np.sin(2 * np.pi * 220 * 2 ** (next(notes) / 12) * time)
        return tone if channels is None else np.stack([tone] * channels, axis=1)

    write("8 channels.wav", sound(channels=8))
    write("9 channels.wav", sound(channels=9))
    (folder / "broken header.wav").write_bytes(b"RIFF0000WAVEjunk")
    write("clipped.wav", 5 * sound())
    write("dc.wav", 0.1 + sound())
    (folder / "empty.wav").touch()
    write("folder.wav/inside.wav", sound())
    good = np.round(32767 * sound()).astype(np.int16)  # floats are rounded differently by the two encoders
    write("good.wav", good)
    write("good_compressed.flac", good)
    (folder / "link.wav").symlink_to(folder / "good.wav")
    patch(write("header of 1 Hz.wav", sound()), 24, (1).to_bytes(4, "little"))
    patch(write("header of 4 GiB.wav", sound()), 40, (2**32 - 16).to_bytes(4, "little"))
    # STREAMINFO ends in 36 bits for the number of samples, of which 0 means that it is not known, and the sum of them all
    patch(write("header of no length.flac", sound()), 22, bytes(20))
    write("header only.wav", np.zeros(0))
    tone = sound()
    write("left minus right.wav", np.stack([tone, -tone], axis=1), subtype="FLOAT")
    (folder / "loop").symlink_to(folder)
    write("lossy.mp3", sound())
    write("lossy.ogg", sound())
    write("mostly silent.wav", np.concatenate([sound(), np.zeros(RATE)]))
    wrong = sound()
    wrong[RATE // 4] = np.nan
    write("nan.wav", wrong, subtype="FLOAT")
    write("near silent.wav", 1e-4 * sound(), subtype="FLOAT")
    write('new\nline, and "more".wav', sound())
    (folder / "notes.txt").write_text("not audio")
    (folder / "README").write_text("not audio")
    (folder / "nowhere.wav").symlink_to(folder / "gone.wav")
    (folder / "round.wav").symlink_to(folder / "round.wav")
    write("of 0.005 s.wav", sound(0.005))
    write("of 0.05 s.wav", sound(0.05))
    write("over full scale.wav", 32768 * sound(), subtype="FLOAT")
    os.mkfifo(folder / "pipe.wav")
    write("silence.wav", np.zeros(RATE))
    write("stereo at 48 kHz.wav", sound(channels=2), 48_000)
    (folder / "text.mp3").write_text("not audio, whatever its name says")
    half(write("truncated.flac", sound()))
    half(write("truncated.wav", sound()))
    for name in ("UPPER.WAV", "日本語 ☃ é.wav", "x" * 251 + ".wav", "é" * 125 + "x.wav"):
        write(name, sound())
    if sys.platform == "linux":
        os.rename(write("no text.wav", sound()), os.path.join(os.fsencode(folder), b"\xff no text.wav"))
    return EXPECTED


def half(path: Path) -> None:
    """Cuts a file off in its middle."""
    os.truncate(path, path.stat().st_size // 2)


def lock(folder: Path) -> dict[str, Expected]:
    """Adds what others may not read; what is expected of each file, and of a folder."""
    for name in ("locked/unseen.wav", "locked.wav", "no way in/behind.wav"):
        (folder / name).parent.mkdir(exist_ok=True)
        soundfile.write(folder / name, np.full(RATE, 0.1), RATE)
    (folder / "locked").chmod(0)
    (folder / "locked.wav").chmod(0)
    (folder / "no way in").chmod(0o444)
    return LOCKED


def sentence(folder: Path, name: str, expected: Expected) -> str:
    """What is to be said of a file, from its path on."""
    return f"{folder / name} {expected.sentence.format(folder=folder)}"


def assert_every_reject_is_named(told: str, folder: Path, expected: dict[str, Expected]) -> None:
    """Whatever a verb told, it has the sentence of every file that looks like audio and is not used."""
    told = " ".join(told.split())
    for name, of_file in expected.items():
        if of_file.reason not in (None, "not audio"):
            assert " ".join(sentence(folder, name, of_file).split()) in told, name


@contextmanager
def growing(path: Path) -> Iterator[None]:
    """A recording to which another process appends byte after byte."""
    soundfile.write(path, 0.1 * np.random.default_rng(0).standard_normal((60 * 48_000, 2)), 48_000, subtype="FLOAT")
    append = "import sys\nwith open(sys.argv[1], 'ab', buffering=0) as file:\n while True: file.write(b'x')"
    size = path.stat().st_size
    with subprocess.Popen([sys.executable, "-S", "-c", append, str(path)]) as writer:
        try:
            while path.stat().st_size == size:
                assert writer.poll() is None
            yield
        finally:
            writer.send_signal(signal.SIGKILL)


def run_as_nobody(code: str, folder: Path) -> subprocess.CompletedProcess:
    """Runs Python code in `folder` as a user who owns nothing; where the tests are not run as root, as their own user.

    The code has `main` and `AudioFolder`, and whatever these import later, since that user may not read them.
    """
    imports = (
        "import os, soundfile, soxr, rich.progress_bar, scipy.signal, librosa, audioread\n"
        "from s4audio.cli import main\nfrom s4audio.data import AudioFolder\n"
        f"if os.geteuid() == 0: os.setgid({NOBODY}); os.setuid({NOBODY})\n"
    )
    with tempfile.TemporaryDirectory() as cache:
        os.chmod(cache, 0o777)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "S4AUDIO_CACHE": cache}
        return subprocess.run(
            [sys.executable, "-c", imports + code], cwd=folder, env=environment, capture_output=True, text=True
        )
