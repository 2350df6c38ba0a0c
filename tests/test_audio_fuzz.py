"""Damaged headers: whatever is in a file, reading it gives audio or an AudioError, soon and in little memory."""

import os
import random
import time
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
import soundfile
import torch

from s4audio.audio import MAX_CHANNELS, AudioError, read_audio, read_blocks
from s4audio.data import check_folder

HEADER = 120  # bytes from the start in which a file is damaged
SECONDS, MEMORY = 5.0, 64 * 2**20  # at most, for files of up to 35 kB
EXTREMES = (0, 1, 2, 2**7, 2**8 - 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**36 - 1, 2**63, 2**64 - 1)


def seeds() -> list[tuple[str, bytes]]:
    """Small files of many kinds: the extension, and the bytes."""
    import io

    made = []
    noise = 0.3 * np.random.default_rng(0).standard_normal((4000, 2)).clip(-1, 1)
    for kind, subtypes in (("WAV", ("PCM_16", "PCM_U8", "PCM_24", "FLOAT", "DOUBLE", "ULAW", "IMA_ADPCM", "MS_ADPCM")),
        ("WAVEX", ("PCM_16",)), ("RF64", ("PCM_16",)), ("FLAC", ("PCM_16", "PCM_24"))):  # fmt: skip
        for subtype in subtypes:
            for channels in (1, 2):
                file = io.BytesIO()
                soundfile.write(file, noise[:, :channels], 16_000, format=kind, subtype=subtype)
                made.append((".flac" if kind == "FLAC" else ".wav", file.getvalue()))
    return made


def flip(content: bytearray, draw: random.Random, header: int) -> None:
    for _ in range(draw.choice((1, 1, 2, 8, 32))):
        content[draw.randrange(header)] ^= 1 << draw.randrange(8)


def cut(content: bytearray, draw: random.Random, header: int) -> None:
    del content[draw.randrange(draw.choice((header, len(content)))) :]


def insert(content: bytearray, draw: random.Random, header: int) -> None:
    place = draw.randrange(header)
    content[place:place] = draw.randbytes(draw.choice((1, 2, 4, 100, 5000)))


def leave_out(content: bytearray, draw: random.Random, header: int) -> None:
    place = draw.randrange(header)
    del content[place : place + draw.choice((1, 2, 4, 16))]


def set_extreme(content: bytearray, draw: random.Random, header: int) -> None:
    """A number of 1 to 8 bytes, in either order, at any place: lengths, rates, channels, offsets."""
    for _ in range(draw.choice((1, 1, 2, 4))):
        size = draw.choice((1, 2, 4, 4, 4, 8))
        value = (draw.choice(EXTREMES) + draw.randrange(-2, 3)) % 256**size
        place = draw.randrange(header)
        content[place : place + size] = value.to_bytes(size, draw.choice(("little", "big")))


def repeat(content: bytearray, draw: random.Random, header: int) -> None:
    """A piece of the header, a chunk perhaps, many times."""
    start = draw.randrange(header)
    content[start:start] = content[start : start + 1 + draw.randrange(header)] * draw.choice((1, 3, 200))


MUTATIONS: tuple[Callable[[bytearray, random.Random, int], None], ...] = (
    flip, cut, insert, leave_out, set_extreme, set_extreme, repeat
)  # fmt: skip


@pytest.mark.parametrize("count", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_damaged_headers_are_read_or_refused(tmp_path, monkeypatch, count):
    (tmp_path / "data").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    kinds, draw = seeds(), random.Random(count)
    outcomes = {"read": 0, "refused": 0}
    for number in range(count):
        extension, content = kinds[number % len(kinds)]
        damaged = bytearray(content)
        for _ in range(draw.choice((1, 1, 1, 2))):
            if damaged:
                draw.choice(MUTATIONS)(damaged, draw, min(HEADER, len(damaged)))
        path = tmp_path / "data" / f"{number}{extension}"
        path.write_bytes(damaged)
        started = time.monotonic()
        tracemalloc.start()
        try:
            whole, blocks, found = outcome(path, read_audio), outcome(path, read_all), check_folder(path, workers=1)[0]
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert time.monotonic() - started < SECONDS, path
        assert peak < MEMORY, path
        if isinstance(whole, str):
            assert blocks == whole == str(found.rejected), path
            assert str(path) in whole and "\n" not in whole
        else:
            assert torch.equal(whole, blocks) and torch.isfinite(whole).all() and whole.numel(), path
            assert found.sound is not None and found.sound.channels <= MAX_CHANNELS, path
            assert found.sound.seconds == pytest.approx(whole.shape[-1] / found.sound.sample_rate), path
        outcomes["refused" if isinstance(whole, str) else "read"] += 1
        path.unlink()
    assert min(outcomes.values()) > count / 10, outcomes  # else the damage is too small, or too large, to show anything
    assert os.listdir(tmp_path / "data") == os.listdir(tmp_path / "elsewhere") == []
    assert sorted(os.listdir(tmp_path)) == ["data", "elsewhere"]


def read_all(path) -> tuple[torch.Tensor, None]:
    return torch.cat(list(read_blocks(path, block_seconds=0.1)), dim=-1), None


def outcome(path, read) -> torch.Tensor | str:
    """The samples, or the sentence; anything else that is raised ends the test."""
    try:
        return read(path)[0]
    except AudioError as error:
        return str(error)
