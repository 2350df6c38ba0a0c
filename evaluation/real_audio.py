"""Whether the evaluator can be trusted with real recordings: what it says of parts of one collection, and of damaged ones.

    python evaluation/real_audio.py FOLDER --embedding log_mel --json FILE

* A third part of a collection, disjoint from two others, must score no worse against them than they do against each
  other: how often, over random thirds, its score lies within the floor's interval.
* Random halves must not be told apart, but in 5 % of the cases.
* More damage must score worse: white noise from 40 to 0 dB below the signal, ever lower low-pass filters, ever harder
  clipping.
* Silence must never be best.

Thirds and halves are drawn at random, so that they are of one kind by construction: what fails here is the evaluator. Parts
that were split by artist or by session may well differ, and be told apart.
"""

import argparse
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

import s4audio
from s4audio.audio import find_audio
from s4audio.cli.evaluate import embedding
from s4audio.metrics.comparison import compare
from s4audio.metrics.kernel import bandwidth, kernel, permutation_test
from s4audio.metrics.resampling import shuffled
from s4audio.metrics.sensitivity import card, sensitivity

SERIES = {"white noise": "white noise", "low-pass": "low-pass", "clipping": "clipped"}


def inside_floor(clips: list[torch.Tensor], repeats: int) -> dict[str, float]:
    """Share of random thirds whose score against the other two lies inside the floor's interval, or below it."""
    inside: dict[str, list[bool]] = {"fid": [], "kad": []}
    third = len(clips) // 3
    for repeat in range(repeats):
        order = shuffled(clips, repeat, 7)
        scores = compare(order[:third], order[third:], seed=repeat).scores
        for key, found in inside.items():
            found.append(scores["at_equal_n"][key] <= scores["floor"][f"{key}_interval"][1])
    return {key: float(np.mean(found)) for key, found in inside.items()}


def told_apart(clips: list[torch.Tensor], repeats: int) -> float:
    """Share of random halves that the verdict tells apart."""
    wrong = 0
    for repeat in range(repeats):
        order = shuffled(clips, repeat, 8)
        made, real = order[: len(order) // 2], order[len(order) // 2 :]
        wrong += (permutation_test(kernel(made, real, bandwidth(real)), repeat) or 1.0) < 0.05
    return wrong / repeats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="many recordings of one kind")
    parser.add_argument("--name", help="of the collection, for the file (default: that of the folder)")
    parser.add_argument("--embedding", default="log_mel", help="log_mel (default) or a model folder")
    parser.add_argument("--sample-rate", type=int)
    parser.add_argument("--thirds", type=int, default=50, help="random thirds (default 50)")
    parser.add_argument("--halves", type=int, default=500, help="random halves (default 500)")
    parser.add_argument("--most", type=int, default=300, help="clips to use at most, drawn at random (default 300)")
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    evaluator = s4audio.Evaluator(embedding(args.embedding), sample_rate=args.sample_rate)
    files = find_audio(args.folder)
    rate = evaluator.common_rate(files)
    which = evaluator.embedding_at(rate)
    folder = evaluator.embed(which, args.folder, shuffled(files, 0)[: args.most], rate)
    clips = shuffled(folder.windows(), 0)[: args.most]
    thirds, apart = inside_floor(clips, args.thirds), told_apart(clips, args.halves)
    rows = sensitivity(evaluator, args.folder)
    by_name = {row.damage: row for row in rows}
    rising = {
        f"{name}, {key}": all(a < b for a, b in pairwise(getattr(r, key) for r in rows if r.damage.startswith(start)))
        for name, start in SERIES.items()
        for key in ("fid", "kad")
    }
    silence = by_name["silence"]
    result = {
        "collection": args.name or Path(args.folder).name,
        "embedding": which.name,
        "clips": len(clips),
        "share_of_thirds_within_floor": thirds,
        "share_of_halves_told_apart": apart,
        "rises_with_damage": rising,
        "silence_is_best": any(silence.fid <= row.fid or silence.kad <= row.kad for row in rows[:2]),
        **card(rows),
    }
    print(f"{result['collection']}, {len(clips)} clips, by {which.name}")
    print(f"  thirds within the floor: FID {thirds['fid']:.0%}, KAD {thirds['kad']:.0%}; halves told apart: {apart:.1%}")
    print(f"  rises with damage: {rising}; silence is best: {result['silence_is_best']}")
    print(f"  not noticed: {result['not_noticed']}; better than real: {result['better_than_real']}")
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
