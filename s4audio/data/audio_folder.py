"""Folders of audio files as training clips."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from s4audio.audio import NORMALIZATIONS, NOT_AUDIO, AudioError, find_audio, list_folder, normalize, readers
from s4audio.data.cache import Progress, cache_folder, cached
from s4audio.data.check import SHORTEST_SECONDS, Recording, copy_of, read_recording


class AudioFolder(lightning.LightningDataModule):
    """Mono clips from a folder of audio files, searched recursively.

    Every file is decoded once and kept in a cache on disk, from where clips are mapped: memory does not grow with the data,
    and the next start decodes nothing. The samples are those of the decoder, to the bit, 4 bytes each: 230 MB an hour at
    16 kHz. A cache can be deleted at any time.

    Files that cannot be used, and copies of others, are left out and named in `skipped`; `check_folder` says the same.

    Training clips are a stream without end: clip number k is a file and a place drawn from (seed, k) alone, so that a run
    that stops and goes on sees what it would have seen. Where several devices train, each takes its share of every step's
    clips: two with batches of 8 see what one with batches of 16 sees. Validation clips are fixed windows, side by side.

    With labels a batch is a pair, clips (B, 1, T) and the numbers of their classes (B,); the split is the same.

    Args:
        train: folder (or one file) to train on.
        sample_rate: in Hz; files at other rates are resampled.
        valid: folder to validate on, which may lie in `train`: what is held out is not trained on, copies included, unless
            both are the same folder. None splits files off `train`, or the end off its only file.
        valid_fraction: share of the training files, or of the only one, that is split off if `valid` is None.
        clip_seconds: length of a clip, drawn at a random place of the file; a shorter file is padded with zeros at its end,
            never dropped. None takes whole files, each batch padded to its longest.
        batch_size: clips in a batch, of each device.
        normalize: `none`, or `peak`: every file to a peak of full scale.
        seed: of the split and of the clips.
        num_workers: processes that prepare batches; the clips are mapped, so 0 does.
        cache: folder of the cache; None takes S4AUDIO_CACHE, or s4audio in the user's folder of caches.
        labels: `folder`: the class of a file is the first subfolder that it is in, and `classes` are those of the training
            files, sorted. None does without.

    Raises:
        ValueError: an argument outside its range.
        AudioError: a folder is missing, or holds no file that can be used; or the cache cannot be written; or with labels a
            file is in no subfolder, or only validation files are of its class.
    """

    def __init__(
        self,
        train: str,
        sample_rate: int,
        valid: str | None = None,
        valid_fraction: float = 0.1,
        clip_seconds: float | None = None,
        batch_size: int = 8,
        normalize: str = "none",
        seed: int = 0,
        num_workers: int = 0,
        cache: str | None = None,
        labels: str | None = None,
    ) -> None:
        super().__init__()
        if labels not in (None, "folder"):
            raise ValueError(f"labels is {labels!r}; wanted folder, or null for none.")
        if normalize not in NORMALIZATIONS:
            raise ValueError(f"normalize is {normalize!r}; choose one of {', '.join(NORMALIZATIONS)}.")
        if sample_rate < 1 or batch_size < 1 or (clip_seconds is not None and clip_seconds <= 0):
            raise ValueError(
                f"sample_rate {sample_rate}, batch_size {batch_size}, clip_seconds {clip_seconds}: all must be positive."
            )
        if valid is None and not 0 < valid_fraction < 1:
            raise ValueError(f"valid_fraction is {valid_fraction}; wanted a share between 0 and 1.")
        self.train, self.sample_rate, self.valid, self.valid_fraction = train, sample_rate, valid, valid_fraction
        self.clip_seconds, self.batch_size, self.normalize = clip_seconds, batch_size, normalize
        self.seed, self.num_workers, self.cache, self.labels = seed, num_workers, cache, labels
        self.clip_samples = None if clip_seconds is None else max(1, round(clip_seconds * sample_rate))
        self.train_clips: list[Tensor] = []
        self.valid_clips: list[Tensor] = []
        self.train_names: list[str] = []
        self.valid_names: list[str] = []
        self.classes: list[str] = []
        self.train_labels: list[int] = []
        self.valid_labels: list[int] = []
        self.skipped: list[str] = []
        self.caches: list[Path] = []  # the folders in the cache that are in use
        self.notes: list[str] = []  # what was wrong with them
        self.progress: Progress = lambda files, total: files  # of decoding

    def setup(self, stage: str | None = None) -> None:
        """Finds, splits and reads the files, once."""
        if self.train_clips:
            return
        seen: dict[str, Path] = {}
        valid = None if self.valid is None else self._read("valid", self.valid, seen)
        if self.valid is not None and Path(self.valid).resolve() == Path(self.train).resolve():
            seen = {}  # on purpose: to see what a model can memorize
        train = self._read("train", self.train, seen)
        if valid is None and len(train) > 1:
            train, valid = split_files(train, self.valid_fraction, self.seed)
        elif valid is None:
            ((name, audio),) = train.items()
            kept = round((1 - self.valid_fraction) * audio.shape[-1])
            if min(kept, audio.shape[-1] - kept) < SHORTEST_SECONDS * self.sample_rate:
                raise ValueError(
                    f"{name} is the only recording, {audio.shape[-1] / self.sample_rate:.2f} s, and valid_fraction "
                    f"{self.valid_fraction:g} leaves less than {SHORTEST_SECONDS} s of it to train on or to hold out."
                )
            train, valid = {name: audio[..., :kept]}, {f"the end of {name}": audio[..., kept:]}
        self.train_clips, self.valid_clips = list(train.values()), list(valid.values())
        self.train_names, self.valid_names = list(train), list(valid)
        if self.labels:
            self._label()

    def describe(self) -> dict[str, object]:
        """What was read, for people and for config.json; seconds are after resampling."""
        seconds = [
            sum(clip.shape[-1] for clip in clips) / self.sample_rate for clips in (self.train_clips, self.valid_clips)
        ]
        return {
            "sample_rate": self.sample_rate, "normalize": self.normalize, "clip_seconds": self.clip_seconds,
            "train_files": len(self.train_clips), "train_seconds": round(seconds[0], 3),
            "valid_files": len(self.valid_clips), "valid_seconds": round(seconds[1], 3), "skipped": self.skipped,
        }  # fmt: skip

    def train_dataloader(self) -> DataLoader:
        """Batches (B, 1, T) without end, from where the trainer stands; where several devices train, this one's share."""
        clips = _TrainingClips(self.train_clips, self.clip_samples, self.seed, self.train_labels)
        return self._loader(clips, sampler=Share(lambda: position(self), self.batch_size))

    def val_dataloader(self) -> DataLoader:
        """The windows of every validation file, always the same."""
        if not self.labels:
            return self._loader([clip for audio in self.valid_clips for clip in windows(audio, self.clip_samples)])
        pairs = zip(self.valid_clips, self.valid_labels, strict=True)
        return self._loader([(clip, label) for audio, label in pairs for clip in windows(audio, self.clip_samples)])

    def _loader(self, clips: Any, sampler: Sampler[int] | None = None) -> DataLoader:
        return DataLoader(
            clips, self.batch_size, sampler=sampler, collate_fn=pad_pairs if self.labels else pad_batch,
            num_workers=self.num_workers, persistent_workers=self.num_workers > 0, pin_memory=torch.cuda.is_available(),
        )  # fmt: skip

    def _label(self) -> None:
        """Finds the classes, and numbers those of the files.

        Raises:
            AudioError: a file has no class, or one that no training file has.
        """
        train = [class_of(name, self.train) for name in self.train_names]
        valid = [class_of(name, self.train if self.valid is None else self.valid) for name in self.valid_names]
        self.classes = sorted(set(train))
        if unknown := sorted(set(valid) - set(train)):
            raise AudioError(
                f"only held-out recordings are of the class {unknown[0]!r}, and none that is trained on; add recordings of "
                f"it, take valid_fraction smaller, or leave it out. Trained on are {', '.join(self.classes)}."
            )
        numbers = {name: number for number, name in enumerate(self.classes)}
        self.train_labels, self.valid_labels = [numbers[name] for name in train], [numbers[name] for name in valid]

    def _read(self, argument: str, folder: str, seen: dict[str, Path]) -> dict[str, Tensor]:
        """Name and samples of each file that can be used and is none of `seen`; why others cannot goes to `skipped`."""
        try:
            files = find_audio(folder)
        except AudioError as error:
            raise AudioError(f"{argument}: {error}", error.reason) from error
        settings = {
            "sample_rate": self.sample_rate, "channels": 1, "normalize": self.normalize, "shortest": SHORTEST_SECONDS,
            "readers": readers(),
        }  # fmt: skip

        def read(file: Path) -> Recording:
            recording = read_recording(file, self.sample_rate)
            return recording._replace(audio=normalize(recording.audio, self.normalize))

        found, home, notes = cached(Path(folder), files, settings, read, cache_folder(self.cache), self.progress)
        clips: dict[str, Tensor] = {}
        skipped: list[str] = []
        for file, recording in zip(files, found, strict=True):
            if isinstance(recording, str):
                skipped.append(recording)
            elif copy := copy_of(file, recording.fingerprint, seen):
                if seen[recording.fingerprint].absolute() != file.absolute():  # else it is held out, and that is no fault
                    skipped.append(str(copy))
            else:
                clips[str(file)] = recording.audio
        if not clips:
            why = f"the first: {skipped[0]}" if skipped else "all of them are held out."
            raise AudioError(f"{argument}: none of the {len(files)} audio files can be used; {why}")
        barred = [str(error) for error in list_folder(folder)[1].values() if error.reason != NOT_AUDIO]
        self.skipped += skipped + barred
        self.notes += notes
        self.caches.append(home)
        return clips


def split_files(files: dict[str, Tensor], valid_fraction: float, seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Training and validation files, two or more, by a seeded shuffle; never a part of a file in each."""
    num_valid = min(max(1, round(valid_fraction * len(files))), len(files) - 1)
    order = np.random.default_rng([seed, 0]).permutation(len(files))
    chosen = set(order[:num_valid].tolist())
    train = {name: audio for i, (name, audio) in enumerate(files.items()) if i not in chosen}
    return train, {name: audio for i, (name, audio) in enumerate(files.items()) if i in chosen}


def class_of(name: str, folder: str) -> str:
    """The first subfolder of a folder on the way to one of its files.

    Raises:
        AudioError: the file is in no subfolder.
    """
    file = Path(name.removeprefix("the end of "))
    parts = file.relative_to(folder).parts if file != Path(folder) else ()
    if len(parts) < 2:
        raise AudioError(f"{file} is in no subfolder of {folder}, whose name would be its class; move it into one.")
    return parts[0]


def pad_pairs(pairs: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    """Clips as `pad_batch`, and their labels (B,)."""
    clips, labels = zip(*pairs, strict=True)
    return pad_batch(list(clips)), torch.tensor(labels)


def pad_batch(clips: list[Tensor]) -> Tensor:
    """(B, 1, T) from clips (1, ...), with T the longest one's length; zeros at the end of the others."""
    longest = max(clip.shape[-1] for clip in clips)
    return torch.stack([_pad(clip, longest) for clip in clips])


class _TrainingClips(Dataset):
    """Clip k of a stream without end: every file once in each pass, in an order and at a place drawn from (seed, pass).

    The files are tensors (1, T) by number; with labels, one for each file, a clip is a pair.
    """

    def __init__(self, files: Any, clip_samples: int | None, seed: int, labels: Sequence[int] = ()) -> None:
        self.files, self.clip_samples, self.seed, self.labels = files, clip_samples, seed, labels
        self.drawn: tuple[int, np.ndarray, np.ndarray] | None = None  # the last pass, which takes a while with many files

    def __getitem__(self, index: int) -> Tensor | tuple[Tensor, int]:
        passes, number = divmod(index, len(self.files))
        if self.drawn is None or self.drawn[0] != passes:
            generator = np.random.default_rng([self.seed, 1, passes])
            self.drawn = passes, generator.permutation(len(self.files)), generator.random(len(self.files))
        _, order, places = self.drawn
        audio = self.files[order[number]]
        if self.clip_samples is not None:
            room = max(0, audio.shape[-1] - self.clip_samples)
            audio = cut(audio, math.floor(places[number] * (room + 1)), self.clip_samples)
        return (audio, self.labels[order[number]]) if self.labels else audio


class Share(Sampler[int]):
    """start(), start() + 1, … without end, asked anew by each iterator; of several devices each takes a batch in turn."""

    def __init__(self, start: Callable[[], int], batch_size: int) -> None:
        self.start, self.batch_size = start, batch_size

    def __iter__(self) -> Iterator[int]:
        start, (rank, devices) = self.start(), rank_and_devices()
        for batch in itertools.count(rank, devices):
            yield from range(start + batch * self.batch_size, start + (batch + 1) * self.batch_size)


def position(data: Any) -> int:
    """How many clips the trainer of a data module has used, on all devices."""
    if data.trainer is None:
        return 0
    _, devices = rank_and_devices()
    return data.trainer.global_step * data.trainer.accumulate_grad_batches * data.batch_size * devices


def rank_and_devices() -> tuple[int, int]:
    """Which of how many processes of a training this is."""
    started = torch.distributed.is_available() and torch.distributed.is_initialized()
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if started else (0, 1)


def windows(audio: Tensor, clip_samples: int | None) -> list[Tensor]:
    """The file (1, T) cut into clips, the last padded if at least half of it is audio, else left out; never none.

    clip_samples None keeps the file whole.
    """
    if clip_samples is None:
        return [audio]
    num_clips = max(1, math.floor(audio.shape[-1] / clip_samples + 0.5))
    return [cut(audio, index * clip_samples, clip_samples) for index in range(num_clips)]


def cut(audio: Tensor, start: int, clip_samples: int) -> Tensor:
    """clip_samples from `start` on, with zeros after the file's end; a view of the file where that is all of it."""
    return _pad(audio[..., start : start + clip_samples], clip_samples)


def _pad(clip: Tensor, length: int) -> Tensor:
    missing = length - clip.shape[-1]
    return torch.nn.functional.pad(clip, (0, missing)) if missing else clip
