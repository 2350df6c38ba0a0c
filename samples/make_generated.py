"""Makes what the pretrained models make, by seed 0 to 7 and not by ear, and a page to listen to.

python samples/make_generated.py [--out FOLDER]
"""

import argparse
from pathlib import Path
from typing import Any

import torch

import s4audio
from s4audio.audio import write_audio
from s4audio.report import Clip, Section, write_page

SEEDS = range(8)
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
HERE = Path(__file__).parent


def count(model: Any, seed: int) -> torch.Tensor:
    """(1, 80000): a second of each word, from zero to nine."""
    label = torch.tensor([model.classes.index(word) for word in WORDS])
    return model.sample(len(WORDS), model.sample_rate, label=label, generator=torch.Generator().manual_seed(seed)).flatten()[
        None
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "generated")
    out = parser.parse_args().out
    model: Any = s4audio.load("digits-8k")
    clips = []
    for seed in SEEDS:
        audio = count(model, seed)
        write_audio(out / f"digits_{seed}.flac", audio, model.sample_rate)
        clips.append(Clip(f"seed {seed}", audio, model.sample_rate))
        print(out / f"digits_{seed}.flac", flush=True)
    text = [f"{', '.join(WORDS)}, a second each; every word from noise of its own."]
    lead = "From noise, in the steps that generate takes if it is told nothing; seeds 0 to 7, not chosen by ear."
    write_page(out / "generated.html", "What the pretrained models make", lead, [Section("digits-8k", text, clips)])
    print(out / "generated.html")


if __name__ == "__main__":
    main()
