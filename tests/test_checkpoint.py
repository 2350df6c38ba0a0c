"""Model folders: whole, safe, and refused in a sentence when they are not what they should be."""

import hashlib
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from s4audio import S4DVAE, CausalAutoencoder, ConvVAE, Flow, S4DAutoencoder, S4Model, SaShiMi, checkpoint
from s4audio.checkpoint import CheckpointError, fingerprint, load, load_embedding, load_state, read_config, save, save_state
from s4audio.layers import S4D
from s4audio.models import PatchS4Model, WaveNet, begin_stream


def autoencoder() -> CausalAutoencoder:
    return CausalAutoencoder(8000, strides=(2,), widths=(4, 4), d_state=4)


MODELS = {
    "CausalAutoencoder": autoencoder,
    "ConvVAE": lambda: ConvVAE(8000, strides=(2,), widths=(4, 4), latent_channels=2, num_blocks=1),
    "Flow": lambda: Flow(8000, strides=(2,), widths=(4, 4), num_blocks=1, d_state=4, classes=("a", "b")),
    "Flow of latents": lambda: Flow(
        8000, autoencoder=autoencoder(), strides=(2,), widths=(4, 4), num_blocks=(0, 1), d_state=4
    ),
    "PatchS4Model": lambda: PatchS4Model(3, 10, d_model=4, num_layers=1, patch=4, d_state=4),
    "S4DAutoencoder": lambda: S4DAutoencoder(3000, final_gelu=False),
    "S4DVAE": lambda: S4DVAE(8000, strides=(2,), widths=(4, 4), num_blocks=1, latent_channels=2, d_state=4),
    "S4Model": lambda: S4Model(3, 10, d_model=4, num_layers=1, layer="S4", d_state=4),
    "SaShiMi": lambda: SaShiMi(8000, d_model=4, num_blocks=(1, 1), pools=(2,), d_state=4, num_levels=16),
    "WaveNet": lambda: WaveNet(8000, d_model=4, d_skip=4, num_stacks=1, num_layers=2, num_levels=16),
}


def test_every_savable_model_is_tested():
    assert {type(make()).__name__ for make in MODELS.values()} == set(checkpoint.MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_a_loaded_model_is_the_saved_one(tmp_path, name):
    model = MODELS[name]().eval()
    save(model, tmp_path / "run" / "best", training={"steps": 3})
    loaded = load(tmp_path / "run" / "best")

    def output(model: nn.Module) -> torch.Tensor:
        torch.manual_seed(1)
        if isinstance(model, Flow):
            return model.sample(1, 64)
        return model(torch.randn(1, 3 if name.endswith("S4Model") else 1, 64))

    assert torch.equal(output(loaded), output(model)) and not loaded.training
    assert read_config(tmp_path / "run" / "best")["training"] == {"steps": 3}


def test_a_model_among_the_arguments_comes_with_the_folder(tmp_path):
    """Its class, its arguments, its weights, and that it is not trained; only autoencoders are taken."""
    model = MODELS["Flow of latents"]().eval()
    model.autoencoder.latent_mean.fill_(3)
    save(model, tmp_path / "model")
    described = read_config(tmp_path / "model")["arguments"]["autoencoder"]
    assert described["class"] == "CausalAutoencoder" and described["arguments"]["strides"] == [2]
    loaded = load(tmp_path / "model")
    audio = torch.randn(1, 1, 64)
    assert torch.equal(loaded.autoencoder(audio), model.autoencoder(audio)) and (loaded.autoencoder.latent_mean == 3).all()
    trained = {name for name, parameter in loaded.named_parameters() if parameter.requires_grad}
    assert trained and not any(name.startswith("autoencoder") for name in trained)
    save(loaded.autoencoder, tmp_path / "autoencoder")
    assert torch.equal(checkpoint.load_autoencoder(str(tmp_path / "autoencoder"))(audio), model.autoencoder(audio))
    with pytest.raises(CheckpointError, match="is a Flow; wanted an autoencoder"):
        checkpoint.load_autoencoder(str(tmp_path / "model"))
    with pytest.raises(CheckpointError, match=r"not there; train it first, with a recipe of its own and --out runs/first"):
        checkpoint.load_autoencoder("runs/first/best")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    for part, message in (
        ({"class": "S4DAutoencoder", "arguments": {"sample_rate": 8000}}, "where nothing is wanted as autoencoder"),
        ({"class": "Linear", "arguments": {}}, "the arguments do not fit Flow"),
        ({"class": "S4Model", "arguments": {"d_input": 1, "num_classes": 2}}, "autoencoder is a S4Model"),
        ({"class": "CausalAutoencoder"}, "describes no model"),
        ({"class": "CausalAutoencoder", "arguments": {"sample_rate": 8000, "evil": 1}}, "evil"),
    ):
        changed = {**config, "arguments": {**config["arguments"], "autoencoder": part}}
        (tmp_path / "model" / "config.json").write_text(json.dumps(changed))
        with pytest.raises(CheckpointError, match=message):
            load(tmp_path / "model")


@pytest.mark.parametrize("make", [Flow, SaShiMi])
def test_there_may_be_more_classes_than_tensors(make, tmp_path):
    size = {"strides": (2,), "widths": (4, 4)} if make is Flow else {"d_model": 4, "pools": (2,)}
    classes = tuple(map(str, range(200)))
    save(make(8000, num_blocks=1, d_state=4, classes=classes, **size), tmp_path)
    loaded = load(tmp_path)
    assert len(loaded.state_dict()) < len(classes) and tuple(loaded.classes) == classes


def test_a_name_that_is_no_folder_is_a_pretrained_model(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "PRETRAINED", tmp_path / "shipped")
    monkeypatch.chdir(tmp_path)
    assert checkpoint.pretrained() == []
    save(S4DAutoencoder(3000), tmp_path / "shipped" / "small-3k", {"steps": 1})
    assert checkpoint.pretrained() == ["small-3k"]
    assert load("small-3k").sample_rate == 3000 and read_config("small-3k")["training"] == {"steps": 1}
    assert fingerprint("small-3k") == fingerprint(tmp_path / "shipped" / "small-3k")
    save(S4DAutoencoder(4000), "small-3k")  # a folder of this name goes first
    assert load("small-3k").sample_rate == 4000
    for name in ("other-3k", "../shipped/small-3k/..", ""):
        with pytest.raises(CheckpointError, match=r"is not a model: it has no config.json"):
            load(name)
    with pytest.raises(CheckpointError, match="and small-3k come with the package"):
        load("smal-3k")


def test_saving_again_replaces_and_leaves_nothing_else(tmp_path):
    for steps in (1, 2):
        save(MODELS["S4DAutoencoder"](), tmp_path / "model", training={"steps": steps})
    assert read_config(tmp_path / "model")["training"] == {"steps": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_failed_save_keeps_the_old_model(tmp_path, monkeypatch):
    save(MODELS["S4DAutoencoder"](), tmp_path / "model", training={"steps": 1})

    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "to_bytes", no_space)
    with pytest.raises(OSError, match="No space left"):
        save(MODELS["S4DAutoencoder"](), tmp_path / "model", training={"steps": 2})
    assert load(tmp_path / "model") is not None and read_config(tmp_path / "model")["training"] == {"steps": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_files_are_readable_as_the_umask_says(tmp_path):
    save(MODELS["S4DAutoencoder"](), tmp_path / "model")
    (tmp_path / "plain").write_text("")
    modes = {path.stat().st_mode for path in [*(tmp_path / "model").iterdir(), tmp_path / "plain"]}
    assert len(modes) == 1


def test_a_missing_model_points_to_the_one_beside_it(tmp_path):
    save(MODELS["S4DAutoencoder"](), tmp_path / "run" / "last")
    for wrong in ("run/best", "run"):
        with pytest.raises(CheckpointError, match=r"has no config.json; there is one in .*run/last"):
            load(tmp_path / wrong)


def test_only_known_models_are_saved(tmp_path):
    with pytest.raises(CheckpointError, match="Linear is not a model that can be saved"):
        save(nn.Linear(1, 1), tmp_path / "model")


def damage(path, how):
    config = json.loads((path / "config.json").read_text())
    if how == "no config":
        (path / "config.json").unlink()
    elif how == "not json":
        (path / "config.json").write_text("{")
    elif how == "a list":
        (path / "config.json").write_text("[]")
    elif how == "unknown class":
        (path / "config.json").write_text(json.dumps({**config, "class": "os.system"}))
    elif how == "unknown argument":
        (path / "config.json").write_text(json.dumps({**config, "arguments": {"sample_rate": 1, "evil": 2}}))
    elif how == "wrong type":
        (path / "config.json").write_text(json.dumps({**config, "arguments": {"sample_rate": 1, "d_state": "ten"}}))
    elif how == "other size":
        (path / "config.json").write_text(json.dumps({**config, "arguments": {**config["arguments"], "d_state": 4}}))
    elif how == "fewer weights":
        weights = load_file(path / "model.safetensors")
        weights.pop(min(weights))
        save_file(weights, path / "model.safetensors")
    elif how == "no weights":
        (path / "model.safetensors").unlink()
    elif how == "truncated weights":
        (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:100])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no config", "is not a model: it has no config.json"),
        ("not json", "is damaged"),
        ("a list", "is damaged"),
        ("unknown class", "is damaged or from another program"),
        ("unknown argument", "S4DAutoencoder has no argument 'evil'"),
        ("wrong type", "the arguments do not fit S4DAutoencoder"),
        ("other size", "does not fit S4DAutoencoder"),
        ("fewer weights", "it has nothing where .* An older s4audio may have written it: train the model again"),
        ("no weights", "model.safetensors is missing, unreadable or damaged"),
        ("truncated weights", "model.safetensors is missing, unreadable or damaged"),
    ],
)
def test_a_damaged_folder_is_refused(tmp_path, how, message):
    save(MODELS["S4DAutoencoder"](), tmp_path / "model")
    damage(tmp_path / "model", how)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "model")


@pytest.mark.skipif(sys.platform == "win32", reason="limits on the size of files are a Unix thing")
def test_weights_that_do_not_fit_on_the_disk_leave_the_old_model_whole(tmp_path):
    """Also where the weights are so few that they fail only when the file is closed."""
    save(MODELS["S4DAutoencoder"](), tmp_path / "model", training={"steps": 1})
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    code = (
        "import resource, signal, sys; from s4audio import S4DAutoencoder, save\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)); signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"save(S4DAutoencoder(3000), {str(tmp_path / 'model')!r}, training={{'steps': 2}})"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 1 and "File too large" in run.stderr
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before


def test_an_embedding_is_the_encoder_of_a_model(tmp_path):
    model = CausalAutoencoder(8000, strides=(2,), widths=(4, 4), d_state=4, latent_channels=3).eval()
    save(model, tmp_path / "model", {"train_files": 3})
    embedding = load_embedding(tmp_path / "model")
    audio = torch.randn(1, 1, 16000)
    latent = model.encode(audio)[0].mT[:4000]
    wanted = torch.cat([latent.mean(0), latent.std(0, correction=0)])
    torch.testing.assert_close(embedding(audio)[0, 0], wanted)
    sha256 = hashlib.sha256((tmp_path / "model" / "model.safetensors").read_bytes()).hexdigest()
    assert embedding.details["sha256"] == sha256 and embedding.details["training_data"] == {"train_files": 3}
    save(S4Model(3, 10, d_model=4, num_layers=1, layer="S4", d_state=4), tmp_path / "classifier")
    with pytest.raises(CheckpointError, match="S4Model, which has no encoder"):
        load_embedding(tmp_path / "classifier")


def test_an_embedding_discretizes_once_and_not_for_every_clip(tmp_path, monkeypatch):
    model = CausalAutoencoder(8000, strides=(2,), widths=(4, 4), d_state=4, latent_channels=3).eval()
    save(model, tmp_path)
    audio = torch.randn(2, 1, 1, 16000)
    wanted = [model.encode(clip) for clip in audio]
    embedding = load_embedding(tmp_path)
    monkeypatch.delattr(S4D, "system")
    assert all(torch.equal(embedding.encode(clip), latent) for clip, latent in zip(audio, wanted, strict=True))


def test_the_embedding_of_a_flow_is_the_encoder_that_it_works_on(tmp_path):
    autoencoder = CausalAutoencoder(8000, strides=(2,), widths=(4, 4), d_state=4, latent_channels=3).eval()
    save(autoencoder, tmp_path / "autoencoder")
    save(Flow(8000, autoencoder=autoencoder, strides=(2,), widths=(4, 4), num_blocks=1, d_state=4), tmp_path / "flow")
    save(Flow(8000, strides=(2,), widths=(4, 4), num_blocks=1, d_state=4), tmp_path / "raw")
    audio = torch.randn(1, 1, 16000)
    embedding = load_embedding(tmp_path / "flow")
    torch.testing.assert_close(embedding(audio), load_embedding(tmp_path / "autoencoder")(audio))
    assert embedding.details["sha256"] == fingerprint(tmp_path / "flow")  # who scores the flow's clips by it is warned
    with pytest.raises(CheckpointError, match="Flow, which has no encoder"):
        load_embedding(tmp_path / "raw")


def test_models_of_one_recipe_and_data_are_of_one_kind(tmp_path):
    for name, steps, files in (("a", 1, 3), ("b", 2, 3), ("c", 1, 4)):
        save(
            CausalAutoencoder(8000, strides=(2,), widths=(4, 4), d_state=4),
            tmp_path / name,
            {"train_files": files, "steps": steps},
        )
    a, b, c = (checkpoint.kind(tmp_path / name) for name in "abc")
    assert a == b != c and fingerprint(tmp_path / "a") != fingerprint(tmp_path / "b")


@pytest.mark.parametrize(
    "change", [{"clip_seconds": 2.0}, {"normalize": "peak"}, {"train_seconds": 9.0}, {"train_files": 4}]
)
def test_all_that_is_said_of_the_data_makes_the_kind(tmp_path, change):
    for name, about in (("one", {}), ("other", change)):
        save(autoencoder(), tmp_path / name, {"train_files": 3, **about})
    assert checkpoint.kind(tmp_path / "one") != checkpoint.kind(tmp_path / "other")


def test_a_state_that_holds_no_numbers_is_refused(tmp_path):
    model = autoencoder()
    save_state(begin_stream(model)._replace(waiting=torch.tensor([[float("nan")]])), tmp_path / "state", "0")
    with pytest.raises(CheckpointError, match="is damaged: it does not hold what a stream of this model remembers"):
        load_state(tmp_path / "state", model, "0")
