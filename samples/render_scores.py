"""Renders a data set of public-domain music, which may be shared with what is trained on it: 16 kHz, mono, FLAC.

    pip install music21 mido; apt-get install fluidsynth fluid-soundfont-gm
    python samples/render_scores.py --out FOLDER [--variants 12] [--soundfont FILE]

The scores are the tunes of make_samples.py, typed in by us, and those of the music21 package's corpus whose encoding is
explicitly free (SCORES says how). Each is played several times by fluidsynth, every time in another key, at another tempo,
by other instruments, and with other dynamics. All of that comes from SEED, the piece and the number of the variant. train,
valid and test share no piece. FOLDER/README.md lists the sources and their licences, which go with the data.

The soundfont is FluidR3 (MIT licence) unless another is given. Six hours took half an hour on two busy cores.
"""

import argparse
import contextlib
import functools
import math
import shutil
import subprocess
import sys
import tempfile
import warnings
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from make_samples import PIECES, notes

from s4audio.audio import read_audio, write_audio

SEED = 21
SAMPLE_RATE = 16_000
LONGEST = 240.0  # seconds of one recording
SOUNDFONT = "/usr/share/sounds/sf2/FluidR3_GM.sf2"
BY_SA, CC0 = "CC BY-SA", "CC0"
SCORES: dict[str, tuple[str, str, str]] = {  # file of the corpus: what it is, licence of the encoding, split
    "schumann_clara/polonaise_op1n1.mxl": ("Clara Schumann, Polonaise op. 1 no. 1", f"{BY_SA} 4.0, Cypressdome", "train"),
    "schumann_clara/polonaise_op1n2.mxl": ("Clara Schumann, Polonaise op. 1 no. 2", f"{BY_SA} 4.0, Cypressdome", "train"),
    "schumann_clara/polonaise_op1n3.mxl": ("Clara Schumann, Polonaise op. 1 no. 3", f"{BY_SA} 4.0, Cypressdome", "test"),
    "schumann_clara/polonaise_op1n4.mxl": ("Clara Schumann, Polonaise op. 1 no. 4", f"{BY_SA} 4.0, Cypressdome", "train"),
    "corelli/opus3no1/1grave.xml": ("A. Corelli, op. 3 no. 1, Grave", "CC BY, 2014", "train"),
    "beach/prayer_of_a_tired_child.musicxml": ("A. Beach, Prayer of a Tired Child", f"{BY_SA}, M. S. Cuthbert", "train"),
    "weber/concertino_clarinet.mxl": ("C. M. von Weber, Concertino op. 26", "public domain, O. Seely 1998", "train"),
    "johnson_j_r/lift_every_voice.mxl": ("J. R. Johnson, Lift Every Voice", f"{CC0}, M. S. A. Cuthbert", "train"),
    "liliuokalani/aloha_oe.mxl": ("Liliuokalani, Aloha Oe", f"{CC0}, M. S. A. Cuthbert", "valid"),
    "ciconia/quod_jactatur.xml": ("J. Ciconia, Quod jactatur", f"{BY_SA} 3.0, M. S. Cuthbert", "train"),
    "luca/gloria.xml": ("D. Luca, Gloria", f"{BY_SA} 3.0, M. S. Cuthbert", "train"),
    "lusitano/allor_che_ignuda.mxl": ("V. Lusitano, Allor che ignuda", f"{CC0}, M. S. A. Cuthbert", "test"),
    "webern/webern_dormi_jesu_op_16_no_2.mxl": ("A. Webern, Dormi Jesu op. 16 no. 2", f"{BY_SA}, M. S. Cuthbert", "train"),
    "leadSheet/fosterBrownHair.mxl": ("S. Foster, Jeanie with the Light Brown Hair", "public domain", "train"),
}
# Programs of General MIDI, for the parts from the highest to the lowest; the last one for all that follow.
ENSEMBLES = {
    "piano": (0,), "piano, bright": (1,), "harpsichord": (6,), "organ": (19,), "guitar": (24,), "harp": (46,),
    "strings": (40, 40, 41, 42), "winds": (73, 68, 71, 70), "flute and piano": (73, 0), "violin and piano": (40, 0),
    "cello and harp": (42, 46), "clarinet and guitar": (71, 24), "string orchestra": (48,), "marimba": (12,),
}  # fmt: skip


class Note(NamedTuple):
    """One note, in seconds at the score's own tempo."""

    part: int
    start: float
    length: float
    pitch: int  # of MIDI
    loudness: float  # 0 to 1


def typed(name: str) -> list[Note]:
    """The notes of a piece of make_samples.py."""
    piece = PIECES[name]
    beat = 60 / piece.tempo
    return [
        Note(part, start * beat, length * beat, round(69 + 12 * math.log2(hertz / 440)), loudness)
        for part, line in enumerate(piece.parts)
        for start, length, hertz, loudness in notes(line.score)
    ]


def encoded(path: str) -> list[Note]:
    """The notes of a file of music21's corpus, repeats played where its marks are well-formed."""
    import music21

    score: Any = music21.converter.parse(Path(music21.__file__).parent / "corpus" / path)
    with contextlib.suppress(music21.exceptions21.Music21Exception):  # marks that do not fit together: played once
        score = score.expandRepeats()
    score = score.toSoundingPitch().stripTies()
    marks = [(start, mark.getQuarterBPM() or 90.0) for start, _, mark in score.metronomeMarkBoundaries()] or [(0.0, 90.0)]
    starts, tempos = np.array([start for start, _ in marks]), np.array([tempo for _, tempo in marks])
    begins = np.concatenate([[0.0], np.cumsum(np.diff(starts) * 60 / tempos[:-1])])  # seconds at which each mark stands

    def seconds(quarters: float) -> float:
        mark = max(0, int(np.searchsorted(starts, quarters, "right")) - 1)
        return float(begins[mark] + (quarters - starts[mark]) * 60 / tempos[mark])

    found = []
    for part, line in enumerate(score.parts):
        for element in line.flatten().notes:
            start, length = float(element.offset), float(element.quarterLength)
            if length == 0:  # a grace note, before its beat
                start, length = max(0.0, start - 0.125), 0.125
            first, last = seconds(start), seconds(start + length)
            found += [Note(part, first, last - first, pitch.midi, 0.6) for pitch in element.pitches]
    return found


def perform(score: list[Note], rng: np.random.Generator) -> tuple[list[Note], tuple[int, ...], str]:
    """The score as it is played once, a program for each part, and the ensemble's name.

    Another key and tempo; parts sorted from high to low; a loudness that swells and fades, and a touch for every note.
    """
    ensemble = str(rng.choice(list(ENSEMBLES)))
    key, tempo = int(rng.integers(-5, 7)), float(rng.uniform(0.85, 1.2))
    base, swing, period, phase = rng.uniform((0.45, 0.1, 6.0, 0.0), (0.8, 0.25, 14.0, 2 * np.pi))
    parts = sorted({note.part for note in score}, key=lambda part: -np.mean([n.pitch for n in score if n.part == part]))
    played = []
    for note in score:
        start = max(0.0, note.start / tempo + rng.normal(0, 0.008))
        swell = base + swing * np.sin(2 * np.pi * start / period + phase) + rng.normal(0, 0.04)
        loudness = float(np.clip(swell + note.loudness - 0.6 - 0.08 * (parts.index(note.part) > 0), 0.15, 1.0))
        length = note.length / tempo * rng.uniform(0.9, 1.0)
        played.append(Note(parts.index(note.part), start, length, min(108, max(21, note.pitch + key)), loudness))
    programs = ENSEMBLES[ensemble]
    return played, tuple(programs[min(part, len(programs) - 1)] for part in range(len(parts))), ensemble


def write_midi(path: Path, played: list[Note], programs: tuple[int, ...]) -> None:
    """Milliseconds as ticks; a note that is struck again while it sounds ends first."""
    import mido

    ends: dict[tuple[int, int], float] = {}
    events = []
    for note in sorted(played, key=lambda note: -note.start):  # from the last: where the next one of its pitch begins
        end = min(note.start + note.length, ends.get((note.part, note.pitch), math.inf))
        ends[note.part, note.pitch] = note.start
        events += [(note.start, 1, note), (max(end, note.start + 0.02), 0, note)]
    track = mido.MidiTrack()
    channel = [part if part < 9 else 10 + (part - 9) % 6 for part in range(len(programs))]  # 9 is for drums
    track += [mido.Message("program_change", program=p, channel=c) for p, c in zip(programs, channel, strict=True)]
    now = 0
    for time, on, note in sorted(events, key=lambda event: event[:2]):
        ticks = round(1000 * min(time, LONGEST))
        kind, loudness = ("note_on", round(20 + 100 * note.loudness)) if on else ("note_off", 0)
        if on and time >= LONGEST:
            continue
        message = mido.Message(kind, note=note.pitch, velocity=loudness, channel=channel[note.part], time=ticks - now)
        track.append(message)
        now = ticks
    mido.MidiFile(ticks_per_beat=500, tracks=[track]).save(path)  # 120 beats a minute: a tick is a millisecond


def render(score: list[Note], name: str, variant: int, soundfont: str, target: Path) -> tuple[float, str]:
    """Writes one recording; returns its seconds and who plays."""
    rng = np.random.default_rng([SEED, zlib.crc32(name.encode()), variant])
    played, programs, ensemble = perform(score, rng)
    with tempfile.TemporaryDirectory() as place:
        midi, wave = Path(place) / "score.mid", Path(place) / "audio.wav"
        write_midi(midi, played, programs)
        command = ["fluidsynth", "-ni", "-g", "0.5", "-r", "48000", "-F", str(wave), soundfont, str(midi)]
        subprocess.run(command, check=True, capture_output=True, timeout=300)
        audio, _ = read_audio(wave, SAMPLE_RATE, mono=True)
    loud = (audio.abs().amax(0) > 1e-3 * audio.abs().max()).nonzero()
    audio = audio[:, int(loud[0]) : int(loud[-1]) + 1]
    write_audio(target, 0.7 * audio / audio.abs().max(), SAMPLE_RATE)
    return audio.shape[-1] / SAMPLE_RATE, ensemble


def pieces() -> dict[str, tuple[str, str, str, Any]]:
    """Name: what it is, licence, split, and what reads its notes."""
    found: dict[str, tuple[str, str, str, Any]] = {}
    for name, piece in PIECES.items():
        if "blues" not in name:
            split, _, short = name.partition("/")
            found[short] = (piece.source, "Apache-2.0, typed by us", split, functools.partial(typed, name))
    for path, (title, licence, split) in SCORES.items():
        found[Path(path).stem] = (title, licence, split, functools.partial(encoded, path))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for train, valid and test")
    parser.add_argument("--variants", type=int, default=12, help="recordings of each piece (default 12)")
    parser.add_argument("--soundfont", default=SOUNDFONT)
    parser.add_argument("names", nargs="*", help="which pieces; all if none is named")
    args = parser.parse_args()
    if not shutil.which("fluidsynth") or not Path(args.soundfont).is_file():
        parser.error(
            f"fluidsynth must be installed, and the soundfont {args.soundfont} be there: apt-get install fluidsynth "
            "fluid-soundfont-gm, or name another with --soundfont."
        )
    known = pieces()
    if unknown := set(args.names) - set(known):
        parser.error(f"{', '.join(sorted(unknown))}: no such piece; known are {', '.join(known)}.")
    try:
        import mido  # noqa: F401
        import music21  # noqa: F401
    except ImportError as error:
        parser.error(f"{error.name} is not installed: pip install music21 mido.")
    warnings.filterwarnings("ignore", module="music21")
    total, lines = {"train": 0.0, "valid": 0.0, "test": 0.0}, []
    for name in args.names or known:
        title, licence, split, read = known[name]
        (args.out / split).mkdir(parents=True, exist_ok=True)
        score, players, seconds = read(), [], 0.0
        for variant in range(args.variants):
            long, ensemble = render(score, name, variant, args.soundfont, args.out / split / f"{name}_{variant:02d}.flac")
            seconds += long
            players.append(ensemble)
        total[split] += seconds
        lines.append(f"| {title} | {licence} | {split} | {seconds / 60:.1f} |")
        print(f"{split}/{name}: {len(score)} notes, {seconds / 60:.1f} min by {', '.join(players)}", flush=True)
    minutes = ", ".join(f"{split} {seconds / 60:.0f}" for split, seconds in total.items())
    (args.out / "README.md").write_text(
        "# Rendered scores\n\n16,000 Hz, mono, made by samples/render_scores.py of s4audio with "
        f"{args.variants} variants of each piece, seed {SEED}, and {Path(args.soundfont).name}; minutes: {minutes}. The "
        "licences are those of the encodings; the music is out of copyright. The whole is under the strictest, CC BY-SA 4.0."
        "\n\n"
        "| piece | licence | split | minutes |\n| --- | --- | --- | --- |\n" + "\n".join(lines) + "\n"
    )
    print(f"{args.out}: minutes: {minutes}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
