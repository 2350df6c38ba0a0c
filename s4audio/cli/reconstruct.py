"""`s4audio reconstruct`: a recording of any length through a model, block by block, in memory that does not grow."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path

from rich.progress import Progress
from torch import Tensor

from s4audio import checkpoint
from s4audio.audio import read_blocks, write_blocks
from s4audio.cli.arguments import Parser, load_streaming
from s4audio.models import stream_blocks


def reconstruct(arguments: list[str]) -> None:
    """Writes the model's reconstruction of a recording, at the recording's own level."""
    parser = Parser(
        prog="s4audio reconstruct",
        description="Send a recording through a model, one second at a time, with the state carried from block to block. "
        "The output is mono at the model's sample rate and at the level of the input. Memory does not grow with the "
        "recording, except for M4A, which is decoded whole.",
    )
    parser.add_argument("model", help="model folder, such as runs/NAME/best")
    parser.add_argument("input", help="recording to read: WAV, FLAC, OGG, MP3, any rate, any length")
    parser.add_argument("output", help="WAV file to write")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cpu (default) or cuda")
    args = parser.parse_args(arguments)
    source, target = Path(args.input), Path(args.output)
    if target.suffix.lower() != ".wav":
        raise ValueError(f"{target} is not the name of a WAV file; what is written block by block is WAV.")
    if source.exists() and target.exists() and source.samefile(target):
        raise ValueError(f"{target} is the recording to read; choose another name for the output.")
    model = load_streaming(args.model, "reconstruct", args.device)
    level = checkpoint.read_config(args.model)["training"].get("normalize", "none")
    num_samples, peak = _scan(source, model.sample_rate)
    scale = peak if level == "peak" and peak > 0 else 1.0
    seconds, replaced = num_samples / model.sample_rate, target.exists()
    print(f"{source}: {seconds:.1f} s, taken as mono at {model.sample_rate} Hz", flush=True)
    started = time.monotonic()
    with Progress(disable=not sys.stdout.isatty(), transient=True) as bar:
        row = bar.add_task("reconstructing", total=num_samples)

        def at_level() -> Iterator[Tensor]:
            for block in read_blocks(source, model.sample_rate):
                yield (block / scale).to(args.device)
                bar.advance(row, block.shape[-1])

        blocks = (scale * block.cpu() for block in stream_blocks(model, at_level()))
        clipped = write_blocks(target, blocks, model.sample_rate)
    took = time.monotonic() - started
    note = f"; {clipped} samples beyond full scale were clipped" if clipped else ""
    older = " in the place of an older file" if replaced else ""
    print(f"{target}: written{older} in {took:.1f} s, {seconds / took:.1f} times real time{note}")


def _scan(path: Path, sample_rate: int) -> tuple[int, float]:
    """Length and peak at that rate; whatever is wrong with the file shows here, before anything is written."""
    length, peak = 0, 0.0
    for block in read_blocks(path, sample_rate):
        length, peak = length + block.shape[-1], max(peak, block.abs().max().item())
    return length, peak
