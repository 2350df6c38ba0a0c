"""What the tests of the verbs share."""

from pathlib import Path

import numpy as np
import pytest
import soundfile

from s4audio.cli import fit_audio, fit_images, main
from s4audio.cli.run_page import PAGE
from s4audio.files import replacing
from s4audio.tasks import GenerativeTask

ROOT = Path(__file__).parents[2]
RECIPE = str(ROOT / "recipes" / "debug.yaml")


def fit(folder: Path, out: Path, *options: str) -> int:
    return main(["fit", "--config", RECIPE, "--data.init_args.train", str(folder), "--out", str(out), *options])


def wav(path: Path) -> np.ndarray:
    return soundfile.read(path, dtype="int16")[0]


def refused(capsys, *arguments: str) -> str:
    assert main(list(arguments)) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("s4audio: ") and "Traceback" not in error and len(error.splitlines()) == 1
    return error


def limit_files(size: int) -> None:
    """From now on no file of this process grows beyond `size` bytes, as if the disk were full."""
    import resource  # Unix only

    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def without_pictures(patch: pytest.MonkeyPatch) -> None:
    """Trainings draw nothing, which takes most of the time of a short one."""

    def finish(out: Path, data: object) -> list[str]:
        with replacing(out / PAGE) as file:
            file.write(b"a page")
        return []

    patch.setattr(GenerativeTask, "_show", lambda *_: None)
    patch.setattr(fit_audio, "finish", finish)
    patch.setattr(fit_images, "finish", finish)
