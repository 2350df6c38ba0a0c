"""`s4audio stream`: raw samples from standard input through a model to standard output, as they come."""

import argparse
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from s4audio import checkpoint
from s4audio.audio import PCM_FORMATS, AudioError, from_pcm, to_pcm
from s4audio.cli.arguments import Parser, load_streaming
from s4audio.layers import S4D
from s4audio.models import advance_stream, begin_stream, finish_stream, stream_latency

LARGEST_BLOCK = 2**20  # samples
EVERY_SECONDS = 10.0  # between lines on how fast it goes
EXAMPLE = (
    "ffmpeg -i IN.mp3 -f s16le -ac 1 -ar {rate} - | s4audio stream MODEL | ffmpeg -f s16le -ac 1 -ar {rate} -i - OUT.wav"
)


def stream(arguments: list[str]) -> None:
    """Writes what the model makes of samples, as they come in; what there is to say goes to standard error."""
    parser = Parser(
        prog="s4audio stream",
        description="Send raw samples through a model, from standard input to standard output: mono, little-endian, at the "
        "model's rate. The output is as long as the input: what the model makes of it at once, to rounding.",
        epilog="With ffmpeg at both ends, for a model at 16,000 Hz:\n  " + EXAMPLE.format(rate=16_000),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="model folder, such as runs/NAME/best")
    parser.add_argument(
        "--format", choices=PCM_FORMATS, default="s16", help="s16, signed 16-bit integers (default), or f32, 32-bit floats"
    )
    parser.add_argument(
        "--block", type=int, default=1024, help="samples at a time (default 1024): fewer wait less, more compute less"
    )
    parser.add_argument(
        "--gain",
        type=float,
        default=0.0,
        metavar="DB",
        help="the model hears the input this much louder; the output comes back",
    )
    parser.add_argument("--load-state", metavar="FILE", help="go on where another stream through this model ended")
    parser.add_argument(
        "--save-state", metavar="FILE", help="where to write the state, at the start and at the end; an incomplete block "
        "stays in it and comes out when it goes on"
    )  # fmt: skip
    args = parser.parse_args(arguments)
    if not 1 <= args.block <= LARGEST_BLOCK:
        raise ValueError(f"--block is {args.block}; wanted 1 to {LARGEST_BLOCK:,} samples.")
    if not -60 <= args.gain <= 60:
        raise ValueError(f"--gain is {args.gain:g}; wanted -60 to 60 dB.")
    model = load_streaming(args.model, "stream")
    for file, name in ((sys.stdin, "input"), (sys.stdout, "output")):
        if file is None or file.isatty():
            raise ValueError(
                f"standard {name} is no pipe and no file, and raw samples go through both; for example: "
                f"{EXAMPLE.format(rate=model.sample_rate)}"
            )
    torch.set_num_threads(1)  # a block is too little to share; threads that wait for each other are slower
    for layer in model.modules():
        if isinstance(layer, S4D):
            layer.freeze()
    sha256, training = checkpoint.fingerprint(args.model), checkpoint.read_config(args.model)["training"]
    state = checkpoint.load_state(args.load_state, model, sha256) if args.load_state else begin_stream(model)
    if args.save_state:
        checkpoint.save_state(state, args.save_state, sha256)  # a place that cannot be written shows now
    rate, hop, delay = model.sample_rate, model.hop_length, stream_latency(model.hop_length, args.block)
    going_on = f", going on from {args.load_state}" if args.load_state else ""
    _say(f"{args.format} samples, little-endian, mono at {rate} Hz, in and out{going_on}")
    _say(
        f"latency: {delay} samples ({1000 * delay / rate:.3g} ms) at most: {hop - 1} for the model's frames of {hop}, "
        f"{delay - hop + 1} for blocks of {args.block}"
    )
    meter, gain, clipped = Meter(rate), 10 ** (args.gain / 20), 0
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        for audio in read_samples(sys.stdin.buffer.read1, args.format, args.block):  # type: ignore[union-attr]
            began = time.monotonic()
            y, after = advance_stream(model, gain * audio, state, args.block)
            meter.add(gain * audio, time.monotonic() - began)
            clipped += _write(y / gain, args.format)
            state = after
        if not args.save_state:
            clipped += _write(finish_stream(model, state) / gain, args.format)
    finally:  # Ctrl-C, SIGTERM, a reader that has gone away too: the state is that after the last block that went out
        signal.signal(signal.SIGTERM, before)
        if args.save_state:
            checkpoint.save_state(state, args.save_state, sha256)
            _say(f"the state is in {args.save_state}")
        if meter.seconds:
            _say(meter.speed())
            _say(_level(meter.peak, args.gain, training.get("normalize") == "peak"))
        if clipped:
            _say(f"{clipped} samples beyond full scale were clipped")


def _terminated(number: int, frame: Any) -> NoReturn:
    """What a service manager asks for: the end, after the state is saved; with the status that a shell gives it."""
    sys.exit(128 + number)


def read_samples(read: Callable[[int], bytes], sample_format: str, num_samples: int) -> Iterator[Tensor]:
    """(1, samples) for what comes in at each reading, up to num_samples; a sample may come in two pieces.

    Args:
        read: gives at most as many bytes as it is asked for, and none at the end; as `read1` of a binary file.
        sample_format: a key of PCM_FORMATS.
        num_samples: to ask for at a time.

    Raises:
        AudioError: a sample is not a finite number.
    """
    width, rest, count = np.dtype(PCM_FORMATS[sample_format]).itemsize, b"", 0
    while data := read(num_samples * width):
        data = rest + data
        whole = len(data) // width * width
        rest = data[whole:]
        if whole:
            audio = from_pcm(data[:whole], sample_format)
            finite = audio.isfinite()[0]
            if not finite.all():
                place = count + int(finite.logical_not().nonzero()[0])
                raise AudioError(
                    f"sample {place} of the input is not a finite number; is it {sample_format}, little-endian?"
                )
            count += audio.shape[-1]
            yield audio
    if rest:
        _say(f"the input ended within a sample: {len(rest)} of its {width} bytes were left over; is it {sample_format}?")


class Meter:
    """What has gone through a stream, and how fast; says so now and then."""

    def __init__(self, sample_rate: int) -> None:
        self.sample_rate, self.said_at = sample_rate, time.monotonic()
        self.seconds, self.computing, self.peak = 0.0, 0.0, 0.0

    def add(self, heard: Tensor, computing: float) -> None:
        """Input as the model heard it, and the seconds that this took."""
        self.seconds += heard.shape[-1] / self.sample_rate
        self.computing += computing
        self.peak = max(self.peak, heard.abs().max().item())
        if time.monotonic() - self.said_at >= EVERY_SECONDS:
            self.said_at = time.monotonic()
            _say(self.speed())

    def speed(self) -> str:
        """The real-time factor: seconds of computing for a second of audio."""
        factor = self.computing / self.seconds
        slow = "; a live input would fall behind: try a larger --block" if factor > 1 else ""
        return f"{self.seconds:.1f} s of audio at a real-time factor of {factor:.3g}, {1 / factor:.3g} times real time{slow}"


def _level(peak: float, gain: float, trained_at_peak: bool) -> str:
    """How loud the model heard the input, and whether that is what it knows."""
    heard = (
        f"the loudest sample that the model heard was at {20 * math.log10(peak):.1f} dB" if peak else "the input was silent"
    )
    if not peak or not trained_at_peak:
        return heard
    return (
        f"{heard}; it was trained on recordings with their loudest at 0 dB, and how loud a stream will be cannot be known: "
        f"--gain {gain - 20 * math.log10(peak):.1f} would have been right, and the output comes back to its own level"
    )


def _write(audio: Tensor, sample_format: str) -> int:
    """Sends samples out; returns how many of them were clipped."""
    sys.stdout.buffer.write(to_pcm(audio, sample_format))
    sys.stdout.buffer.flush()
    return int((audio.abs() > 1).sum()) if sample_format == "s16" else 0


def _say(sentence: str) -> None:
    print(f"s4audio: {sentence}", file=sys.stderr, flush=True)
