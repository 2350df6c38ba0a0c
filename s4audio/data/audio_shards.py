"""Clips from shards on one disk or on none: written once by `write_shards`, read by the package litdata, item by item.

An item is a piece of a recording. litdata reads any item by its number: from a folder in place, from an address (s3://,
gs://, …) by asking for the bytes of that item alone. So what a training sees follows from (seed, position), as with
`AudioFolder`; litdata's own shuffling, whose order depends on the number of devices and workers, is not used.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from s4audio.audio import AudioError
from s4audio.data.audio_folder import AudioFolder, Share, _TrainingClips, pad_batch, position, windows

SHARD_BYTES = 64_000_000
FORMAT = ["no_header_numpy:9", "str"]  # of an item, in litdata's words: float32 samples, and JSON about them


class AudioShards(lightning.LightningDataModule):
    """Mono clips from shards that `write_shards` made, for recordings that no disk holds; needs s4audio[shards].

    Clips, and where a run goes on, are as of `AudioFolder`, with pieces in the place of files: of recordings that are
    shorter than a piece they are the same clips. Each clip is a request, so that from an address several workers should
    ask at once.

    Args:
        root: what `write_shards` wrote: a folder, or an address that litdata reads.
        sample_rate: in Hz; that of the shards.
        clip_seconds: as of AudioFolder; at most the length of a piece. None takes whole pieces.
        batch_size: clips in a batch, of each device.
        seed: of the clips.
        num_workers: processes that prepare batches.

    Raises:
        ValueError: an argument outside its range.
        RuntimeError: litdata is not installed.
        AudioError: there are no such shards, or they do not fit.
    """

    def __init__(
        self,
        root: str,
        sample_rate: int,
        clip_seconds: float | None = None,
        batch_size: int = 8,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        if sample_rate < 1 or batch_size < 1 or (clip_seconds is not None and clip_seconds <= 0):
            raise ValueError(
                f"sample_rate {sample_rate}, batch_size {batch_size}, clip_seconds {clip_seconds}: all must be positive."
            )
        self.root, self.sample_rate, self.clip_seconds = root, sample_rate, clip_seconds
        self.batch_size, self.seed, self.num_workers = batch_size, seed, num_workers
        self.clip_samples = None if clip_seconds is None else max(1, round(clip_seconds * sample_rate))
        self.about: dict[str, Any] = {}
        self.caches: list[Path] = []
        self.notes: list[str] = []

    def setup(self, stage: str | None = None) -> None:
        """Opens the shards."""
        if self.about:
            return
        self.train_pieces, self.valid_pieces = _Pieces(f"{self.root}/train"), _Pieces(f"{self.root}/valid")
        about = self.train_pieces.about(0)["data"]
        if about["sample_rate"] != self.sample_rate:
            raise AudioError(f"{self.root} is at {about['sample_rate']} Hz and sample_rate is {self.sample_rate}.")
        if (self.clip_seconds or 0) > about["piece_seconds"]:
            raise AudioError(
                f"clip_seconds is {self.clip_seconds}, and the pieces in {self.root} are {about['piece_seconds']} s long; "
                "write the shards again with longer ones."
            )
        self.about = about

    def describe(self) -> dict[str, object]:
        """What was written, for people and for config.json."""
        return {**self.about, "clip_seconds": self.clip_seconds}

    @property
    def valid_names(self) -> list[str]:
        """The recordings that the first held-out pieces are of."""
        return [self.valid_pieces.about(index)["file"] for index in range(min(2, len(self.valid_pieces)))]

    @property
    def valid_clips(self) -> list[Tensor]:
        """The first held-out pieces, (1, T) each."""
        return [self.valid_pieces[index] for index in range(min(2, len(self.valid_pieces)))]

    def train_dataloader(self) -> DataLoader:
        """Batches (B, 1, T) without end, from where the trainer stands; where several devices train, this one's share."""
        return DataLoader(
            _TrainingClips(self.train_pieces, self.clip_samples, self.seed), self.batch_size,
            sampler=Share(lambda: position(self), self.batch_size), collate_fn=pad_batch, num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0, pin_memory=torch.cuda.is_available(),
        )  # fmt: skip

    def val_dataloader(self) -> DataLoader:
        """The windows of every held-out piece, always the same."""
        return DataLoader(
            _Windows(self.valid_pieces, self.clip_samples), self.batch_size, collate_fn=pad_batch,
            pin_memory=torch.cuda.is_available(),
        )  # fmt: skip


class _Pieces(Dataset):
    """The pieces (1, T) in the shards at an address, read one by one.

    Raises:
        RuntimeError: litdata is not installed.
        AudioError: there are no such shards.
    """

    def __init__(self, address: str) -> None:
        try:
            from litdata import StreamingDataset
        except ImportError as error:
            raise RuntimeError("shards are read by litdata, which is not here; pip install 's4audio[shards]'.") from error
        try:
            self.dataset: Any = StreamingDataset(address)
            self.length = len(self.dataset)
            self.dataset[0:0]  # opens it
            found = self.dataset.cache._reader.config.data_format
        except Exception as error:  # whatever litdata makes of a wrong address
            raise AudioError(f"{address} holds no shards of s4audio ({str(error).splitlines()[0]}).") from error
        if found != FORMAT:  # litdata has a format that runs code when it is read
            raise AudioError(f"{address} holds items of the form {found}; wanted {FORMAT}, as write_shards makes them.")

    def about(self, index: int) -> dict[str, Any]:
        """The file that a piece is of; with the first piece also what all of them are."""
        return json.loads(self.dataset[index]["about"])

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(self.dataset[int(index)]["samples"].copy()).unsqueeze(0)


class _Windows(IterableDataset):
    def __init__(self, pieces: _Pieces, clip_samples: int | None) -> None:
        self.pieces, self.clip_samples = pieces, clip_samples

    def __iter__(self) -> Iterator[Tensor]:
        for index in range(len(self.pieces)):
            yield from windows(self.pieces[index], self.clip_samples)


def write_shards(data: AudioFolder, out: str | Path, piece_seconds: float = 10.0) -> None:
    """Writes the recordings of a folder, as they are trained on, into shards in OUT/train and OUT/valid: all or nothing.

    Args:
        data: the folder, with its split, rate and level.
        out: a folder that does not exist; it can be copied anywhere that litdata reads.
        piece_seconds: recordings are cut into pieces of this length, the last one shorter. Clips do not cross pieces.

    Raises:
        RuntimeError: litdata is not installed.
        AudioError: as AudioFolder; or `out` exists.
        ValueError: piece_seconds is not positive.
        OSError: `out` cannot be written.
    """
    try:
        from litdata.streaming.writer import BinaryWriter
    except ImportError as error:
        raise RuntimeError("shards are written by litdata, which is not here; pip install 's4audio[shards]'.") from error
    out = Path(out)
    length = round(piece_seconds * data.sample_rate)
    if length < 1:
        raise ValueError(f"piece_seconds is {piece_seconds}; wanted a positive length.")
    if out.exists():
        raise AudioError(f"{out} exists; choose a new folder for the shards.")
    data.setup()
    about = {**data.describe(), "clip_seconds": None, "piece_seconds": piece_seconds}
    part = out.with_name(f".{out.name}.new")
    shutil.rmtree(part, ignore_errors=True)
    try:
        for split, names, clips in (
            ("train", data.train_names, data.train_clips),
            ("valid", data.valid_names, data.valid_clips),
        ):
            (part / split).mkdir(parents=True)
            writer, number = BinaryWriter(str(part / split), chunk_bytes=SHARD_BYTES), 0
            for name, clip in zip(names, clips, strict=True):
                for start in range(0, clip.shape[-1], length):
                    told = {"file": name} if number else {"file": name, "data": about}
                    # as JSON: of a text that is a file's path litdata would store the file
                    writer[number] = {"samples": clip[0, start : start + length].numpy(), "about": json.dumps(told)}
                    number += 1
            writer.done()
            writer.merge()
        os.replace(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
