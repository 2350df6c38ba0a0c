"""`s4audio check`: what it prints and writes, and that it never writes into the data."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile

from s4audio.cli import main
from tests import hostile
from tests.cli.commands import fit, refused


def files_of(folder):
    return sorted((str(path), path.lstat().st_mtime_ns) for path in folder.rglob("*"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes and links are a Unix thing")
def test_a_hostile_folder_is_told_and_written_down(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "data"
    data.mkdir()
    expected = hostile.make(data)
    before = files_of(data)
    assert main(["check", "data", "--workers", "2"]) == 0
    told = capsys.readouterr().out
    rejected = {name: of_file for name, of_file in expected.items() if of_file.reason}
    kept = len(expected) - len(rejected)
    assert told.startswith(f"data: {len(expected)} files found, {kept + 5} read, {kept} kept: ")  # 5: silent, short, copies
    for row in (
        "  broken link   ",
        "  duplicate   ",
        "  clipped   ",
        "  near silent   ",
        "  sample rates (files): 16,000 Hz (",
    ):
        assert row in told
    assert told.endswith("\ntrain on it: s4audio train data\n")
    assert files_of(data) == before and sorted(os.listdir()) == ["check", "data"]
    assert sorted(os.listdir("check")) == ["check.json", "rejects.csv"]

    with open("check/rejects.csv", newline="", encoding="utf-8") as file:
        rows = {row["path"]: row for row in csv.DictReader(file)}
    assert sorted(rows) == sorted(f"data/{name}" for name in rejected)
    for name, of_file in rejected.items():
        row, sentence = rows[f"data/{name}"], hostile.sentence(Path("data"), name, of_file)
        assert row["reason"] == of_file.reason and row["sentence"].startswith(sentence)

    found = json.loads((tmp_path / "check" / "check.json").read_text())
    assert found["found"] == len(expected) == found["kept"] + sum(found["skipped"].values())
    assert {file["path"]: (file["reason"], tuple(file["warnings"])) for file in found["files"]} == {
        f"data/{name}": (of_file.reason, of_file.warnings) for name, of_file in expected.items()
    }


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes and links are a Unix thing")
def test_training_tells_the_same(tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    expected = hostile.make(data)
    before = files_of(data)
    assert fit(data, tmp_path / "run", "--steps", "1", "--trainer.val_check_interval", "1") == 0
    hostile.assert_every_reject_is_named(capsys.readouterr().out, data, expected)
    assert files_of(data) == before


def test_nothing_to_keep_is_status_2_and_written_down_all_the_same(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "empty.wav").touch()
    error = refused(capsys, "check", "data")
    assert error == "s4audio: none of the 1 files in data can be used; check/rejects.csv says why of each."
    assert (tmp_path / "check" / "rejects.csv").read_text().splitlines()[1:] == [
        "data/empty.wav,empty file,data/empty.wav is an empty file."
    ]


def test_an_empty_folder_leaves_nothing_behind(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for verb in ("check", "train"):
        assert "data is empty; put audio files into it" in refused(capsys, verb, "data")
    assert list(tmp_path.iterdir()) == [tmp_path / "data"]


@pytest.mark.parametrize("out", [".", "data", "data/check", "data/sub/check", "link/check"])
def test_nothing_is_written_into_the_data(tmp_path, capsys, monkeypatch, out):
    (tmp_path / "data" / "sub").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "data" / "sub")
    soundfile.write(tmp_path / "data" / "a.wav", np.linspace(-0.5, 0.5, 8000), 8000)
    monkeypatch.chdir(tmp_path / "data" if out == "." else tmp_path)
    folder = "." if out == "." else "data"
    assert f"{out} is inside {folder}, where nothing is written" in refused(capsys, "check", folder, "--out", out)
    assert sorted(path.name for path in (tmp_path / "data").rglob("*")) == ["a.wav", "sub"]


def test_wrong_input_is_refused_before_anything_is_read(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "file").touch()
    assert "--workers is 0; wanted at least 1" in refused(capsys, "check", "data", "--workers", "0")
    assert "nowhere does not exist" in refused(capsys, "check", "nowhere")
    assert "is no place where a file can be written" in refused(capsys, "check", "data", "--out", "file")
    assert sorted(os.listdir()) == ["data", "file"]


def test_names_do_not_command_the_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    soundfile.write("data/a\n\x1b[2Jé.wav", np.full(800, 0.5), 8000)
    (tmp_path / "data" / "b\r\x07\u202e.wav").touch()
    assert main(["check", "data"]) == 0
    told = capsys.readouterr().out
    assert "data/a\\n\\x1b[2Jé.wav\n" in told and "data/b\\r\\x07\\u202e.wav is an empty file.\n" in told
    assert not {"\x1b", "\r", "\x07", "\u202e"} & set(told)
    with open("check/rejects.csv", newline="", encoding="utf-8") as file:
        assert [row["path"] for row in csv.DictReader(file)] == ["data/b\r\x07\u202e.wav"]  # as it is, for programs


def test_one_file_and_a_name_with_a_space(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    soundfile.write("my song.wav", np.linspace(-0.5, 0.5, 8000), 8000)
    assert main(["check", "my song.wav", "--out", "elsewhere"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("my song.wav: 1 file found, 1 read, 1 kept: 0.0 of 0.0 min (100.0%)")
    assert "s4audio train 'my song.wav'\n" in told and sorted(os.listdir("elsewhere")) == ["check.json", "rejects.csv"]


def test_silence_is_told_in_percent(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    sound = np.append(0.3 * np.sin(np.arange(8000) * 0.1), np.zeros(24_000))
    soundfile.write(tmp_path / "data" / "a.wav", sound, 8000)
    assert main(["check", str(tmp_path / "data"), "--out", str(tmp_path / "out")]) == 0
    (row,) = (line.split() for line in capsys.readouterr().out.splitlines() if "silent, % of the time" in line)
    assert row[-3:] == ["75", "75", "75"]
