"""Makes what `s4audio generate` makes with the pretrained models, by seed and not by ear, and a page to listen to.

python samples/make_generated.py [--out FOLDER]
"""

import argparse
from pathlib import Path
from typing import Any

import torch

import s4audio
from s4audio.audio import normalize, read_audio, write_audio
from s4audio.cli.generate import noise_of
from s4audio.report import Clip, Section, write_page

SEEDS, SECONDS = range(8), 10
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COMMAND = "s4audio generate {} --from noise{} --num 1 --seed SEED"
HERE = Path(__file__).parent


def count(model: Any, seed: int) -> torch.Tensor:
    """(1, 80000): a second of each word, from zero to nine."""
    label = torch.tensor([model.classes.index(word) for word in WORDS])
    words = model.sample(len(WORDS), model.sample_rate, label=label, generator=[noise_of(seed, 0) for _ in WORDS])
    return words.flatten()[None]


def play(model: Any, seed: int) -> torch.Tensor:
    """(1, 160000): ten seconds."""
    return model.sample(1, SECONDS * model.sample_rate, generator=[noise_of(seed, 0)])[0]


def from_recordings(model: Any) -> dict[str, tuple[str, torch.Tensor]]:
    """Names of files -> what they are, and the clips (1, T): of the first ten seconds of two recordings, by seed 0."""
    rate, given, level = model.sample_rate, [], 0.7  # of what it is given at a peak of 1, lest what it makes be clipped
    for name in ("fur_elise_piano", "spring_strings"):
        audio, _ = read_audio(HERE / "valid" / f"{name}.flac", rate)
        given.append(normalize(audio[:, : SECONDS * rate], "peak"))
    clip, begun = given[0][None], given[0][None, :, : 5 * rate]
    anew = model.inpaint(clip, 4 * rate, 11 * rate // 2, [noise_of(0, 0)])[0]
    more = torch.cat([begun, model.continue_(begun, 5 * rate, generator=[noise_of(0, 0)])], dim=-1)[0]
    made = {
        "recording": ("the recording, fur_elise_piano.flac", given[0]),
        "inpainted": ("4.0 to 5.5 s made anew: --inpaint 4.0:5.5", anew),
        "continued": ("5 s, and 5 s more: --continue 5", more),
        "varied": ("half noise: --variation 0.5", model.vary(clip, 0.5, [noise_of(0, 0)])[0]),
        "between": ("half of the way to spring_strings.flac: --interpolate", model.interpolate(*given, 3)[1]),
    }
    return {name: (what, level * audio) for name, (what, audio) in made.items()}


MADE = {  # of each pretrained model: its files' names, what makes a clip, and what that is
    "classical-16k": (
        "classical",
        play,
        f"{SECONDS} seconds of music that nobody wrote: {COMMAND.format('classical-16k', '')}",
    ),
    "digits-8k": ("digits", count, f"{', '.join(WORDS)}, a second each: {COMMAND.format('digits-8k', ' --label WORD')}"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "generated")
    out = parser.parse_args().out
    sections = []
    for name, (stem, make, text) in MADE.items():
        model: Any = s4audio.load(name)
        clips = []
        for seed in SEEDS:
            audio = make(model, seed)
            write_audio(out / f"{stem}_{seed}.flac", audio, model.sample_rate)
            clips.append(Clip(f"seed {seed}", audio, model.sample_rate))
            print(out / f"{stem}_{seed}.flac", flush=True)
        sections.append(Section(name, [text], clips))
        if name == "classical-16k":
            clips = []
            for stem, (what, audio) in from_recordings(model).items():
                write_audio(out / f"classical_{stem}.flac", audio, model.sample_rate)
                clips.append(Clip(what, audio, model.sample_rate))
            sections.append(Section(f"{name}, from a recording", ["Ten seconds of it; seed 0."], clips))
    lead = "In the steps that generate takes if it is told nothing; seeds 0 to 7 of noise, none chosen by ear."
    write_page(out / "generated.html", "What the pretrained models make", lead, sections)
    print(out / "generated.html")


if __name__ == "__main__":
    main()
