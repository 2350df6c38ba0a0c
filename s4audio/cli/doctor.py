"""`s4audio doctor`: what this machine can do, and what is missing."""

import importlib.metadata
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from s4audio import __version__, ssm
from s4audio.audio import decoders, mel_filterbank, read_audio, resample, write_audio
from s4audio.cli.arguments import Parser
from s4audio.layers import S4, S4D
from s4audio.models import CausalAutoencoder, stream_blocks

Finding = tuple[str, str]  # "ok", "note" or "FAIL", and a sentence
FREE_GIB = 2.0


def doctor(arguments: list[str]) -> int:
    """Prints one line a check; 1 if something that s4audio needs does not work."""
    Parser(prog="s4audio doctor", description="Check this installation, and say what is missing.").parse_args(arguments)
    failures = 0
    for check in (_python, _torch, _accelerator, _torchaudio, _audio_files, _disk, _engine, _streaming):
        for verdict, sentence in _findings(check):
            print(f"{verdict:>5}  {sentence}", flush=True)
            failures += verdict == "FAIL"
    print("\neverything that s4audio needs works." if failures == 0 else f"\n{failures} of the checks failed; see above.")
    return 1 if failures else 0


def _findings(check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    try:
        yield from check()
    except Exception as error:  # whatever is broken here is what the reader wants to know
        yield (
            "FAIL",
            f"{check.__name__.strip('_').replace('_', ' ')}: {type(error).__name__}: {' '.join(str(error).split())}",
        )


def _python() -> Iterator[Finding]:
    good = sys.version_info >= (3, 11)
    wanted = "" if good else "; s4audio needs 3.11 or newer"
    yield "ok" if good else "FAIL", f"Python {platform.python_version()} on {platform.platform()}{wanted}"
    yield "ok", f"s4audio {__version__} in {Path(__file__).parents[1]}"


def _torch() -> Iterator[Finding]:
    yield "ok", f"torch {torch.__version__}, {torch.get_num_threads()} threads"
    if torch.get_num_threads() > 1:
        yield "note", "on a machine that does other things too, OMP_NUM_THREADS=1 is often the faster choice"


def _accelerator() -> Iterator[Finding]:
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        yield (
            "ok",
            f"CUDA {torch.version.cuda}: {torch.cuda.get_device_name(0)}, {memory:.0f} GiB; training uses it by itself",
        )
        return
    reason = "this torch is built without CUDA" if torch.version.cuda is None else "torch finds no CUDA device"
    yield "note", f"no GPU: {reason}; everything runs on the CPU"
    if torch.backends.mps.is_available():
        yield "note", "Apple's GPU is not used: it has no 64-bit numbers, which the layers are made with"


def _torchaudio() -> Iterator[Finding]:
    try:
        mel_filterbank(16000, 512, 40)
    except RuntimeError as error:
        yield "note", f"mel distances are not available: {error}"
    else:
        yield "ok", f"torchaudio {importlib.metadata.version('torchaudio')}, for mel distances"


def _audio_files() -> Iterator[Finding]:
    tone = 0.5 * torch.sin(torch.arange(4410) * 0.05).unsqueeze(0)
    library, formats = decoders()
    with tempfile.TemporaryDirectory() as folder:
        for name in ("a.wav", "a.flac"):
            write_audio(Path(folder) / name, tone, 44100)
            error = (read_audio(Path(folder) / name)[0] - tone).abs().max().item()
            if error > 1e-4:
                yield "FAIL", f"{name[2:].upper()} files come back with an error of {error:.1e}"
    if resample(tone, 44100, 22050).shape[-1] != 2205:
        yield "FAIL", "soxr does not resample"
    yield "ok", f"{library} reads {', '.join(formats)}"
    if "MP3" not in formats:
        yield "note", "this libsndfile cannot read MP3; 1.1 or newer does"
    if "M4A" not in formats:
        yield "note", "M4A files cannot be read without ffmpeg; install it, or convert them to WAV or FLAC"


def _disk() -> Iterator[Finding]:
    for name, folder, needed in (("this folder", Path.cwd(), False), ("temporary files", Path(tempfile.gettempdir()), True)):
        try:
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            yield "FAIL" if needed else "note", f"{name} ({folder}) cannot be written: {error.strerror}"
            continue
        free = shutil.disk_usage(folder).free / 2**30
        enough = free >= FREE_GIB
        advice = "" if enough else f"; a training run may want {FREE_GIB:.0f} GiB"
        yield "ok" if enough else "note", f"{free:.1f} GiB free for {name} ({folder}){advice}"


def _engine() -> Iterator[Finding]:
    """The engine against the definition, in the precision and on the device that training uses; its gradient in float64."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(1, 4, 1500, generator=generator)
    for layer in (S4D(4, 32), S4(4, 32)):
        with ssm.backend("reference"), torch.no_grad():
            wanted = layer.double()(u.double())
        with ssm.backend("chunk"):
            wanted_gradient = _gradient(layer, u.double())
        layer, on_device = layer.float().to(device), u.to(device)
        with torch.no_grad():
            error = _error(layer(on_device), wanted)
            refusal = ssm.ops.fused_refusal(layer.system(), on_device)
        gradient_error = _error(_gradient(layer, on_device), wanted_gradient)
        verdict = "ok" if max(error, gradient_error) < 1e-4 else "FAIL"
        engine = "the fused engine" if device == "cuda" and refusal is None else "the engine"
        found = f"is within {error:.0e} of the recurrence, its gradient within {gradient_error:.0e}"
        yield verdict, f"{type(layer).__name__}: {engine} on {device} {found}"
        if refusal and device == "cuda":
            yield "note", f"{type(layer).__name__} runs in plain PyTorch on this GPU, and slower: {refusal}"
    long = torch.randn(1, 64, 16000, generator=generator).to(device)
    layer = S4D(64, 64).to(device)
    with torch.no_grad():
        layer(long)
        start = time.perf_counter()
        layer(long).sum().item()
    yield "ok", f"64 channels by 16,000 samples take {1000 * (time.perf_counter() - start):.0f} ms on {device}"


def _gradient(layer: S4D, u: Tensor) -> Tensor:
    u = u.detach().requires_grad_()
    return torch.autograd.grad(layer(u).square().mean(), u)[0]


def _error(got: Tensor, wanted: Tensor) -> float:
    got = got.detach().cpu().double()
    return ((got - wanted).abs().max() / wanted.abs().max()).item()


@torch.no_grad()
def _streaming() -> Iterator[Finding]:
    model = CausalAutoencoder(16_000, strides=(8,), widths=(8, 16), latent_channels=4, d_state=8)
    audio = 0.1 * torch.randn(1, 1, 4000, generator=torch.Generator().manual_seed(0))
    blocks = torch.cat(list(stream_blocks(model, audio[0].split(800, dim=-1))), dim=-1)
    whole = model(audio)[0]
    error = ((blocks - whole).abs().max() / whole.abs().max()).item()
    yield "ok" if error < 1e-4 else "FAIL", f"an autoencoder in blocks is within {error:.0e} of the whole at once"
