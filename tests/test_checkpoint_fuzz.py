"""Whatever has happened to the files of a model or of a stream's state: it loads, or a CheckpointError says why not.

Soon, without much memory, and with nothing written. (A bit that flips among the weights makes another weight, and loads.)
100 seeded mutations here, 2,000 others among the slow tests.
"""

import json
import signal
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from s4audio import CausalAutoencoder, checkpoint, load, save
from s4audio.checkpoint import CheckpointError, load_state
from s4audio.models import advance_stream, begin_stream
from tests.test_checkpoint import MODELS

SECONDS, MIB = 5, 200  # what one loading may take; the models here are a few KiB, and torch itself 300 MiB
VALUES = (
    0, 1, 2, -1, 10**9, -(10**9), 10**30, 2**63, 0.5, 1e308, float("nan"), float("inf"), "", "ten", "../../etc", None, True,
    [], [1], [10**9], [10**9] * 3, [[[]]], {}, {"a": 1},
)  # fmt: skip
TEXTS = (b"[" * 100_000, b'{"a":' * 50_000, b"1" * 10_000, b'"' + b"x" * 100_000 + b'"')  # in the place of a value


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> dict[str, dict[str, bytes]]:
    """The files of every kind of model, and of one the state of a stream too."""
    found = {}
    for name, make in MODELS.items():
        folder = tmp_path_factory.mktemp(name)
        torch.manual_seed(0)
        model = make().eval()
        save(model, folder, {"steps": 3, "train_files": 2})
        if isinstance(model, CausalAutoencoder):
            _, state = advance_stream(model, torch.randn(1, 101), begin_stream(model), 10)
            checkpoint.save_state(state, folder / "state", checkpoint.fingerprint(folder))
        found[name] = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "README.md"}
    return found


def mutate_bytes(data: bytes, rng: np.random.Generator) -> bytes:
    place = int(rng.integers(0, len(data)) ** rng.choice([0.5, 1]))  # half of them near the beginning, where the header is
    how = rng.choice(["flip", "truncate", "insert", "delete", "ones", "length"])
    if how == "flip":
        return data[:place] + bytes([data[place] ^ (1 << int(rng.integers(8)))]) + data[place + 1 :]
    if how == "truncate":
        return data[:place]
    if how == "insert":
        return data[:place] + rng.bytes(int(rng.integers(1, 20))) + data[place:]
    if how == "delete":
        return data[:place] + data[place + int(rng.integers(1, 20)) :]
    if how == "ones":
        return data[:place] + b"\xff" * 8 + data[place + 8 :]
    return struct.pack("<Q", int(rng.choice([0, 1, 2**20, 2**40, 2**63]))) + data[8:]  # of a safetensors header


def mutate_json(data: bytes, rng: np.random.Generator) -> bytes:
    """One value, anywhere in it, replaced, removed or nested."""
    config = json.loads(data)
    places = []

    def walk(value) -> None:
        for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
            places.append((value, key))
            walk(value[key])

    walk(config)
    parent, key = places[rng.integers(len(places))]
    how = rng.choice(["value", "value", "value", "text", "remove", "rename"])
    if how == "value":
        parent[key] = VALUES[rng.integers(len(VALUES))]
    elif how == "text":
        parent[key] = "HERE"
        return json.dumps(config).encode().replace(b'"HERE"', TEXTS[rng.integers(len(TEXTS))])
    elif how == "remove":
        del parent[key]
    elif isinstance(parent, dict):
        parent[f"{key}x"] = parent.pop(key)
    return json.dumps(config).encode()


def mutate_header(data: bytes, rng: np.random.Generator) -> bytes:
    """One value of a safetensors header."""
    length = struct.unpack("<Q", data[:8])[0]
    header = mutate_json(data[8 : 8 + length], rng)
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def peak_mib() -> float:
    status = Path("/proc/self/status")
    return int(status.read_text().split("VmHWM:")[1].split()[0]) / 1024 if status.exists() else 0.0


def forget_peak() -> None:
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


class TooLongError(BaseException):
    """No Exception, so that nobody makes a CheckpointError of it."""


def too_long(*_) -> None:
    raise TooLongError(f"took more than {SECONDS} s")


def fuzz(originals, folder: Path, seed: int, number: int) -> dict[str, int]:
    """How many loadings of mutated files gave something, and how many an error."""
    rng, outcomes = np.random.default_rng(seed), {"loaded": 0, "refused": 0}
    warm = originals["S4Model"]  # what is imported at the first loading is not its memory
    for name, data in warm.items():
        (folder / name).write_bytes(data)
    load(folder)
    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, too_long)
    for index in range(number):
        name = list(originals)[index % len(originals)]
        files = dict(originals[name])
        target = str(rng.choice(list(files)))
        mutations = [mutate_bytes, mutate_json if target == "config.json" else mutate_header]
        files[target] = mutations[rng.integers(2)](files[target], rng)
        for path in folder.iterdir():
            path.unlink()
        for file, data in files.items():
            (folder / file).write_bytes(data)
        forget_peak()
        before = peak_mib()
        if hasattr(signal, "SIGALRM"):
            signal.alarm(SECONDS)
        try:
            model = load(folder)
            if "state" in files and target == "state":
                load_state(folder / "state", model, checkpoint.fingerprint(folder))
            outcomes["loaded"] += 1
        except CheckpointError as error:
            outcomes["refused"] += 1
            assert str(folder) in str(error), (index, error)
        except BaseException as error:
            raise AssertionError(f"mutation {index} of seed {seed}: {target} of {name}") from error
        finally:
            if hasattr(signal, "SIGALRM"):
                signal.alarm(0)
        assert peak_mib() - before < MIB, (index, name, target)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == files, (index, name, target)
    return outcomes


def test_mutated_models_load_or_are_refused(originals, tmp_path):
    outcomes = fuzz(originals, tmp_path, seed=0, number=100)
    assert outcomes["loaded"] >= 5 and outcomes["refused"] >= 40  # flipped weights load, broken headers do not


@pytest.mark.slow
def test_2000_mutated_models_load_or_are_refused(originals, tmp_path):
    outcomes = fuzz(originals, tmp_path, seed=1, number=2000)
    assert outcomes["loaded"] >= 100 and outcomes["refused"] >= 800


@pytest.mark.parametrize("name", MODELS)
def test_no_size_in_config_json_makes_loading_slow_or_large(originals, tmp_path, name):
    """Every whole number and every entry of a list, one after the other, a thousand million."""
    for file, data in originals[name].items():
        (tmp_path / file).write_bytes(data)
    load(tmp_path)
    config = json.loads(originals[name]["config.json"])

    def places(value) -> list[list]:
        """The keys on the way to each whole number."""
        if type(value) is int:
            return [[]]
        keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
        return [[key, *rest] for key in keys for rest in places(value[key])]

    assert len(places(config["arguments"])) > 1
    for *way, key in places(config["arguments"]):
        damaged = json.loads(originals[name]["config.json"])
        parent = damaged["arguments"]
        for step in way:
            parent = parent[step]
        parent[key] = 10**9
        (tmp_path / "config.json").write_text(json.dumps(damaged))
        forget_peak()
        before = peak_mib()
        if key in ("sample_rate", "chunk_samples") and name != "Flow of latents":  # which no weight knows
            assert getattr(load(tmp_path), key) == 10**9
        else:
            with pytest.raises(CheckpointError, match=r"the arguments do not fit|does not fit"):
                load(tmp_path)
        assert peak_mib() - before < MIB, (*way, key)


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pkl", "model.safetensors", "config.json", "state"])
def test_a_pickle_is_not_touched(originals, tmp_path, name):
    """Beside the model or in the place of one of its files: nothing of it is executed."""
    import pickle

    for file, data in originals["CausalAutoencoder"].items():
        (tmp_path / file).write_bytes(data)
    bomb = pickle.dumps(Bomb(tmp_path / "executed"))
    (tmp_path / name).write_bytes(bomb)
    if name in ("model.safetensors", "config.json"):
        with pytest.raises(CheckpointError, match="damaged"):
            load(tmp_path)
    elif name == "state":
        with pytest.raises(CheckpointError, match="damaged"):
            load_state(tmp_path / name, load(tmp_path), checkpoint.fingerprint(tmp_path))
    else:
        load(tmp_path)
    assert (tmp_path / name).read_bytes() == bomb and not (tmp_path / "executed").exists()
    pickle.loads(bomb)
    assert (tmp_path / "executed").exists()  # it would have worked
