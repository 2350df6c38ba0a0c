"""`s4audio evaluate`: the table, the JSON, the page, comparisons and refusals."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from s4audio import CausalAutoencoder, checkpoint, load, save
from s4audio.cli import evaluate as module
from s4audio.cli import main
from tests.cli.commands import refused


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Three folders of tones at 4 kHz: real ones, ones like them, and higher ones."""
    generator, root = np.random.default_rng(0), tmp_path_factory.mktemp("folders")
    for name, number, pitch in (("real", 16, 1), ("near", 10, 1), ("far", 10, 3)):
        (root / name).mkdir()
        for index in range(number):
            tone = 0.3 * np.sin(2 * np.pi * pitch * generator.uniform(200, 400) * np.arange(4000) / 4000)
            soundfile.write(root / name / f"{index}.wav", tone + 0.01 * generator.standard_normal(4000), 4000)
    return {name: root / name for name in ("real", "near", "far")}


def score(folders, name: str, path: Path, *options: str) -> dict:
    assert main(["evaluate", str(folders[name]), str(folders["real"]), "--json", str(path), *options]) == 0
    return json.loads(path.read_text())


def test_table_and_json(folders, tmp_path, capsys):
    found = score(folders, "far", tmp_path / "far.json")
    said = capsys.readouterr().out
    assert (
        "far, 10 clips, 0.2 min" in said
        and "real against real" in said
        and "can be told from the reference (p = 0.0" in said
    )
    assert f"{found['kad']:#.3g}" in said and found["fid_infinity"] is None and "FID∞ needs" in said
    assert found["provenance"]["made_by"] == []
    assert {"fid", "fid_interval", "kad", "kad_interval", "floor", "at_equal_n", "verdict", "defects", "warnings"} <= set(
        found
    )


def test_page_with_everything(folders, tmp_path, capsys):
    made, real = str(folders["near"]), str(folders["real"])
    assert main(["evaluate", made, real, "--train", str(folders["far"]), "--paired", "--report", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "10 pairs" in said and "copies? " in said and "the training clips themselves score KAD" in said
    assert "by heart, or lucky" not in said  # what is paired is near
    page = (tmp_path / "report.html").read_text()
    assert page.count("<audio") == 10  # nearest, most typical, farthest and their originals; two pairs
    for words in (
        "Is it a copy?",
        "File by file",
        "How it was measured",
        "reference.sha256",
        "A map of the clips",
        "The worst pairs",
    ):
        assert words in page


def test_comparison_of_two_results(folders, tmp_path, capsys):
    near, far, again = (tmp_path / f"{name}.json" for name in ("near", "far", "again"))
    score(folders, "near", near)
    score(folders, "far", far)
    capsys.readouterr()
    assert main(["evaluate", "--compare", str(near), str(far)]) == 0
    assert f"KAD: {near} is closer; FID: {near} is closer." in capsys.readouterr().out
    assert main(["evaluate", "--compare", str(near), str(near)]) == 0
    said = capsys.readouterr().out
    assert (
        "KAD: neither is surely closer" in said
        and "coverage" in said
        and f"note on {near}: with fewer than 20 clips" in said
    )
    for change, field in (
        (["--seed", "1"], "seed is 0 in one and 1 in the other"),
        (["--normalize", "none"], "normalize is peak in one and none in the other"),
        (["--sample-rate", "3000"], "embedding.sample_rate is 4000 in one and 3000 in the other"),
        (["--paired"], "paired is False in one and True in the other"),
    ):
        score(folders, "near", again, *change)
        capsys.readouterr()
        assert field in refused(capsys, "evaluate", "--compare", str(near), str(again))
    result = json.loads(far.read_text())
    result["provenance"]["reference"]["sha256"] = "0"
    again.write_text(json.dumps(result))
    assert "reference.sha256" in refused(capsys, "evaluate", "--compare", str(near), str(again))
    whole = json.loads(near.read_text())
    for change in ({"kad": None}, {"kad_interval": 3}, {"provenance": {}}, {"fid_interval": None}, {"warnings": 1}):
        again.write_text(json.dumps({**whole, **change}))
        assert "is no result of `s4audio evaluate --json`" in refused(capsys, "evaluate", "--compare", str(near), str(again))
    for text in ("[]", "{", '{"kad": 1}', "1"):
        again.write_text(text)
        assert "is no result of `s4audio evaluate --json`" in refused(capsys, "evaluate", "--compare", str(near), str(again))


def test_a_trained_encoder_and_a_judge_of_its_own_work(folders, model, tmp_path, capsys):
    made = tmp_path / "made"
    assert main(["generate", str(model), "--from", str(folders["real"]), "--out", str(made)]) == 0
    capsys.readouterr()
    options = ["--embedding", str(model), "--json", str(tmp_path / "own.json"), "--paired"]
    assert main(["evaluate", str(made), str(folders["real"]), *options]) == 0
    said, found = capsys.readouterr().out, json.loads((tmp_path / "own.json").read_text())
    assert "a judge of its own work" in said
    sha256 = checkpoint.fingerprint(model)
    embedding = found["provenance"]["embedding"]
    assert embedding["sha256"] == sha256 and embedding["name"] == f"CausalAutoencoder {sha256[:12]}"
    assert found["provenance"]["made_by"] == [
        {"class": "CausalAutoencoder", "kind": checkpoint.kind(model), "sha256": sha256}
    ]
    assert found["paired"]["pairs"] == 16
    assert main(["evaluate", str(made), str(folders["real"])]) == 0
    assert "a judge of its own work" not in capsys.readouterr().out
    (made / "generated.json").write_text("{")
    assert main(["evaluate", str(made), str(folders["real"])]) == 0
    assert "generated.json cannot be read, so which model made these clips is not known" in capsys.readouterr().out


def test_a_sister_of_the_generator_and_swapped_folders_are_notes(folders, model, tmp_path, capsys):
    made, sister = tmp_path / "made", tmp_path / "sister"
    assert main(["generate", str(model), "--from", str(folders["real"]), "--out", str(made)]) == 0
    torch.manual_seed(7)
    save(type(load(model))(**checkpoint.read_config(model)["arguments"]), sister, checkpoint.read_config(model)["training"])
    capsys.readouterr()
    assert main(["evaluate", str(folders["real"]), str(made), "--embedding", str(sister)]) == 0
    assert "are the folders swapped" in capsys.readouterr().out
    assert main(["evaluate", str(made), str(folders["real"]), "--embedding", str(sister)]) == 0
    assert "of the same kind as the model that made these clips" in capsys.readouterr().out


def test_an_embedding_that_hears_two_channels_is_refused(folders, tmp_path, capsys):
    save(CausalAutoencoder(4000, strides=(4,), widths=(4, 8), d_state=8, channels=2), tmp_path / "stereo")
    arguments = [str(folders["near"]), str(folders["real"]), "--embedding", str(tmp_path / "stereo")]
    assert "hears 2 channels; an embedding hears one" in refused(capsys, "evaluate", *arguments)


def test_sensitivity_card(folders, tmp_path, capsys):
    path = tmp_path / "card.json"
    assert main(["evaluate", "--sensitivity", "log_mel", str(folders["real"]), "--json", str(path)]) == 0
    said = capsys.readouterr().out
    assert "nothing, real against real" in said and "white noise, 0 dB below" in said and "it does not hear" in said
    found = json.loads(path.read_text())
    assert (
        found["provenance"]["embedding"]["name"] == "log_mel_1"
        and len(found["rows"]) == 17
        and "6 dB quieter" in found["not_noticed"]
    )


def test_wrong_input_is_a_sentence_and_no_number(folders, model, tmp_path, capsys):
    real, made = str(folders["real"]), str(folders["near"])
    one = tmp_path / "one"
    one.mkdir()
    soundfile.write(one / "a.wav", 0.1 * np.ones(4000), 4000)
    (tmp_path / "empty").mkdir()
    other_rate = tmp_path / "rate"
    other_rate.mkdir()
    for name in "abc":
        soundfile.write(other_rate / f"{name}.wav", 0.1 * np.ones(8000), 8000)
    hole = tmp_path / "hole"
    hole.mkdir()
    for name in "abc":
        soundfile.write(hole / f"{name}.wav", np.array([0.1, np.nan] * 4000), 4000, subtype="FLOAT")
    out = tmp_path / "scores.json"
    for arguments, message in (
        ([], "evaluate takes GENERATED and REFERENCE"),
        ([made], "evaluate takes GENERATED and REFERENCE"),
        ([made, real, "--compare", "a", "b"], "evaluate takes GENERATED and REFERENCE"),
        ([str(one), real], "has 1 clip; a score"),
        ([str(tmp_path / "empty"), real], "holds no audio file"),
        ([str(tmp_path / "missing"), real], "does not exist"),
        ([str(other_rate), real], "2 sample rates"),
        ([str(hole), real], "not finite numbers"),
        ([made, real, "--embedding", "vggish"], "neither log_mel, nor a folder that holds a model, nor a pretrained model"),
        ([made, real, "--embedding", str(one)], "is not a model"),
        ([made, real, "--seed", "-1"], "seed"),
        ([made, real, "--report", str(one / "a.wav")], "is no place where a file can be written"),
        (
            ["--sensitivity", "log_mel", real, "--paired"],
            "--paired goes with GENERATED and REFERENCE, not with --sensitivity",
        ),
        (["--compare", str(tmp_path / "no.json"), str(tmp_path / "no.json")], "is no result"),
        (["--sensitivity", "log_mel", str(one)], "has 1 clips; a sensitivity card needs 16"),
    ):
        place = [] if "--compare" in arguments else ["--json", str(out)]
        assert message in refused(capsys, "evaluate", *arguments, *place), arguments
    assert not out.exists()
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path, tmp_path / "pipe", "/"):
        assert "is no place" in refused(capsys, "evaluate", made, real, "--json", str(place))
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize(("kad", "within"), [(0.5, True), (2.0, False)])
def test_the_verdict_says_whether_halves_of_the_reference_differ_as_much(kad, within):
    scores = {
        "verdict": {"p_value": 0.001, "distinguishable": True}, "provenance": {"paired": False},
        "at_equal_n": {"kad": kad}, "floor": {"kad_interval": [-1.0, 1.0]},
    }  # fmt: skip
    assert ("no more than halves of the reference do" in module.verdict(scores)) == within


def test_the_last_column_is_the_floor():
    def at(value: float) -> dict:
        ranges = {"fid_interval": [value, value], "kad_interval": [value, value]}
        return {"clips": 9, **dict.fromkeys(("fid", "kad", *module.MANIFOLD), value), **ranges}

    scores = {**at(1.0), "fid_infinity": None, "fid_infinity_interval": None, "at_equal_n": at(0.25), "floor": at(0.75)}
    of_both = [row for row in module.score_table(scores) if "9 clips" in row[0] or row[0] in module.MANIFOLD.values()]
    assert len(of_both) == 6 and all("0.25" in row[1] and "0.75" in row[3] for row in of_both)


@pytest.mark.parametrize("suspicious", [True, False])
def test_what_was_learned_by_heart_is_said(suspicious):
    found = {
        "share_nearer_than_95_percent_of_reference": 0.5, "suspicious": suspicious,
        "median_distance_reference_to_train": 1.0, "closest": [{"generated": "a", "train": "b", "distance": 0.1}],
    }  # fmt: skip
    told = module._memorization(found)
    assert ("LIKELY LEARNED BY HEART" in told, "no sign of it" in told) == (suspicious, not suspicious)


@pytest.mark.parametrize(("second", "told"), [([2.0, 4.0], "neither is surely closer"), ([3.5, 5.0], "a.json is closer")])
def test_results_whose_intervals_overlap_are_not_told_apart(monkeypatch, capsys, second, told):
    def result(value: float, interval: list[float]) -> dict:
        return {
            "kad": value, "kad_interval": interval, "fid": value, "fid_interval": interval, "fid_infinity": None,
            "fid_infinity_interval": None, "at_equal_n": None, "warnings": [],
            "provenance": {"generated": {"clips": 1, "windows": 1}},
        }  # fmt: skip

    monkeypatch.setattr(module, "_read_scores", {"a.json": result(2.0, [1.0, 3.0]), "b.json": result(4.0, second)}.get)
    module._compare("a.json", "b.json")
    assert f"KAD: {told}" in capsys.readouterr().out
