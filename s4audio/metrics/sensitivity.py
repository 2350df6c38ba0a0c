"""What an embedding hears: the scores of recordings that were damaged on purpose, beside those of real ones."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from s4audio.audio import band_limit, find_audio, read_audio, resample
from s4audio.metrics.comparison import SIGNIFICANCE
from s4audio.metrics.evaluator import Evaluator
from s4audio.metrics.frechet import frechet_distance
from s4audio.metrics.kernel import bandwidth, kernel, kernel_audio_distance, permutation_test
from s4audio.metrics.resampling import Clips, shuffled

FEWEST_CLIPS, MAX_CLIPS, MAX_SECONDS = 16, 100, 30.0
NUM_SPLITS = 5  # of the clips into two halves
REAL = "nothing, real against real"

Damage = Callable[[Tensor, int], Tensor]  # (1, samples) at a rate in Hz -> (1, samples)


class Heard(NamedTuple):
    """What a damage does to the scores; means over splits of the clips into a damaged half and another as it was."""

    damage: str
    fid: float
    kad: float
    p_value: float  # of the verdict, mean over the splits
    noticed: bool
    better_than_real: bool  # FID or KAD is lower than that of real clips in every split, and by more than they vary


def _noise(snr_db: float) -> Damage:
    def damage(audio: Tensor, rate: int) -> Tensor:
        fresh = torch.randn(audio.shape, generator=torch.Generator().manual_seed(audio.shape[-1]))
        return audio + fresh * audio.square().mean().sqrt() * 10 ** (-snr_db / 20)

    return damage


def _low_pass(share: float) -> Damage:
    return lambda audio, rate: band_limit(audio, rate, max(1, int(share * rate)))


def _clipping(share: float) -> Damage:
    return lambda audio, rate: audio.clamp(-share * audio.abs().max(), share * audio.abs().max())


def _semitone(audio: Tensor, rate: int) -> Tensor:
    return resample(audio, rate, round(rate / 2 ** (1 / 12)))


DAMAGES: dict[str, Damage] = {
    **{f"white noise, {snr} dB below": _noise(snr) for snr in (40, 30, 20, 10, 0)},
    **{f"low-pass at {share:g} of the band": _low_pass(share) for share in (0.8, 0.5, 0.25)},
    **{f"clipped at {share:g} of the peak": _clipping(share) for share in (0.7, 0.4, 0.2)},
    "reversed": lambda audio, rate: audio.flip(-1),
    "a semitone higher and faster": _semitone,
    "6 dB quieter": lambda audio, rate: audio / 2,
    "silence": lambda audio, rate: torch.zeros_like(audio),
}
ONE_KIND = "only the quarter that is most alike"


def sensitivity(evaluator: Evaluator, folder: str | Path) -> list[Heard]:
    """The scores of every damage, real clips first; up to 100 clips of up to 30 s.

    The clips are split into two halves five times over. Each half is damaged and compared with the other as it was: a damage
    that moves one half closer to the other by chance moves the other half away from it, and the mean tells the damage alone.

    Raises:
        AudioError: as `Evaluator.score`, or there are fewer than 16 clips.
    """
    files = find_audio(folder)
    rate = evaluator.common_rate(files)
    embedding = evaluator.embedding_at(rate)
    if len(files) < FEWEST_CLIPS:
        raise ValueError(f"{folder} has {len(files)} clips; a sensitivity card needs {FEWEST_CLIPS} at least.")
    some = shuffled(files, evaluator.seed)[:MAX_CLIPS]
    clips = [read_audio(file, rate)[0][..., : round(MAX_SECONDS * rate)] for file in some]

    def embed(damage: Damage) -> list[Tensor]:
        return [evaluator.embed_clip(embedding, damage(clip, rate), rate) for clip in clips]

    number = len(DAMAGES) + 2
    evaluator.progress(REAL, 0, number)
    real = embed(lambda audio, rate: audio)
    orders = [shuffled(range(len(clips)), evaluator.seed, 1 + split) for split in range(NUM_SPLITS)]
    halves = [order for each in orders for order in (each, each[::-1])]
    width = bandwidth(real)
    of_real = _split_scores(real, real, halves, width, evaluator.seed)
    rows = [_heard(REAL, of_real, of_real)]
    for done, (name, damage) in enumerate(DAMAGES.items(), 1):
        evaluator.progress(name, done, number)
        rows.append(_heard(name, _split_scores(embed(damage), real, halves, width, evaluator.seed), of_real))
    evaluator.progress(ONE_KIND, number - 1, number)
    rows.append(_heard(ONE_KIND, _split_scores(None, real, halves, width, evaluator.seed), of_real))
    evaluator.progress("done", number, number)
    return rows


def _split_scores(damaged: Clips | None, real: Clips, halves: Sequence[Sequence[int]], width: float, seed: int) -> Tensor:
    """(splits, 3) FID, KAD and p of the damaged first half against the other; None damages by keeping one kind only."""
    scores = []
    for order in halves:
        half = len(order) // 2
        other = [real[i] for i in order[half:]]
        made = _alike([real[i] for i in order[:half]]) if damaged is None else [damaged[i] for i in order[:half]]
        kernels = kernel(made, other, width)
        fid = frechet_distance(torch.cat(made), torch.cat(other))
        scores.append((fid, kernel_audio_distance(kernels).value, permutation_test(kernels, seed, 199) or 1.0))
    return torch.tensor(scores)


def _heard(name: str, scores: Tensor, of_real: Tensor) -> Heard:
    fid, kad, p_value = scores.mean(0).tolist()
    gain = of_real[:, :2] - scores[:, :2]
    better = (gain > 0).all(0) & (gain.mean(0) > of_real[:, :2].std(0))
    return Heard(name, fid, kad, p_value, p_value < SIGNIFICANCE, bool(better.any()))


def _alike(clips: Sequence[Tensor]) -> list[Tensor]:
    """The quarter of the clips that lies closest together: a generator that knows one thing."""
    means = torch.stack([clip.mean(0) for clip in clips])
    quarter = max(2, len(clips) // 4)
    distances, nearest = torch.cdist(means, means).topk(quarter, largest=False)
    return [clips[i] for i in nearest[distances.sum(1).argmin()]]


def card(rows: Sequence[Heard]) -> dict[str, Any]:
    """The rows in JSON's types, and what an embedding does not hear or takes for better than real."""
    return {
        "rows": [row._asdict() for row in rows],
        "not_noticed": [row.damage for row in rows[1:] if not row.noticed],
        "better_than_real": [row.damage for row in rows[1:] if row.better_than_real],
    }
