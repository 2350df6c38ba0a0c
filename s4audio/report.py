"""Pictures of signals and pages with players: the one place that draws and writes HTML.

matplotlib and jinja2 are imported when something is drawn, not before. A page is one file that needs no network: sounds are
embedded as FLAC or WAV and pictures as SVG whose colours follow the reader's light or dark theme.
"""

import base64
import functools
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from s4audio.audio import encode
from s4audio.files import replacing
from s4audio.losses import magnitude

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

P = ParamSpec("P")
R = TypeVar("R")

FLAC_BLOCK = 4096  # samples of libFLAC's blocks; Chromium cannot seek in a file of one, and so does not play it
INK, ACCENT, SECOND, FAINT = "#333333", "#1f6f8b", "#c4622d", "#b0b0b0"
LINES = (ACCENT, SECOND, "#5b8c3a", "#8a5a9e")  # of several curves in one picture
STYLE: Any = {
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": FAINT, "xtick.color": INK, "ytick.color": INK,
    "xtick.labelcolor": INK, "ytick.labelcolor": INK, "axes.spines.top": False, "axes.spines.right": False,
    "font.size": 9, "grid.color": FAINT, "grid.linewidth": 0.4, "legend.frameon": False, "svg.fonttype": "none",
}  # fmt: skip


def _styled(draw: Callable[P, R]) -> Callable[P, R]:
    """The function with STYLE in force while it runs, and matplotlib's own settings as they were afterwards."""

    @functools.wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> R:
        from matplotlib import rc_context

        with rc_context(STYLE):
            return draw(*args, **kwargs)

    return styled


class Clip(NamedTuple):
    """A sound on a page: a player under a name, with its picture."""

    name: str
    audio: Tensor  # (channels, T)
    sample_rate: int  # Hz


class Section(NamedTuple):
    """A part of a page under its title; lists that are empty are left out."""

    title: str
    text: Sequence[str] = ()  # paragraphs
    clips: Sequence[Clip] = ()
    figures: Sequence[tuple[str, "Figure"]] = ()  # caption, picture
    table: Sequence[Sequence[str]] = ()  # rows; the first is the heading
    commands: Sequence[tuple[str, str]] = ()  # what for, what to type


def write_page(path: str | Path, title: str, lead: str, sections: Sequence[Section]) -> None:
    """Writes a page that stands on its own; it appears whole, in the place of an older one, or not at all.

    Args:
        path: of the HTML file.
        title: the heading.
        lead: one or two sentences under it.
        sections: what follows.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(loader=PackageLoader("s4audio", "."), autoescape=True, undefined=StrictUndefined)
    environment.filters.update(player=_player, clip_svg=_clip_svg, svg=_svg)
    page = environment.get_template("report.html").render(title=title, lead=lead, sections=sections)
    with replacing(path) as file:
        file.write(page.encode(errors="replace"))  # a file name may be no text


@_styled
def clips_figure(clips: Mapping[str, Tensor], sample_rate: int) -> "Figure":
    """Waveform and spectrogram of each named clip, one column a clip.

    Args:
        clips: name -> (channels, T) audio; the first channel is drawn.
        sample_rate: in Hz.
    """
    figure = _figure(6.0 * len(clips), 4.6)
    axes = figure.subplots(2, len(clips), squeeze=False, sharex=True, sharey="row", height_ratios=(2, 3))
    for column, (name, audio) in enumerate(clips.items()):
        samples = audio[0].detach().float().cpu()
        image = _draw_clip(axes[0, column], axes[1, column], samples, sample_rate)
        axes[0, column].set_title(f"{name}: {_level(samples)}", fontsize=10)
    axes[0, 0].set_ylabel("amplitude")
    axes[1, 0].set_ylabel("kHz")
    figure.colorbar(image, ax=axes[1, :].tolist(), label="dB re a full-scale sine", pad=0.01)
    return figure


def save_figure(path: str | Path, figure: "Figure") -> None:
    """The figure as a PNG file."""
    with replacing(path) as file:
        figure.savefig(file, dpi=100, format="png")


@_styled
def curves_figure(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], ylabel: str, log: bool = True) -> "Figure":
    """Values over training steps: lines for many points, marks too for a few.

    Args:
        curves: name -> (steps, values).
        ylabel: what the values are.
        log: whether the values are drawn on a logarithmic scale.
    """
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    figure = _figure(4.4, 2.4)
    axis = figure.subplots()
    for colour, (name, (steps, values)) in zip(itertools.cycle(LINES), curves.items(), strict=False):
        marker = "o" if len(steps) < 30 else None
        axis.plot(steps, values, color=colour, label=name, linewidth=1.3, marker=marker, markersize=3)
    if log:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.set_xlabel("step")
    axis.set_ylabel(ylabel)
    axis.grid(axis="y")
    if len(curves) > 1:
        axis.legend()
    return figure


@_styled
def poles_figure(layers: Mapping[str, tuple[Tensor, Tensor]], in_time: bool = True) -> "Figure":
    """What each layer can remember: the frequency of every pole, and how long it rings.

    Poles that hardly swing stand at the left edge.

    Args:
        layers: name -> frequencies and decay times to 1/e of its poles, in Hz and seconds, or cycles a sample and samples.
        in_time: whether it is Hz and seconds.
    """
    lowest = 1e-4 * (max(frequency.max().item() for frequency, _ in layers.values()) or 1.0)
    columns = min(2, len(layers))
    rows = -(-len(layers) // columns)
    figure = _figure(4.4, 0.6 + 1.3 * rows)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axis, (name, (frequency, decay)) in zip(axes.flat, layers.items(), strict=False):
        axis.scatter(frequency.clamp_min(lowest), decay, s=3, color=ACCENT, alpha=0.35, linewidths=0)
        axis.set_title(name, fontsize=8)
    for axis in list(axes.flat)[len(layers) :]:
        axis.set_visible(False)
    axes[0, 0].set_xscale("log")
    axes[0, 0].set_yscale("log")
    for axis in (axes[0, 0].xaxis, axes[0, 0].yaxis):
        axis.set_major_formatter("{x:g}")
    figure.supxlabel("frequency, Hz" if in_time else "frequency, cycles a sample", fontsize=9, color=INK)
    figure.supylabel("decay to 1/e, s" if in_time else "decay to 1/e, samples", fontsize=9, color=INK)
    return figure


@_styled
def extrapolation_figure(sizes: Sequence[float], values: Sequence[float], value: float, slope: float) -> "Figure":
    """Scores of subsets over 1 / size, and the line through them to an infinite size.

    Args:
        sizes: of the subsets.
        values: their mean scores.
        value: where the line begins, at 1 / size = 0.
        slope: of the line.
    """
    figure = _figure(4.4, 2.6)
    axis = figure.subplots()
    most = 1 / min(sizes)
    axis.plot([0, most], [value, value + slope * most], color=FAINT, linewidth=1.2, zorder=1)
    axis.scatter([1 / size for size in sizes], values, s=18, color=ACCENT, label="subsets")
    axis.scatter([0], [value], s=34, color=SECOND, label="infinitely many", zorder=3, clip_on=False)
    axis.set_xlim(0, None)
    shown = [size for i, size in enumerate(sizes) if i % 2 == 0]
    axis.set_xticks([0, *(1 / size for size in shown)], ["∞", *(f"{size:.0f}" for size in shown)])
    axis.set_xlabel("windows in a subset")
    axis.set_ylabel("Fréchet distance")
    axis.grid(axis="y")
    axis.legend()
    return figure


@_styled
def map_figure(points: Mapping[str, Tensor], shares: tuple[float, float]) -> "Figure":
    """Named sets of points in a plane.

    Args:
        points: name -> (n, 2).
        shares: how much of all the variance each axis shows, from 0 to 1.
    """
    figure = _figure(4.4, 3.4)
    axis = figure.subplots()
    for (name, of_set), colour, marker in zip(points.items(), (ACCENT, SECOND, INK), ("o", "^", "s"), strict=False):
        axis.scatter(of_set[:, 0], of_set[:, 1], s=16, color=colour, marker=marker, alpha=0.6, linewidths=0, label=name)
    axis.set_xlabel(f"first direction, {shares[0]:.0%} of the variance")
    axis.set_ylabel(f"second, {shares[1]:.0%}")
    axis.legend()
    return figure


@_styled
def histogram_figure(values: Mapping[str, Tensor], xlabel: str, of: str = "clips") -> "Figure":
    """How the values of two sets are spread, as outlines over the same bins.

    Args:
        values: name -> (n,).
        xlabel: what they are.
        of: what has such a value.
    """
    figure = _figure(4.4, 2.6)
    axis = figure.subplots()
    every = torch.cat(list(values.values()))
    bins = torch.linspace(every.min().item(), every.max().item() + 1e-6, 25).tolist()
    for (name, of_set), colour in zip(values.items(), (ACCENT, SECOND, INK), strict=False):
        weights = torch.full((len(of_set),), 100 / len(of_set)).numpy()
        axis.hist(of_set.numpy(), bins=bins, weights=weights, histtype="step", color=colour, linewidth=1.4, label=name)
    axis.set_xlabel(xlabel)
    axis.set_ylabel(f"% of the {of}")
    axis.legend()
    return figure


@_styled
def bars_figure(values: Mapping[str, float], xlabel: str) -> "Figure":
    """One bar for each name, with its value; the figure is wider for longer names."""
    figure = _figure(3.5 + 0.08 * max(map(len, values)), 0.6 + 0.22 * len(values))
    axis = figure.subplots()
    bars = axis.barh(list(values), list(values.values()), color=ACCENT, height=0.7)
    axis.bar_label(bars, fmt="%.3f", padding=3, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.1 * max(*values.values(), 1e-9))
    axis.set_xlabel(xlabel)
    return figure


@_styled
def confusion_figure(counts: Tensor, classes: Sequence[str]) -> "Figure":
    """What each class, a row, is taken for, a column, in % of the class.

    Args:
        counts: (classes, classes).
        classes: their names.
    """
    percent = (100 * counts / counts.sum(1, keepdim=True).clamp_min(1)).numpy()
    figure = _figure(4.4, 4.0)
    axis = figure.subplots()
    axis.imshow(percent, cmap="Blues", vmin=0, vmax=100)
    axis.set_xticks(range(len(classes)), classes, rotation=60, ha="right", fontsize=7)
    axis.set_yticks(range(len(classes)), classes, fontsize=7)
    for row, column in itertools.product(range(len(classes)), repeat=2):
        value = percent[row, column]
        axis.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=7, color="white" if value > 50 else INK)
    axis.set_xlabel("taken for")
    axis.set_ylabel("is")
    return figure


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _draw_clip(wave: "Axes", picture: "Axes", samples: Tensor, sample_rate: int) -> Any:
    """Waveform above, spectrogram below; returns the latter's image."""
    seconds = samples.shape[-1] / sample_rate
    low, high = _envelope(samples)
    time = torch.linspace(0, seconds, low.shape[-1])
    wave.fill_between(time.numpy(), low.numpy(), high.numpy(), color=ACCENT, linewidth=0.3)
    wave.set_ylim(-1.05, 1.05)
    picture.set_xlabel("seconds")
    return picture.imshow(
        _spectrogram_db(samples).numpy(), origin="lower", aspect="auto", cmap="magma", vmin=-90, vmax=0,
        extent=(0, seconds, 0, sample_rate / 2000), interpolation="nearest",
    )  # fmt: skip


def _level(samples: Tensor) -> str:
    rms_db = 10 * torch.log10(samples.square().mean().clamp_min(1e-12)).item()
    return f"peak {samples.abs().max().item():.2f}, {rms_db:.1f} dBFS RMS"


def _envelope(samples: Tensor, points: int = 1200) -> tuple[Tensor, Tensor]:
    """Lowest and highest sample of each of at most `points` stretches."""
    stretch = -(-samples.shape[-1] // points)
    whole = torch.nn.functional.pad(samples, (0, -samples.shape[-1] % stretch)).reshape(-1, stretch)
    return whole.amin(-1), whole.amax(-1)


def _spectrogram_db(samples: Tensor) -> Tensor:
    """(bins, frames) level against a full-scale sine, at most about 1,000 frames."""
    n_fft = 512
    hop_length = max(n_fft // 4, samples.shape[-1] // 1000)
    return 20 * torch.log10(magnitude(samples, n_fft, hop_length) / (n_fft / 4)).clamp_min(-6)


def _player(clip: Clip) -> str:
    """The sound as the address of an audio element; beyond full scale it is clipped, as in a file."""
    file_format = "FLAC" if clip.audio.shape[-1] > FLAC_BLOCK else "WAV"
    encoded = base64.b64encode(encode(clip.audio, clip.sample_rate, file_format)).decode()
    return f"data:audio/{file_format.lower()};base64,{encoded}"


@_styled
def _clip_svg(clip: Clip) -> Any:
    figure = _figure(4.4, 2.5)
    wave, picture = figure.subplots(2, 1, sharex=True, height_ratios=(2, 3))
    samples = clip.audio[0].detach().float().cpu()
    _draw_clip(wave, picture, samples, clip.sample_rate)
    wave.set_title(_level(samples), fontsize=8, loc="left")
    wave.set_yticks([])
    picture.set_ylabel("kHz")
    return _svg(figure, f"Waveform and spectrogram of {clip.name}, {_level(samples)}")


@_styled
def _svg(figure: "Figure", label: str) -> Any:
    """The figure as inline SVG in the page's colours and letters; a screen reader says the label."""
    from markupsafe import Markup, escape

    text = StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)
    used = set(re.findall(r"#([\w-]+)", svg))
    svg = re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in used else "", svg)
    for colour, variable in ((INK, "--ink"), (ACCENT, "--accent"), (SECOND, "--second"), (FAINT, "--faint")):
        svg = svg.replace(colour, f"var({variable})")
    return Markup(svg)
