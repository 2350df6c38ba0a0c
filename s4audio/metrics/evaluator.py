"""Scores of a folder of generated audio against a folder of reference recordings, with everything needed to trust them."""

import hashlib
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from s4audio.audio import NORMALIZATIONS, RESAMPLER, AudioError, find_audio, normalize, read_audio, resample, sample_rate_of
from s4audio.losses import multi_resolution_stft
from s4audio.metrics.comparison import Progress, compare, memorization, silently
from s4audio.metrics.embeddings import Embedding, LogMel
from s4audio.metrics.frechet import FrechetInfinity
from s4audio.metrics.kernel import BANDWIDTH_RULE
from s4audio.metrics.neighbours import Nearest, nearest
from s4audio.metrics.resampling import count_windows, jackknife
from s4audio.metrics.signal import log_spectral_distance, mel_distance, si_sdr

FORMAT = 1  # of the dictionary; another number if a key or its meaning changed
SILENT_PEAK = 1e-4  # -80 dB
CLIPPED_RUN, CLIPPED_LEVEL = 3, 0.999  # samples in a row at full scale
DC_OFFSET = 0.01  # -40 dB
DEFECTS = {
    "silent": "are silent", "clipped": "are clipped", "dc_shifted": "have a DC offset", "duplicate": "repeat another"
}  # fmt: skip
FEW_CLIPS = 20
LIBRARIES = ("torch", "torchaudio", "numpy", "soxr", "soundfile")


class EmbeddedClip(NamedTuple):
    """A clip and what is needed to find and to compare it."""

    name: str  # its file's path inside the folder, and where in it the clip starts, if files are cut
    file: Path
    start: float  # seconds from the beginning of the file
    seconds: float
    sha256: str  # of its samples
    defects: tuple[str, ...]
    windows: Tensor  # (windows, d)


class Folder(NamedTuple):
    """The embedded clips of a folder."""

    path: str
    clips: list[EmbeddedClip]
    dropped: int  # ends of files that are shorter than half a clip

    def windows(self) -> list[Tensor]:
        """(windows, d) of each clip."""
        return [clip.windows for clip in self.clips]

    def describe(self) -> dict[str, Any]:
        """What was compared; the hash is that of the samples, under whatever names and in whatever order."""
        digests = "".join(sorted(clip.sha256 for clip in self.clips))
        return {
            "clips": len(self.clips), "windows": count_windows(self.windows()), "dropped": self.dropped,
            "seconds": round(sum(clip.seconds for clip in self.clips), 3),
            "median_clip_seconds": round(float(np.median([clip.seconds for clip in self.clips])), 3),
            "sha256": hashlib.sha256(digests.encode()).hexdigest(),
        }  # fmt: skip

    def count_defects(self) -> dict[str, int]:
        """How many clips are silent, clipped, shifted, or the same as one before."""
        counts = {"clips": len(self.clips)} | {d: sum(d in clip.defects for clip in self.clips) for d in DEFECTS}
        return {**counts, "duplicate": len(self.clips) - len({clip.sha256 for clip in self.clips})}


class Evaluation(NamedTuple):
    """The scores, and what a report draws them from."""

    scores: dict[str, Any]  # in JSON's types
    generated: Folder
    reference: Folder
    train: Folder | None
    infinity: FrechetInfinity | None
    to_reference: Nearest  # of each generated clip
    to_train: Nearest | None
    reference_to_train: Nearest | None


class Evaluator:
    """Compares folders of audio by an embedding.

    Every clip is mixed to mono, brought to a common rate and level, embedded in windows, and compared as in
    evaluation/README.md. The same folders and seed give the same scores.

    Args:
        embedding: `log_mel`, or anything that `metrics.embeddings.Embedding` describes.
        sample_rate: in Hz, at which all files are compared; None wants them to have one rate.
        normalize: `peak` (every clip to a peak of full scale) or `none`.
        clip_seconds: cut longer files into clips of this length, which then count as clips of their own; None takes files
            whole.
        seed: of every random choice.
        progress: called with (what, done, total).

    Raises:
        ValueError: an argument outside its range.
    """

    def __init__(
        self,
        embedding: str | Embedding = "log_mel",
        *,
        sample_rate: int | None = None,
        normalize: str = "peak",
        clip_seconds: float | None = None,
        seed: int = 0,
        progress: Progress = silently,
    ) -> None:
        if isinstance(embedding, str) and embedding != "log_mel":
            raise ValueError(
                f"the embedding is {embedding!r}; wanted 'log_mel' or an object with name, sample_rate and call."
            )
        if normalize not in NORMALIZATIONS:
            raise ValueError(f"normalize is {normalize!r}; choose one of {', '.join(NORMALIZATIONS)}.")
        if (sample_rate is not None and sample_rate < 1) or (clip_seconds is not None and clip_seconds <= 0) or seed < 0:
            raise ValueError(
                f"sample_rate is {sample_rate}, clip_seconds {clip_seconds} and seed {seed}; wanted positive numbers, and "
                "a seed of 0 or more."
            )
        self.embedding, self.sample_rate, self.normalize = embedding, sample_rate, normalize
        self.clip_seconds, self.seed, self.progress = clip_seconds, seed, progress

    def score(
        self, generated: str | Path, reference: str | Path, train: str | Path | None = None, paired: bool = False
    ) -> dict[str, Any]:
        """The scores of generated audio against a reference, in JSON's types; evaluation/README.md explains the keys.

        Args:
            generated: folder (or one file) of audio to judge.
            reference: folder of recordings it should sound like.
            train: folder of what the generator was trained on: adds memorization, and what the training clips score.
            paired: the files belong together by name: adds signal metrics.

        Raises:
            AudioError: a folder is missing or empty, has one clip only, holds a file that cannot be used or is too short, or
                the files have different rates.
            ValueError: paired files that do not fit each other.
        """
        return self.evaluate(generated, reference, train, paired).scores

    def evaluate(
        self, generated: str | Path, reference: str | Path, train: str | Path | None = None, paired: bool = False
    ) -> Evaluation:
        """As `score`, with the embedded clips beside the scores."""
        from s4audio import __version__  # the package is not complete when this module is imported

        folders = {"generated": generated, "reference": reference} | ({} if train is None else {"train": train})
        files = {role: find_audio(folder) for role, folder in folders.items()}
        rate = self.common_rate([file for of_folder in files.values() for file in of_folder])
        embedding = self.embedding_at(rate)
        pairs = pair_files(files["generated"], files["reference"]) if paired else []
        embedded = {role: self.embed(embedding, folder, files[role], rate) for role, folder in folders.items()}
        for role, folder in embedded.items():
            if len(folder.clips) < 2:
                raise AudioError(
                    f"{role}: {folder.path} has one clip only, and a spread needs two; add files, or cut long ones into "
                    "clips of fewer seconds."
                )
        made, real, trained = embedded["generated"], embedded["reference"], embedded.get("train")
        scores, infinity = compare(made.windows(), real.windows(), self.seed, self.progress)
        to_train = reference_to_train = None
        if trained is not None:
            scores["train_against_reference"] = compare(trained.windows(), real.windows(), self.seed, self.progress).scores
            scores["memorization"], to_train, reference_to_train = memorization(
                made.windows(), real.windows(), trained.windows()
            )
            for pair in scores["memorization"]["closest"]:
                pair["generated"], pair["train"] = made.clips[pair["generated"]].name, trained.clips[pair["train"]].name
        if paired:
            scores["paired"] = self._paired(pairs, rate)
        scores["defects"] = {role: folder.count_defects() for role, folder in embedded.items()}
        scores["warnings"] = _warnings(embedded)
        scores["provenance"] = {
            "format": FORMAT,
            "embedding": {
                "name": embedding.name, "sample_rate": embedding.sample_rate, "dim": made.clips[0].windows.shape[-1],
                "sha256": None, **getattr(embedding, "details", {}),
            },
            "sample_rate": rate, "channels": "mean", "normalize": self.normalize, "clip_seconds": self.clip_seconds,
            "resampler": RESAMPLER, "kernel_bandwidth": BANDWIDTH_RULE, "seed": self.seed,
            **{role: folder.describe() for role, folder in embedded.items()},
            "versions": {"s4audio": __version__, **{name: version(name) for name in LIBRARIES}},
        }  # fmt: skip
        to_reference = nearest(made.windows(), real.windows())
        return Evaluation(scores, made, real, trained, infinity, to_reference, to_train, reference_to_train)

    def embedding_at(self, rate: int) -> Embedding:
        """The embedding for audio at `rate`: `log_mel` is made for it, any other has its own rate."""
        return LogMel(rate) if isinstance(self.embedding, str) else self.embedding

    def embed(self, embedding: Embedding, folder: str | Path, files: Sequence[Path], rate: int) -> Folder:
        """Reads and embeds the files of a folder, one after the other.

        Raises:
            AudioError: files that cannot be used or are too short: how many, and the first of them.
        """
        clips: list[EmbeddedClip] = []
        problems: list[str] = []
        dropped = 0
        what = f"listening to {folder}"
        for number, file in enumerate(files):
            self.progress(what, number, len(files))
            try:
                audio = read_audio(file, rate)[0]
                pieces = self.pieces(audio, rate)
                dropped += audio.shape[-1] > sum(piece.shape[-1] for piece in pieces)
                start = 0.0
                for piece in pieces:
                    name = str(file.relative_to(folder)) if file != Path(folder) else file.name
                    clips.append(
                        EmbeddedClip(
                            name if len(pieces) == 1 else f"{name} at {start:g} s", file, start, piece.shape[-1] / rate,
                            hashlib.sha256(piece.numpy().tobytes()).hexdigest(), _defects(piece),
                            self.embed_clip(embedding, piece, rate),
                        )
                    )  # fmt: skip
                    start += piece.shape[-1] / rate
            except ValueError as error:
                problems.append(str(error) if isinstance(error, AudioError) else f"{file}: {error}")
        self.progress(what, len(files), len(files))
        if problems:
            raise AudioError(
                f"{len(problems)} of the {len(files)} files in {folder} cannot be scored, so nothing was; the first: "
                f"{problems[0]}"
            )
        return Folder(str(folder), clips, dropped)

    def embed_clip(self, embedding: Embedding, clip: Tensor, rate: int) -> Tensor:
        """Mono audio (1, samples) at `rate` -> (windows, d) on the CPU.

        Raises:
            ValueError: it is too short, or the embedding gives something that is not finite or of another form.
        """
        audio = resample(normalize(clip, self.normalize), rate, embedding.sample_rate)
        vectors = embedding(audio.unsqueeze(0)).detach().float().cpu()
        if vectors.ndim != 3 or vectors.shape[0] != 1 or vectors.shape[1] == 0:
            raise ValueError(
                f"{embedding.name} gives {tuple(vectors.shape)}; wanted (1, windows, dim), one window at least."
            )
        if not torch.isfinite(vectors).all():
            raise ValueError(f"{embedding.name} gives values that are not finite.")
        return vectors[0]

    def pieces(self, audio: Tensor, rate: int) -> list[Tensor]:
        """The file, or the clips it is cut into; what is left at the end counts if it is at least half a clip, or all."""
        if self.clip_seconds is None:
            return [audio]
        pieces = list(audio.split(max(1, round(self.clip_seconds * rate)), dim=-1))
        if len(pieces) > 1 and 2 * pieces[-1].shape[-1] < pieces[0].shape[-1]:
            pieces.pop()
        return pieces

    def common_rate(self, files: Sequence[Path]) -> int:
        """The rate at which all files are compared, in Hz.

        Raises:
            AudioError: they have different rates and none was asked for, or one was that is above that of a file.
        """
        rates: dict[int, Path] = {}
        for file in files:
            rate = sample_rate_of(file)
            if rate is None:  # not by its header: decode it; what cannot be read is named when all are read
                try:
                    rate = read_audio(file)[1]
                except AudioError:
                    continue
            rates.setdefault(rate, file)
        if not rates:
            raise AudioError(f"none of the {len(files)} files can be read as audio; the first is {files[0]}.")
        lowest = min(rates)
        if self.sample_rate is not None:
            if self.sample_rate > lowest:
                raise AudioError(
                    f"{rates[lowest]} is at {lowest} Hz: files cannot be compared at {self.sample_rate} Hz, which it does "
                    f"not reach. Choose {lowest} Hz or less."
                )
            return self.sample_rate
        if len(rates) > 1:
            listed = ", ".join(f"{rate} Hz ({file})" for rate, file in sorted(rates.items())[:3])
            raise AudioError(
                f"the files have {len(rates)} sample rates: {listed}. Scores of one rate say nothing about another; set the "
                f"sample rate to {lowest} to compare all of them there."
            )
        return lowest

    def _paired(self, pairs: Sequence[tuple[Path, Path]], rate: int) -> dict[str, Any]:
        """Signal metrics of each generated file against its reference, at the level that brings the reference to its own."""
        values: dict[str, list[float]] = {name: [] for name in PAIRED}
        for number, (made_file, real_file) in enumerate(pairs):
            self.progress("comparing pairs", number, len(pairs))
            made, real = read_audio(made_file, rate)[0], read_audio(real_file, rate)[0]
            length = min(made.shape[-1], real.shape[-1])
            if max(made.shape[-1], real.shape[-1]) - length > max(0.01 * length, 0.05 * rate):
                raise ValueError(
                    f"{made_file} lasts {made.shape[-1] / rate:.2f} s and {real_file} {real.shape[-1] / rate:.2f} s: "
                    "they are no pair."
                )
            made, real = made[..., :length], real[..., :length]
            if self.normalize == "peak" and real.abs().max() > 0:
                made, real = made / real.abs().max(), real / real.abs().max()
            for name, metric in PAIRED.items():
                values[name].append(float(metric(made, real, rate)))
        self.progress("comparing pairs", len(pairs), len(pairs))
        scores: dict[str, Any] = {"pairs": len(pairs)}
        for name, of_pairs in values.items():
            finite = np.array([value for value in of_pairs if np.isfinite(value)])
            scores[name] = None if len(finite) == 0 else float(finite.mean())
            if len(finite) > 1:
                without = (finite.sum() - finite) / (len(finite) - 1)
                estimate = jackknife(float(finite.mean()), without.tolist())
                scores[f"{name}_interval"] = [estimate.low, estimate.high]
            scores[f"{name}_undefined"] = len(of_pairs) - len(finite)
        return scores


PAIRED: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "si_sdr_db": lambda estimate, reference, rate: si_sdr(estimate, reference),
    "log_spectral_distance_db": lambda estimate, reference, rate: log_spectral_distance(estimate, reference),
    "multi_resolution_stft": lambda estimate, reference, rate: multi_resolution_stft(estimate, reference),
    "mel_distance": lambda estimate, reference, rate: mel_distance(estimate, reference, rate),
}


def pair_files(generated: Sequence[Path], reference: Sequence[Path]) -> list[tuple[Path, Path]]:
    """Each generated file with its reference: NAME or NAME_something with NAME, whatever the extensions.

    Raises:
        ValueError: a generated file has none, or the same as another.
    """
    by_stem = {file.stem: file for file in reference}
    pairs: dict[Path, Path] = {}
    for file in generated:
        words = file.stem.split("_")
        stems = ["_".join(words[:count]) for count in range(len(words), 0, -1)]
        match = next((by_stem[stem] for stem in stems if stem in by_stem), None)
        if match is None:
            raise ValueError(
                f"{file} has no partner: no reference file is called {words[0]}… as it is. Pairs are NAME.wav, or "
                "NAME_reconstructed.wav, with NAME.wav."
            )
        if match in pairs:
            raise ValueError(
                f"{pairs[match]} and {file} would both be compared with {match}; keep one of them in the folder."
            )
        pairs[match] = file
    return [(made, real) for real, made in pairs.items()]


def _defects(audio: Tensor) -> tuple[str, ...]:
    """What is wrong with a clip (1, samples)."""
    full = (audio[0].abs() >= CLIPPED_LEVEL).float()
    run = min(CLIPPED_RUN, len(full))
    found = {
        "silent": audio.abs().max() < SILENT_PEAK,
        "clipped": bool((full.unfold(0, run, 1).sum(-1) == run).any()),
        "dc_shifted": audio.mean().abs() > DC_OFFSET,
    }
    return tuple(name for name, is_so in found.items() if is_so)


def _warnings(embedded: dict[str, Folder]) -> list[str]:
    """Sentences about what makes the scores less than they seem."""
    found = []
    made, real = embedded["generated"], embedded["reference"]
    for role, folder in embedded.items():
        for defect, count in folder.count_defects().items():
            if defect in DEFECTS and count:
                found.append(f"{count} of the {len(folder.clips)} {role} clips {DEFECTS[defect]}.")
    lengths = [folder.describe()["median_clip_seconds"] for folder in (made, real)]
    if max(lengths) > 2 * min(lengths):
        found.append(
            f"the generated clips last {lengths[0]:.3g} s and those of the reference {lengths[1]:.3g} s: a clip of one does "
            "not weigh as much as one of the other. Cut them to one length (clip_seconds)."
        )
    if min(len(made.clips), len(real.clips)) < FEW_CLIPS:
        found.append(f"with fewer than {FEW_CLIPS} clips in a folder every score is rough: read the intervals.")
    roles = list(embedded)
    for first, second in ((a, b) for i, a in enumerate(roles) for b in roles[i + 1 :]):
        same = {clip.sha256 for clip in embedded[first].clips} & {clip.sha256 for clip in embedded[second].clips}
        if same:
            found.append(f"{len(same)} clips are, sample for sample, in the {first} folder and in the {second} one.")
    return found
