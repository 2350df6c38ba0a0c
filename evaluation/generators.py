"""Scores generators side by side, from noise, against recordings that none of them heard; and writes a page to listen to.

    python evaluation/generators.py --train FOLDER --test FOLDER --judge RUN/best --out FOLDER --seconds 10 \\
        --model "VAE=RUN0/best" --model "flow=RUN1/best" --device cuda

Recordings are cut into clips of --seconds, side by side; one that is shorter is filled with silence at its end, as in
training. Every model makes as many clips of that length as there are test clips, or --clips, from seeds 0, 1, 2, …; one with
classes makes all of them in turn. All are scored at a peak of 1 by the encoder of the judge, which must be none of the
models, and by log_mel: FID, FID∞, KAD with their intervals, beside what the training clips score against the test clips;
density and coverage; and how many clips are as near to a training clip as only 1 % of the test clips are, beside how many
training clips are as near to one of another recording: artists and pieces that the tests do not have bring both up. Scores
hear a second at a time; `drift` says whether the seconds of a clip belong together.
Models that fill spans or go on with recordings do that with test clips too, to see whether the audio steps at the borders.

OUT gets a folder of WAV files for each model, scores.json, and report.html with the clips of seeds 0 to 3 of each. Clips
that the same weights and the same code made there before are not made again.
"""

import argparse
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from system4 import KEPT
from torch.nn import functional as F

import s4audio
from s4audio import checkpoint
from s4audio.audio import find_audio, normalize, read_audio, write_audio
from s4audio.metrics.embeddings import Embedding
from s4audio.metrics.evaluator import Folder
from s4audio.metrics.neighbours import nearest
from s4audio.report import Clip, Section, write_page

HEARD = 4  # clips of each model on the page
HEADING = ("model", "FID", "FID∞", "KAD", "train's KAD", "told apart", "density", "coverage", "near copies")


def cut(folder: str, out: Path, seconds: float, rate: int) -> int:
    """Writes the recordings of a folder as clips of one length, RECORDING_PART.wav; returns how many."""
    length, number = round(seconds * rate), 0
    _empty(out)
    for recording, file in enumerate(find_audio(folder)):
        audio = normalize(read_audio(file, rate)[0], "peak")
        audio = F.pad(audio, (0, max(0, length - audio.shape[-1])))
        for part, clip in enumerate(audio.split(length, dim=-1)):
            if clip.shape[-1] == length and clip.any():
                write_audio(out / f"{recording:05d}_{part:03d}.wav", clip, rate)
                number += 1
    return number


def _empty(folder: Path) -> None:
    """Removes clips of an earlier run, which would be scored with those of this one."""
    for file in folder.glob("[0-9][0-9][0-9][0-9][0-9]*.wav"):
        file.unlink()


class Listener(s4audio.Evaluator):
    """An evaluator that listens to each folder once, however many models it scores against it."""

    def __init__(self, embedding: str | Embedding, sample_rate: int) -> None:
        super().__init__(embedding, sample_rate=sample_rate)
        self.heard: dict[str, Folder] = {}

    def embed(self, embedding: Embedding, folder: str | Path, files: Sequence[Path], rate: int) -> Folder:
        if str(folder) not in self.heard:
            self.heard[str(folder)] = super().embed(embedding, folder, files, rate)
        return self.heard[str(folder)]


def code_of_models() -> str:
    """SHA-256 of the code that makes clips."""
    package = Path(s4audio.__file__).parent
    files = sorted(file for part in ("layers", "models", "ssm") for file in (package / part).glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


@torch.no_grad()
def make(path: str, out: Path, number: int, seconds: float, device: str, batch_size: int) -> float:
    """Writes clips that a model makes of noise; returns how long one took, in seconds."""
    note, weights = out / "made.json", checkpoint.fingerprint(path)
    by = {
        "sha256": weights, "code": code_of_models(), "clips": number, "seconds": seconds, "device": device,
        "batch_size": batch_size,
    }  # fmt: skip
    if note.exists() and by.items() <= (before := json.loads(note.read_text())).items():
        return before["seconds_a_clip"]
    _empty(out)
    model: Any = s4audio.load(path, device)
    classes, length, took = len(getattr(model, "classes", ())), round(seconds * model.sample_rate), 0.0
    for first in range(0, number, batch_size):
        seeds = range(first, min(number, first + batch_size))
        label = torch.tensor([seed % classes for seed in seeds], device=device) if classes else None
        start = time.perf_counter()
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        clips = model.sample(len(seeds), length, label=label, generator=generators).cpu()
        took += time.perf_counter() - start
        for seed, clip in zip(seeds, clips, strict=True):
            name = f"{seed:05d}_{model.classes[seed % classes]}" if classes else f"{seed:05d}"
            write_audio(out / f"{name}.wav", clip, model.sample_rate)
    note.write_text(json.dumps({**by, "seconds_a_clip": took / number}))
    return took / number


@torch.no_grad()
def seams(path: str, test: Path, device: str, many: int = 16) -> dict[str, float]:
    """Of spans made anew in test clips and of continuations, if the model makes them: the share of borders at which the
    audio steps further than anywhere else in its clip, and how far the furthest steps, against the furthest elsewhere."""
    model: Any = s4audio.load(path, device)
    found: dict[str, float] = {}
    clips = torch.stack([read_audio(file)[0] for file in find_audio(test)[:many]]).to(device)
    length = clips.shape[-1]
    third, generators = length // 3, [torch.Generator().manual_seed(seed) for seed in range(len(clips))]
    made: dict[str, tuple[torch.Tensor, tuple[int, ...]]] = {}
    if hasattr(model, "inpaint"):
        made["inpaint"] = (model.inpaint(clips, third, 2 * third, generators), (third, 2 * third))
    if hasattr(model, "continue_"):
        more = model.continue_(clips[..., :third], length - third, generator=generators)
        made["continue"] = (torch.cat([clips[..., :third], more], dim=-1), (third,))
    for name, (audio, borders) in made.items():
        steps = audio.diff(dim=-1).abs()[:, 0]
        at = [border - 1 for border in borders]
        elsewhere = steps.clone()
        elsewhere[:, at] = 0
        largest = elsewhere.amax(-1, keepdim=True)
        found[f"{name}_share_of_borders_beyond"] = (steps[:, at] > largest).float().mean().item()
        found[f"{name}_largest_step_against_elsewhere"] = (steps[:, at] / largest).max().item()
    return found


def score(evaluator: Listener, made: Path, test: Path, train: Path) -> dict[str, Any]:
    """The scores that are kept of a folder of clips."""
    found = evaluator.evaluate(made, test, train)
    assert found.to_train is not None and found.reference_to_train is not None  # for mypy; there is a training folder
    limit = float(np.quantile(found.reference_to_train.distance.numpy(), 0.01))
    return {
        **{key: found.scores[key] for key in KEPT},
        "train_against_test": {key: found.scores["train_against_reference"][key] for key in KEPT},
        "distance_to_train_of_the_nearest_1_percent_of_test": limit,
        "share_nearer_to_train_than_1_percent_of_test": float((found.to_train.distance.numpy() < limit).mean()),
        "memorization": found.scores["memorization"],
        "defects": found.scores["defects"]["generated"],
    }


def share_alike(clips: Folder, limit: float) -> float:
    """The share of clips, named as by `cut`, that are nearer than `limit` to one of another recording in their folder."""
    recordings = [clip.name.partition("_")[0] for clip in clips.clips]
    near = 0
    for recording in set(recordings):
        own, others = (
            [clip for clip, its in zip(clips.windows(), recordings, strict=True) if (its == recording) == wanted]
            for wanted in (True, False)
        )
        near += int((nearest(own, others).distance < limit).sum())
    return near / len(recordings)


def drift(clips: Folder, scale: torch.Tensor) -> float | None:
    """How unlike its beginning a clip ends, against the end of a clip of another recording: the mean distances of the first
    third of its windows to the last. 1 if the two have nothing in common, which no score of single seconds can hear; None of
    clips of one window.

    Args:
        clips: named as by `cut`, or by `make`; those of one recording are not compared.
        scale: (d,) what the windows are divided by.
    """
    third = [max(1, len(clip.windows) // 3) for clip in clips.clips]
    if any(len(clip.windows) < 2 for clip in clips.clips):
        return None
    first, last = (
        torch.stack([end(clip.windows, many).mean(0) / scale for clip, many in zip(clips.clips, third, strict=True)])
        for end in (lambda windows, many: windows[:many], lambda windows, many: windows[-many:])
    )
    recordings = [clip.name.partition("_")[0] for clip in clips.clips]
    other = torch.tensor([[one != another for another in recordings] for one in recordings])
    distance = torch.cdist(first, last, compute_mode="donot_use_mm_for_euclid_dist")
    return (distance.diagonal().mean() / distance[other].mean()).item() if other.any() else None


def table_row(name: str, scores: dict[str, Any]) -> tuple[str, ...]:
    """The row of one model under HEADING; intervals in brackets."""

    def with_interval(key: str) -> str:
        if scores[key] is None:
            return "-"
        low, high = scores[f"{key}_interval"]
        return f"{scores[key]:.2f} ({low:.2f} to {high:.2f})"

    at_n, apart = scores["at_equal_n"] or {}, scores["verdict"]["distinguishable"]
    return (
        name, *map(with_interval, ("fid", "fid_infinity", "kad")), f"{scores['train_against_test']['kad']:.2f}",
        "-" if apart is None else "yes" if apart else "no",
        *(f"{at_n[key]:.2f}" if at_n.get(key) is not None else "-" for key in ("density", "coverage")),
        f"{scores['share_nearer_to_train_than_1_percent_of_test']:.1%}",
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True, help="folder of the recordings that the models learned")
    parser.add_argument("--test", required=True, help="folder of recordings that they did not")
    parser.add_argument("--judge", required=True, help="model whose encoder judges; none of those that are judged")
    parser.add_argument("--model", action="append", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--out", required=True, type=Path, help="folder for the clips, the scores and the page")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of a clip (default 10)")
    parser.add_argument("--clips", type=int, help="of each model (default: as many as test clips)")
    parser.add_argument("--batch_size", type=int, default=16, help="clips at a time (default 16)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    args = parser.parse_args()
    models = {name: folder for name, _, folder in (model.partition("=") for model in args.model)}
    judge = checkpoint.fingerprint(args.judge)
    for name, folder in models.items():
        if judge == checkpoint.fingerprint(folder):
            raise SystemExit(f"the judge is {name} itself; train another with a seed of its own.")
    for folder in (args.train, args.test):
        if Path(folder).resolve().is_relative_to(args.out.resolve()):
            raise SystemExit(
                f"{folder} lies in --out {args.out}, where clips of an earlier run are removed; choose another."
            )
    loaded: Any = s4audio.load(args.judge)
    rate, real = loaded.sample_rate, {split: args.out / split for split in ("train", "test")}
    number = {split: cut(getattr(args, split), folder, args.seconds, rate) for split, folder in real.items()}
    rows: list[dict[str, Any]] = []
    for name, folder in models.items():
        of_model: Any = s4audio.load(folder)
        if of_model.sample_rate != rate:
            raise SystemExit(f"{name} makes audio at {of_model.sample_rate} Hz, and the judge hears {rate} Hz.")
        out, many = args.out / name, args.clips or number["test"]
        seconds = make(folder, out, many, args.seconds, args.device, args.batch_size)
        parameters = sum(parameter.numel() for parameter in of_model.parameters())
        print(f"{name}: {many} clips of {args.seconds:g} s, {seconds:.2f} s each", flush=True)
        rows.append({"model": name, "parameters": parameters, "clips": many, "seconds_a_clip": seconds})
        rows[-1] |= {"seams": seams(folder, real["test"], args.device)}
        rows[-1] |= {"sha256": checkpoint.fingerprint(folder), "training": checkpoint.read_config(folder)["training"]}
    tables: dict[str, list[tuple[str, ...]]] = {"the trained encoder": [HEADING], "log_mel": [HEADING]}
    alike, drifts = {}, {}
    for by, which in zip(tables, (args.judge, "log_mel"), strict=True):
        ears = which if which == "log_mel" else checkpoint.load_embedding(which, args.device)
        evaluator = Listener(ears, sample_rate=rate)
        for row in rows:
            row[by.replace(" ", "_")] = scores = score(evaluator, args.out / row["model"], real["test"], real["train"])
            tables[by].append(table_row(row["model"], scores))
            print(f"by {by}:", *tables[by][-1], sep="  ", flush=True)
        limit = scores["distance_to_train_of_the_nearest_1_percent_of_test"]
        heard = evaluator.heard
        scale = torch.cat(heard[str(real["test"])].windows()).std(0).clamp_min(1e-6)
        for row in rows:
            row[by.replace(" ", "_")]["drift"] = drift(heard[str(args.out / row["model"])], scale)
        drifts[by.replace(" ", "_")] = {split: drift(heard[str(folder)], scale) for split, folder in real.items()}
        of_each = {row["model"]: row[by.replace(" ", "_")]["drift"] for row in rows}
        print(f"by {by}: drift", *(f"{name} {value:.2f}" for name, value in of_each.items() if value is not None), sep="  ")
        alike[by.replace(" ", "_")] = share_alike(evaluator.heard[str(real["train"])], limit)
        print(
            f"by {by}: {alike[by.replace(' ', '_')]:.1%} of the training clips are as near to another recording", flush=True
        )
    about = {
        "seconds": args.seconds, "train_clips": number["train"], "test_clips": number["test"], "judge": judge,
        "train_clips_as_near_to_another_recording": alike, "drift": drifts,
    }  # fmt: skip
    (args.out / "scores.json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")

    def heard(folder: Path) -> list[Clip]:
        return [Clip(file.stem, *read_audio(file)) for file in find_audio(folder)[:HEARD]]

    sections = [Section(f"Scores by {by}", table=table) for by, table in tables.items()]
    sections += [Section(name, [f"Seeds 0 to {HEARD - 1}, not chosen by ear."], heard(args.out / name)) for name in models]
    lead = f"Clips of {args.seconds:g} s from noise, against {number['test']} clips that no model heard."
    write_page(args.out / "report.html", "Generators", lead, [*sections, Section("Recordings", clips=heard(real["test"]))])


if __name__ == "__main__":
    main()
