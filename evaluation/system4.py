"""Scores generators as reference system 4 was scored: Fréchet distances by a trained encoder, on training and test clips.

    python evaluation/system4.py --train FOLDER --test FOLDER --judge RUN/best --json FILE \\
        --model "VAE=RUN0/best,RUN1/best,RUN2/best" --model "S4D autoencoder=RUN3/best,RUN4/best,RUN5/best"

`side_by_side.py` trains them. Each --model is a name and its training seeds. Every seed reconstructs the clips of each
split, and makes as many clips of the same length from noise; both are scored against the split, by the encoder of the judge
and by log_mel. The judge must be none of the models. Reconstructions are compared as pairs: KAD and the floor never set a
clip against its own reconstruction; FID does, as the original did. What is written: FID, FID∞, KAD, their intervals and
floors for each seed, and the mean and standard deviation over seeds. The original scored at most 20 batches of each split;
here a split is one batch of all its clips.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

import s4audio
from s4audio import checkpoint
from s4audio.audio import find_audio, normalize, read_audio, write_audio
from s4audio.cli.evaluate import embedding
from s4audio.metrics.comparison import compare
from s4audio.report import clips_figure, save_figure

KEPT = (
    "fid",
    "fid_interval",
    "fid_infinity",
    "fid_infinity_interval",
    "kad",
    "kad_interval",
    "verdict",
    "at_equal_n",
    "floor",
)
SUMMED = ("fid", "fid_infinity", "kad")
SOURCES = ("samples", "noise")


@torch.no_grad()
def generate(path: str, source: str, folder: str, out: Path, seed: int) -> None:
    """Writes a reconstruction of each clip in a folder, or as many clips of the same lengths from noise, at a peak of 1."""
    model: Any = s4audio.load(path)
    for number, file in enumerate(find_audio(folder)):
        audio = normalize(read_audio(file, model.sample_rate)[0], "peak")
        if source == "samples":
            made = model(audio.unsqueeze(0))[0]
        else:
            made = model.sample(1, audio.shape[-1], generator=torch.Generator().manual_seed(1000 * seed + number))[0]
        write_audio(out / f"{file.stem}.wav", normalize(made, "peak"), model.sample_rate)


@torch.no_grad()
def draw(models: dict[str, list[str]], test: str, path: str) -> None:
    """Six seconds of a test clip, and of what the first seed of each model makes of noise."""
    clips = {}
    for name, paths in models.items():
        model: Any = s4audio.load(paths[0])
        length = 6 * model.sample_rate
        made = model.sample(1, length, generator=torch.Generator().manual_seed(0))[0]
        clips[f"{name}, from noise"] = normalize(made, "peak")
    audio = read_audio(find_audio(test)[3], model.sample_rate)[0][..., :length]
    save_figure(path, clips_figure({"a recording": normalize(audio, "peak"), **clips}, model.sample_rate))


def summary(seeds: list[dict[str, Any]]) -> dict[str, float | None]:
    """Mean and standard deviation over seeds."""
    found: dict[str, float | None] = {}
    for key in SUMMED:
        values = [seed[key] for seed in seeds]
        known = None not in values
        found[key] = float(np.mean(values)) if known else None
        found[f"{key}_std"] = float(np.std(values, ddof=1)) if known and len(values) > 1 else None
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True, help="folder of the clips that the models learned")
    parser.add_argument("--test", required=True, help="folder of clips that they did not")
    parser.add_argument("--judge", required=True, help="model whose encoder judges; none of those that are judged")
    parser.add_argument("--model", action="append", required=True, metavar="NAME=FOLDER,FOLDER,…")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--json", help="file for the scores")
    parser.add_argument("--picture", help="draw what each model makes of noise (PNG)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    models = {name: folders.split(",") for name, _, folders in (model.partition("=") for model in args.model)}
    judge = checkpoint.fingerprint(args.judge)
    for name, paths in models.items():
        if judge in [checkpoint.fingerprint(path) for path in paths]:
            raise SystemExit(f"the judge is one of the seeds of {name}; train another with a seed of its own.")
    if args.picture:
        draw(models, args.test, args.picture)
    if not args.json:
        return
    rate = s4audio.load(args.judge).sample_rate
    splits = {"train": args.train, "test": args.test}
    rows, floors = [], []
    for which in (args.judge, "log_mel"):
        evaluator = s4audio.Evaluator(embedding(which), sample_rate=rate)
        listen = evaluator.embedding_at(rate)
        real = {split: evaluator.embed(listen, folder, find_audio(folder), rate) for split, folder in splits.items()}
        against_test = compare(real["train"].windows(), real["test"].windows()).scores
        bound = {key: against_test[key] for key in KEPT}
        floors.append(
            {"embedding": listen.name, **{split: of.describe() for split, of in real.items()}, "train_as_test": bound}
        )
        for name, paths in models.items():
            for source in SOURCES:
                for split, folder in splits.items():
                    seeds = []
                    for seed, path in enumerate(paths):
                        with tempfile.TemporaryDirectory() as out:
                            generate(path, source, folder, Path(out), seed)
                            made = evaluator.embed(listen, out, find_audio(out), rate)
                        of_name = {Path(clip.name).stem: clip.windows for clip in made.clips}
                        aligned = [of_name[Path(clip.name).stem] for clip in real[split].clips]
                        scores = compare(aligned, real[split].windows(), paired=source == "samples").scores
                        seeds.append({"sha256": checkpoint.fingerprint(path), **{key: scores[key] for key in KEPT}})
                    model: Any = s4audio.load(paths[0])
                    row = {
                        "model": name,
                        "from": source,
                        "split": split,
                        "embedding": "log_mel" if which == "log_mel" else "judge",
                        "latent_numbers_a_second": round(model.latent_channels * rate / model.hop_length),
                        "parameters": sum(p.numel() for p in model.parameters()),
                        **summary(seeds),
                        "seeds": seeds,
                    }
                    rows.append(row)
                    print(
                        f"{name}, from {source}, {split}, by {row['embedding']}: FID {row['fid']:.2f}, KAD {row['kad']:.2f}",
                        flush=True,
                    )
    details = dict(getattr(embedding(args.judge), "details", {}))
    result = {
        "judge": {"class": details["class"], "sha256": judge, "training_data": details["training_data"]},
        "references": floors,
        "rows": rows,
    }
    Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
