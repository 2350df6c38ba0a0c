"""A page stands on its own, its players play what they were given, and drawing changes nothing elsewhere."""

import base64
import io
import re

import matplotlib
import numpy as np
import pytest
import soundfile
import torch

from s4audio.report import (
    Clip,
    Section,
    _envelope,
    _player,
    clips_figure,
    curves_figure,
    extrapolation_figure,
    histogram_figure,
    map_figure,
    poles_figure,
    save_figure,
    write_page,
)

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


@pytest.mark.parametrize("samples, kind", [(1, "wav"), (4096, "wav"), (4097, "flac")])
def test_a_clip_of_one_flac_block_is_a_wav_which_browsers_play(samples, kind):
    address = _player(Clip("short", 0.5 * torch.ones(1, samples), RATE))
    header, _, encoded = address.partition(",")
    assert header == f"data:audio/{kind};base64"
    sound, rate = soundfile.read(io.BytesIO(base64.b64decode(encoded)))
    assert (len(sound), rate) == (samples, RATE) and np.abs(sound - 0.5).max() < 1e-4


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


def test_extrapolation_ends_where_the_line_begins():
    sizes, slope, value = [400.0, 200.0, 100.0], 50.0, 3.0
    figure = extrapolation_figure(sizes, [value + slope / size for size in sizes], value, slope)
    axis = figure.axes[0]
    subsets, limit = (points.get_offsets() for points in axis.collections)
    np.testing.assert_allclose(limit, [[0, 3]])
    line = axis.lines[0].get_xydata()
    np.testing.assert_allclose(line, [[0, 3], [0.01, 3.5]])
    np.testing.assert_allclose(subsets[-1], line[-1])  # the smallest subset lies on the line it made
    assert [label.get_text() for label in axis.get_xticklabels()] == ["∞", "400", "100"]


def test_map_and_histogram_keep_the_sets_apart():
    points = {"reference": torch.tensor([[0.0, 1.0], [2.0, 3.0]]), "generated": torch.tensor([[4.0, 5.0]])}
    axis = map_figure(points, (0.5, 0.25)).axes[0]
    for drawn, (name, wanted) in zip(axis.collections, points.items(), strict=True):
        np.testing.assert_allclose(drawn.get_offsets(), wanted)
        assert drawn.get_label() == name
    assert axis.get_xlabel() == "first direction, 50% of the variance" and axis.get_ylabel() == "second, 25%"
    axis = histogram_figure({"few": torch.tensor([1.0, 2.0]), "many": torch.arange(100.0) / 50}, "distance").axes[0]
    heights = [sum(np.diff(patch.get_path().vertices[:, 0]) * patch.get_path().vertices[1:, 1]) for patch in axis.patches]
    assert heights[0] == pytest.approx(heights[1], rel=1e-6)  # shares of each set, however large it is


def test_poles_stand_at_their_frequency_and_decay():
    figure = poles_figure({"one": (torch.tensor([10.0, 200.0]), torch.tensor([0.5, 0.25]))})
    (axis,) = figure.axes
    np.testing.assert_allclose(axis.collections[0].get_offsets(), [[10, 0.5], [200, 0.25]])
