"""Times whole training steps: forward, backward, AdamW.

    python evaluation/bench/train_step.py
    python evaluation/bench/train_step.py --device cuda --json FILE

On the CPU: system 4 on clips of 30 s at 3,000 Hz, as seconds of audio trained per second. On a GPU also classifiers of 1,024
pixels and the 16 kHz autoencoder, each by the plain engine and by the fused one, eagerly, and the fused one once more as a
CUDA graph of the whole step, with the model under torch.compile and without. Medians after warming up. `--losses` shows that
the loss curve in bfloat16 is that of float32.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import s4audio
from s4audio.models.classifier import S4Model
from s4audio.tasks import parameter_groups

SECONDS, SAMPLE_RATE = 30, 3000


class Case(NamedTuple):
    """A model, its batch and its loss."""

    name: str
    model: Callable[[], nn.Module]
    batch: tuple[int, ...]
    bfloat16: bool
    seconds: float  # of audio in a batch; 0 for images


def classifier(d_model: int, num_layers: int, **options: Any) -> Callable[[], nn.Module]:
    """A classifier of ten kinds of images, pixel by pixel."""
    return lambda: S4Model(3, 10, d_model, num_layers, **options)


def autoencoder_16k() -> nn.Module:
    """The model of recipes/autoencoder_16k.yaml."""
    return s4audio.CausalAutoencoder(
        16000, strides=(16,), widths=(32, 128), latent_channels=8, num_blocks=(0, 4), d_state=32, losses=("l1", "stft")
    )


def system4() -> nn.Module:
    """Reference system 4."""
    return s4audio.S4DAutoencoder(SAMPLE_RATE)


BOTH_WAYS = {"layer": "S4", "discretization": "bilinear", "bidirectional": True, "dropout": 0.1}
CASES = [
    Case("S4D 128 x 4", classifier(128, 4, dropout=0.1), (64, 3, 1024), False, 0),
    Case("S4D 128 x 4", classifier(128, 4, dropout=0.1), (64, 3, 1024), True, 0),
    Case("S4D 512 x 6", classifier(512, 6, dropout=0.1), (50, 3, 1024), True, 0),
    Case("S4 512 x 6, both ways", classifier(512, 6, **BOTH_WAYS), (50, 3, 1024), True, 0),
    Case("system 4", system4, (8, 1, SECONDS * SAMPLE_RATE), False, 8 * SECONDS),
    Case("autoencoder_16k", autoencoder_16k, (32, 1, 32000), False, 64),
]


def draw_tones(batch: Tensor, labels: Tensor, generator: torch.Generator) -> None:
    """Fills a batch (B, C, L) with something to learn: ten kinds of sines in noise of four times their power."""
    kinds = torch.randint(10, labels.shape, generator=generator)
    turns = 4.0 * (kinds + 1) * torch.linspace(0, 1, batch.shape[-1]).unsqueeze(-1)  # (L, B)
    phase = 2 * torch.pi * torch.rand(labels.shape, generator=generator)
    sine = torch.sin(2 * torch.pi * turns + phase).T.unsqueeze(1)
    batch.copy_(sine + 2**0.5 * torch.randn(batch.shape, generator=generator))
    labels.copy_(kinds)


def make_step(case: Case, device: str, compiled: bool = False, learns: bool = False) -> Callable[[], Tensor]:
    """One training step, as a function that returns the loss: on random data with dropout, or on tones anew and without."""
    torch.manual_seed(0)
    model = case.model().to(device).train(not learns)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, lr=1e-3, ssm_lr=1e-3, weight_decay=0.0), fused=device == "cuda", capturable=device == "cuda"
    )
    batch = (torch.randn(case.batch) if case.seconds == 0 else 0.1 * torch.randn(case.batch)).to(device)
    labels = torch.randint(10, case.batch[:1]).to(device)

    def loss() -> Tensor:
        if case.seconds == 0:
            return F.cross_entropy(model(batch), labels)
        return torch.stack(list(model.training_losses(batch).values())).sum()

    function = torch.compile(loss) if compiled else loss

    generator = torch.Generator().manual_seed(0)

    def step() -> Tensor:
        if learns:
            draw_tones(batch, labels, generator)
        optimizer.zero_grad()
        with torch.autocast(device, dtype=torch.bfloat16, enabled=case.bfloat16):
            value = function()
        value.backward()
        optimizer.step()
        return value.detach()

    return step


def graph_of(step: Callable[[], Tensor]) -> Callable[[], object]:
    """The step as a CUDA graph: one launch instead of thousands."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def seconds_per_step(step: Callable[[], object], repeats: int) -> float:
    """Median seconds of one training step."""
    done = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None

    def once() -> float:
        start = time.perf_counter()
        step()
        done()
        return time.perf_counter() - start

    for _ in range(3):
        once()
    return statistics.median(once() for _ in range(repeats))


def on_cuda(cases: list[Case], repeats: int) -> Iterator[dict[str, Any]]:
    """Every case, in milliseconds."""
    for case in cases:
        row: dict[str, Any] = {"name": case.name, "batch": case.batch, "dtype": "bfloat16" if case.bfloat16 else "float32"}
        with s4audio.backend("chunk"):
            row["plain_ms"] = 1e3 * seconds_per_step(make_step(case, "cuda"), max(3, repeats // 4))
        row["fused_ms"] = 1e3 * seconds_per_step(make_step(case, "cuda"), repeats)
        try:
            row["graph_ms"] = 1e3 * seconds_per_step(graph_of(make_step(case, "cuda")), repeats)
            row["compiled_graph_ms"] = 1e3 * seconds_per_step(graph_of(make_step(case, "cuda", compiled=True)), repeats)
        except RuntimeError as error:  # an operation that a graph cannot hold
            row["graph_error"] = str(error).splitlines()[0]
            torch.cuda.synchronize()
        if case.seconds:
            for key in [key.removesuffix("_ms") for key in row if key.endswith("_ms")]:
                row[f"{key}_real_time"] = case.seconds / row[f"{key}_ms"] * 1e3
        print(", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
        yield row


def loss_curves(num_steps: int, device: str) -> dict[str, dict[str, list[float]]]:
    """The losses of each classifier in both precisions, by the fused engine and by the plain one: on the same batches, and
    without dropout, which every implementation would draw anew."""
    curves: dict[str, dict[str, list[float]]] = {}
    paths = (("plain", "chunk", False), ("fused", "auto", False), ("fused, bfloat16", "auto", True))
    for case in CASES[1:4]:
        of_case = curves.setdefault(case.name, {})
        for name, backend, bfloat16 in paths:
            with s4audio.backend(backend):
                step = make_step(case._replace(bfloat16=bfloat16), device, learns=True)
                of_case[name] = [float(step()) for _ in range(num_steps)]
            print(case.name, name, *(f"{value:.4f}" for value in of_case[name][:: max(1, num_steps // 10)]), flush=True)
    return curves


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--cases", type=int, nargs="*", default=range(len(CASES)), help="numbers, on a GPU (default: all)")
    parser.add_argument("--losses", type=int, default=0, metavar="STEPS", help="also this many losses in either precision")
    parser.add_argument("--json", help="also write the figures to this file")
    args = parser.parse_args()
    result: dict[str, Any] = {}

    def keep() -> None:
        if args.json:
            Path(args.json).write_text(json.dumps(result, indent=1) + "\n")

    if args.device == "cuda":
        result |= {"machine": f"{torch.cuda.get_device_name()}, torch {torch.__version__}", "rows": []}
        for row in on_cuda([CASES[index] for index in args.cases], args.repeats):
            result["rows"].append(row)
            keep()  # a machine may be lent for less time than this takes
    else:
        print(f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}")
        for batch_size in (1, 8):
            case = Case("system 4", system4, (batch_size, 1, SECONDS * SAMPLE_RATE), False, batch_size * SECONDS)
            seconds = seconds_per_step(make_step(case, "cpu"), args.repeats)
            speed = case.seconds / seconds
            print(f"system 4, batch {batch_size}: {seconds * 1e3:.1f} ms a step, {speed:,.0f} times real time")
    if args.losses:
        result["losses"] = loss_curves(args.losses, args.device)
    keep()


if __name__ == "__main__":
    main()
