"""Files that appear whole or not at all."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: str | Path, durable: bool = False, previous: Path | None = None) -> Iterator[BinaryIO]:
    """A binary file to write, which takes its name, and the place of an older one, when all of it is there.

    If something fails, no new file is left and an older one stays. Its folder is made if it is missing.

    Args:
        path: of the file.
        durable: wait until the disk has it, before it takes its name and after, so that a power cut leaves the one or the
            other, whole.
        previous: the name that an older file gets, in the same folder, in place of being lost.

    Raises:
        OSError: it cannot be written; `filename` names it, also where the system's error does not.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.new")  # of this writer alone
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                yield file
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
            if previous and path.exists():
                os.replace(path, previous)
            os.replace(temporary, path)
            if durable:
                _write_names(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        if error.filename in (None, str(temporary)):
            error.filename = str(path)
        raise


def _write_names(folder: Path) -> None:
    """Wait until the disk has the names in a folder; where the system can be asked for that, as Windows cannot."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
