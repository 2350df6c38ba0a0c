"""The cache: the decoder's samples to the bit, whatever happened to the files, to the cache or to the run that wrote it."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from s4audio.audio import AudioError, find_audio
from s4audio.data import AudioFolder, cache
from s4audio.data.cache import cached
from s4audio.data.check import Recording, read_recording

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


class Reader:
    """read_recording at 1 kHz, and which files it was asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, file: Path) -> Recording:
        self.asked.append(file.name)
        return read_recording(file, 1000)


class Place:
    """Recordings, what they hold, and a cache."""

    def __init__(self, root: Path) -> None:
        self.source, self.cache = root / "recordings", root / "cache"
        generator = np.random.default_rng(0)
        for number in range(6):
            path = self.source / f"sub{number % 2}" / f"{number}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, generator.uniform(-0.9, 0.9, 200 + 50 * number), (1000, 1500)[number % 2])
        (self.source / "broken.wav").write_bytes(b"nothing")
        soundfile.write(self.source / "silent.wav", np.zeros(300), 1000)

    def read(self, read: Reader | None = None, source: Path | None = None) -> tuple[list, Path, list[str], list[str]]:
        """What cached returns, and which files it had decoded."""
        reader, source = read or Reader(), source or self.source
        found, home, notes = cached(source, find_audio(source), {"rate": 1000}, reader, self.cache)
        return samples_of(found), home, notes, sorted(reader.asked)

    def truth(self) -> list:
        """What the files hold, from the decoder."""
        return [sentence_or_samples(file) for file in find_audio(self.source)]


def samples_of(found: list) -> list:
    return [entry.audio if isinstance(entry, Recording) else entry for entry in found]


def sentence_or_samples(file: Path) -> torch.Tensor | str:
    try:
        return read_recording(file, 1000).audio
    except AudioError as error:
        return str(error)


def same(found: list, truth: list) -> bool:
    return len(found) == len(truth) and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b
        for a, b in zip(found, truth, strict=True)
    )


@pytest.fixture
def place(tmp_path) -> Place:
    return Place(tmp_path)


@pytest.fixture
def settled(monkeypatch) -> None:
    """As if the recordings were older than a moment, so that their times tell whether they have changed."""
    monkeypatch.setattr(cache, "SETTLED_NS", 0)


def test_samples_and_sentences_are_the_decoders_and_the_next_start_decodes_nothing(place, settled):
    found, home, notes, asked = place.read()
    assert same(found, place.truth()) and len(asked) == 8 and notes == []
    broken, silent = (entry for entry in found if isinstance(entry, str))
    assert broken.startswith(f"{place.source / 'broken.wav'} cannot be read as audio (")
    assert silent == f"{place.source / 'silent.wav'} is silent."
    assert {path.name for path in home.parent.iterdir()} == {home.name}
    shards = [path for path in home.iterdir() if path.name != "manifest.json"]
    held = sum(entry.numel() for entry in found if isinstance(entry, torch.Tensor))
    assert [path.stat().st_size for path in shards] == [4 * held] and cache.size(home) > 4 * held
    before = {path: path.stat() for path in home.iterdir()}
    again, _, notes, asked = place.read()
    assert same(again, found) and asked == notes == []
    assert {path: path.stat() for path in home.iterdir()} == before


def test_a_sentence_from_the_cache_names_the_file_as_it_was_given(place, monkeypatch):
    place.read()
    monkeypatch.chdir(place.source.parent)
    found, *_, asked = place.read(source=Path("recordings"))
    assert asked == [] and "recordings/silent.wav is silent." in found


def test_only_what_has_changed_is_decoded_again(place, settled):
    _, home, *_ = place.read()
    time.sleep(0.02)  # beyond the resolution of file times
    first, second, third = (place.source / name for name in ("sub0/0.wav", "sub1/1.wav", "sub0/2.wav"))
    status = second.stat()
    samples = soundfile.read(second)[0]
    soundfile.write(second, -samples, 1500)  # other content of the same size, with its time put back
    os.utime(second, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (second.stat().st_size, second.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    os.utime(first)  # the same content at another time
    third.rename(place.source / "renamed.wav")
    (place.source / "sub1" / "3.wav").unlink()
    soundfile.write(place.source / "new.wav", samples, 1000)
    found, _, notes, asked = place.read()
    assert asked == ["1.wav", "new.wav"] and same(found, place.truth()) and notes == []
    assert place.read()[3] == []
    manifest = json.loads((home / "manifest.json").read_bytes().partition(b"\n")[2])
    assert len(manifest["files"]) == 8 and "sub0/2.wav" not in manifest["files"]


def test_a_file_that_has_just_been_written_is_compared_by_its_content(place):
    """Its times may be too coarse to show that it was written once more."""
    place.read()
    (place.source / "silent.wav").write_bytes((place.source / "sub0" / "0.wav").read_bytes())
    found, *_, asked = place.read()
    assert asked == [] and same(found, place.truth())  # known by its content


def test_a_file_that_grows_while_it_is_read_is_read_again_at_the_next_start(place, settled):
    path = place.source / "sub0" / "0.wav"

    class Grows(Reader):
        def __call__(self, file):
            audio = super().__call__(file)
            if file == path:
                time.sleep(0.02)
                soundfile.write(path, np.linspace(-0.5, 0.5, 900), 1000)
            return audio

    place.read(Grows())
    found, *_, asked = place.read()
    assert asked == ["0.wav"] and same(found, place.truth())


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with a name are a Unix thing")
def test_a_pipe_is_not_waited_for(place):
    os.mkfifo(place.source / "pipe.wav")
    files = [place.source / "pipe.wav", place.source / "sub0" / "0.wav"]
    (pipe, samples), *_ = cached(place.source, files, {}, Reader(), place.cache)
    assert "pipe.wav" in pipe and not isinstance(samples, str)


def test_other_settings_have_a_cache_of_their_own(place):
    _, home, *_ = place.read()
    _, other, _ = cached(place.source, find_audio(place.source), {"rate": 500}, Reader(), place.cache)
    assert other != home and other.parent == home.parent


@linux
def test_samples_are_mapped_and_a_deleted_cache_costs_a_run_nothing(place):
    found, home, *_ = place.read()
    (shard,) = home.glob("*.f32")
    assert shard.name in Path("/proc/self/maps").read_text()
    truth = place.truth()
    shutil.rmtree(place.cache)
    assert same(found, truth)
    next(entry for entry in found if isinstance(entry, torch.Tensor))[0, 0] = 7.0  # stays in this process
    again, _, notes, asked = place.read()
    assert same(again, truth) and len(asked) == 8 and notes == []


def test_a_cache_that_is_deleted_while_it_is_written_is_written_again(place):
    class Deletes(Reader):
        def __call__(self, file):
            if len(self.asked) == 4:
                shutil.rmtree(place.cache, ignore_errors=True)
            return super().__call__(file)

    found, home, *_ = place.read(Deletes())
    assert same(found, place.truth()) and (home / "manifest.json").exists()

    class Spoils(Reader):
        def __call__(self, file):
            shutil.rmtree(place.cache, ignore_errors=True)
            return super().__call__(file)

    shutil.rmtree(place.cache)
    with pytest.raises(AudioError, match="deleted again and again while it is written"):
        place.read(Spoils())


def test_a_stopped_build_goes_on_after_its_last_shard(place, monkeypatch):
    monkeypatch.setattr(cache, "SHARD_BYTES", 2000)
    monkeypatch.setattr(cache, "THREADS", 1)

    class Stops(Reader):
        def __call__(self, file):
            if file.name == "5.wav":
                raise KeyboardInterrupt
            return super().__call__(file)

    with pytest.raises(KeyboardInterrupt):
        place.read(Stops())
    found, home, notes, asked = place.read()
    assert 1 <= len(asked) < 6 and same(found, place.truth()) and notes == []
    assert len(list(home.glob("*.f32"))) > 1
    assert not list(home.glob("*.part*")) and not list(home.glob(".*"))


def test_two_builders_at_once_write_the_same_shards(place, monkeypatch):
    monkeypatch.setattr(cache, "SHARD_BYTES", 1500)
    start, results = threading.Barrier(4), []

    def build():
        start.wait()
        results.append(place.read())

    threads = [threading.Thread(target=build) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    truth = place.truth()
    assert len(results) == 4 and all(same(found, truth) for found, *_ in results)
    found, home, notes, asked = place.read()
    assert same(found, truth) and asked == notes == []
    held = sum(entry.numel() for entry in truth if isinstance(entry, torch.Tensor))
    assert sum(path.stat().st_size for path in home.glob("*.f32")) == 4 * held  # each once


def test_damage_is_noticed_said_and_mended(place):
    truth, home = place.truth(), place.read()[1]
    (shard,) = home.glob("*.f32")
    content, manifest = shard.read_bytes(), home / "manifest.json"
    for damage in (content[:-4], content[:-1], b"", content + bytes(4), bytes([content[0] ^ 1]) + content[1:], None):
        shard.unlink()
        if damage is not None:
            shard.write_bytes(damage)
            os.utime(shard, ns=(0, 0))
        found, _, notes, asked = place.read()
        assert same(found, truth) and len(asked) == 6
        assert notes == [f"the cache's {shard} was missing or damaged; what it held is decoded again."]
        assert shard.read_bytes() == content
    for text in (b"", b"junk", manifest.read_bytes()[:-9], manifest.read_bytes().replace(b"wav", b"wax")):
        manifest.write_bytes(text)
        found, _, notes, asked = place.read()
        assert same(found, truth) and len(asked) == 8
        assert notes == [f"the cache's {manifest} was damaged; everything is decoded again."]
        assert place.read()[2:] == ([], [])
    os.utime(shard)  # another time, as in a copy of the cache, with the same content
    assert place.read()[2:] == ([], [])


def mutate(place: Place, home: Path, seed: int) -> str:
    """Damages the manifest or a shard, as a program might: bytes, lengths, or one value under a checksum that is right."""
    generator = np.random.default_rng(seed)
    manifest, shards = home / "manifest.json", sorted(home.glob("*.f32"))
    kind = ("manifest", "shard", "value", "shards")[seed % 4]
    if kind in ("manifest", "shard"):
        path = manifest if kind == "manifest" else shards[generator.integers(len(shards))]
        content = bytearray(path.read_bytes())
        for _ in range(generator.integers(1, 20)):
            content[generator.integers(len(content))] = generator.integers(256)
        length = len(content) if generator.random() < 0.5 else generator.integers(len(content) + 1)
        path.write_bytes(content[:length])
        os.utime(path, ns=(0, seed))
        return kind
    body = json.loads(manifest.read_bytes().partition(b"\n")[2])
    outside = str(place.source.parent / "outside")
    values = [None, True, -1, 0, 2**40, 1e99, "", "..", "../../outside", outside, "\ud800", [], {}, [1, 2, 3], "\0"]
    value = values[generator.integers(len(values))]
    if kind == "shards":
        if generator.random() < 0.3:
            body["shards"] = value
        else:
            body["shards"][str(value)] = values[generator.integers(len(values))]
    else:
        rows = body["files"]
        name = sorted(rows)[generator.integers(len(rows))]
        if generator.random() < 0.2:
            rows[name] = value
        else:
            rows[name][generator.integers(len(rows[name]))] = value
    text = json.dumps(body).encode()
    manifest.write_bytes(hashlib.sha256(text).hexdigest().encode() + b"\n" + text)
    return kind


def fuzz(place: Place, seeds: range) -> None:
    """Samples may differ only where the manifest was forged with a checksum that is right."""
    truth, home = place.truth(), place.read()[1]
    (place.source.parent / "outside").write_bytes(bytes(4000))
    kept = {path.name: path.read_bytes() for path in home.iterdir()}
    outside = snapshot(place)
    for seed in seeds:
        kind = mutate(place, home, seed)
        started = time.monotonic()
        try:
            found, *_ = place.read()
        except ValueError as error:
            assert str(error)
        else:
            assert len(found) == len(truth) and all(isinstance(entry, str | torch.Tensor) for entry in found)
            if kind in ("manifest", "shard", "shards"):
                assert same(found, truth), seed
        assert time.monotonic() - started < 5 and snapshot(place) == outside, seed
        for path in home.iterdir():
            path.unlink()
        for name, content in kept.items():
            (home / name).write_bytes(content)


def snapshot(place: Place) -> dict[Path, tuple[int, int]]:
    """Everything but the cache."""
    paths = [path for path in place.source.parent.rglob("*") if place.cache not in (path, *path.parents)]
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in paths}


def test_a_damaged_cache_is_rebuilt_and_nothing_outside_is_touched(place):
    fuzz(place, range(100))


@pytest.mark.slow
def test_a_damaged_cache_is_rebuilt_2000_times(place):
    fuzz(place, range(100, 2100))


def test_what_no_longer_counts_is_removed(place, settled):
    _, home, *_ = place.read()
    old = [path.name for path in home.glob("*.f32")]
    yesterday = time.time() - 2 * cache.ABANDONED_SECONDS
    for name in (*old, "killed.part", ".killed.part.new"):
        (home / name).touch()
        os.utime(home / name, (yesterday, yesterday))
    (home / "being_written.part").touch()
    time.sleep(0.02)
    for file in find_audio(place.source):
        if file.parent != place.source:
            soundfile.write(file, np.linspace(-0.3, 0.8, 500), 1000)
    found, *_ = place.read()
    assert same(found, place.truth())
    left = {path.name for path in home.iterdir()}
    assert not left & {*old, "killed.part", ".killed.part.new"} and "being_written.part" in left


def test_shards_are_packed_anew_when_half_of_them_is_unused(place, settled):
    _, home, *_ = place.read()
    (shard,) = home.glob("*.f32")
    size, gone = shard.stat().st_size, ("sub0/0.wav", "sub0/2.wav", "sub1/3.wav", "sub0/4.wav", "sub1/5.wav")
    for name in gone:
        (place.source / name).unlink()
        found, *_, asked = place.read()
        manifest = json.loads((home / "manifest.json").read_bytes().partition(b"\n")[2])
        used, held = sum(stamp[0] for stamp in manifest["shards"].values()), 4 * sum(len(f[0]) for f in found if f[0] != "/")
        assert asked == [] and same(found, place.truth()) and used <= 2 * held
    assert used == held < size / 4


def test_a_cache_is_never_made_in_the_users_data(place):
    with pytest.raises(
        AudioError, match=r"is inside of .*recordings, where the recordings are; choose another place by S4AU"
    ):
        cached(place.source, find_audio(place.source), {}, Reader(), place.source / "sub0" / "cache")
    assert not (place.source / "sub0" / "cache").exists()


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.delenv("S4AUDIO_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.cache_folder() == tmp_path / ".cache" / "s4audio"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_folder() == tmp_path / "xdg" / "s4audio"
    monkeypatch.setenv("S4AUDIO_CACHE", str(tmp_path / "mine"))
    assert cache.cache_folder() == tmp_path / "mine" and cache.cache_folder("there") == Path("there")


def test_a_place_that_cannot_be_written_is_refused_in_a_sentence(place):
    place.cache.write_text("a file")
    with pytest.raises(AudioError, match=r"cannot be written \(.*\); choose another place by S4AUDIO_CACHE"):
        place.read()


@pytest.mark.skipif(sys.platform == "win32", reason="limits on the size of files are a Unix thing")
def test_a_full_disk_ends_in_its_own_error_and_leaves_nothing(place):
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
        with pytest.raises(OSError) as caught:
            place.read()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG and str(place.cache) in str(caught.value.filename)
    assert [path for path in place.cache.rglob("*") if path.is_file()] == []
    assert same(place.read()[0], place.truth())


def test_clips_are_those_of_the_decoder_and_the_cache_is_named(place):
    """The whole way: clips of a folder, cut from the cache, against clips cut from what the decoder gives."""
    from s4audio.data.audio_folder import _TrainingClips

    first, again = (AudioFolder(str(place.source), 1000, valid=str(place.source), clip_seconds=0.1) for _ in range(2))
    decoded = [
        entry for entry in (sentence_or_samples(f) for f in find_audio(place.source)) if isinstance(entry, torch.Tensor)
    ]
    quiet = [read_recording(file, 1000).audio for file in find_audio(place.source) if file.parent != place.source]
    for data in (first, again):
        data.setup()
        assert same(data.train_clips, quiet) and len(decoded) == 6
        mapped, held = _TrainingClips(data.train_clips, 100, 3), _TrainingClips(quiet, 100, 3)
        assert all(torch.equal(mapped[k], held[k]) for k in range(50))
        assert data.caches[0] == data.caches[1] and data.caches[0].parent == Path(os.environ["S4AUDIO_CACHE"])
    assert first.skipped == again.skipped and len(first.skipped) == 4


BUILD = """
import sys
from pathlib import Path
from s4audio.data import AudioFolder, cache
cache.SHARD_BYTES = 40_000
data = AudioFolder(sys.argv[1], 8000, valid=sys.argv[1], cache=sys.argv[2])
data.setup()
import hashlib
print(hashlib.sha256(b"".join(clip.numpy().tobytes() for clip in data.train_clips)).hexdigest(), data.notes)
"""


@pytest.mark.slow
def test_builders_that_are_killed_leave_a_cache_that_the_next_finishes(tmp_path):
    """Of 12 processes on one cache half are killed at random moments; the others have the decoder's samples."""
    generator = np.random.default_rng(0)
    for number in range(300):
        soundfile.write(tmp_path / f"{number}.wav", generator.uniform(-0.9, 0.9, 8000), 11_025)
    truth = hashlib.sha256(b"".join(read_recording(f, 8000).audio.numpy().tobytes() for f in find_audio(tmp_path)))
    wanted = f"{truth.hexdigest()} []"
    command = [sys.executable, "-c", BUILD, str(tmp_path), str(tmp_path.parent / f"{tmp_path.name}_cache")]
    for _ in range(3):
        runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
        time.sleep(generator.uniform(3, 9))
        for process in runs[:2]:
            process.kill()
        said = [process.communicate(timeout=120)[0].strip() for process in runs]
        assert said[2:] == [wanted, wanted]
        shutil.rmtree(command[-1]) if generator.random() < 0.5 else None
    assert subprocess.run(command, capture_output=True, text=True).stdout.strip() == wanted


def test_a_file_whose_time_was_put_back_just_now_is_compared_by_its_content(place):
    file = find_audio(place.source)[0]
    os.utime(file, (0, 0))
    assert cache._stamp(file) is None


def test_each_place_has_a_cache_of_its_own(place):
    assert place.read()[1] != place.read(source=place.source / "sub0")[1]


def test_a_file_of_known_content_at_another_time_is_looked_at_once(place, settled, monkeypatch):
    place.read()
    time.sleep(0.02)  # beyond the resolution of file times
    for file in find_audio(place.source):
        os.utime(file)
    place.read()
    looked_at: list[Path] = []
    monkeypatch.setattr(cache, "_digest", looked_at.append)
    place.read()
    assert looked_at == []


@pytest.mark.parametrize(
    "cause", [OSError(errno.EMFILE, "Too many open files"), MemoryError(), None], ids=["files", "memory", "changed"]
)
def test_what_may_be_over_at_the_next_try_is_tried_again(tmp_path, cause):
    place, once = Place(tmp_path), ["3.wav"]

    class Shaky(Reader):
        def __call__(self, file: Path) -> Recording:
            if file.name in once:
                once.remove(file.name)
                raise AudioError(f"{file} is busy.", "unreadable" if cause else "changed") from cause
            return super().__call__(file)

    first = place.read(Shaky())[0]
    assert any(isinstance(found, str) and found.endswith("sub1/3.wav is busy.") for found in first)
    again, *_, asked = place.read(Shaky())
    assert asked == ["3.wav"] and same(again, place.truth())
    assert place.read()[-1] == []  # what the content decides, that of a broken and of a silent file, is asked once
