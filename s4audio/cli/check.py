"""`s4audio check`: what training will make of a folder of recordings, before it takes the time."""

import csv
import io
import shlex
from pathlib import Path
from typing import Any

from s4audio.cli.arguments import Parser, check_place, progress_bar, write_json
from s4audio.cli.info import print_table
from s4audio.data.check import WARNINGS, CheckedFile, check_folder, summarize
from s4audio.files import replacing

ROWS = {  # of the table of ranges: a name, a format, and a factor
    "seconds": ("seconds", ",.2f", 1),
    "peak_db": ("peak, dB of full scale", ".1f", 1),
    "loudness_lufs": ("loudness, LUFS", ".1f", 1),
    "silent_share": ("silent, % of the time", ".0f", 100),
    "dc_offset": ("DC offset", "z.4f", 1),
}


def check(arguments: list[str]) -> None:
    """Prints what there is, and writes OUT/rejects.csv and OUT/check.json."""
    parser = Parser(
        prog="s4audio check",
        description="Read every recording of a folder and say what training will use, why it leaves out the rest, and what "
        "to look at. What cannot be read, is silent, shorter than 0.01 s or a copy of another is left out. Writes "
        "rejects.csv, with a sentence for each file that is left out, and check.json, with all that was measured; never "
        "into the folder itself.",
    )
    parser.add_argument("folder", help="folder of recordings, searched in subfolders too, or one file")
    parser.add_argument("--out", default="check", help="folder for rejects.csv and check.json (default check)")
    parser.add_argument("--workers", type=int, help="threads that read (default: one for each core)")
    args = parser.parse_args(arguments)
    if args.workers is not None and args.workers < 1:
        raise ValueError(f"--workers is {args.workers}; wanted at least 1.")
    report_folder(args.folder, Path(args.out), args.workers)
    print(f"train on it: s4audio train {shlex.quote(args.folder)}")


def report_folder(folder: str, out: Path, workers: int | None = None) -> None:
    """Prints what a folder holds, and writes rejects.csv and check.json into `out`.

    Raises:
        ValueError: nothing in it can be used; or `out` is inside it.
    """
    data = Path(folder).resolve()
    if data in (out.resolve(), *out.resolve().parents):
        raise ValueError(f"{out} is inside {folder}, where nothing is written; choose another folder with --out.")
    rejects, report = out / "rejects.csv", out / "check.json"
    for file in (rejects, report):
        check_place(file)
    with progress_bar() as bar:
        files = check_folder(folder, workers, lambda done, total: bar("reading", done, total))
    if not files:
        raise ValueError(f"{folder} is empty; put audio files into it, or name another folder.")
    found = summarize(files)
    _print(folder, files, found)
    _write_rejects(rejects, files)
    write_json(str(report), {"folder": folder, **found})
    print(f"\nwhy each is left out: {rejects}; all that was measured: {report}")
    if found["kept"] == 0:
        raise ValueError(f"none of the {found['found']} files in {folder} can be used; {rejects} says why of each.")


def _print(folder: str, files: list[CheckedFile], found: dict[str, Any]) -> None:
    files_found = f"{found['found']:,} file{'s' * (found['found'] != 1)} found"
    minutes = f"{found['kept_minutes']:.1f} of {found['found_minutes']:.1f} min ({found['kept_share']:.1%})"
    print(f"{folder}: {files_found}, {found['read']:,} read, {found['kept']:,} kept: {minutes}")
    if found["skipped"]:
        first = {
            file.rejected.reason: _in_a_line(str(file.rejected)) for file in reversed(files) if file.rejected is not None
        }
        print()
        print_table([("skipped", "files", "the first"), *((r, f"{n:,}", first[r]) for r, n in found["skipped"].items())])
    if found["warnings"]:
        example = {warning: _in_a_line(str(file.path)) for file in reversed(files) for warning in file.warnings}
        print()
        rows = [(warning, f"{n:,}", WARNINGS[warning], example[warning]) for warning, n in found["warnings"].items()]
        print_table([("kept, but look at", "files", "what is odd", "the first"), *rows])
    if found["kept"]:
        ranges = [
            (name, *(format(factor * value, form) for value in found["lowest_median_highest"][key]))
            for key, (name, form, factor) in ROWS.items()
            if found["lowest_median_highest"][key]
        ]
        print()
        print_table([("kept", "lowest", "median", "highest"), *ranges])
        rates = ", ".join(f"{int(rate):,} Hz ({count:,})" for rate, count in found["sample_rates"].items())
        channels = ", ".join(f"{number} ({count:,})" for number, count in found["channels"].items())
        print(f"  sample rates (files): {rates}; channels (files): {channels}")


def _in_a_line(text: str) -> str:
    """Without the line breaks and the commands to the terminal that a file's name can hold."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def _write_rejects(path: Path, files: list[CheckedFile]) -> None:
    text = io.StringIO(newline="")
    rows = csv.writer(text)
    rows.writerow(("path", "reason", "sentence"))
    rows.writerows((file.path, file.rejected.reason, file.rejected) for file in files if file.rejected is not None)
    with replacing(path) as file:
        file.write(text.getvalue().encode(errors="backslashreplace"))  # a name that is no text
