"""Recordings as they are trained on, kept on disk: decoded once, then mapped into memory instead of read.

The recordings of one place, read with one set of settings, have a folder in the cache:

    manifest.json   the SHA-256 of all that follows, and for each file its size and times, the SHA-256 of its content, and
                    where its samples are, or the sentence that says why it cannot be used
    SHA256.f32      a shard: the samples of many files end to end, float32; its name is the SHA-256 of its content

A shard takes its name when it is whole and is never changed, and a manifest replaces another in one step. So there is no
lock: two runs that build at once write the same shards, one that is killed leaves nothing that counts, and deleting a folder
costs a running training nothing, since what is mapped stays until it ends.

A file has changed if its size or its times differ, and then its content; a shard likewise. Only what has changed is decoded
again. So damage to a shard that leaves its size and its time alone is not noticed: that would take reading all of it.
"""

import hashlib
import itertools
import json
import os
import re
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from s4audio.audio import AudioError
from s4audio.data.check import Recording
from s4audio.files import replacing

FORMAT = 2  # of what is written here
MANIFEST = "manifest.json"
SHARD = re.compile(r"[0-9a-f]{64}\.f32")
SHARD_BYTES = 2**29  # of a full shard; each mapped one is an open file, of which a process may have about a thousand
SETTLED_NS = 2 * 10**9  # a file that was changed more recently may change again while its times stay
ABANDONED_SECONDS = 24 * 3600  # what no manifest names is of a killed run, or of one that has yet to write its manifest
THREADS = 16  # at most, each with a file in memory

Item = TypeVar("Item")
Result = TypeVar("Result")
Stamp = list[int] | None  # size, time of change and of status change; None where they do not tell
Shards = dict[str, tuple["Stamp", np.ndarray]]  # with the stamp of each, mapped
Progress = Callable[[Iterable[Any], int], Iterable[Any]]  # passes on what it is given, so many, and shows how far it is


class Entry(NamedTuple):
    """What is known of a file."""

    stamp: Stamp
    sha256: str | None  # None: it could not be read
    suffix: str  # decoders look at it
    shard: str  # "" if it is skipped
    start: int  # in samples
    length: int
    fingerprint: str  # of the recording
    skipped: str  # why, with \0 in the place of its path


class Written(NamedTuple):
    """A new shard."""

    name: str
    stamp: Stamp
    mapped: np.ndarray
    entries: dict[str, Entry]  # that are in it


def cache_folder(cache: str | None = None) -> Path:
    """Where caches are: the argument, else S4AUDIO_CACHE, else s4audio in XDG_CACHE_HOME or in ~/.cache."""
    named = cache or os.environ.get("S4AUDIO_CACHE")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "s4audio"


def cached(
    source: Path,
    files: list[Path],
    settings: dict[str, Any],
    read: Callable[[Path], Recording],
    cache: Path,
    progress: Progress = lambda items, total: items,
) -> tuple[list[Recording | str], Path, list[str]]:
    """The samples of every file, mapped from the cache, which is brought up to date first.

    Args:
        source: the folder that was searched, or the only file.
        files: what was found there.
        settings: all that the samples depend on beside the content of the file, in JSON's types.
        read: a file's recording, of at least one sample, or an AudioError whose sentence says why it is not used. Called
            from several threads.
        cache: the folder of all caches.
        progress: of the files that are new or have changed.

    Returns:
        For each file its recording, or the sentence; the folder of these recordings in the cache; and what was wrong
        with what was found there.

    Raises:
        AudioError: the cache is inside of `source`, or cannot be written.
        OSError: the disk is full.
    """
    place = source.resolve()
    key = hashlib.sha256(json.dumps([FORMAT, str(place), settings], sort_keys=True).encode()).hexdigest()[:16]
    home = cache.resolve() / key
    if place in home.parents:
        raise AudioError(
            f"the cache {cache} is inside of {source}, where the recordings are; choose another place by S4AUDIO_CACHE or "
            "by data.init_args.cache."
        )
    names = [file.name if source == file else str(file.relative_to(source)) for file in files]
    for _ in range(3):
        try:
            found, notes = _update(home, dict(zip(names, files, strict=True)), read, progress)
            return found, home, notes
        except FileNotFoundError:  # the folder was deleted meanwhile
            continue
        except (PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError) as error:
            raise AudioError(
                f"the cache {home} cannot be written ({error.strerror}: {error.filename}); choose another place by "
                "S4AUDIO_CACHE or by data.init_args.cache."
            ) from error
    raise AudioError(f"the cache {home} is deleted again and again while it is written; let one program have it.")


def size(folder: Path) -> int:
    """Bytes of all files in a folder."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:  # another run has removed it
            continue
    return total


def _update(
    home: Path, files: dict[str, Path], read: Callable[[Path], Recording], progress: Progress
) -> tuple[list[Recording | str], list[str]]:
    """What each file holds, after decoding what is new."""
    known, shards, notes = _load(home)
    contents = {(entry.sha256, entry.suffix): entry for entry in known.values()}
    entries = {
        name: known[name]
        for name, file in files.items()
        if name in known and known[name].sha256 and (stamp := _stamp(file)) and known[name].stamp == stamp
    }
    new = [name for name in files if name not in entries]

    def examine(name: str) -> tuple[str, Entry, Tensor | None]:
        file, suffix = files[name], files[name].suffix.lower()
        stamp, sha256 = _stamp(file), _digest(file)
        same = contents.get((sha256, suffix)) if sha256 else None
        if same:
            return name, same._replace(stamp=stamp), None
        entry = Entry(stamp, sha256, suffix, "", 0, 0, "", "")
        try:
            recording = read(file)
            return name, entry._replace(fingerprint=recording.fingerprint), recording.audio
        except AudioError as error:
            known_as = None if error.passing else sha256  # what the content does not decide is asked again
            return name, entry._replace(sha256=known_as, skipped=str(error).replace(str(file), "\0")), None

    def decoded() -> Iterator[tuple[str, Entry, Tensor]]:
        for name, entry, audio in progress(_in_order(examine, new), len(new)):
            if audio is None:
                entries[name] = entry
            else:
                yield name, entry, audio

    def write(recordings: Iterator[tuple[str, Entry, Tensor]]) -> None:
        for shard in _write_shards(home, recordings):
            entries.update(shard.entries)
            shards[shard.name] = shard.stamp, shard.mapped
            _write_manifest(home, known | entries, shards)  # a build that is stopped goes on after its last shard

    write(decoded())
    if sum(length for _, _, length in _places(entries)) < sum(len(mapped) for _, mapped in shards.values()) / 2:
        held = {name: entry for name, entry in entries.items() if entry.shard}
        write((name, entry, _samples(entry, shards)) for name, entry in held.items())
    used = {shard for shard, _, _ in _places(entries)}
    if _write_manifest(home, entries, {shard: of for shard, of in shards.items() if shard in used}):
        _remove_abandoned(home, used)
    found: list[Recording | str] = []
    for name, file in files.items():
        entry = entries[name]
        sentence = entry.skipped.replace("\0", str(file))
        found.append(Recording(_samples(entry, shards), entry.fingerprint) if entry.shard else sentence)
    return found, notes


def _places(entries: dict[str, Entry]) -> set[tuple[str, int, int]]:
    """Where samples are in use; files of one content share theirs."""
    return {(entry.shard, entry.start, entry.length) for entry in entries.values() if entry.shard}


def _samples(entry: Entry, shards: Shards) -> Tensor:
    """(1, T), a view of the mapped shard."""
    _, mapped = shards[entry.shard]
    return torch.from_numpy(mapped[entry.start : entry.start + entry.length]).unsqueeze(0)


def _write_shards(home: Path, recordings: Iterator[tuple[str, Entry, Tensor]]) -> Iterator[Written]:
    """Puts recordings (name, entry, samples) into shards."""
    for first in recordings:
        entries: dict[str, Entry] = {}
        digest, length, part = hashlib.sha256(), 0, home / f"{secrets.token_hex(8)}.part"
        try:
            with replacing(part) as file:
                for name, entry, audio in itertools.chain([first], recordings):
                    samples = np.ascontiguousarray(audio.numpy(), np.float32)
                    file.write(samples.data)
                    digest.update(samples.data)
                    entries[name] = entry._replace(start=length, length=samples.size)
                    length += samples.size
                    if length * samples.itemsize >= SHARD_BYTES:
                        break
                file.flush()
                os.fsync(file.fileno())  # a machine that loses power does not keep the name without the samples
            mapped, shard = _map(part), f"{digest.hexdigest()}.f32"
            os.replace(part, home / shard)
        finally:
            part.unlink(missing_ok=True)
        stamp = _stamp_of_shard(home / shard)
        yield Written(shard, stamp, mapped, {name: entry._replace(shard=shard) for name, entry in entries.items()})


def _map(path: Path) -> np.ndarray:
    # Copy on write: what is done to a tensor does not reach the file, nor end the process, as on pages that are read-only.
    return np.asarray(np.memmap(path, np.float32, mode="c"))


def _write_manifest(home: Path, entries: dict[str, Entry], shards: Shards) -> bool:
    """Whether anything is new."""
    manifest = {"shards": {shard: stamp for shard, (stamp, _) in shards.items()}, "files": entries}
    body = json.dumps(manifest, sort_keys=True).encode()
    content = hashlib.sha256(body).hexdigest().encode() + b"\n" + body
    if (home / MANIFEST).is_file() and (home / MANIFEST).read_bytes() == content:
        return False
    part = home / f"{secrets.token_hex(8)}.part"  # a name that no other run has
    try:
        with replacing(part) as file:
            file.write(content)
        os.replace(part, home / MANIFEST)
    finally:
        part.unlink(missing_ok=True)
    return True


def _load(home: Path) -> tuple[dict[str, Entry], Shards, list[str]]:
    """What the manifest says as far as it is true, with the shards mapped, and what was wrong."""
    try:
        digest, _, body = (home / MANIFEST).read_bytes().partition(b"\n")
    except OSError:  # nothing yet
        return {}, {}, []
    try:
        if hashlib.sha256(body).hexdigest().encode() != digest:
            raise ValueError("its checksum is another")
        manifest = json.loads(body)
        entries = {name: Entry(*row) for name, row in manifest["files"].items()}
        stamps = {shard: stamp for shard, stamp in manifest["shards"].items() if SHARD.fullmatch(shard)}
        shards, notes = {}, []
        for shard, stamp in stamps.items():
            mapped = _checked_map(home, shard, stamp)
            if mapped is None:
                notes.append(f"the cache's {home / shard} was missing or damaged; what it held is decoded again.")
            else:
                shards[shard] = _stamp_of_shard(home / shard), mapped
        return {name: entry for name, entry in entries.items() if _is_right(entry, shards)}, shards, notes
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}, {}, [f"the cache's {home / MANIFEST} was damaged; everything is decoded again."]


def _checked_map(home: Path, shard: str, stamp: Stamp) -> np.ndarray | None:
    """The shard, if it is what it was, by its size and time or else by its content."""
    try:
        if _stamp_of_shard(home / shard) != stamp and f"{_digest(home / shard)}.f32" != shard:
            return None
        return _map(home / shard)
    except (OSError, ValueError):
        return None


def _is_right(entry: Entry, shards: Shards) -> bool:
    """Whether an entry has the right types, and what it speaks of is there."""
    texts = all(isinstance(text, str) for text in (entry.suffix, entry.shard, entry.fingerprint, entry.skipped))
    numbers = all(isinstance(number, int) for number in (entry.start, entry.length))
    if not texts or not numbers or not isinstance(entry.sha256, str | None):
        return False
    if not entry.shard:
        return bool(entry.skipped)
    return entry.shard in shards and entry.start >= 0 < entry.length <= len(shards[entry.shard][1]) - entry.start


def _remove_abandoned(home: Path, used: set[str]) -> None:
    """Removes what no manifest names and nobody can be writing any more."""
    for path in home.iterdir():
        try:
            if path.name not in used | {MANIFEST} and time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
                path.unlink()
        except OSError:  # another run was quicker
            continue


def _stamp(file: Path) -> Stamp:
    try:
        status = file.stat()
    except OSError:
        return None
    settled = time.time_ns() - status.st_ctime_ns > SETTLED_NS
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns] if settled else None


def _stamp_of_shard(path: Path) -> Stamp:
    """Size and time of change: nobody but us writes here, and a copy of the cache may keep its times."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _digest(file: Path) -> str | None:
    try:
        if not file.is_file():  # a pipe would wait for somebody to write
            return None
        with open(file, "rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError:
        return None


def _in_order(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """The results in the order of the items, made by several threads that are few files ahead."""
    threads = min(THREADS, os.cpu_count() or 1)
    pool = ThreadPoolExecutor(threads)
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
