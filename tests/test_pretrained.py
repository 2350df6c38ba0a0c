"""The models that come with the package: small, licensed, described, and making sound at once, without a network."""

import socket
from pathlib import Path

import pytest
import torch

import s4audio
from s4audio import checkpoint
from s4audio.audio import clipped_runs, normalize, read_audio
from s4audio.cli import main

NAMES = checkpoint.pretrained()
SAMPLES = Path(__file__).parent.parent / "samples" / "valid"


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("asked for the network")

    monkeypatch.setattr(socket, "socket", refuse)


def test_there_are_some():
    assert "digits-8k" in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_card_says_what_it_is_and_what_it_may_be_used_for(name):
    folder = checkpoint.PRETRAINED / name
    assert {file.name for file in folder.iterdir()} == {"README.md", checkpoint.CONFIG, checkpoint.WEIGHTS}
    assert (folder / checkpoint.WEIGHTS).stat().st_size <= 8e6
    card = (folder / "README.md").read_text()
    head = card.split("---")[1]
    assert "\nlicense: " in head and "#" not in head
    assert f"s4audio generate {name} --from noise" in card and "To fill in" not in card
    assert all(f"\n## {part}\n" in card for part in ("Training", "Use", "Scores", "Limits", "License"))


@pytest.mark.parametrize("name", NAMES)
def test_generates_sound_by_its_name(name, tmp_path, capsys):
    options = "--from", "noise", "--num", "3", "--steps", "8", "--seed", "5"
    for out, size in (("a", "3"), ("b", "1")):
        assert main(["generate", name, *options, "--batch-size", size, "--out", str(tmp_path / out)]) == 0
    clips = [[read_audio(file)[0] for file in sorted((tmp_path / out).glob("*.wav"))] for out in "ab"]
    assert len(clips[0]) == 3
    for clip, again in zip(*clips, strict=True):
        assert torch.isfinite(clip).all() and not clipped_runs(clip)  # a louder clip is brought to a peak of 1
        assert clip.std() > 0.003 and clip.mean().abs() < 0.01  # neither silent nor off zero
        assert (clip - again).abs().max() <= 1.01 / 32768  # at another batch size
    assert main(["models"]) == 0
    assert name in capsys.readouterr().out


@pytest.mark.parametrize("word", ["seven", "zero"])
def test_another_word_is_another_sound(word):
    model = s4audio.load("digits-8k")
    label = torch.full((2,), model.classes.index(word))
    made = [
        model.sample(2, 8000, label=each, generator=torch.Generator().manual_seed(0)) for each in (label, (label + 1) % 10)
    ]
    difference = (made[0] - made[1]).square().mean() / made[0].square().mean()
    assert difference > 0.1  # of the same noise; a model that does not hear the label has 0


def test_a_span_made_anew_is_about_as_loud_as_what_is_around_it():
    """Of two clips that it never heard, with two seeds each; when it did not heed them, it was 8 dB quieter on the mean."""
    model = s4audio.load("classical-16k")
    files = [SAMPLES / "fur_elise_piano.flac", SAMPLES / "spring_strings.flac"]
    clips = [normalize(read_audio(file, 16_000)[0][:, 48_000:128_000], "peak") for file in files]
    audio = torch.stack(clips).repeat(2, 1, 1)
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 0, 1, 1)]
    made = model.inpaint(audio, 32_000, 56_000, generators, num_steps=16)
    around = torch.cat([audio[..., 24_000:32_000], audio[..., 56_000:64_000]], dim=-1)
    louder = 10 * torch.log10(made[..., 32_000:56_000].square().mean(-1) / around.square().mean(-1))
    assert -4 < louder.mean() < 2
