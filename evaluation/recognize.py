"""Has a classifier of its own say what generated words are, where it is known what they should be.

    python evaluation/recognize.py --train FOLDER --test FOLDER --generated FOLDER --json FILE

Folders hold a subfolder for each class, or files whose names hold the class between underscores, as those that `generate
--label` and `generators.py` write. The classifier, an S4D model on the log-mel frames of a second at 8 kHz, is trained on
--train alone, with clips that are moved, made louder or softer, and noisy; what it recognizes of --test stands beside what
it does of --generated.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from s4audio.audio import find_audio, normalize, read_audio
from s4audio.losses import log_mel, mel_magnitude
from s4audio.models import S4Model
from s4audio.tasks.optim import parameter_groups

RATE, WINDOW, BANDS = 8000, 256, 64
EPOCHS, BATCH, LR = 20, 64, 4e-3


def label_of(file: Path, folder: Path, classes: list[str]) -> int:
    """The class in a file's path.

    Raises:
        SystemExit: there is none.
    """
    inside = file.relative_to(folder)
    names = inside.parts[:1] if len(inside.parts) > 1 else file.stem.split("_")
    for name in names:
        if name in classes:
            return classes.index(name)
    raise SystemExit(f"{file} is of no class; known are {', '.join(classes)}.")


def read(folder: str, classes: list[str]) -> tuple[Tensor, Tensor]:
    """Clips (n, RATE) at a peak of 1, cut or filled to a second, and their classes (n,)."""
    files = find_audio(folder)
    clips = [normalize(read_audio(file, RATE, mono=True)[0], "peak")[0, :RATE] for file in files]
    labels = [label_of(file, Path(folder), classes) for file in files]
    return torch.stack([F.pad(clip, (0, RATE - len(clip))) for clip in clips]), torch.tensor(labels)


def features(audio: Tensor) -> Tensor:
    """(B, RATE) -> (B, BANDS, frames)"""
    return log_mel(mel_magnitude(audio, RATE, WINDOW, BANDS))


def altered(audio: Tensor) -> Tensor:
    """Each clip up to a tenth of a second earlier or later, softer by up to 12 dB, and with noise 20 to 60 dB below it."""
    moved = torch.stack(
        [clip.roll(int(shift)) for clip, shift in zip(audio, torch.randint(-800, 801, (len(audio),)), strict=True)]
    )
    noise = torch.randn_like(audio) * 10 ** -(1 + 2 * torch.rand(len(audio), 1))
    return (moved + 0.1 * noise) * 10 ** (-0.6 * torch.rand(len(audio), 1))


def train(audio: Tensor, labels: Tensor, num_classes: int) -> S4Model:
    """A classifier of clips."""
    model = S4Model(BANDS, num_classes, 96, 3, block="post_norm", dropout=0.1, bidirectional=True)
    frames = features(audio)
    model.set_moments(frames.mean((0, 2)), frames.std((0, 2)))
    optimizer = torch.optim.AdamW(parameter_groups(model, LR, 1e-3, 0.01))
    steps = EPOCHS * -(-len(audio) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [group["lr"] for group in optimizer.param_groups], steps)
    for epoch in range(EPOCHS):
        for places in torch.randperm(len(audio)).split(BATCH):
            loss = F.cross_entropy(model(features(altered(audio[places]))), labels[places], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1} of {EPOCHS}: loss {loss.item():.3f}", flush=True)
    return model.eval()


@torch.no_grad()
def accuracy(model: S4Model, audio: Tensor, labels: Tensor) -> dict[str, Any]:
    """Of clips, with its standard error, and by class."""
    right = torch.cat([model(features(part)).argmax(1) for part in audio.split(BATCH)]) == labels
    share = right.double().mean().item()
    by_class = [right[labels == k].double().mean().item() for k in range(model.num_classes)]
    return {
        "clips": len(right),
        "accuracy": share,
        "standard_error": (share * (1 - share) / len(right)) ** 0.5,
        "by_class": by_class,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True, help="folder with a subfolder of recordings for each class")
    parser.add_argument("--test", required=True, help="recordings that the generator did not hear")
    parser.add_argument("--generated", action="append", default=[], help="folder of generated clips; may be given again")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    classes = sorted(path.name for path in Path(args.train).iterdir() if path.is_dir())
    if len(classes) < 2:
        raise SystemExit(f"{args.train} has {len(classes)} subfolders; wanted one for each class.")
    clips = {folder: read(folder, classes) for folder in (args.test, *args.generated)}  # before minutes of training
    model = train(*read(args.train, classes), len(classes))
    found = {folder: accuracy(model, *of_folder) for folder, of_folder in clips.items()}
    for folder, figures in found.items():
        print(f"{folder}: {figures['accuracy']:.1%} ± {figures['standard_error']:.1%} of {figures['clips']} clips")
    if args.json:
        result = {"classes": classes, "seed": args.seed, "folders": found}
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
