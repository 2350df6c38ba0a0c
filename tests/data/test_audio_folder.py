"""Audio folders: what is read, cut, padded and split, and that clips follow from (seed, position) alone."""

import itertools
import types

import numpy as np
import pytest
import soundfile
import torch

from s4audio.audio import AudioError
from s4audio.data import AudioFolder, audio_folder
from s4audio.data.audio_folder import _TrainingClips, split_files, windows


@pytest.fixture
def folder(tmp_path):
    """Four files of 1, 2, 3 and 0.1 s at 1 kHz; each file holds its number / 10."""
    for number, seconds in enumerate((1.0, 2.0, 3.0, 0.1), start=1):
        (tmp_path / "sub").mkdir(exist_ok=True)
        soundfile.write(
            tmp_path / "sub" / f"{number}.wav", np.full(round(1000 * seconds), number / 10), 1000, subtype="FLOAT"
        )
    return tmp_path


def batches(data: AudioFolder, count: int) -> list[torch.Tensor]:
    data.setup()
    return list(itertools.islice(data.train_dataloader(), count))


def test_every_file_appears_once_in_each_pass_and_short_ones_are_padded(folder):
    data = AudioFolder(str(folder), 1000, valid=str(folder), clip_seconds=0.5, batch_size=4)
    for batch in batches(data, 5):
        assert batch.shape == (4, 1, 500)
        assert sorted(round(10 * float(clip[0, 0])) for clip in batch) == [1, 2, 3, 4]
        short = next(clip for clip in batch if round(10 * float(clip[0, 0])) == 4)
        assert (short[0, :100] == 0.4).all() and (short[0, 100:] == 0).all()
    assert data.describe()["train_files"] == 4 and data.describe()["train_seconds"] == 6.1


def test_clips_come_from_everywhere_in_a_file():
    file = torch.arange(1000.0).unsqueeze(0)
    clips = _TrainingClips([file], 10, seed=0)
    starts = torch.stack([clips[k][0, 0] for k in range(3000)])
    assert starts.min() == 0 and starts.max() == 990
    assert torch.histc(starts, 10, 0, 991).min() > 230  # uniform: 300 in each tenth


def test_clips_follow_from_seed_and_position(folder):
    first, again, other = (
        torch.cat(batches(AudioFolder(str(folder), 1000, clip_seconds=0.5, batch_size=2, seed=s), 6)) for s in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_each_iterator_starts_where_the_trainer_stands(folder):
    data = AudioFolder(str(folder), 1000, clip_seconds=0.5, batch_size=2)
    whole = batches(data, 6)
    data.trainer = types.SimpleNamespace(global_step=1, accumulate_grad_batches=2)
    loader = data.train_dataloader()
    assert torch.equal(next(iter(loader)), whole[2])
    data.trainer.global_step = 2
    assert torch.equal(next(iter(loader)), whole[4])


def test_devices_share_the_clips_of_one(folder, monkeypatch):
    """Two devices with batches of 2, step by step, see what one with batches of 4 sees; also where they go on."""

    def steps(rank: int, devices: int, batch_size: int, done: int) -> list[torch.Tensor]:
        monkeypatch.setattr(audio_folder, "rank_and_devices", lambda: (rank, devices))
        data = AudioFolder(str(folder), 1000, clip_seconds=0.5, batch_size=batch_size)
        data.trainer = types.SimpleNamespace(global_step=done, accumulate_grad_batches=3)
        return batches(data, 5)

    for done in (0, 7):
        one, first, second = steps(0, 1, 4, done), steps(0, 2, 2, done), steps(1, 2, 2, done)
        assert all(torch.equal(torch.cat(shares), whole) for *shares, whole in zip(first, second, one, strict=True))
        assert not torch.equal(first[0], second[0])


def test_workers_change_nothing(folder):
    alone, helped = (
        torch.cat(batches(AudioFolder(str(folder), 1000, clip_seconds=0.5, batch_size=2, num_workers=n), 6)) for n in (0, 1)
    )
    assert torch.equal(alone, helped)


def test_whole_files_are_padded_to_the_longest_of_the_batch(folder):
    (batch,) = batches(AudioFolder(str(folder), 1000, valid=str(folder), batch_size=4), 1)
    assert batch.shape == (4, 1, 3000)
    assert sorted((batch[:, 0] != 0).sum(1).tolist()) == [100, 1000, 2000, 3000]


def test_split_is_by_file_seeded_and_never_empty(folder):
    files = {str(path): torch.zeros(1, 1) for path in sorted(folder.rglob("*.wav"))}

    def names(fraction: float, seed: int) -> tuple[list[str], list[str]]:
        train, valid = split_files(files, fraction, seed)
        return list(train), list(valid)

    train, valid = names(0.5, 0)
    assert sorted(train + valid) == list(files) and len(valid) == 2
    assert names(0.5, 0) == (train, valid)
    assert any(names(0.5, seed) != (train, valid) for seed in range(1, 5))
    assert [len(part) for part in names(0.001, 0)] == [3, 1]
    assert [len(part) for part in names(0.999, 0)] == [1, 3]


def test_the_end_of_an_only_file_is_held_out(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.linspace(0.1, 0.9, 1000), 1000, subtype="FLOAT")
    data = AudioFolder(str(tmp_path), 1000, valid_fraction=0.2)
    data.setup()
    assert [clip.shape[-1] for clip in data.train_clips + data.valid_clips] == [800, 200]
    assert data.valid_clips[0].min() > data.train_clips[0].max()
    assert data.valid_names == [f"the end of {tmp_path / 'a.wav'}"]


def test_silent_and_tiny_files_are_skipped_and_named(folder):
    soundfile.write(folder / "silent.wav", np.zeros(500), 1000)
    soundfile.write(folder / "tiny.wav", 0.5 * np.ones(9), 1000)
    data = AudioFolder(str(folder), 1000)
    data.setup()
    assert data.describe()["train_files"] == 3 and data.describe()["valid_files"] == 1
    assert ["silent.wav is silent." in data.skipped[0], "tiny.wav is shorter than 0.01 s." in data.skipped[1]] == [
        True,
        True,
    ]


def test_copies_are_left_out_so_that_none_is_trained_on_and_held_out(folder):
    for number in range(1, 5):
        samples, rate = soundfile.read(folder / "sub" / f"{number}.wav", dtype="float32")
        soundfile.write(folder / f"copy of {number}.wav", samples, rate, subtype="FLOAT")
    data = AudioFolder(str(folder), 1000, valid_fraction=0.5)
    data.setup()
    assert len(data.skipped) == 4
    assert data.skipped[0] == f"{folder / 'sub' / '1.wav'} holds the same samples as {folder / 'copy of 1.wav'}."
    assert sorted(round(10 * float(clip.amax())) for clip in data.train_clips + data.valid_clips) == [1, 2, 3, 4]


def test_what_is_held_out_is_not_trained_on_though_its_folder_lies_in_the_training_folder(folder):
    held_out = folder / "held out"
    held_out.mkdir()
    (folder / "sub" / "2.wav").rename(held_out / "2.wav")
    (held_out / "copy.wav").write_bytes((folder / "sub" / "3.wav").read_bytes())
    data = AudioFolder(str(folder), 1000, valid=str(held_out))
    data.setup()
    loudest = [sorted(round(10 * float(clip.amax())) for clip in clips) for clips in (data.train_clips, data.valid_clips)]
    assert loudest == [[1, 4], [2, 3]]
    assert f"{folder / 'sub' / '3.wav'} holds the same samples as {held_out / 'copy.wav'}." in data.skipped
    assert len(data.skipped) == 1
    with pytest.raises(AudioError, match="train: none of the 2 audio files can be used; all of them are held out"):
        AudioFolder(str(held_out), 1000, valid=str(folder)).setup()


@pytest.mark.parametrize(("length", "expected"), [(1, 1), (100, 1), (149, 1), (150, 2), (200, 2), (260, 3)])
def test_validation_windows_lie_side_by_side(length, expected):
    audio = 1 + torch.arange(float(length)).unsqueeze(0)
    clips = windows(audio, 100)
    assert len(clips) == expected and all(clip.shape == (1, 100) for clip in clips)
    covered = torch.cat(clips, -1)[..., :length]
    assert torch.equal(covered, audio[..., : covered.shape[-1]])


def test_bad_files_are_skipped_and_named(folder):
    (folder / "broken.wav").write_bytes(b"nothing")
    data = AudioFolder(str(folder), 1000, valid=str(folder), clip_seconds=0.5)
    data.setup()
    assert data.describe()["train_files"] == 4
    assert len(data.skipped) == 2 and "broken.wav" in data.skipped[0]


def test_a_folder_of_bad_files_is_refused(tmp_path):
    for name in ("a.wav", "b.wav"):
        (tmp_path / name).write_bytes(b"nothing")
    with pytest.raises(AudioError, match="none of the 2 audio files can be used"):
        AudioFolder(str(tmp_path), 1000).setup()


def test_peak_normalization_is_by_file(folder):
    data = AudioFolder(str(folder), 1000, valid=str(folder), clip_seconds=0.5, normalize="peak")
    assert all((batch.amax((1, 2)) == 1).all() for batch in batches(data, 3))


@pytest.fixture
def labelled(tmp_path):
    """Six files at 1 kHz in the folders b and a/…, each holding its number / 10."""
    for number, place in enumerate(("b", "a", "a/deep", "b", "a", "b"), start=1):
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
        soundfile.write(tmp_path / place / f"{number}.wav", np.full(1000, number / 10), 1000, subtype="FLOAT")
    return tmp_path


CLASS = {1: 1, 2: 0, 3: 0, 4: 1, 5: 0, 6: 1}  # of the files, as a is number 0


def numbers(clips: torch.Tensor) -> list[int]:
    return [round(10 * float(clip[0, 0])) for clip in clips]


def test_the_first_subfolder_is_the_class(labelled):
    plain, data = (AudioFolder(str(labelled), 1000, clip_seconds=0.5, batch_size=2, labels=how) for how in (None, "folder"))
    for clips, (pairs, labels) in zip(batches(plain, 9), batches(data, 9), strict=True):
        assert torch.equal(clips, pairs) and labels.tolist() == [CLASS[number] for number in numbers(pairs)]
    assert data.classes == ["a", "b"] and data.valid_names == plain.valid_names
    assert data.caches == plain.caches and data.describe() == plain.describe()
    ((clips, labels),) = list(data.val_dataloader())
    assert labels.dtype == torch.int64 and labels.tolist() == [CLASS[number] for number in numbers(clips)]
    assert torch.equal(clips, next(iter(plain.val_dataloader())))
    held = AudioFolder(str(labelled), 1000, valid=str(labelled), clip_seconds=0.3, batch_size=99, labels="folder")
    held.setup()
    ((clips, labels),) = list(held.val_dataloader())  # three windows of each file
    assert len(clips) == 18 and labels.tolist() == [CLASS[number] for number in numbers(clips)]


def test_files_without_a_class_and_classes_without_training_are_refused(labelled, tmp_path_factory):
    others = tmp_path_factory.mktemp("others")
    (others / "c").mkdir()
    (labelled / "a" / "2.wav").rename(others / "c" / "2.wav")
    with pytest.raises(AudioError, match=r"only held-out recordings are of the class 'c'.* Trained on are a, b"):
        AudioFolder(str(labelled), 1000, valid=str(others), labels="folder").setup()
    (labelled / "b" / "1.wav").rename(labelled / "1.wav")
    with pytest.raises(AudioError, match=r"1.wav is in no subfolder of .*, whose name would be its class"):
        AudioFolder(str(labelled), 1000, labels="folder").setup()
    with pytest.raises(AudioError, match="is in no subfolder"):
        AudioFolder(str(labelled / "1.wav"), 1000, labels="folder").setup()


@pytest.mark.parametrize("share", [1e-5, 1 - 1e-5])
def test_the_only_recording_must_be_long_enough_to_be_shared(tmp_path, share):
    soundfile.write(tmp_path / "one.wav", 0.1 * np.ones(2000), 1000)
    with pytest.raises(
        ValueError, match=r"one.wav is the only recording, 2.00 s, and valid_fraction .* leaves less than 0.01"
    ):
        AudioFolder(str(tmp_path), 1000, valid_fraction=share).setup()
    data = AudioFolder(str(tmp_path), 1000, valid_fraction=0.005)
    data.setup()
    assert [clip.shape[-1] for clip in (*data.train_clips, *data.valid_clips)] == [1990, 10]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": "file"}, "labels is 'file'; wanted folder"),
        ({"normalize": "loud"}, "normalize is 'loud'"),
        ({"sample_rate": 0}, "all must be positive"),
        ({"clip_seconds": -1.0}, "all must be positive"),
        ({"valid_fraction": 1.0}, "valid_fraction is 1.0"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        AudioFolder("x", **{"sample_rate": 1000, **arguments})


def test_the_seed_draws_the_clips_and_the_split_each(folder):
    same_files = [AudioFolder(str(folder), 1000, valid=str(folder), clip_seconds=0.5, batch_size=4, seed=s) for s in (0, 1)]
    first, other = (torch.cat(batches(data, 4)) for data in same_files)
    assert not torch.equal(first, other)
    splits = set()
    for seed in range(6):
        data = AudioFolder(str(folder), 1000, seed=seed)
        data.setup()
        splits.add(tuple(data.valid_names))
    assert len(splits) > 1


def test_another_rate_or_level_does_not_get_what_the_cache_holds_of_the_first(folder):
    def read(rate: int, level: str) -> list[torch.Tensor]:
        data = AudioFolder(str(folder), rate, valid=str(folder), normalize=level)
        data.setup()
        return data.train_clips

    first, faster, louder = read(1000, "none"), read(2000, "none"), read(1000, "peak")
    assert [clip.shape[-1] for clip in faster] == [2 * clip.shape[-1] for clip in first]
    assert all(clip.amax() < 0.5 for clip in first) and all(clip.amax() == 1 for clip in louder)
