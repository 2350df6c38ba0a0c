"""`s4audio evaluate`: how close generated audio comes to recordings, and how sure that is."""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from s4audio import checkpoint
from s4audio.audio import NORMALIZATIONS, find_audio, read_audio
from s4audio.cli.arguments import Parser, check_place, progress_bar, write_json
from s4audio.cli.generate import made_by
from s4audio.cli.info import print_table
from s4audio.metrics.comparison import Progress
from s4audio.metrics.embeddings import Embedding
from s4audio.metrics.evaluator import FORMAT, EmbeddedClip, Evaluation, Evaluator
from s4audio.metrics.sensitivity import Heard, card, sensitivity
from s4audio.report import (
    Clip,
    Section,
    extrapolation_figure,
    histogram_figure,
    map_figure,
    write_page,
)

CLIP_SECONDS = 10.0
WORST_PAIRS = 10
MANIFOLD = {
    "precision": "precision: generated windows that lie among real ones",
    "recall": "recall: real windows that lie among generated ones",
    "density": "density: how closely, 1 as real ones do",
    "coverage": "coverage: real windows with a generated one nearby",
}
PAIRED = {
    "si_sdr_db": "SI-SDR in dB, higher is better",
    "log_spectral_distance_db": "log-spectral distance in dB",
    "multi_resolution_stft": "multi-resolution STFT distance",
    "mel_distance": "mel distance, as DAC reports it",
}
ITS_OWN = ("generated", "made_by", "train")  # of a result's provenance: what may differ between two that are compared


def evaluate(arguments: list[str]) -> None:
    """Scores a folder against another, compares two results, or shows what an embedding hears."""
    parser = Parser(
        prog="s4audio evaluate",
        usage="%(prog)s GENERATED REFERENCE [options]\n       %(prog)s --compare A.json B.json\n       "
        "%(prog)s --sensitivity EMBEDDING FOLDER [options]",
        description="How close generated audio comes to recordings: Fréchet and kernel distances, intervals, and what "
        "recordings score against recordings. An EMBEDDING is log_mel (fixed, untrained) or the folder of a trained model.",
    )
    parser.add_argument("generated", nargs="?", help="folder of audio to judge")
    parser.add_argument("reference", nargs="?", help="folder of recordings that it should sound like")
    parser.add_argument(
        "--embedding", default="log_mel", help="log_mel (default), a model folder such as runs/NAME/best, or classical-16k"
    )
    parser.add_argument("--train", help="folder that the generator was trained on: looks for copies of its clips")
    parser.add_argument(
        "--paired", action="store_true", help="NAME.wav and NAME_reconstructed.wav belong together: adds SI-SDR"
    )
    parser.add_argument("--json", metavar="FILE", help="write every score and how it was measured to this file")
    parser.add_argument("--report", metavar="DIR", help="write a page with players and pictures, DIR/report.html")
    parser.add_argument("--sample-rate", type=int, help="compare at this rate in Hz; needed if the files have several")
    parser.add_argument("--normalize", choices=NORMALIZATIONS, default="peak", help="level of every clip (default peak)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same scores (default 0)")
    parser.add_argument("--compare", nargs=2, metavar=("A.json", "B.json"), help="two results of --json side by side")
    parser.add_argument("--sensitivity", nargs=2, metavar=("EMBEDDING", "FOLDER"), help="what an embedding hears")
    args = parser.parse_args(arguments)
    alone = {"--train": args.train, "--paired": args.paired, "--report": args.report}
    if args.compare:
        alone["--json"] = args.json
    for option, given in alone.items() if args.compare or args.sensitivity else ():
        if given:
            raise ValueError(
                f"{option} goes with GENERATED and REFERENCE, not with --{'compare' if args.compare else 'sensitivity'}."
            )
    modes = [args.generated is not None, args.compare is not None, args.sensitivity is not None]
    if sum(modes) != 1 or (args.generated is not None and args.reference is None):
        raise ValueError(
            "evaluate takes GENERATED and REFERENCE, or --compare A.json B.json, or --sensitivity EMBEDDING FOLDER."
        )
    if args.compare:
        _compare(*args.compare)
    elif args.sensitivity:
        _show_sensitivity(args, *args.sensitivity)
    else:
        _score(args)


def embedding(name: str) -> str | Embedding:
    """`log_mel`, or the encoder of the model in a folder, or of the pretrained one of this name.

    Raises:
        ValueError: there is no such model, or it has no encoder.
    """
    if name == "log_mel":
        return name
    if not checkpoint.located(name).exists():
        raise ValueError(
            f"the embedding {name!r} is neither log_mel, nor a folder that holds a model, nor a pretrained model."
        )
    return checkpoint.load_embedding(name)


def _score(args: argparse.Namespace) -> None:
    page = Path(args.report) / "report.html" if args.report else None
    for file in filter(None, (args.json and Path(args.json), page)):
        check_place(file)  # now, not after minutes of work
    models, unreadable = made_by(Path(args.generated))
    of_reference, _ = made_by(Path(args.reference))
    with progress_bar() as progress:
        evaluator = _evaluator(args, embedding(args.embedding), progress)
        evaluation = evaluator.evaluate(args.generated, args.reference, args.train, args.paired)
    scores = evaluation.scores
    provenance = scores["provenance"]
    provenance["made_by"] = models
    for warning in _warnings_of_notes(args, provenance["embedding"]["sha256"], models, unreadable, of_reference):
        scores["warnings"].insert(0, warning)
    print(_heading(scores))
    print_table(score_table(scores))
    print(f"\n{verdict(scores)}")
    if "paired" in scores:
        print()
        print_table(paired_table(scores["paired"]))
    if "memorization" in scores:
        print(f"\n{_bound(scores)}\n{_memorization(scores['memorization'])}")
    for warning in [*scores["warnings"], *filter(None, [scores.get("fid_infinity_reason")])]:
        print(f"note: {warning}")
    if args.json:
        write_json(args.json, scores)
        print(f"scores: {args.json}")
    if page:
        _write_report(page, evaluation)
        print(f"page: {page}, to open in a browser")


def _warnings_of_notes(
    args: argparse.Namespace,
    judge: str,
    models: list[dict[str, str]],
    unreadable: Path | None,
    of_reference: list[dict[str, str]],
) -> list[str]:
    """What the notes of `generate` in the two folders have to say about the scores."""
    found = []
    if unreadable:
        found.append(f"{unreadable} cannot be read, so which model made these clips is not known.")
    if of_reference:
        found.append("a model made files of the reference: are the folders swapped, or is one inside the other?")
    if judge in [model["sha256"] for model in models]:
        found.append(
            "the embedding is the encoder of a model that made these clips, a judge of its own work: choose another."
        )
    elif args.embedding != "log_mel" and checkpoint.kind(args.embedding) in [model.get("kind") for model in models]:
        found.append(
            "the embedding is of the same kind as the model that made these clips and learned the same data: make sure that "
            "it comes from a run of its own, with another seed."
        )
    return found


def _evaluator(args: argparse.Namespace, which: str | Embedding, progress: Progress) -> Evaluator:
    return Evaluator(
        which, sample_rate=args.sample_rate, normalize=args.normalize, seed=args.seed, progress=progress
    )  # fmt: skip


def _heading(scores: dict[str, Any]) -> str:
    p = scores["provenance"]
    level = "every clip at a peak of 1" if p["normalize"] == "peak" else "clips at their own level"
    e = p["embedding"]
    sizes = [
        f"{role}: {scores['folders'][role]}, {p[role]['clips']} clips, {p[role]['seconds'] / 60:.1f} min"
        for role in ("generated", "reference", "train")
        if role in p
    ]
    return "\n".join(
        [
            *sizes,
            f"heard by {e['name']} ({e['dim']} numbers a window), mono at {p['sample_rate']} Hz, {level}, seed {p['seed']}",
        ]
    )


def score_table(scores: dict[str, Any]) -> list[tuple[str, ...]]:
    """The scores beside the floor, as rows; the surer of KAD and FID∞ comes first."""
    at_n, floor = scores["at_equal_n"] or {}, scores["floor"] or {}
    n = f"{at_n['clips']} clips a side" if at_n else ""
    kad = ("KAD, all clips", _number(scores["kad"]), _range(scores["kad_interval"]), "expected 0")
    infinity = ("FID∞, all clips", _number(scores["fid_infinity"]), _range(scores["fid_infinity_interval"]), "expected 0")
    few = scores["fid_infinity"] is None or min(scores["provenance"][r]["clips"] for r in ("generated", "reference")) < 1000
    rows = [kad, infinity] if few else [infinity, kad]
    rows.append(("FID, all clips", _number(scores["fid"]), _range(scores["fid_interval"]), ""))
    for key, name in (("fid", "FID"), ("kad", "KAD")):
        if at_n:
            real = f"{_number(floor[key])} ({_range(floor[f'{key}_interval'])})"
            rows.append((f"{name}, {n}", _number(at_n[key]), _range(at_n[f"{key}_interval"]), real))
    rows += [(sentence, f"{at_n[key]:.2f}", "", f"{floor[key]:.2f}") for key, sentence in MANIFOLD.items() if key in at_n]
    return [("", "score", "95 % range", "real against real"), *rows]


def paired_table(paired: dict[str, Any]) -> list[tuple[str, ...]]:
    rows = [(name, _number(paired[key]), _range(paired.get(f"{key}_interval"))) for key, name in PAIRED.items()]
    return [(f"{paired['pairs']} pairs, mean", "", "95 % interval"), *rows]


def verdict(scores: dict[str, Any]) -> str:
    p, paired = scores["verdict"]["p_value"], scores["provenance"]["paired"]
    what = "The reconstructions can" if paired else "The generated clips can"
    other = "their originals" if paired else "the reference"
    if p is None:
        return f"There are too few clips to say whether they can be told from {other}."
    if not scores["verdict"]["distinguishable"]:
        return f"{what}not be told from {other} with this embedding and so few clips (p = {p:.2f})."
    at_n, floor = scores["at_equal_n"], scores["floor"]
    within = bool(floor) and at_n["kad"] <= floor["kad_interval"][1]
    though = ", though they differ by no more than halves of the reference do" if within else ""
    return f"{what} be told from {other} (p = {p:.3f}){though}."


def _bound(scores: dict[str, Any]) -> str:
    train = scores["train_against_reference"]
    kad = f"KAD {_number(train['kad'])} ({_range(train['kad_interval'])})"
    at_n = train["at_equal_n"]
    fid = f", FID {_number(at_n['fid'])} at {at_n['clips']} clips a side" if at_n else ""
    nearer = "" if scores["provenance"]["paired"] else ": what is nearer than that was learned by heart, or lucky"
    return f"the training clips themselves score {kad}{fid}{nearer}"


def _memorization(found: dict[str, Any]) -> str:
    share, first = found["share_nearer_than_95_percent_of_reference"], found["closest"][0]
    closest = (
        f"the closest clips are {first['generated']} and {first['train']}, {_number(first['distance'])} apart, where a clip "
        f"of the reference is typically {_number(found['median_distance_reference_to_train'])} from its nearest"
    )
    if share is None:
        return f"copies? There are too few reference windows to compare with; {closest}"
    return (
        f"copies? {share:.1%} of the generated windows lie as close to a training window as only 5 % of the reference's do "
        f"({'LIKELY LEARNED BY HEART' if found['suspicious'] else 'no sign of it'}); {closest}"
    )


def _number(value: float | None) -> str:
    """Three digits."""
    if value is None:
        return "none"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}" if abs(value) > 1e-9 else "0"


def _range(interval: list[float] | None) -> str:
    return "" if interval is None else f"{_number(interval[0])} to {_number(interval[1])}"


def _write_report(path: Path, evaluation: Evaluation) -> None:
    scores, made, real = evaluation.scores, evaluation.generated.clips, evaluation.reference.clips
    provenance = scores["provenance"]
    distance = evaluation.to_reference.distance
    means = torch.stack([clip.windows.mean(0) for clip in made])
    chosen = {
        "nearest to the reference": int(distance.argmin()),
        "most typical": int((means - means.mean(0)).norm(dim=1).argmin()),
        "farthest from the reference": int(distance.argmax()),
    }
    rate = provenance["sample_rate"]
    sections = [
        Section(
            "Listen",
            ["Of all generated clips the one that lies nearest to the reference, the one in the middle of all, and the one "
             "farthest away, as the embedding hears them."],
            clips=[
                clip
                for what, i in chosen.items()
                for clip in (
                    _clip(f"{what}: {made[i].name}", made[i], rate),
                    *([_clip(f"its original: {real[i].name}", real[i], rate)] if provenance["paired"] else []),
                )
            ],
        ),
        Section(
            "The scores",
            [
                "For the distances (KAD, FID) lower is better; for precision, recall and coverage higher; density is about "
                "1 for real clips. The last column says what real clips score against other real clips. Read nothing into "
                "differences that are smaller than the ranges; below 0 is chance, and means 0.",
                *(f"{warning[0].upper()}{warning[1:]}" for warning in scores["warnings"]),
                *filter(None, [scores.get("fid_infinity_reason")]),
            ],
            table=score_table(scores),
            figures=_figures(evaluation),
        ),
    ]  # fmt: skip
    if "paired" in scores:
        sections += [Section("File by file", table=paired_table(scores["paired"])), _worst_pairs(scores["paired"])]
    if evaluation.train is not None and evaluation.to_train is not None:
        sections.append(_memorization_section(evaluation))
    sections.append(Section("How it was measured", table=[("", ""), *_flat(provenance)]))
    sets = " against ".join(f"{provenance[r]['clips']} clips in {scores['folders'][r]}" for r in ("generated", "reference"))
    lead = f"{verdict(scores)} {sets}, heard by {provenance['embedding']['name']}."
    write_page(path, "How close does it come?", lead, sections)


def _worst_pairs(paired: dict[str, Any]) -> Section:
    rows = [
        (file["generated"], file["reference"], *(_number(file[key]) for key in PAIRED))
        for file in paired["files"][:WORST_PAIRS]
    ]
    heading = ("reconstruction", "original", "SI-SDR, dB", "log-spectral distance, dB", "STFT distance", "mel distance")
    return Section("The worst pairs, by mel distance", table=[heading, *rows])


def _figures(evaluation: Evaluation) -> list[tuple[str, Any]]:
    sets = {"reference": evaluation.reference, "generated": evaluation.generated}  # everywhere in this order and colour
    means = {name: torch.stack([clip.windows.mean(0) for clip in folder.clips]).double() for name, folder in sets.items()}
    every = torch.cat(list(means.values()))
    _, spread, directions = torch.linalg.svd(every - every.mean(0), full_matrices=False)
    plane = {name: ((of_set - every.mean(0)) @ directions[:2].mT) for name, of_set in means.items()}
    shares = (spread.square() / spread.square().sum().clamp_min(1e-12)).tolist()
    figures = []
    if len(shares) > 1:
        figures.append(
            ("A map of the clips: the two directions in which they differ most.", map_figure(plane, (shares[0], shares[1])))
        )
    infinity = evaluation.infinity
    if infinity is not None:
        caption = f"FID∞: the distance of ever larger subsets, and where it leads (R² = {infinity.r_squared:.2f})."
        line = extrapolation_figure(infinity.sizes, infinity.distances, infinity.estimate.value, infinity.slope)
        figures.append((caption, line))
    return figures


def _memorization_section(evaluation: Evaluation) -> Section:
    scores, to_train, train = evaluation.scores, evaluation.to_train, evaluation.train
    found = scores["memorization"]
    of_reference = evaluation.reference_to_train
    assert to_train is not None and train is not None and of_reference is not None
    made, rate = evaluation.generated.clips, scores["provenance"]["sample_rate"]
    clips = []
    for i in to_train.distance.argsort()[:2].tolist():
        other = train.clips[int(to_train.clip[i])]
        clips += [_clip(f"generated: {made[i].name}", made[i], rate), _clip(f"trained on: {other.name}", other, rate)]
    distances = {"reference to train": of_reference.distance, "generated to train": to_train.distance}
    caption = "Distance of each clip to its nearest training clip."
    rows = [(pair["generated"], pair["train"], f"{pair['distance']:.2f}") for pair in found["closest"]]
    return Section(
        "Is it a copy?",
        [
            *(f"{text[0].upper()}{text[1:]}." for text in (_memorization(found), _bound(scores))),
            "Below, the closest pairs: do you hear a copy?",
        ],
        clips=clips,
        table=[("generated", "trained on", "distance"), *rows],
        figures=[(caption, histogram_figure(distances, "distance"))],
    )


def _clip(name: str, clip: EmbeddedClip, rate: int) -> Clip:
    return Clip(name, read_audio(clip.file, rate)[0][..., : round(CLIP_SECONDS * rate)], rate)


def _flat(value: Any, key: str = "") -> list[tuple[str, str]]:
    """Nested dictionaries as rows of a dotted key and a value."""
    if isinstance(value, dict):
        return [row for k, v in value.items() for row in _flat(v, f"{key}.{k}" if key else k)]
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [row for i, v in enumerate(value) for row in _flat(v, f"{key}.{i}")]
    return [(key, str(value))]


def _compare(first: str, second: str) -> None:
    """Two results side by side; refused if they were not measured in the same way."""
    results = {path: _read_scores(path) for path in (first, second)}
    a, b = results[first], results[second]
    before, now = (dict(_flat(_comparable(result["provenance"]))) for result in (a, b))
    for key in {**before, **now}:
        if before.get(key) != now.get(key):
            raise ValueError(
                f"{first} and {second} cannot be compared: {key} is {before.get(key, 'not there')} in one and "
                f"{now.get(key, 'not there')} in the other. Score both again in the same way."
            )
    rows: list[tuple[str, ...]] = [("", first, "95 % interval", second, "95 % interval")]
    closer = []
    for key, name in (("kad", "KAD"), ("fid_infinity", "FID∞"), ("fid", "FID")):
        values = [text for r in (a, b) for text in (_number(r[key]), _range(r[f"{key}_interval"]))]
        rows.append((name, *values))
        if a[key] is not None and b[key] is not None:
            low, high = sorted((a[f"{key}_interval"], b[f"{key}_interval"]))
            better = first if a[key] < b[key] else second
            closer.append(f"{name}: {better} is closer" if low[1] < high[0] else f"{name}: neither is surely closer")
    for key in MANIFOLD:
        if all(key in (r["at_equal_n"] or {}) for r in (a, b)):
            rows.append((key, *(text for r in (a, b) for text in (f"{r['at_equal_n'][key]:.2f}", ""))))
    print_table(rows)
    print(f"\n{'; '.join(closer)}.")
    for path, result in results.items():
        for warning in result["warnings"]:
            print(f"note on {path}: {warning}")


def _comparable(provenance: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in provenance.items() if key not in ITS_OWN}
    return {**kept, "generated": {key: provenance["generated"][key] for key in ("clips", "windows")}}


def _read_scores(path: str) -> dict[str, Any]:
    """A result of --json.

    Raises:
        ValueError: it is none, or of another version.
    """
    try:
        scores = json.loads(Path(path).read_text())
        provenance = scores["provenance"]
        if provenance["format"] != FORMAT:
            raise ValueError(f"its format is {provenance['format']}, and this version reads {FORMAT}")
        if provenance["embedding"]["sha256"] is None:
            raise ValueError("its embedding has no sha256 in its details, so nobody knows which one it was")
        for key in ("kad", "fid", *(["fid_infinity"] if scores["fid_infinity"] is not None else [])):
            if not all(isinstance(value, float) for value in (scores[key], *scores[f"{key}_interval"])):
                raise TypeError(f"{key} is no number")
        if not isinstance(scores["warnings"], list):
            raise TypeError("warnings is no list")
        dict(scores["at_equal_n"] or {})
        _comparable(provenance)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"there is no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} is no result of `s4audio evaluate --json` that can be compared ({what}).") from error
    return scores


def _show_sensitivity(args: argparse.Namespace, name: str, folder: str) -> None:
    if args.json:
        check_place(Path(args.json))
    with progress_bar() as progress:
        evaluator = _evaluator(args, embedding(name), progress)
        rows = sensitivity(evaluator, folder)
    print(f"what {name} hears in {folder}: one half of the clips damaged, against the other half")
    told = [(r.damage, _number(r.fid), _number(r.kad), f"{r.p_value:.3f}", _judgement(r)) for r in rows]
    print_table([("damage", "FID", "KAD", "p", ""), *told])
    found = card(rows)
    for key, what in (("not_noticed", "it does not hear"), ("better_than_real", "it prefers to real clips")):
        if found[key]:
            print(f"{what}: {'; '.join(found[key])}")
    if args.json:
        rate = evaluator.common_rate(find_audio(folder))
        write_json(args.json, {**found, "provenance": evaluator.provenance(evaluator.embedding_at(rate), rate)})
        print(f"card: {args.json}")


def _judgement(row: Heard) -> str:
    if row.better_than_real:
        return "scores BETTER than real"
    return "heard" if row.noticed else "not heard"
