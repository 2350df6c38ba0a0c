"""Every wrong input ends in one clear sentence and a non-zero status, with nothing half-written."""

from s4audio import S4Model, save
from s4audio.cli import main
from tests.cli.commands import refused


def test_wrong_input_ends_in_a_sentence_and_status_2(capsys, model, folder, tmp_path):
    save(S4Model(3, 10, d_model=4, num_layers=1), tmp_path / "classifier")
    (tmp_path / "empty").mkdir()
    generate = ["generate", str(model), "--out", str(tmp_path / "out"), "--from"]
    assert "'foo' is not a verb" in refused(capsys, "foo")
    assert "is not a model: it has no config.json" in refused(capsys, "generate", str(folder), "--from", "noise")
    assert "which classifies" in refused(capsys, "generate", str(tmp_path / "classifier"), "--from", "noise")
    assert "does not exist" in refused(capsys, *generate, str(tmp_path / "nowhere"))
    assert "holds no audio file" in refused(capsys, *generate, str(tmp_path / "empty"))
    assert "--variation is 2.0" in refused(capsys, *generate, str(folder), "--variation", "2")
    assert "must be at least 1" in refused(capsys, *generate, "noise", "--num", "0")
    assert "--from noise there is none" in refused(capsys, *generate, "noise", "--variation", "0.5")
    assert "--seconds positive" in refused(capsys, *generate, "noise", "--seconds", "inf")
    assert not (tmp_path / "out").exists()


def test_help_says_what_there_is(capsys):
    assert main(["--help"]) == 0
    assert "generate MODEL --from noise" in capsys.readouterr().out
    assert main([]) == 2
