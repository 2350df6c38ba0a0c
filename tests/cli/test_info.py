"""What a model is and remembers, in words and as a picture."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from s4audio import S4DVAE, CausalAutoencoder, Flow, S4DAutoencoder, S4Model, load, save
from s4audio.cli import main
from s4audio.cli.info import memories
from s4audio.cli.run_page import memory_section, next_commands
from tests.cli.commands import refused


def test_a_model_is_described(model, capsys, tmp_path):
    assert main(["info", str(model), "--plot", str(tmp_path / "plot.png")]) == 0
    told = capsys.readouterr().out
    for wanted in (
        "CausalAutoencoder in", "1 channel at 4,000 Hz", "16 numbers, 500 times a second: 8,000 a second in place of 4,000",
        "waits for 1.75 ms at most", "training:    not recorded", "encoder.1.inner.1", "decoder.5.inner.1",
    ):  # fmt: skip
        assert wanted in told, wanted
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_every_kind_of_model_has_a_description(capsys, tmp_path):
    save(S4DAutoencoder(3000), tmp_path / "a")
    save(S4Model(3, 10, d_model=4, num_layers=2, layer="S4", d_state=8), tmp_path / "b")
    save(S4DAutoencoder(3000), tmp_path / "a", training={"steps": 5})  # a record of somebody's own
    assert main(["info", str(tmp_path / "a")]) == 0
    assert "no, it hears the future" in capsys.readouterr().out
    assert main(["info", str(tmp_path / "b")]) == 0
    told = capsys.readouterr().out
    assert "times in samples: this model has no sample rate" in told and "S4 " in told
    assert (tmp_path / "b" / "poles.png").exists()  # beside the model unless told


def test_a_picture_of_another_kind_and_a_torn_record_are_refused(model, capsys, tmp_path):
    assert "wanted a name that ends in .png" in refused(capsys, "info", str(model), "--plot", str(tmp_path / "plot.pdf"))
    for torn in ({"steps": None}, {"train_seconds": "long"}, {"scores": None}):
        save(S4DAutoencoder(3000), tmp_path / "torn", training={"steps": 5})
        config = json.loads((tmp_path / "torn" / "config.json").read_text())
        config["training"].update(torn)
        (tmp_path / "torn" / "config.json").write_text(json.dumps(config))
        assert "is damaged or from another program" in refused(capsys, "info", str(tmp_path / "torn"))


@pytest.mark.parametrize("may_write", [True, False])
def test_poles_are_drawn_here_where_the_model_may_not_be_written(model, tmp_path, monkeypatch, may_write):
    shutil.copytree(model, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: may_write)
    assert main(["info", "model"]) == 0
    assert (tmp_path / "model" / "poles.png").exists() == may_write != (tmp_path / "poles.png").exists()


def test_each_layer_is_measured_at_its_own_rate():
    """A layer behind a stride of 8 runs at an eighth of the rate, and remembers eight times as long as its samples say."""
    model = CausalAutoencoder(8000, strides=(2, 4), widths=(4, 4, 4), d_state=8, latent_channels=2)
    by_name = {memory.name: memory for memory in memories(model)}
    rates = {name: memory.rate for name, memory in by_name.items()}
    assert sorted(rates.values()) == [1000, 1000, 4000, 4000, 8000, 8000] and len(rates) == 6
    inner = next(memory for memory in by_name.values() if memory.rate == 1000)
    dt = inner.layer.log_dt.exp().reshape(4, 1)
    torch.testing.assert_close(inner.decay, (1 / (0.5 * dt) / 1000).expand(4, 4).flatten().double())  # Re A = -1/2


def test_what_is_no_model_is_refused(capsys, tmp_path, model):
    assert "is not a model" in refused(capsys, "info", str(tmp_path))
    assert "arguments are required: model" in refused(capsys, "info")
    with pytest.raises(SystemExit) as caught:
        main(["info", "--help"])
    assert caught.value.code == 0


@pytest.mark.parametrize("bidirectional", [False, True])
def test_only_what_hears_no_future_streams(bidirectional, tmp_path, capsys):
    save(
        S4DVAE(8000, strides=(2,), widths=(4, 4), latent_channels=2, num_blocks=1, d_state=4, bidirectional=bidirectional),
        tmp_path / "m",
    )
    assert main(["info", str(tmp_path / "m")]) == 0
    assert ("no, it hears the future" in capsys.readouterr().out) == bidirectional
    commands = [command for _, command in next_commands(load(tmp_path / "m"), tmp_path / "m")]
    assert any("s4audio reconstruct " in command for command in commands) != bidirectional


def test_a_model_of_classes_is_asked_for_one():
    flow = Flow(8000, strides=(2,), widths=(4, 4), num_blocks=1, d_state=4, classes=("my cat", "two"))
    (_, command), *_ = next_commands(flow, Path("run/best"))
    assert command == "s4audio generate run/best --from noise --label 'my cat'"


@pytest.mark.parametrize("layers, shown", [(1, [1]), (3, [1, 2, 3]), (10, [1, 4, 7, 10])])
def test_a_page_shows_the_poles_of_four_layers_at_most(layers, shown):
    ((_, figure),) = memory_section(S4Model(1, 2, d_model=4, num_layers=layers, d_state=4)).figures
    assert [axis.get_title() for axis in figure.axes if axis.get_visible()] == [f"layer {i} of {layers}" for i in shown]
