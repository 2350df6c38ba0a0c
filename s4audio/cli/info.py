"""`s4audio info`: what a model is, how it was trained, and what its state spaces remember for how long."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from s4audio import checkpoint, ssm
from s4audio.card import describe_training
from s4audio.cli.arguments import Parser
from s4audio.layers import S4D


class Memory(NamedTuple):
    """The poles of one layer."""

    name: str
    layer: S4D
    rate: float  # Hz; 1 for a model of sequences without a sample rate
    frequency: Tensor  # Hz, or cycles a sample
    decay: Tensor  # seconds to 1/e, or samples


def info(arguments: list[str]) -> None:
    """Prints the description of a model and draws its poles."""
    parser = Parser(prog="s4audio info", description="What a model is, how it was trained, and what it remembers.")
    parser.add_argument("model", help="model folder, such as runs/NAME/best")
    parser.add_argument(
        "--plot",
        metavar="FILE.png",
        help="where to draw the poles (default: poles.png in the model folder, or here if that may not be written)",
    )
    args = parser.parse_args(arguments)
    if args.plot and Path(args.plot).suffix.lower() != ".png":
        raise ValueError(f"--plot is {args.plot}; the picture is a PNG, so wanted a name that ends in .png.")
    model, config = checkpoint.load(args.model), checkpoint.read_config(args.model)
    print(f"{config['class']} in {args.model}")
    for name, sentence in [*describe(model), *describe_training(config["training"])]:
        print(f"  {name + ':':13}{sentence}")
    layers = memories(model)
    in_time = hasattr(model, "sample_rate")
    if not layers:
        print("\nit has no state-space layers, so there are no poles to show")
        return
    print("\nwhat each layer remembers: the frequencies of its poles, and how long they ring, to 1/e")
    rows = [("layer", "kind", "channels", "rate", "frequencies", "rings for", "half of them longer than")]
    for memory in layers:
        low, high = memory.frequency.min().item(), memory.frequency.max().item()
        shortest, middle, longest = (f(memory.decay).item() for f in (torch.min, torch.median, torch.max))
        hertz, seconds = (_hertz, _seconds) if in_time else (_plain, _plain)
        rows.append(
            (
                memory.name, type(memory.layer).__name__, str(memory.layer.d_model), hertz(memory.rate) if in_time else "1",
                f"{hertz(low)} to {hertz(high)}", f"{seconds(shortest)} to {seconds(longest)}", seconds(middle),
            )
        )  # fmt: skip
    print_table(rows)
    if not in_time:
        print("  (frequencies in cycles a sample, times in samples: this model has no sample rate)")
    from s4audio.report import poles_figure, save_figure

    beside = Path(args.model) if Path(args.model).exists() and os.access(args.model, os.W_OK) else Path()
    plot = Path(args.plot) if args.plot else beside / "poles.png"
    save_figure(plot, poles_figure({m.name: (m.frequency, m.decay) for m in layers}, in_time))
    print(f"\nplot: {plot}")


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Rows of cells, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def describe(model: nn.Module) -> list[tuple[str, str]]:
    """What the model is, line by line: a name and a sentence."""
    states = sum(p.numel() for layer in model.modules() if isinstance(layer, S4D) for p in layer.parameters(recurse=False))
    total = sum(p.numel() for p in model.parameters())
    lines = [("parameters", f"{total:,}, of which {states:,} in state spaces")]
    if hasattr(model, "sample_rate"):
        m: Any = model
        lines.append(("audio", f"{m.channels} channel{'s' * (m.channels > 1)} at {m.sample_rate:,} Hz"))
        if getattr(m, "classes", ()):
            lines.append(("classes", ", ".join(m.classes)))
        if hasattr(m, "encode"):
            frames = m.sample_rate / m.hop_length  # a second
            lines += [
                ("latent", f"{m.latent_channels} numbers, {frames:,.4g} times a second: {m.latent_channels * frames:,.0f} "
                    f"a second in place of {m.channels * m.sample_rate:,} samples"),
                ("streams", f"yes, a sample waits for {1000 * (m.hop_length - 1) / m.sample_rate:.3g} ms at most"
                    if streams(model) else "no, it hears the future"),
            ]  # fmt: skip
    return lines


def streams(model: Any) -> bool:
    """Whether a model runs block by block what it learned."""
    return hasattr(model, "stream") and not getattr(model, "bidirectional", False)


@torch.no_grad()
def memories(model: nn.Module) -> list[Memory]:
    """The poles of every state-space layer, in Hz and seconds where the model has a sample rate."""
    rates = _layer_rates(model)
    found = []
    for name, layer in model.named_modules():
        if isinstance(layer, S4D):
            frequency, decay = ssm.poles(layer.system())
            rate = rates.get(name, 1.0)
            found.append(Memory(name, layer, rate, frequency.flatten() * rate, decay.flatten() / rate))
    return found


def _layer_rates(model: Any) -> dict[str, float]:
    """The sample rate at which each state-space layer runs, seen by sending silence through."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, S4D)}
    if not layers or not hasattr(model, "sample_rate"):
        return {}
    length = model.hop_length  # in which every layer has a whole number of samples
    seen: dict[str, float] = {}
    hooks = []
    for name, layer in layers.items():

        def note(_: nn.Module, inputs: tuple[Tensor], name: str = name) -> None:
            seen[name] = inputs[0].shape[-1] / length * model.sample_rate

        hooks.append(layer.register_forward_pre_hook(note))
    model.training_losses(torch.zeros(1, model.channels, length))  # which runs all of it
    for hook in hooks:
        hook.remove()
    return seen


def _hertz(value: float) -> str:
    return f"{value / 1000:.3g} kHz" if value >= 1000 else f"{value:.3g} Hz"


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms"


def _plain(value: float) -> str:
    return f"{value:.3g}"
