"""A page stands on its own, its players play what they were given, and drawing changes nothing elsewhere."""

import base64
import io
import re

import matplotlib
import numpy as np
import pytest
import soundfile
import torch

from s4audio.report import Clip, Section, _envelope, clips_figure, curves_figure, poles_figure, save_figure, write_page

RATE, HZ = 8000, 375.0  # a bin of the spectrogram


@pytest.fixture
def tone() -> torch.Tensor:
    return 0.5 * torch.sin(torch.arange(RATE) / RATE * 2 * torch.pi * HZ).unsqueeze(0)


@pytest.fixture
def page(tmp_path, tone) -> str:
    poles = {"layer <1>": (torch.tensor([0.0, 10.0]), torch.tensor([0.1, 1.0]))}
    curves = {"training": ([1, 2, 3], [3.0, 2.0, 1.0]), "held out": ([3], [1.5])}
    write_page(
        tmp_path / "page.html", "A title & more", "A lead.",
        [
            Section("Sounds", ["A <b>paragraph</b>."], clips=[Clip("a tone", tone, RATE), Clip("silence", 0 * tone, RATE)]),
            Section("Numbers", table=[("what", "value"), ("SI-SDR", "3 dB")]),
            Section("Pictures", figures=[("loss", curves_figure(curves, "loss")), ("poles", poles_figure(poles))]),
            Section("Next", commands=[("Do this:", "s4audio info MODEL > out")]),
        ],
    )  # fmt: skip
    return (tmp_path / "page.html").read_text(encoding="utf-8")


def test_a_page_needs_no_network_and_no_other_file(page):
    assert not re.findall(r'(?:src|href)="(?!data:|#)[^"]*"', page)
    assert not re.findall(r"@import|url\((?!#)", page)


def test_text_is_text_whatever_it_holds(page):
    for wanted in ("A title &amp; more", "A &lt;b&gt;paragraph", "info MODEL &gt; out", "layer &lt;1&gt;", "3 dB"):
        assert wanted in page
    assert "<b>paragraph" not in page


def test_players_hold_the_sounds(page, tone):
    players = re.findall(r'<audio controls preload="metadata" aria-label="[^"]+" src="data:audio/flac;base64,([^"]+)"', page)
    sounds = [soundfile.read(io.BytesIO(base64.b64decode(player))) for player in players]
    assert [rate for _, rate in sounds] == [RATE, RATE]
    assert np.abs(sounds[0][0] - tone[0].numpy()).max() < 1e-4 and not sounds[1][0].any()


def test_pictures_follow_the_theme_of_the_reader(page):
    assert "prefers-color-scheme: dark" in page and "width=device-width" in page
    assert page.count("<svg") == 4
    drawn = page[page.index("<main>") :]
    assert "var(--ink)" in drawn and "var(--accent)" in drawn
    assert not re.findall(r"#(?:333333|1f6f8b|c4622d|b0b0b0|ffffff)", drawn)


def test_a_screen_reader_finds_names(page):
    assert page.count('role="img" aria-label="') == 4 and 'aria-label="Waveform and spectrogram of a tone, peak 0.50' in page
    assert '<audio controls preload="metadata" aria-label="a tone"' in page and '<th scope="row">SI-SDR</th>' in page
    ids = re.findall(r' id="([^"]+)"', page)
    assert all(f"#{name}" in page for name in ids)


@pytest.mark.parametrize("length", [1, 5, 1199, 1200, 1201, 2399, 90_001])
def test_an_envelope_has_at_most_so_many_points_and_misses_no_peak(length):
    samples = torch.randn(length)
    low, high = _envelope(samples)
    assert low.shape == high.shape and low.shape[-1] <= 1200
    assert high.max() >= samples.max() and low.min() <= samples.min()


def test_drawing_leaves_the_settings_of_matplotlib_alone(tone, tmp_path):
    before = dict(matplotlib.rcParams)
    save_figure(tmp_path / "a.png", clips_figure({"a": tone}, RATE))
    assert dict(matplotlib.rcParams) == before and (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_shows_the_signal(tone):
    """The waveform's envelope and the spectrogram's brightest row are where the tone is."""
    figure = clips_figure({"a tone": tone}, RATE)
    wave, picture = figure.axes[:2]
    assert "a tone: peak 0.50, -9.0 dBFS RMS" in wave.get_title()
    image = picture.images[0].get_array()
    hz = image.mean(1).argmax() * RATE / 2 / (image.shape[0] - 1)
    assert hz == pytest.approx(HZ, abs=8) and image[:, 5:-5].max() == pytest.approx(-6.02, abs=0.1)  # half of full scale
    assert picture.images[0].get_extent() == [0, 1.0, 0, RATE / 2000]
