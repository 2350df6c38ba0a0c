"""The doctor says what works, and its status says whether anything needed does not."""

import tempfile
from pathlib import Path

import torch

from s4audio.cli import main
from tests.cli.commands import refused


def test_a_healthy_installation(capsys):
    assert main(["doctor"]) == 0
    told = capsys.readouterr().out
    assert "FAIL" not in told and "everything that s4audio needs works" in told
    for wanted in ("Python 3", "torch 2", "libsndfile", "GiB free", "S4D: the engine", "S4: the engine", "in blocks"):
        assert wanted in told, wanted


def test_a_broken_engine_is_found(capsys, monkeypatch):
    from s4audio.ssm import chunk

    run = chunk.run
    monkeypatch.setattr(chunk, "run", lambda *arguments: (1.01 * run(*arguments)[0], run(*arguments)[1]))
    assert main(["doctor"]) == 1
    told = capsys.readouterr().out
    assert " FAIL  S4D: the engine on" in told and "2 of the checks failed" in told


def test_a_check_that_crashes_is_a_finding(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: 1 / 0)
    assert main(["doctor"]) == 1
    assert "FAIL  accelerator: ZeroDivisionError" in capsys.readouterr().out


def test_a_missing_torchaudio_is_a_note(capsys, monkeypatch):
    def missing(*_):
        raise RuntimeError("mel filters need torchaudio")

    monkeypatch.setattr("s4audio.cli.doctor.mel_filterbank", missing)
    assert main(["doctor"]) == 0
    assert "note  mel distances are not available" in capsys.readouterr().out


def test_it_takes_no_arguments(capsys):
    assert "unrecognized arguments: --now" in refused(capsys, "doctor", "--now")


def test_a_folder_that_cannot_be_written_is_a_note_and_no_place_for_temporary_files_a_failure(capsys, monkeypatch):
    real = tempfile.TemporaryFile
    for locked, status, verdict in (
        (Path.cwd(), 0, " note  this folder"),
        (Path(tempfile.gettempdir()), 1, " FAIL  temporary"),
    ):

        def refuse(dir, locked=locked):
            if Path(dir) == locked:
                raise PermissionError(13, "Permission denied")
            return real(dir=dir)

        monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
        assert main(["doctor"]) == status
        assert verdict in capsys.readouterr().out
