"""What the README and the docstrings show runs."""

import doctest
import importlib
import io
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from PIL import Image

from s4audio.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
EXAMPLES = [path for path in (ROOT / "s4audio").rglob("*.py") if ">>> " in path.read_text()]
COMMANDS = [
    line for block in re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL) for line in block.splitlines() if line
] + re.findall(r"`((?:s4audio|python|make) [^`]+)`", README)
QUICK = (
    "--trainer.max_steps 1 --trainer.val_check_interval 1 --data.init_args.batch_size 1 --data.init_args.clip_seconds 0.1 "
    "--trainer.accelerator cpu"
)

QUICK_IMAGES = "--steps 1 --data.init_args.valid_images 5 --data.init_args.batch_size 4 --trainer.accelerator cpu"


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL))
def test_python_block_of_the_readme_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict = {}
    exec(compile(block, "README.md", "exec"), names)
    torch.testing.assert_close(names["streamed"], names["again"][0], rtol=0, atol=1e-5)
    assert names["latent"].shape == (1, 16, 1000)
    assert soundfile.info(tmp_path / "made.wav").frames == 32_000


def stream(command: str, monkeypatch) -> int:
    """The status of the `s4audio stream` in a line of the shell; of other commands only the formats are looked at."""
    stages = command.split(" | ")
    assert len(stages) == 1 or all("-f s16le -ac 1 -ar 16000 -" in stage for stage in (stages[0], stages[2]))
    words = shlex.split(next(stage for stage in stages if stage.startswith("s4audio ")))
    source, sink = (Path(words[words.index(way) + 1]) if way in words else None for way in "<>")
    output = io.BytesIO()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(source.read_bytes() if source else bytes(1000))))
        patch.setattr(sys, "stdout", io.TextIOWrapper(output))
        status = main(words[1 : words.index("<") if source else None])
        if sink:
            sink.write_bytes(output.getvalue())
    return status


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_commands_of_the_readme_run_in_their_order(tmp_path, monkeypatch):
    """Those of s4audio, with small recordings in the place of the reader's and one step in the place of many."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "MY_RECORDINGS").mkdir()
    for number in range(16):
        tone = 0.3 * np.sin(np.arange(8000) * 0.05 * (number + 1))
        soundfile.write(tmp_path / "MY_RECORDINGS" / f"{number}.wav", tone, 16_000)
    for name in ("MY_RECORDING.wav", "ANOTHER.wav"):
        soundfile.write(tmp_path / name, np.tile(tone, 8), 16_000)
    flow = yaml.safe_load((ROOT / "recipes" / "flow_classical_3k.yaml").read_text())
    flow["model"]["init_args"]["model"]["init_args"] |= {"widths": [4, 4, 8], "num_blocks": 1, "d_state": 4}
    flow["data"]["init_args"] |= {"valid": None, "clip_seconds": 0.5, "batch_size": 2}
    flow["trainer"] |= {"accelerator": "cpu", "max_steps": 1, "val_check_interval": 1}
    (tmp_path / "small_flow.yaml").write_text(yaml.safe_dump(flow))
    for split, number in (("train", 3), ("test", 1)):
        for label in range(10):
            (tmp_path / "CIFAR10" / split / str(label)).mkdir(parents=True)
            for index in range(number):
                Image.new("RGB", (32, 32), (25 * label, 0, index)).save(
                    tmp_path / "CIFAR10" / split / str(label) / f"{index}.png"
                )
    (tmp_path / "KEPT_BACK").symlink_to(tmp_path / "MY_RECORDINGS")
    for name in ("FIRST.raw", "SECOND.raw"):
        (tmp_path / name).write_bytes((3000 * tone[:3001]).astype("<i2").tobytes())
    ran = set()
    for command in COMMANDS:
        if "s4audio stream" in command:
            assert stream(command, monkeypatch) == 0, command
            ran.add("stream")
            continue
        program, *arguments = shlex.split(command, comments=True)
        if program != "s4audio" or arguments[0] == "demo":  # the demo has a test of its own
            continue
        if "RECIPE" in command:  # a pattern
            continue
        if len(arguments) == 1 and arguments[0] not in ("demo", "doctor"):  # a verb in running text
            continue
        if arguments[0] == "train":
            arguments = [
                {"--minutes": "--steps", "10": "1", "flow_classical_3k": "small_flow.yaml"}.get(argument, argument)
                for argument in arguments
            ]
        if arguments[0] == "fit":
            arguments += (QUICK_IMAGES if "--root" in arguments else QUICK).split()
        try:
            status = main(arguments)
        except SystemExit as done:  # argparse, after --help
            status = done.code
        assert status == 0, command
        ran.add(arguments[0])
    assert {"check", "train", "fit", "reconstruct", "stream", "generate", "evaluate", "info", "doctor"} <= ran
    outputs = [(tmp_path / name).stat().st_size // 2 for name in ("FIRST_OUT.raw", "SECOND_OUT.raw")]
    assert outputs[0] == 2048 and sum(outputs) == 2 * 3001
    assert (tmp_path / "out.wav").exists() and (tmp_path / "runs" / "mine" / "report.html").exists()


def test_what_check_says_in_the_readme_is_what_it_says(tmp_path, monkeypatch, capsys):
    data = tmp_path / "MY_RECORDINGS"
    shutil.copytree(ROOT / "samples" / "train", data)
    audio, rate = soundfile.read(data / "moonlight_piano.flac", dtype="int16")
    soundfile.write(data / "moonlight_piano_copy.wav", audio, rate)
    audio = audio / 32768
    soundfile.write(data / "too_loud.wav", np.clip(8 * audio[: 10 * rate], -1, 1), rate)
    soundfile.write(data / "click.wav", audio[rate : rate + rate // 20], rate)
    soundfile.write(data / "stereo.wav", np.stack([audio, 0.8 * audio], axis=1)[: 10 * rate], 48_000)
    soundfile.write(data / "muted.wav", np.zeros((5 * rate, 2)), 48_000)
    (data / "half_downloaded.wav").write_bytes(b"RIFF")
    (data / "notes.txt").touch()
    monkeypatch.chdir(tmp_path)
    assert main(["check", "MY_RECORDINGS"]) == 0
    assert f"```\n{capsys.readouterr().out}```" in README


@pytest.mark.parametrize("command", sorted({c for c in COMMANDS if c.startswith(("make ", "python "))}))
def test_other_commands_of_the_readme_exist(command):
    program, target, *options = shlex.split(command, comments=True)
    if program == "make":
        asked = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True)
        assert asked.returncode == 0, asked.stderr
    else:
        told = subprocess.run([sys.executable, target, "--help"], cwd=ROOT, capture_output=True, text=True)
        assert told.returncode == 0, told.stderr
        assert all(option in told.stdout for option in options if option.startswith("--"))


def test_files_that_the_readme_names_exist():
    named = set(re.findall(r"(?:recipes|evaluation|tests|samples|s4audio)/[\w/]+\.\w+", README))
    named |= {target for target in re.findall(r"\]\(([^)]+)\)", README) if "://" not in target}
    assert named and all((ROOT / name).exists() for name in named), [n for n in named if not (ROOT / n).exists()]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_doctests(path):
    module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    failed, attempted = doctest.testmod(module)
    assert attempted and not failed
