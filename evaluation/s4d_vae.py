"""Shows whether trainings were stable: the norm of the gradient before clipping, and the latent dimensions in use.

    python evaluation/s4d_vae.py RUN [RUN ...] --picture FILE.png --json FILE

For each run folder: the steps, the largest and the median norm of the gradient, whether all of them and all losses were
finite, and what the last model made of the held-out clips: loss, SI-SDR and active dimensions. The picture has the norms of
all runs.
"""

import argparse
import json
import math
from pathlib import Path
from statistics import median
from typing import Any

from s4audio.checkpoint import read_config
from s4audio.cli.run_page import read_curves
from s4audio.report import curves_figure, save_figure

NORM = "gradient_norm/model"


def summary(run: Path) -> dict[str, Any]:
    """What a run came to.

    Raises:
        SystemExit: it has no norms of the gradient.
    """
    curves, config = read_curves(run), read_config(run / "last")
    if NORM not in curves:
        raise SystemExit(f"{run} has no {NORM} in its curves; train it with this version.")
    norms, scores = curves[NORM][1], config["training"]["scores"]
    return {
        "run": str(run), "class": config["class"], "steps": config["training"]["steps"],
        "wall_seconds": config["training"]["wall_seconds"], "device": config["training"]["device"],
        "norms": len(norms), "largest_norm": max(norms), "median_norm": median(norms),
        "finite": all(math.isfinite(value) for _, values in curves.values() for value in values),
        "latent_channels": config["arguments"]["latent_channels"],
        **{name: scores.get(f"valid/{name}") for name in ("active_dimensions", "kl", "si_sdr_db", "loss")},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder of `s4audio fit`")
    parser.add_argument("--picture", metavar="FILE.png", help="draw the norms")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    args = parser.parse_args()
    rows = [summary(run) for run in args.runs]
    for row in rows:
        active, si_sdr = ("none" if row[n] is None else f"{row[n]:.3g}" for n in ("active_dimensions", "si_sdr_db"))
        print(
            f"{row['run']}: {row['steps']} steps, norm of the gradient {row['median_norm']:.3g} in the middle and "
            f"{row['largest_norm']:.3g} at most, {'all finite' if row['finite'] else 'NOT ALL FINITE'}; held out: "
            f"{active} of {row['latent_channels']} dimensions active, SI-SDR {si_sdr} dB"
        )
    if args.picture:
        lines = {run.name: read_curves(run)[NORM] for run in args.runs}
        save_figure(args.picture, curves_figure(lines, "norm of the gradient"))
    if args.json:
        Path(args.json).write_text(json.dumps({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
