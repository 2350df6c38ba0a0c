"""Files appear whole or not at all."""

import errno
import os
import subprocess
import sys

import pytest

from s4audio.files import replacing


def test_a_file_takes_its_place_when_it_is_whole(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with replacing(path) as file:
        file.write(b"one")
        assert not path.exists()
    with replacing(path) as file:
        file.write(b"two")
        assert path.read_bytes() == b"one"
    assert path.read_bytes() == b"two" and os.listdir(path.parent) == ["a.txt"]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), replacing(path) as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.txt"]


def test_an_error_without_a_name_gets_one(tmp_path):
    with pytest.raises(OSError) as caught, replacing(tmp_path / "a.txt"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(tmp_path / "a.txt")


@pytest.mark.skipif(sys.platform == "win32", reason="limits on the size of files are a Unix thing")
def test_a_real_write_that_does_not_fit_leaves_nothing(tmp_path):
    """A limit on the size of files stands in for a full disk: the kernel refuses the write half way."""
    code = (
        "import resource, signal; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from s4audio.files import replacing\n"
        f"with replacing({str(tmp_path / 'a')!r}) as file: file.write(bytes(5000))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 1 and "File too large" in run.stderr and os.listdir(tmp_path) == []


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    path = tmp_path / "a.txt"
    with replacing(path) as first:
        first.write(b"first")
        with replacing(path) as second:
            second.write(b"the second")
        assert path.read_bytes() == b"the second"
        first.write(b", whole")
    assert path.read_bytes() == b"first, whole" and os.listdir(tmp_path) == ["a.txt"]
