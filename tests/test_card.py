"""The card beside a model says what its config.json says, in a form that the hub takes."""

import json
import re

import pytest
import yaml

from s4audio import CausalAutoencoder, load, save
from s4audio.card import ABOUT, card
from s4audio.checkpoint import MODELS, read_config

TRAINING = {
    "sample_rate": 8000, "normalize": "peak", "clip_seconds": 0.5, "train_files": 12, "train_seconds": 366.0,
    "valid_files": 2, "valid_seconds": 30.0, "skipped": ["a secret name.wav is silent."], "steps": 1600,
    "wall_seconds": 90.0, "device": "CPU, 2 threads",
    "scores": {"train/loss": 3.0, "valid/si_sdr_db": 23.456, "valid/loss": 0.5},
}  # fmt: skip


def model(**arguments) -> CausalAutoencoder:
    return CausalAutoencoder(8000, strides=(2,), widths=(4, 4), d_state=4, **arguments)


def head(text: str) -> dict:
    """The YAML between the first two lines of three dashes, which is what the hub reads."""
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1])


def test_the_card_is_written_from_the_run(tmp_path):
    save(model(), tmp_path, TRAINING)
    text = (tmp_path / "README.md").read_text()
    assert head(text) == {
        "library_name": "s4audio", "pipeline_tag": "audio-to-audio", "tags": ["s4audio", "state-space-model", "audio"]
    }  # fmt: skip
    for fact in (
        "# CausalAutoencoder, 8000 Hz",
        "| training | 1,600 steps in 1.5 min on CPU, 2 threads |",
        "| recordings | 12 files, 6.1 min; held out 2 files, 0.5 min; level: peak |",
        "| held out | si_sdr_db 23.46, loss 0.5 (in clips of 0.5 s) |",
        "# license: ",
    ):
        assert fact in text
    assert "secret" not in text  # the names of somebody's recordings stay at home


def test_the_card_never_disagrees_with_config_json(tmp_path):
    for steps in (1, 1600):
        save(model(), tmp_path, {**TRAINING, "steps": steps})
        assert (
            (tmp_path / "README.md").read_text()
            == card(read_config(tmp_path))
            == card(json.loads((tmp_path / "config.json").read_text()))
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]


def test_a_model_loads_without_its_card(tmp_path):
    save(model(), tmp_path)
    (tmp_path / "README.md").unlink()
    assert isinstance(load(tmp_path), CausalAutoencoder)


def test_every_model_has_a_card_and_only_what_streams_is_streamed(tmp_path):
    assert set(ABOUT) == set(MODELS)
    save(model(), tmp_path / "one way")
    save(model(bidirectional=True), tmp_path / "both ways")
    assert "s4audio stream FOLDER" in (tmp_path / "one way" / "README.md").read_text()
    assert "s4audio stream" not in (tmp_path / "both ways" / "README.md").read_text()


def test_a_model_that_reconstructs_nothing_is_asked_for_no_variation():
    cards = {
        name: card({"class": name, "arguments": {"sample_rate": 8000}, "training": {}}) for name in ("SaShiMi", "WaveNet")
    }
    assert "s4audio generate FOLDER --from noise" in cards["SaShiMi"] and "--variation" not in cards["SaShiMi"]
    assert "s4audio generate" not in cards["WaveNet"]


@pytest.mark.parametrize("training", [{}, {"steps": 3}, {"train_files": 3, "steps": 1}, {"train_images": 5, "steps": 1}])
def test_what_is_not_recorded_is_said_to_be(training):
    text = card({"class": "S4Model", "arguments": {"d_input": 3}, "training": training})
    assert "| training | not recorded |" in text and head(text)["pipeline_tag"] == "image-classification"


def test_commands_of_the_card_are_verbs():
    from s4audio.cli import VERBS

    text = card({"class": "CausalAutoencoder", "arguments": {"sample_rate": 8000, "bidirectional": False}, "training": {}})
    assert {line.split()[1] for line in text.splitlines() if line.startswith("s4audio ")} == {
        "info", "generate", "reconstruct", "stream",
    }  # fmt: skip
    assert all(line.split()[1] in VERBS for line in text.splitlines() if line.startswith("s4audio "))
