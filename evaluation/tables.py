"""Writes the tables of the README that come from evaluation/results, so that a figure cannot drift from its file.

python evaluation/tables.py            writes them, between the marks <!-- table NAME --> and <!-- end -->
python evaluation/tables.py --check    only says whether the README is up to date; exit status 1 if not
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "evaluation" / "results"
SOURCES = {"noise": "from noise", "samples": "reconstructed"}


def read(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def table(*rows: tuple[str, ...]) -> str:
    """Rows in Markdown; the first is the heading."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def number(value: float | None) -> str:
    """Three digits or so."""
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def over_seeds(row: dict[str, Any], key: str) -> str:
    spread = row.get(f"{key}_std")
    return number(row[key]) + (f" ± {number(spread)}" if spread is not None else "")


def system4() -> str:
    found = read("system4")
    rows: list[tuple[str, ...]] = [
        (
            "",
            "numbers a second",
            "FID train",
            "FID test",
            "FID∞ test",
            "KAD test",
            "FID test by log_mel",
            "KAD test by log_mel",
        )
    ]
    by_key = {(r["model"], r["from"], r["split"], r["embedding"]): r for r in found["rows"]}
    models = list(dict.fromkeys(row["model"] for row in found["rows"]))
    for source, words in SOURCES.items():
        for model in models:
            train, test = (by_key[model, source, split, "judge"] for split in ("train", "test"))
            log_mel = by_key[model, source, "test", "log_mel"]
            numbers = "" if source == "noise" else f"{test['latent_numbers_a_second']:,}"
            rows.append(
                (
                    f"{model}, {words}", numbers, over_seeds(train, "fid"), over_seeds(test, "fid"),
                    over_seeds(test, "fid_infinity"), over_seeds(test, "kad"), over_seeds(log_mel, "fid"),
                    over_seeds(log_mel, "kad"),
                )
            )  # fmt: skip
    judge, log_mel = (reference["train_as_test"] for reference in found["references"])
    rows.append(
        (
            "the training clips themselves", "", "0", number(judge["fid"]), number(judge["fid_infinity"]),
            number(judge["kad"]), number(log_mel["fid"]), number(log_mel["kad"]),
        )
    )  # fmt: skip
    return table(*rows)


def real_audio() -> str:
    rows: list[tuple[str, ...]] = [
        ("recordings", "heard by", "clips", "thirds within the floor", "halves told apart", "rises with damage", "missed")
    ]  # fmt: skip
    for path in sorted(RESULTS.glob("real_audio_*.json")):
        found = json.loads(path.read_text())
        within, rises = found["share_of_thirds_within_floor"], found["rises_with_damage"]
        failed = [name for name, holds in rises.items() if not holds]
        rows.append(
            (
                found["collection"], "log_mel" if found["embedding"].startswith("log_mel") else "the trained encoder",
                str(found["clips"]), f"FID {within['fid']:.0%}, KAD {within['kad']:.0%}",
                f"{found['share_of_halves_told_apart']:.1%}", "yes" if not failed else f"not {', '.join(failed)}",
                "; ".join(found["not_noticed"]) or "nothing",
            )
        )  # fmt: skip
    return table(*rows)


def calibration() -> str:
    found = read("calibration")
    rows: list[tuple[str, ...]] = [
        ("", "truth", "mean of 200", "interval holds the truth", "half-width over 1.96 deviations")
    ]
    for name, results in (("FID∞", found["fid_infinity"]), ("KAD", found["kad"])):
        for r in results:
            mean = f"{r['mean']:.3f} ± {r['standard_error_of_mean']:.3f}"
            rows.append(
                (
                    f"{name}, {r['clips']:,} clips of {r['windows']}, d = {r['dimensions']}", f"{r['truth']:g}", mean,
                    f"{r['coverage_of_95_percent_interval']:.1%}", f"{r['half_width_over_1.96_deviations']:.2f}",
                )
            )  # fmt: skip
    return table(*rows)


def ssm_conv_cuda() -> str:
    rows: list[tuple[str, ...]] = [
        ("(batch, channels, samples)", "pass", "textbook", "float32", "faster", "memory", "bfloat16", "faster", "memory")
    ]
    found = read("ssm_conv_cuda")["rows"]
    for textbook in (row for row in found if row["path"] == "textbook"):
        first = textbook["pass"] == "forward"
        cells = [str(tuple(textbook["shape"])) if first else "", textbook["pass"], milliseconds(textbook)]
        for dtype in ("float32", "bfloat16"):
            ours = next(
                row for row in found
                if (row["path"], row["dtype"]) == ("ours", dtype)
                and (row["shape"], row["pass"]) == (textbook["shape"], textbook["pass"])
            )  # fmt: skip
            times, share = ours["faster"], ours["memory_ratio"]
            cells += [milliseconds(ours), "-" if times is None else f"{number(times)}×"]
            cells.append("-" if share is None else f"1/{share:.1f}" if share > 1 else f"{1 / share:.1f}×")
        rows.append(tuple(cells))
    return table(*rows)


def milliseconds(row: dict[str, Any]) -> str:
    return "out of memory" if row["ms"] is None else f"{number(row['ms'])} ms, {row['mib']:,.0f} MiB"


def train_step() -> str:
    rows: list[tuple[str, ...]] = [("forward, backward, AdamW", "batch", "plain engine", "fused", "captured", "compiled")]
    for row in read("train_step_cuda")["rows"]:
        times = [number(row.get(f"{way}_ms")) for way in ("plain", "fused", "graph", "compiled_graph")]
        batch = " × ".join(f"{size:,}" for size in row["batch"])
        rows.append((f"{row['name']}, {row['dtype']}", batch, *times))
    return table(*rows)


def scifar() -> str:
    rows: list[tuple[str, ...]] = [
        (
            "recipe",
            "seeds",
            "parameters",
            "epochs",
            "seconds",
            "images a second",
            "held out",
            "test",
            "ms an image, alone and of 256",
        )
    ]
    for path in sorted(RESULTS.glob("scifar_*.json")):
        found = json.loads(path.read_text())
        for line in found["recipes"]:
            of_recipe = [row for row in found["rows"] if row["recipe"] == line["recipe"]]
            alone, of_256 = (fmean(row[key] for row in of_recipe) for key in ("ms_an_image_alone", "ms_an_image_of_256"))
            rows.append(
                (
                    f"`{line['recipe']}`", str(line["seeds"]), f"{line['parameters']:,}", f"{line['epochs']:g}",
                    f"{line['wall_seconds']:.0f}", f"{line['images_a_second']:,.0f}", percent(line, "valid_accuracy"),
                    percent(line, "test_accuracy"), f"{alone:.3g}, {of_256:.3g} ({found['scored_on']})",
                )
            )  # fmt: skip
    return table(*rows)


def percent(line: dict[str, Any], key: str) -> str:
    spread = line[f"{key}_std"]
    return f"{line[key]:.1%}" + (f" ± {100 * spread:.1f}" if spread is not None else "")


def generators() -> str:
    rows: list[tuple[str, ...]] = [
        (
            "", "FID", "FID∞", "KAD", "density, coverage", "near copies", "told apart", "FID by log_mel", "KAD by log_mel",
            "near copies", "told apart", "drift by log_mel",
        )
    ]  # fmt: skip
    for path in sorted(RESULTS.glob("generators_*.json")):
        found = json.loads(path.read_text())
        data = path.stem.partition("_")[2]
        for row in found["rows"]:
            drift = number(row["log_mel"]["drift"]) if row["log_mel"].get("drift") is not None else ""
            rows.append((f"{data}: {row['model']}", *scores_of(row["the_trained_encoder"], row["log_mel"]), drift))
        by, log_mel = (found["rows"][0][name]["train_against_test"] for name in ("the_trained_encoder", "log_mel"))
        alike = found.get("train_clips_as_near_to_another_recording", {})
        near, near_by_log_mel = (
            f"{alike[name]:.1%}" if name in alike else "" for name in ("the_trained_encoder", "log_mel")
        )
        first = *(number(by[key]) for key in ("fid", "fid_infinity", "kad")), "", near, ""
        drift = found.get("drift", {}).get("log_mel", {}).get("train")
        second = number(log_mel["fid"]), number(log_mel["kad"]), near_by_log_mel, "", "" if drift is None else number(drift)
        rows.append((f"{data}: the training clips themselves", *first, *second))
    return table(*rows)


def copies() -> str:
    rows: list[tuple[str, ...]] = [("", "clips", "seconds", "median", "highest tenth from", "highest")]
    for path in sorted(RESULTS.glob("copies_*.json")):
        found = json.loads(path.read_text())
        for row in found["rows"]:
            who = "the test clips" if row["clips"] == "test" else row["clips"]
            scores = (number(row[key]) for key in ("median", "highest_tenth", "highest"))
            rows.append((f"{path.stem.partition('_')[2]}: {who}", str(row["number"]), f"{found['seconds']:g}", *scores))
    return table(*rows)


def scores_of(judged: dict[str, Any], log_mel: dict[str, Any]) -> tuple[str, ...]:
    def with_interval(scores: dict[str, Any], key: str) -> str:
        if scores[key] is None:
            return "-"
        return f"{number(scores[key])} ({' to '.join(map(number, scores[f'{key}_interval']))})"

    def apart(scores: dict[str, Any]) -> str:
        found = scores["verdict"]["distinguishable"]
        return "-" if found is None else "yes" if found else "no"

    at_n = judged["at_equal_n"] or {}
    near, near_by_log_mel = (f"{by['share_nearer_to_train_than_1_percent_of_test']:.1%}" for by in (judged, log_mel))
    spread = ", ".join("-" if at_n.get(key) is None else number(at_n[key]) for key in ("density", "coverage"))
    return (
        *(with_interval(judged, key) for key in ("fid", "fid_infinity", "kad")), spread, near, apart(judged),
        *(with_interval(log_mel, key) for key in ("fid", "kad")), near_by_log_mel, apart(log_mel),
    )  # fmt: skip


def likelihood() -> str:
    rows: list[tuple[str, ...]] = [("", "parameters", "bits a sample", "deviation over files", "steps, seconds to them")]
    for data in ("classical", "digits"):
        for row in read(f"likelihood_{data}")["rows"]:
            training = row.get("training")
            steps = f"{training['steps']:,}, {training['wall_seconds']:.0f}" if training else ""
            bits, spread = f"{row['bits_per_sample']:.3f}", f"{row['bits_per_sample_std_of_files']:.2f}"
            rows.append((f"{data}: {row['model']}", f"{row['parameters']:,}", bits, spread, steps))
    return table(*rows)


TABLES: dict[str, Callable[[], str]] = {
    "system4": system4,
    "real_audio": real_audio,
    "calibration": calibration,
    "ssm_conv_cuda": ssm_conv_cuda,
    "train_step": train_step,
    "scifar": scifar,
    "generators": generators,
    "copies": copies,
    "likelihood": likelihood,
}


def renewed(text: str) -> str:
    """The README with every table made anew."""

    def replace(found: re.Match[str]) -> str:
        return f"<!-- table {found[1]} -->\n\n{TABLES[found[1]]()}\n\n<!-- end -->"

    return re.sub(r"<!-- table (\w+) -->.*?<!-- end -->", replace, text, flags=re.DOTALL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say whether the README is up to date")
    args = parser.parse_args()
    readme = ROOT / "README.md"
    before = readme.read_text()
    after = renewed(before)
    if args.check:
        print("up to date" if before == after else "the README's tables differ from evaluation/results")
        return int(before != after)
    readme.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
