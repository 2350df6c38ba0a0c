"""`s4audio demo`: trains a small model on the clips that come with the package, and makes a page to see and hear."""

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from s4audio import checkpoint
from s4audio.audio import band_limit, find_audio, normalize, read_audio, write_audio
from s4audio.cli.arguments import Parser, shipped
from s4audio.cli.fit import fit
from s4audio.cli.info import describe, describe_training, print_table
from s4audio.cli.reconstruct import reconstruct
from s4audio.cli.run_page import memory_section, next_commands, training_section
from s4audio.losses import multi_resolution_stft
from s4audio.metrics.signal import log_spectral_distance, si_sdr
from s4audio.models import stream_blocks
from s4audio.report import Clip, Section, write_page

CLIP_SECONDS = 12.0
TITLES = {"fur_elise_piano": "Für Elise", "spring_strings": "Spring"}


def demo(arguments: list[str]) -> None:
    """Trains, generates, streams, scores, and writes OUT/report.html."""
    parser = Parser(
        prog="s4audio demo",
        description="Train a small causal model on the clips that come with s4audio, make sound with it, and write a page "
        "with everything. A few minutes on two cores of a CPU; no download.",
    )
    parser.add_argument("--out", default="demo", help="folder for the page, the sounds and the run (default demo)")
    parser.add_argument("--steps", type=int, help="training steps; fewer for a quick look (default: the recipe's)")
    args = parser.parse_args(arguments)
    if args.steps is not None and args.steps < 1:
        raise ValueError(f"--steps is {args.steps}; wanted at least 1.")
    out, began = Path(args.out), time.monotonic()
    run, train, valid = out / "run", shipped("samples/train"), shipped("samples/valid")
    print("1 of 3: training on the clips in samples/, all but two", flush=True)
    steps = []
    if args.steps is not None:
        steps = ["--trainer.max_steps", str(args.steps), "--trainer.val_check_interval", str(-(-args.steps // 2))]
    fit([
        "--config", str(shipped("recipes/demo.yaml")), "--out", str(run),
        "--data.init_args.train", str(train), "--data.init_args.valid", str(valid), *steps,
    ])  # fmt: skip
    model: Any = checkpoint.load(run / "best")
    rate = model.sample_rate
    recordings = {file.stem: read_audio(file, rate)[0] for file in find_audio(valid)}

    print("\n2 of 3: the two clips that it was not trained on, and noise", flush=True)
    heard, close = _reconstructions(model, recordings, out)
    made = _inventions(model, *next(iter(recordings.items())), out)
    streamed = _streaming(model, run / "best", find_audio(valid)[0], out)

    print("\n3 of 3: the page", flush=True)
    training = checkpoint.read_config(run / "best")["training"]
    minutes = training["wall_seconds"] / 60
    numbers = round(model.latent_channels * rate / model.hop_length)
    write_page(
        out / "report.html",
        "A sound through a state space",
        f"A model with {sum(p.numel() for p in model.parameters()):,} parameters, trained here in {minutes:.1f} minutes, "
        f"turns each second of music into {numbers:,} numbers instead of {rate:,}, and back.",
        [
            heard,
            close,
            streamed,
            made,
            training_section(run),
            memory_section(model),
            Section("The model", table=[("", ""), *describe(model), *describe_training(training)]),
            Section("What to type next", commands=next_commands(model, run / "best")),
        ],
    )
    print_table([(row[0], *row[2:]) for row in close.table])
    print(f"\n{time.monotonic() - began:.0f} s in all. Open {out / 'report.html'} in a browser; the sounds are in {out}.")


@torch.no_grad()
def _reconstructions(model: Any, recordings: dict[str, Tensor], out: Path) -> tuple[Section, Section]:
    """Each recording and what becomes of it; and the scores of the model and of two baselines."""
    rate = model.sample_rate
    numbers = round(model.latent_channels * rate / model.hop_length)
    ways = {
        "the model": lambda audio: audio.abs().max() * model(normalize(audio, "peak").unsqueeze(0))[0],
        "low-pass, as many numbers": lambda audio: band_limit(audio, rate, numbers),
        "mean of each frame": lambda audio: _frame_means(audio, model.hop_length),
    }
    clips: list[Clip] = []
    rows: list[tuple[str, ...]] = []
    for name, audio in recordings.items():
        estimate = ways["the model"](audio)
        write_audio(out / f"{name}_input.wav", audio, rate)
        write_audio(out / f"{name}_reconstructed.wav", estimate, rate)
        length = round(CLIP_SECONDS * rate)
        clips += [
            Clip(f"{TITLES[name]}: the recording", audio[..., :length], rate),
            Clip(f"{TITLES[name]}: through the model", estimate[..., :length], rate),
        ]
    for way, apply in ways.items():
        pairs = [(apply(audio), audio) for audio in (normalize(audio, "peak") for audio in recordings.values())]
        sdr = sum(si_sdr(e, r).item() for e, r in pairs) / len(pairs)
        spectral = sum(log_spectral_distance(e, r).item() for e, r in pairs) / len(pairs)
        stft = sum(multi_resolution_stft(e, r).item() for e, r in pairs) / len(pairs)
        rows.append((way, _in_words(sdr), f"{sdr:.1f} dB", f"{spectral:.1f} dB", f"{stft:.2f}"))
    heard = [
        "First the beginning of a clip that the model was not trained on, then what the model makes of it. Listen for the "
        "attack of the notes, the brightness, and a haze or hiss that was not there.",
        "All clips are made by a small synthesizer that comes with the project: you may do with them what you like.",
    ]
    close = [
        "SI-SDR compares the power of the sound with that of the error; the two distances compare spectra, as an ear does, "
        "and lower is better. All are means over the two clips, whole.",
        "Beside the model stand two ways to say a second of sound in few numbers without learning: a low-pass that keeps "
        f"the same {numbers:,} numbers, and the mean of each frame of {model.hop_length} samples. Music is loudest at the "
        "bottom of the spectrum, so keeping just that is hard to beat in SI-SDR; but the low-pass loses all that is above, "
        "and sounds dull: the spectral distances hear it, and so may you.",
    ]
    limited = Clip(f"{TITLES[name]}: low-pass, as many numbers", band_limit(audio, rate, numbers)[..., :length], rate)
    table = [("", "in words", "SI-SDR, higher is better", "log-spectral distance", "multi-resolution STFT distance"), *rows]
    return Section("Listen", heard, clips=clips), Section("How close is it?", close, clips=[limited], table=table)


def _frame_means(audio: Tensor, hop_length: int) -> Tensor:
    """The audio with each frame replaced by its mean."""
    means = F.avg_pool1d(F.pad(audio, (0, -audio.shape[-1] % hop_length)), hop_length)
    return means.repeat_interleave(hop_length, dim=-1)[..., : audio.shape[-1]]


def _in_words(sdr_db: float) -> str:
    if sdr_db < 0:
        return f"the error has {10 ** (-sdr_db / 10):.1f} times the power of the sound"
    return f"the error has 1/{10 ** (sdr_db / 10):.0f} of the power of the sound"


@torch.no_grad()
def _inventions(model: Any, name: str, audio: Tensor, out: Path) -> Section:
    """A recording with noise in its latent, and noise alone."""
    rate = model.sample_rate
    audio = audio[..., : round(CLIP_SECONDS * rate)]
    level = audio.abs().max()
    generator = torch.Generator().manual_seed(0)
    clips = {
        "variation": Clip(
            f"{TITLES[name]}: noise in the latent (variation 0.1)",
            level * model.vary(normalize(audio, "peak").unsqueeze(0), 0.1, generator)[0],
            rate,
        ),
        "noise": Clip("only noise in the latent", model.sample(1, round(5 * rate), generator=generator)[0], rate),
    }
    for name, clip in clips.items():
        write_audio(out / f"{name}.wav", clip.audio, rate)
    text = (
        "The latent, the numbers that the model makes of a sound, can be changed before it is decoded. A little noise in it "
        "is heard as the recording under a haze; noise alone gives texture, not music: an autoencoder learns what a latent "
        "means, and not which latents sound like music."
    )
    return Section("From noise", [text], clips=list(clips.values()))


@torch.no_grad()
def _streaming(model: Any, path: Path, file: Path, out: Path) -> Section:
    """The same weights as a stream: `reconstruct` over a file, and blocks of random lengths against the whole at once."""
    target = out / f"{file.stem}_streamed.wav"
    started = time.perf_counter()
    reconstruct([str(path), str(file), str(target)])
    took = time.perf_counter() - started
    streamed, rate = read_audio(target)
    audio = read_audio(file, rate)[0]
    speed = audio.shape[-1] / rate / took
    generator = torch.Generator().manual_seed(0)
    lengths, rest = [], min(audio.shape[-1], 4 * rate)
    part = audio[..., :rest]
    while rest:
        lengths.append(min(rest, int(torch.randint(1, 2000, (1,), generator=generator))))
        rest -= lengths[-1]
    blocks = torch.cat(list(stream_blocks(model, part.split(lengths, dim=-1))), dim=-1)
    whole = model(part.unsqueeze(0))[0]
    difference = ((blocks - whole).abs().max() / whole.abs().max()).item()
    table = [
        ("", ""),
        ("speed", f"{speed:.0f} times real time here, in blocks of one second, files read and written"),
        ("memory", "does not grow with the length of the recording"),
        (
            f"{len(lengths)} blocks of 1 to 2,000 samples against all at once",
            f"largest difference {difference:.0e} of the peak",
        ),
        ("delay", f"{1000 * (model.hop_length - 1) / rate:.2g} ms: a sample waits for the end of its frame"),
    ]
    text = (
        "The model was trained on whole clips at once. The same weights run as a stream, block after block, with a state "
        "carried along: the result is the same, whatever the blocks."
    )
    return Section(
        "The same weights, as a stream",
        [text],
        clips=[Clip(f"{TITLES[file.stem]}: streamed in blocks", streamed[..., : round(CLIP_SECONDS * rate)], rate)],
        table=table,
    )
