"""Every wrong input ends in one clear sentence and a non-zero status, with nothing half-written."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import soundfile

from s4audio import S4Model, load, save
from s4audio.cli import main
from tests.cli.commands import RECIPE, ROOT, limit_files, refused


def test_wrong_input_ends_in_a_sentence_and_status_2(capsys, model, folder, tmp_path):
    save(S4Model(3, 10, d_model=4, num_layers=1), tmp_path / "classifier")
    (tmp_path / "empty").mkdir()
    generate = ["generate", str(model), "--out", str(tmp_path / "out"), "--from"]
    assert "'foo' is not a verb" in refused(capsys, "foo")
    assert "is not a model: it has no config.json" in refused(capsys, "generate", str(folder), "--from", "noise")
    assert "which makes no sound" in refused(capsys, "generate", str(tmp_path / "classifier"), "--from", "noise")
    assert "does not exist" in refused(capsys, *generate, str(tmp_path / "nowhere"))
    assert "holds no audio file" in refused(capsys, *generate, str(tmp_path / "empty"))
    assert "--variation is 2.0" in refused(capsys, *generate, str(folder), "--variation", "2")
    assert "--num is 0; wanted at least 1" in refused(capsys, *generate, "noise", "--num", "0")
    assert "--from noise there is none" in refused(capsys, *generate, "noise", "--variation", "0.5")
    for seconds in ("inf", "1e300", "0", "nan", "-3"):
        assert "wanted a positive number, at most 3600" in refused(capsys, *generate, "noise", "--seconds", seconds)
    assert not (tmp_path / "out").exists()


def test_help_says_what_there_is(capsys):
    assert main(["--help"]) == 0
    assert "generate MODEL --from noise" in capsys.readouterr().out
    assert main([]) == 2


def test_ctrl_c_while_a_verb_is_imported_ends_in_a_sentence(monkeypatch, capsys):
    def interrupted(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("importlib.import_module", interrupted)
    assert main(["info", "model"]) == 130
    assert capsys.readouterr().err == "s4audio: stopped; no file is half-written.\n"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_recordings_that_cannot_be_used_are_named_and_nothing_is_trained(capsys, tmp_path):
    """A folder where no file can be used ends at once; a bad file among good ones is skipped by name."""
    bad = {
        "empty.wav": lambda path: path.write_bytes(b""),
        "junk.mp3": lambda path: path.write_bytes(b"junk"),
        "nan.wav": lambda path: soundfile.write(path, np.array([0.1, np.nan], np.float32), 8000, subtype="FLOAT"),
        "silent_header.wav": lambda path: soundfile.write(path, np.zeros(0), 8000),
        "many.wav": lambda path: soundfile.write(path, np.zeros((100, 64)), 8000),
    }
    (tmp_path / "bad").mkdir()
    for name, make in bad.items():
        make(tmp_path / "bad" / name)
    run = str(tmp_path / "run")
    error = refused(capsys, "fit", "--config", RECIPE, "--data.init_args.train", str(tmp_path / "bad"), "--out", run)
    assert "none of the" in error and "audio files can be used" in error
    (tmp_path / "none").mkdir()
    error = refused(capsys, "fit", "--config", RECIPE, "--data.init_args.train", str(tmp_path / "none"), "--out", run)
    assert "holds no audio file" in error and not (tmp_path / "run").exists()

    for number in range(2):
        soundfile.write(tmp_path / "bad" / f"good{number}.wav", 0.1 * np.ones(9000 + number), 8000)
    steps = ["--trainer.max_steps", "1", "--data.init_args.valid", str(tmp_path / "bad" / "good0.wav")]
    assert main(["fit", "--config", RECIPE, "--data.init_args.train", str(tmp_path / "bad"), "--out", run, *steps]) == 0
    told = capsys.readouterr().out
    assert "5 skipped" in told and all(name in told for name in bad)


def test_a_near_miss_gets_a_hint(capsys):
    assert "did you mean reconstruct?" in refused(capsys, "reconstrukt")
    assert "`s4audio --help` explains them" in refused(capsys, "xyz")


def test_a_file_in_the_place_of_a_folder(capsys, model, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    error = refused(capsys, "generate", str(model), "--from", "noise", "--out", str(tmp_path / "file"))
    assert f"{tmp_path / 'file'}: it is a file, and a folder is wanted; choose another place" in error


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="permissions are a Unix thing")
def test_no_permission_to_write(model, folder):
    """Where the tests run as root, which may write anywhere, the verb runs as another user."""
    code = (
        "import os, sys, soundfile, soxr, rich.progress_bar\n"
        "from s4audio import checkpoint\n"
        "from s4audio.cli import main\n"
        "import s4audio.cli.arguments as arguments\n"
        f"model = checkpoint.load({str(model)!r}); checkpoint.load = lambda *_: model\n"
        "checkpoint.read_config = lambda *_: {'training': {}}\n"
        "if os.geteuid() == 0: os.seteuid(65534)\n"
        "sys.exit(main(['reconstruct', 'model', 'in.wav', 'locked/out.wav']))"
    )
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        shutil.copy(folder / "tone0.wav", Path(place) / "in.wav")
        os.chmod(Path(place) / "in.wav", 0o644)
        (Path(place) / "locked").mkdir(mode=0o555)
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        run = subprocess.run([sys.executable, "-c", code], cwd=place, env=environment, capture_output=True, text=True)
        os.chmod(Path(place) / "locked", 0o755)
        assert list((Path(place) / "locked").iterdir()) == []
    assert run.returncode == 2 and len(run.stderr.strip().splitlines()) == 1
    assert "locked" in run.stderr and "Permission denied; choose another place" in run.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="limits on the size of files are a Unix thing")
@pytest.mark.parametrize("size", [1000, 15_000, 100_000], ids=["recipe", "model", "trainer"])
def test_a_full_disk_ends_a_training_in_a_sentence(folder, tmp_path, size):
    """A limit on the size of files stands in for the full disk; whatever was saved before is whole."""
    run = subprocess.run(
        [sys.executable, "-m", "s4audio", "fit", "--config", RECIPE, "--data.init_args.train", str(folder),
            "--out", str(tmp_path / "run"), "--trainer.max_steps", "2", "--trainer.val_check_interval", "2"],
        capture_output=True, text=True, cwd=ROOT,
        preexec_fn=lambda: limit_files(size),
    )  # fmt: skip
    assert run.returncode == 1 and "the disk is full" in run.stderr and "Traceback" not in run.stderr
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert not [path for path in files if path.name.startswith(".")]
    for path in files:
        if path.name == "model.safetensors":
            load(path.parent)


def test_ctrl_c_is_no_accident(monkeypatch, capsys, model):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("s4audio.cli.info.checkpoint.load", interrupted)
    assert main(["info", str(model)]) == 130
    assert capsys.readouterr().err == "s4audio: stopped; no file is half-written.\n"


def test_a_terminal_that_lacks_letters_and_one_that_goes_away(model, folder, tmp_path):
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "s4audio", "reconstruct", str(model), str(folder / "tone0.wav"), "日本.wav"]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
    assert run.returncode == 0 and b"\\u65e5\\u672c.wav" in run.stdout and (tmp_path / "日本.wav").exists()
    if sys.platform != "win32":
        line = f"{sys.executable} -u -m s4audio info {model} | head -n 1"
        piped = subprocess.run(["sh", "-c", line], env=environment, capture_output=True, text=True)
        assert piped.stdout.startswith("CausalAutoencoder") and piped.stderr == ""
