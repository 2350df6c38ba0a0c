"""Models through the hub's mixin: a local folder stands in for the network."""

import importlib
import sys

import pytest
import torch

from s4audio import CausalAutoencoder, load, save
from s4audio.checkpoint import CheckpointError, fingerprint, read_config

TRAINING = {"steps": 3, "normalize": "peak"}


@pytest.fixture
def folder(tmp_path):
    save(CausalAutoencoder(8000, strides=(2,), widths=(4, 4), d_state=4), tmp_path / "model", TRAINING)
    return tmp_path / "model"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    pytest.importorskip("huggingface_hub", reason="pip install 's4audio[hub]'")
    return importlib.import_module("s4audio.hub")


def test_without_the_package_a_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.delitem(sys.modules, "s4audio.hub", raising=False)
    with pytest.raises(ImportError, match=r"pip install 's4audio\[hub\]'"):
        importlib.import_module("s4audio.hub")


def test_a_pretrained_folder_is_a_model_folder(hub, folder, tmp_path):
    hub.HubModel(folder).save_pretrained(tmp_path / "copy")
    for name in ("config.json", "model.safetensors", "README.md"):
        assert (tmp_path / "copy" / name).read_bytes() == (folder / name).read_bytes()
    assert len(list((tmp_path / "copy").iterdir())) == 3
    audio = torch.randn(1, 1, 100)
    assert torch.equal(hub.HubModel.from_pretrained(tmp_path / "copy").model(audio), load(folder)(audio))


def test_saving_where_it_came_from_keeps_the_model(hub, folder):
    before = fingerprint(folder)
    hub.HubModel(folder).save_pretrained(folder)
    assert fingerprint(folder) == before and read_config(folder)["training"] == TRAINING


def test_pushing_and_fetching_pass_the_files_of_the_model_only(hub, folder, tmp_path, monkeypatch):
    """The hub's functions, with a folder of this machine in their place."""
    import huggingface_hub.hub_mixin as mixin

    (folder / "private.wav").write_bytes(b"a recording")
    remote, asked = tmp_path / "remote", {}

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, private, exist_ok):
            asked["create"] = repo_id, private
            return type("Repo", (), {"repo_id": repo_id})

        def upload_folder(self, repo_id, folder_path, **_):
            folder_path.rename(remote)
            return "url"

    monkeypatch.setattr(mixin, "HfApi", Api)
    assert hub.HubModel(folder).push_to_hub("me/violin", private=True) == "url"
    assert asked["create"] == ("me/violin", True)
    assert sorted(path.name for path in remote.iterdir()) == ["README.md", "config.json", "model.safetensors"]

    def snapshot_download(repo_id, allow_patterns, **options):
        asked["fetch"] = repo_id, allow_patterns, options["revision"]
        return str(remote)

    monkeypatch.setattr(mixin, "hf_hub_download", lambda repo_id, filename, **_: str(remote / filename))
    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    fetched = hub.HubModel.from_pretrained("me/violin", revision="v1")
    assert asked["fetch"] == ("me/violin", ["config.json", "model.safetensors"], "v1")
    audio = torch.randn(1, 1, 100)
    assert torch.equal(fetched.model(audio), load(folder)(audio)) and fetched.training == TRAINING


def test_a_folder_that_is_no_model_is_refused(hub, tmp_path):
    with pytest.raises(CheckpointError, match="is not a model"):
        hub.HubModel(tmp_path)
