"""Shards: the clips of the folder that they were written from, in the same order, from wherever a run goes on."""

import builtins
import itertools
import json
import types
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml

from s4audio.audio import AudioError
from s4audio.cli import main
from s4audio.data import AudioFolder, AudioShards, write_shards
from s4audio.data.audio_shards import FORMAT
from tests.cli.commands import RECIPE

litdata = pytest.importorskip("litdata")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path, generator = tmp_path_factory.mktemp("recordings"), np.random.default_rng(0)
    for number, seconds in enumerate((1.0, 0.2, 2.0, 0.7, 1.5, 0.9)):
        soundfile.write(path / f"{number}.wav", generator.uniform(-0.5, 0.5, round(4000 * seconds)), 4000)
    (path / "broken.wav").write_bytes(b"nothing")
    return path


def read(folder, **options) -> AudioFolder:
    return AudioFolder(str(folder), 4000, valid_fraction=0.4, normalize="peak", **options)


@pytest.fixture(scope="module")
def shards(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("shards") / "out"
    write_shards(read(folder), out, piece_seconds=2.0)
    return out


def batches(loader, count: int) -> list[torch.Tensor]:
    return list(itertools.islice(loader, count))


@pytest.mark.parametrize("options", [{"clip_seconds": 0.4}, {"clip_seconds": None}, {"clip_seconds": 0.4, "num_workers": 2}])
def test_clips_are_those_of_the_folder_bit_by_bit(folder, shards, options):
    ours, theirs = AudioShards(str(shards), 4000, batch_size=3, **options), read(folder, batch_size=3, **options)
    ours.setup()
    theirs.setup()
    for made, wanted in (
        (ours.train_dataloader(), theirs.train_dataloader()),
        (ours.val_dataloader(), theirs.val_dataloader()),
    ):
        pairs = list(zip(batches(made, 7), batches(wanted, 7), strict=True))
        assert pairs and all(torch.equal(a, b) for a, b in pairs)


def test_a_run_goes_on_at_any_position(shards):
    data = AudioShards(str(shards), 4000, clip_seconds=0.3, batch_size=2)
    data.setup()
    whole = batches(data.train_dataloader(), 9)
    for done in (1, 4, 7):
        data.trainer = types.SimpleNamespace(global_step=done, accumulate_grad_batches=1)
        assert torch.equal(next(iter(data.train_dataloader())), whole[done])


def test_long_recordings_are_cut_into_pieces_and_nothing_is_lost(folder, tmp_path):
    data = read(folder)
    write_shards(data, tmp_path / "out", piece_seconds=0.25)
    pieces = AudioShards(str(tmp_path / "out"), 4000)
    pieces.setup()
    lengths = [clip.shape[-1] for clip in data.train_clips]
    assert len(pieces.train_pieces) == sum(-(-length // 1000) for length in lengths)
    joined = torch.cat([pieces.train_pieces[index] for index in range(len(pieces.train_pieces))], -1)
    assert torch.equal(joined, torch.cat(data.train_clips, -1))
    assert pieces.train_pieces.about(1)["file"] == data.train_names[0]


def test_what_was_written_is_described(folder, shards):
    data, source = AudioShards(str(shards), 4000, clip_seconds=0.5), read(folder, clip_seconds=0.5)
    data.setup()
    source.setup()
    assert data.describe() == {**source.describe(), "piece_seconds": 2.0} and len(source.skipped) == 1
    assert data.valid_names == source.valid_names[:2]
    assert all(torch.equal(a, b) for a, b in zip(data.valid_clips, source.valid_clips[:2], strict=True))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_model_is_trained_on_shards(shards, tmp_path, capsys):
    recipe = yaml.safe_load(Path(RECIPE).read_text())
    recipe["data"] = {
        "class_path": "s4audio.data.AudioShards",
        "init_args": {"root": str(shards), "sample_rate": 4000, "clip_seconds": 0.5, "batch_size": 2},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    options = ["--config", str(tmp_path / "recipe.yaml"), "--steps", "2", "--out", str(tmp_path / "run")]
    assert main(["fit", *options]) == 0
    said = capsys.readouterr().out
    assert "data: 4 files" in said and "step 2: held out" in said and (tmp_path / "run" / "report.html").exists()


def test_wrong_shards_are_refused_in_a_sentence(folder, shards, tmp_path, monkeypatch):
    with pytest.raises(AudioError, match=r"no/train holds no shards of s4audio"):
        AudioShards(str(tmp_path / "no"), 4000).setup()
    with pytest.raises(AudioError, match="is at 4000 Hz and sample_rate is 8000"):
        AudioShards(str(shards), 8000).setup()
    with pytest.raises(AudioError, match=r"clip_seconds is 3, and the pieces in .* are 2.0 s long"):
        AudioShards(str(shards), 4000, clip_seconds=3).setup()
    with pytest.raises(ValueError, match="all must be positive"):
        AudioShards(str(shards), 4000, batch_size=0)
    with pytest.raises(AudioError, match="exists; choose a new folder"):
        write_shards(read(folder), shards)
    with pytest.raises(ValueError, match="piece_seconds is 0"):
        write_shards(read(folder), tmp_path / "new", piece_seconds=0)
    assert list(tmp_path.iterdir()) == []


def test_shards_that_would_run_code_are_not_read(shards, tmp_path):
    """litdata knows a format that unpickles."""
    from litdata.streaming.writer import BinaryWriter

    class Harm:
        def __reduce__(self):
            return open, (str(tmp_path / "harm"), "w")

    for split in ("train", "valid"):
        (tmp_path / "shards" / split).mkdir(parents=True)
        writer = BinaryWriter(str(tmp_path / "shards" / split), chunk_bytes=1000)
        writer[0] = {"samples": Harm(), "about": "{}"}
        writer.done()
        writer.merge()
    index = json.loads((tmp_path / "shards" / "train" / "index.json").read_text())
    assert index["config"]["data_format"] == ["pickle", "str"] != FORMAT
    with pytest.raises(AudioError, match=r"holds items of the form \['pickle', 'str'\]; wanted"):
        AudioShards(str(tmp_path / "shards"), 4000).setup()
    assert not (tmp_path / "harm").exists()


def test_without_litdata_that_is_said(shards, tmp_path, folder, monkeypatch):
    original = builtins.__import__

    def missing(name, *arguments):
        if name.partition(".")[0] == "litdata":
            raise ImportError(name)
        return original(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", missing)
    for use in (AudioShards(str(shards), 4000).setup, lambda: write_shards(read(folder), tmp_path / "out")):
        with pytest.raises(RuntimeError, match=r"by litdata, which is not here; pip install 's4audio\[shards\]'"):
            use()


def test_the_seed_draws_the_clips_and_a_clip_may_be_a_whole_piece(shards):
    drawn = []
    for seed in (0, 0, 1):
        data = AudioShards(str(shards), 4000, clip_seconds=0.3, batch_size=4, seed=seed)
        data.setup()
        drawn.append(torch.cat(batches(data.train_dataloader(), 3)))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    whole = AudioShards(str(shards), 4000, clip_seconds=2.0)
    whole.setup()
    assert next(iter(whole.train_dataloader())).shape[-1] == 8000
