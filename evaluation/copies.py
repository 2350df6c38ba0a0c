"""Whether generated clips are copies of training clips, sample for sample.

    python evaluation/copies.py FOLDER [--seconds 1] [--device cuda] --json FILE

FOLDER is one that `evaluation/generators.py` wrote: training clips, test clips, and those of each model. Every second of a
clip, half a second apart, is laid on every place of every training clip: how high does their correlation become? The same
second, louder or softer, has 1, and no embedding has a say. Two tones of one pitch come close, too: the test clips, which
are no copies, show how close. Seconds far below the usual loudness are left out.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from s4audio.audio import find_audio, read_audio

QUIET = 0.1  # of the median norm of a second in the training clips: below, a second is left out
AT_ONCE = 64  # training clips


def likest(clips: Tensor, train: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Of every clip, (B,) each: the highest magnitude of a correlation with a training clip, and which that is.

    Args:
        clips: (B, T), T at least `length`.
        train: (N, L), L at least `length`.
        length: samples that are correlated.
    """
    size = 2 ** (train.shape[-1] - 1).bit_length()  # what wraps around are places where a window sticks out: left out
    norms = _norms(train, length)
    floor = QUIET * norms.median()
    windows = clips.unfold(-1, length, max(1, length // 2))
    loud = windows.norm(dim=-1, keepdim=True) > floor
    windows = torch.where(loud, F.normalize(windows, dim=-1), 0)
    values, places = torch.zeros(len(clips)), torch.zeros(len(clips), dtype=torch.int64)
    for first in range(0, len(train), AT_ONCE):
        spectrum = torch.fft.rfft(train[first : first + AT_ONCE], size)
        scale = norms[first : first + AT_ONCE].clamp_min(floor)
        for index, of_clip in enumerate(windows):
            for window in torch.fft.rfft(of_clip, size).conj():
                found = torch.fft.irfft(spectrum * window, size)[:, : scale.shape[-1]] / scale
                value, place = found.abs().amax(-1).max(0)
                if value > values[index]:
                    values[index], places[index] = value, first + place
            done = min(first + AT_ONCE, len(train))
            print(f"\r{done:,} of {len(train):,} training clips, {index + 1:,} of {len(clips):,} ", end="", file=sys.stderr)
    return values, places


def _norms(audio: Tensor, length: int) -> Tensor:
    """(N, L - length + 1) of what begins at each sample of (N, L)."""
    sums = F.pad(audio.double().square().cumsum(-1), (1, 0))
    return (sums[:, length:] - sums[:, :-length]).clamp_min(0).sqrt().float()


def read(folder: Path, device: str) -> tuple[Tensor, list[str], int]:
    """The clips (N, L), their names, and their rate in Hz."""
    files = find_audio(folder)
    clips = [read_audio(file)[0][0] for file in files]
    return pad_sequence(clips, batch_first=True).to(device), [file.name for file in files], read_audio(files[0])[1]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with the folders train and test, and one for each model")
    parser.add_argument("--seconds", type=float, default=1.0, help="that are compared at a time (default 1)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args()
    for name in ("train", "test"):
        if not (args.folder / name).is_dir():
            raise SystemExit(f"{args.folder} has no folder {name}; give one that evaluation/generators.py wrote.")
    train, names, rate = read(args.folder / "train", args.device)
    length = round(args.seconds * rate)
    if not 0 < length <= train.shape[-1]:
        raise SystemExit(
            f"--seconds is {args.seconds}; wanted more than 0, and at most the {train.shape[-1] / rate:g} s of a clip."
        )
    rows: list[dict[str, Any]] = []
    for folder in sorted(
        (f for f in args.folder.iterdir() if f.is_dir() and f.name != "train"), key=lambda f: f.name != "test"
    ):
        clips, files, _ = read(folder, args.device)
        values, places = likest(clips, train, length)
        most = int(values.argmax())
        row = {
            "clips": folder.name,
            "number": len(clips),
            "median": values.median().item(),
            "highest_tenth": values.quantile(0.9).item(),
            "highest": values[most].item(),
            "file": files[most],
            "training_clip": names[places[most]],
        }
        rows.append(row)
        print(
            f"\r{folder.name}: median {row['median']:.2f}, highest tenth from {row['highest_tenth']:.2f}, "
            f"highest {row['highest']:.2f}, of {row['file']} with training clip {row['training_clip']}"
        )
    if args.json:
        result = {"seconds": args.seconds, "training_clips": len(train), "rows": rows}
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
