"""What the page of a run and the report of a demo have in common: curves, and what a model remembers."""

import shlex
from pathlib import Path
from typing import Any

import torch

from s4audio.cli.info import memories, streams
from s4audio.report import Section, curves_figure, poles_figure

PAGE = "report.html"
MOST_PANELS = 4  # of layers' poles; `s4audio info` draws all
MORE_CURVES = {  # what else a run may have logged, what to write under it, and its unit
    "valid/si_sdr_db": ("SI-SDR on the held-out recordings: higher is better.", "dB"),
    "valid/accuracy": ("Share of the held-out sequences that it gets right.", "accuracy"),
}


def training_section(out: Path) -> Section:
    """The losses and scores of a run over its steps."""
    curves = read_curves(out)
    losses = {name: curves[tag] for name, tag in (("training", "train/loss"), ("held out", "valid/loss")) if tag in curves}
    figures = [("Loss: lower is better.", curves_figure(losses, "loss"))] if losses else []
    for tag, (text, unit) in MORE_CURVES.items():
        if tag in curves:
            scores = {"training": curves[other]} if (other := tag.replace("valid", "train")) in curves else {}
            figures.append((text, curves_figure({**scores, "held out": curves[tag]}, unit, log=False)))
    return Section("How it trained", figures=figures)


def memory_section(model: torch.nn.Module) -> Section:
    """What the layers of a model remember, as a picture."""
    layers = memories(model)
    last, panels = len(layers) - 1, min(MOST_PANELS, len(layers))
    shown = [round(panel * last / max(1, panels - 1)) for panel in range(panels)]  # evenly, from the first to the last
    poles = {f"layer {i + 1} of {len(layers)}": (layers[i].frequency, layers[i].decay) for i in shown}
    figure = poles_figure(poles, in_time=hasattr(model, "sample_rate"))
    text = (
        "Each point is a resonance inside the model: how fast it swings, and how long it rings until 1/e is left. Points "
        "high up remember long, points to the right hear fine detail."
    )
    return Section(
        "What it remembers", [text], figures=[("Poles of state-space layers, from the first to the last.", figure)]
    )


def read_curves(out: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Steps and values of everything that a run logged, by name; of steps that were made again after a crash, the last."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    curves = {}
    for tag in events.Tags()["scalars"]:
        points = {point.step: point.value for point in events.Scalars(tag)}
        steps = sorted(points)
        curves[tag] = steps, [points[step] for step in steps]
    return curves


def next_commands(model: Any, path: Path) -> list[tuple[str, str]]:
    """What to do with a model in a folder, and how."""
    folder = shlex.quote(str(path))
    commands = [
        ("Look inside:", f"s4audio info {folder}"),
        ("Train on recordings of your own:",
            "s4audio train MY_RECORDINGS --minutes 10"),
    ]  # fmt: skip
    if not hasattr(model, "sample"):
        return commands
    if not hasattr(model, "encode"):
        wanted = f" --label {shlex.quote(model.classes[0])}" if getattr(model, "classes", ()) else ""
        return [("Make sound from noise:", f"s4audio generate {folder} --from noise{wanted}"), *commands]
    commands = [
        ("Hear a recording with noise in its latent:", f"s4audio generate {folder} --from MY_RECORDING.wav --variation 0.1"),
        ("Score what it makes of recordings:",
            f"s4audio generate {folder} --from MY_RECORDINGS --out reconstructed\n"
            f"s4audio evaluate reconstructed MY_RECORDINGS --sample-rate {model.sample_rate} --paired --report score"),
        *commands,
    ]  # fmt: skip
    if streams(model):
        streamed = f"s4audio reconstruct {folder} MY_RECORDING.wav out.wav"
        commands.insert(0, ("Send a recording of any length through it:", streamed))
    return commands
