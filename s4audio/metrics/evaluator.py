"""Scores of a folder of generated audio against a folder of reference recordings, with everything needed to trust them."""

import hashlib
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from s4audio.audio import (
    DC_OFFSET,
    NORMALIZATIONS,
    RESAMPLER,
    SILENT_PEAK,
    AudioError,
    clipped_runs,
    decoders,
    find_audio,
    normalize,
    read_audio,
    resample,
    sample_rate_of,
)
from s4audio.losses import multi_resolution_stft
from s4audio.metrics.comparison import FEWEST_CLIPS, Progress, compare, memorization, silently
from s4audio.metrics.embeddings import Embedding, LogMel
from s4audio.metrics.frechet import FrechetInfinity
from s4audio.metrics.kernel import BANDWIDTH_RULE
from s4audio.metrics.neighbours import Nearest, nearest
from s4audio.metrics.resampling import count_windows, effective_windows, jackknife
from s4audio.metrics.signal import log_spectral_distance, mel_distance, si_sdr

FORMAT = 1  # of the dictionary; another number if a key or its meaning changed
DEFECTS = {
    "silent": "silent, as mono", "clipped": "clipped", "dc_shifted": "with a DC offset", "duplicate": "the same as another"
}  # fmt: skip
FEW_CLIPS = 20
LIBRARIES = ("torch", "torchaudio", "numpy", "soxr", "soundfile", "librosa")


class EmbeddedClip(NamedTuple):
    """A file and what is needed to find and to compare it."""

    name: str  # its path inside the folder
    file: Path
    seconds: float
    sha256: str  # of its samples
    defects: tuple[str, ...]
    windows: Tensor  # (windows, d)


class Folder(NamedTuple):
    """The embedded clips of a folder, sorted by their hash, so that no draw depends on a name."""

    path: str
    clips: list[EmbeddedClip]

    def windows(self) -> list[Tensor]:
        """(windows, d) of each clip."""
        return [clip.windows for clip in self.clips]

    def describe(self) -> dict[str, Any]:
        """What was compared; the hash is that of the samples, under whatever names and in whatever order."""
        return {
            "clips": len(self.clips), "windows": count_windows(self.windows()),
            "effective_windows": round(effective_windows(self.windows()), 1),
            "seconds": round(sum(clip.seconds for clip in self.clips), 3),
            "median_clip_seconds": round(float(np.median([clip.seconds for clip in self.clips])), 3),
            "sha256": hashlib.sha256("".join(sorted(clip.sha256 for clip in self.clips)).encode()).hexdigest(),
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
        embedding: `log_mel`, or anything that `metrics.embeddings.Embedding` describes, such as `s4audio.load_embedding` of
            a model folder. It gets one whole clip at a time, without gradients; a torch module is put in evaluation mode.
        sample_rate: in Hz, at which all files are compared; None wants them to have one rate.
        normalize: `peak` (every clip to a peak of full scale) or `none`.
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
        seed: int = 0,
        progress: Progress = silently,
    ) -> None:
        if isinstance(embedding, str) and embedding != "log_mel":
            raise ValueError(
                f"the embedding is {embedding!r}; wanted 'log_mel', load_embedding(FOLDER), or an object of your own."
            )
        if normalize not in NORMALIZATIONS:
            raise ValueError(f"normalize is {normalize!r}; choose one of {', '.join(NORMALIZATIONS)}.")
        if sample_rate is not None and sample_rate < 1:
            raise ValueError(f"the sample rate is {sample_rate}; wanted a positive number of Hz.")
        if seed < 0:
            raise ValueError(f"the seed is {seed}; wanted 0 or more.")
        if not isinstance(embedding, str):
            _check_embedding(embedding)
        self.embedding, self.sample_rate, self.normalize = embedding, sample_rate, normalize
        self.seed, self.progress = seed, progress

    def score(
        self, generated: str | Path, reference: str | Path, train: str | Path | None = None, paired: bool = False
    ) -> dict[str, Any]:
        """The scores of generated audio against a reference, in JSON's types; evaluation/README.md explains the keys.

        Args:
            generated: folder of audio to judge, three files or more.
            reference: folder of recordings it should sound like.
            train: folder of what the generator was trained on: adds memorization, and what the training clips score.
            paired: the generated files are reconstructions of the reference's, and called like them: adds signal metrics,
                and keeps the other scores from comparing a recording with itself. Reference files without a partner are left
                out.

        Raises:
            AudioError: a folder is missing, has fewer than 3 files, holds a file that cannot be used or is too short, or the
                files have different rates.
            ValueError: paired files that do not fit each other.
        """
        return self.evaluate(generated, reference, train, paired).scores

    def evaluate(
        self, generated: str | Path, reference: str | Path, train: str | Path | None = None, paired: bool = False
    ) -> Evaluation:
        """As `score`, with the embedded clips beside the scores."""
        folders = {"generated": generated, "reference": reference} | ({} if train is None else {"train": train})
        files = {role: find_audio(folder) for role, folder in folders.items()}
        pairs: list[tuple[Path, Path]] = []
        if paired:
            pairs = pair_files(Path(generated), files["generated"], Path(reference), files["reference"])
            files["reference"] = [real for _, real in pairs]
        for role, of_role in files.items():
            if len(of_role) < FEWEST_CLIPS:
                raise AudioError(
                    f"{role}: {folders[role]} has {len(of_role)} clip{'s' * (len(of_role) != 1)}; a score with its interval "
                    f"needs {FEWEST_CLIPS} files at least."
                )
        rate = self.common_rate([file for of_role in files.values() for file in of_role])
        embedding = self.embedding_at(rate)
        embedded = {role: self.embed(embedding, folder, files[role], rate) for role, folder in folders.items()}
        if paired:
            partner = dict(pairs)
            place = {clip.file: clip for clip in embedded["reference"].clips}
            aligned = [place[partner[clip.file]] for clip in embedded["generated"].clips]
            embedded["reference"] = embedded["reference"]._replace(clips=aligned)
        made, real, trained = embedded["generated"], embedded["reference"], embedded.get("train")
        scores, infinity = compare(made.windows(), real.windows(), self.seed, self.progress, paired)
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
        scores["warnings"] = _warnings(embedded, scores, embedding, rate, paired)
        scores["folders"] = {role: str(folder) for role, folder in folders.items()}
        scores["provenance"] = self.provenance(embedding, rate) | {
            "paired": paired, **{role: folder.describe() for role, folder in embedded.items()}
        }  # fmt: skip
        scores["provenance"]["embedding"]["dim"] = made.clips[0].windows.shape[-1]
        to_reference = nearest(made.windows(), real.windows())
        return Evaluation(scores, made, real, trained, infinity, to_reference, to_train, reference_to_train)

    def provenance(self, embedding: Embedding, rate: int) -> dict[str, Any]:
        """What scores depend on, beside the folders, in JSON's types."""
        from s4audio import __version__  # the package is not complete when this module is imported

        return {
            "format": FORMAT,
            "embedding": {
                "name": embedding.name, "sample_rate": embedding.sample_rate, "sha256": None,
                **getattr(embedding, "details", {}),
            },
            "sample_rate": rate, "channels": "mean", "normalize": self.normalize, "clip_length": "whole files",
            "resampler": RESAMPLER, "kernel_bandwidth": BANDWIDTH_RULE, "seed": self.seed,
            "decoder": decoders()[0],
            "versions": {"s4audio": __version__, **{name: version(name) for name in LIBRARIES}},
        }  # fmt: skip

    def embedding_at(self, rate: int) -> Embedding:
        """The embedding for audio at `rate`: `log_mel` is made for it, any other has its own rate."""
        return LogMel(rate) if isinstance(self.embedding, str) else self.embedding

    def embed(self, embedding: Embedding, folder: str | Path, files: Sequence[Path], rate: int) -> Folder:
        """Reads and embeds the files of a folder, one after the other.

        Raises:
            AudioError: files that cannot be used or are too short: how many, and the first of them.
            RuntimeError: the embedding failed; names the file.
        """
        clips: list[EmbeddedClip] = []
        problems: list[str] = []
        what = f"listening to {folder}"
        for number, file in enumerate(files):
            self.progress(what, number, len(files))
            try:
                audio = read_audio(file, rate)[0]
                windows = self.embed_clip(embedding, audio, rate)
            except ValueError as error:
                problems.append(str(error) if isinstance(error, AudioError) else f"{file}: {error}")
                continue
            except RuntimeError as error:
                raise RuntimeError(f"the embedding {embedding.name} failed on {file}: {error}") from error
            name = str(file.relative_to(folder)) if file != Path(folder) else file.name
            sha256 = hashlib.sha256(audio.numpy().tobytes()).hexdigest()
            clips.append(EmbeddedClip(name, file, audio.shape[-1] / rate, sha256, _defects(audio), windows))
        self.progress(what, len(files), len(files))
        if problems:
            raise AudioError(
                f"{len(problems)} of the {len(files)} files in {folder} cannot be scored, so nothing was; the first: "
                f"{problems[0]}"
            )
        return Folder(str(folder), sorted(clips, key=lambda clip: clip.sha256))

    def embed_clip(self, embedding: Embedding, clip: Tensor, rate: int) -> Tensor:
        """Mono audio (1, samples) at `rate` -> (windows, d) on the CPU.

        Raises:
            ValueError: it is too short, or the embedding gives something that is not finite or of another form.
        """
        audio = resample(normalize(clip, self.normalize), rate, embedding.sample_rate)
        with torch.inference_mode():
            vectors = torch.as_tensor(embedding(audio.unsqueeze(0))).float().cpu()
        if vectors.ndim != 3 or vectors.shape[0] != 1 or vectors.shape[1] == 0:
            raise ValueError(
                f"{embedding.name} gives {tuple(vectors.shape)}; wanted (1, windows, dim), one window at least."
            )
        if not torch.isfinite(vectors).all():
            raise ValueError(f"{embedding.name} gives values that are not finite.")
        return vectors[0].clone()  # not a view: an inference tensor, and whatever else the embedding keeps

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
            listed += ", …" if len(rates) > 3 else ""
            raise AudioError(
                f"the files have {len(rates)} sample rates: {listed}. Scores of one rate say nothing about another; set "
                f"sample_rate (--sample-rate) to {lowest} to compare all of them there, or leave those of low rates out."
            )
        return lowest

    def _paired(self, pairs: Sequence[tuple[Path, Path]], rate: int) -> dict[str, Any]:
        """Signal metrics of each generated file against its reference, at the level that brings the reference to its own."""
        files: list[dict[str, Any]] = []
        for number, (made_file, real_file) in enumerate(pairs):
            self.progress("comparing pairs", number, len(pairs))
            made, real = read_audio(made_file, rate)[0], read_audio(real_file, rate)[0]
            length, longer = sorted((made.shape[-1], real.shape[-1]))
            if longer - length > max(0.01 * length, 0.05 * rate):
                raise ValueError(
                    f"{made_file} lasts {made.shape[-1] / rate:.2f} s and {real_file} {real.shape[-1] / rate:.2f} s: pairs "
                    "may differ by 1 %, or 0.05 s."
                )
            made, real = made[..., :length], real[..., :length]
            if self.normalize == "peak" and real.abs().max() > 0:
                made, real = made / real.abs().max(), real / real.abs().max()
            values = {name: float(metric(made, real, rate)) for name, metric in PAIRED.items()}
            files.append({"generated": made_file.name, "reference": real_file.name, **values})
        self.progress("comparing pairs", len(pairs), len(pairs))
        means: dict[str, Any] = {}
        for name in PAIRED:
            means |= _mean(name, [file[name] for file in files])
        for file in files:  # JSON has no infinity
            file["si_sdr_db"] = file["si_sdr_db"] if abs(file["si_sdr_db"]) < np.inf else None
        return {"pairs": len(pairs), **means, "files": sorted(files, key=lambda file: file["mel_distance"], reverse=True)}


def _mean(name: str, of_pairs: Sequence[Any]) -> dict[str, Any]:
    """Mean over pairs with its interval; null if a pair has no finite value, as the SI-SDR of silence or of a perfect copy.

    Pairs with a silent reference do not count.
    """
    values = np.array([value for value in of_pairs if not np.isnan(value)])
    if len(values) == 0 or np.isinf(values).any():
        silent, identical = int((values == -np.inf).sum()), int((values == np.inf).sum())
        return {name: None, f"{name}_interval": None, f"{name}_silent": silent, f"{name}_identical": identical}
    without = [float(values.mean())] if len(values) == 1 else ((values.sum() - values) / (len(values) - 1)).tolist()
    estimate = jackknife(float(values.mean()), without)
    return {name: estimate.value, f"{name}_interval": [estimate.low, estimate.high]}


PAIRED: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "si_sdr_db": lambda estimate, reference, rate: si_sdr(estimate, reference),
    "log_spectral_distance_db": lambda estimate, reference, rate: log_spectral_distance(estimate, reference),
    "multi_resolution_stft": lambda estimate, reference, rate: multi_resolution_stft(estimate, reference),
    "mel_distance": lambda estimate, reference, rate: mel_distance(estimate, reference, rate),
}


def pair_files(
    generated: Path, generated_files: Sequence[Path], reference: Path, reference_files: Sequence[Path]
) -> list[tuple[Path, Path]]:
    """Each generated file with its reference: NAME or NAME_something with NAME, whatever the extensions.

    In the same subfolder, or else anywhere if there is one such NAME only.

    Raises:
        ValueError: a generated file has none, or several, or the same as another.
    """

    def inside(folder: Path, file: Path) -> Path:
        return (file.relative_to(folder) if file != folder else Path(file.name)).with_suffix("")

    by_path: dict[Path, list[Path]] = {}
    by_stem: dict[str, list[Path]] = {}
    for file in reference_files:
        by_path.setdefault(inside(reference, file), []).append(file)
        by_stem.setdefault(file.stem, []).append(file)
    pairs: dict[Path, Path] = {}
    for file in generated_files:
        words = file.stem.split("_")
        stems = ["_".join(words[:count]) for count in range(len(words), 0, -1)]
        folder = inside(generated, file).parent
        matches = next((by_path[folder / stem] for stem in stems if folder / stem in by_path), None)
        matches = matches or next((by_stem[stem] for stem in stems if stem in by_stem), [])
        if len(matches) != 1:
            found = f"{len(matches)} partners ({', '.join(map(str, matches[:3]))})" if matches else "no partner"
            rename = "; rename all but one, and what was made of them" if matches else ""
            raise ValueError(
                f"{file} has {found} in {reference}: pairs are NAME.wav or NAME_anything.wav with NAME.wav{rename}."
            )
        if matches[0] in pairs:
            raise ValueError(f"{pairs[matches[0]]} and {file} would both be compared with {matches[0]}; keep one of them.")
        pairs[matches[0]] = file
    return [(made, real) for real, made in pairs.items()]


def _defects(audio: Tensor) -> tuple[str, ...]:
    """What is wrong with a clip (1, samples)."""
    found = {
        "silent": audio.abs().max() < SILENT_PEAK,
        "clipped": clipped_runs(audio) > 0,
        "dc_shifted": audio.mean().abs() > DC_OFFSET,
    }
    return tuple(name for name, is_so in found.items() if is_so)


def _check_embedding(embedding: Embedding) -> None:
    """Raises: ValueError, if it has no name or rate, or cannot be called. A torch module is put in evaluation mode."""
    name, rate = getattr(embedding, "name", None), getattr(embedding, "sample_rate", None)
    if isinstance(embedding, type):
        raise ValueError(f"the embedding is the class {embedding.__name__}; give an object of it.")
    if not isinstance(name, str) or not isinstance(rate, int) or rate < 1 or not callable(embedding):
        raise ValueError(
            f"the embedding {type(embedding).__name__} has the name {name!r} and the sample_rate {rate!r}; wanted a text, a "
            "whole number of Hz, and something that can be called. A model goes through load_embedding(FOLDER)."
        )
    if isinstance(embedding, torch.nn.Module):
        embedding.eval()


def _warnings(
    embedded: dict[str, Folder], scores: dict[str, Any], embedding: Embedding, rate: int, paired: bool
) -> list[str]:
    """Sentences about what makes the scores less than they seem, the worst first."""
    found = []
    made, real = embedded["generated"], embedded["reference"]
    roles = list(embedded)
    for first, second in ((a, b) for i, a in enumerate(roles) for b in roles[i + 1 :]):
        same = {clip.sha256 for clip in embedded[first].clips} & {clip.sha256 for clip in embedded[second].clips}
        if same:
            found.append(f"sample for sample the same in the {first} and the {second} folder: {len(same)} clips.")
    copies = scores.get("memorization")
    if copies and copies["suspicious"]:
        found.append(
            f"{copies['share_nearer_than_95_percent_of_reference']:.0%} of the generated windows lie as close to a training "
            "window as only 5 % of the reference's do: training clips were probably learned by heart."
        )
    for role, folder in embedded.items():
        for defect, count in folder.count_defects().items():
            if defect in DEFECTS and count:
                found.append(f"{DEFECTS[defect]}: {count} of the {len(folder.clips)} {role} clips.")
    at_n, floor = scores["at_equal_n"] or {}, scores["floor"] or {}
    if "coverage" in at_n and at_n["coverage"] < 0.5 * floor["coverage"] and at_n["precision"] > 0.5 * floor["precision"]:
        found.append(
            "precision and density are high though few real windows are near: a few unusual windows of the reference reach "
            "far. Trust coverage and recall."
        )
    if embedding.sample_rate > 1.01 * rate:
        found.append(
            f"the embedding hears at {embedding.sample_rate} Hz and the files are compared at {rate} Hz: the upper part of "
            "what it hears is empty."
        )
    lengths = [folder.describe()["median_clip_seconds"] for folder in (made, real)]
    if max(lengths) > 1.2 * min(lengths):
        found.append(
            f"the generated clips last {lengths[0]:.3g} s and those of the reference {lengths[1]:.3g} s (medians): the "
            "verdict and the scores at equal numbers want clips of about one length."
        )
    if min(len(made.clips), len(real.clips)) < FEW_CLIPS:
        found.append(f"with fewer than {FEW_CLIPS} clips in a folder every score is rough: read the ranges.")
    if paired:
        found.append(
            "these are reconstructions: FID compares them with their own originals, and is near 0 for a good one; the other "
            "scores compare each with the originals of the others, and the verdict notices what changes them all alike."
        )
    return found
