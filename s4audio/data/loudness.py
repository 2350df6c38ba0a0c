"""The loudness of a recording as ITU-R BS.1770-5 measures it: K-weighting, and a mean over what is not silent."""

import math

import numpy as np

LOWEST_RATE = 4000  # Hz; below, the K-weighting's shelf at 1.7 kHz does not fit into the band
STEP_SECONDS = 0.1  # powers are taken over this long; a gating block is four of them, and one begins at each
GATING_STEPS = 4


def k_weighting(sample_rate: int) -> np.ndarray:
    """The filter, (2, 6) second-order sections: a shelf that lifts what is above 1.7 kHz by 4 dB, a high-pass at 38 Hz.

    Source: the analogue filters behind the standard's table for 48 kHz, as B. De Man (*Evaluation of implementations of the
    EBU R128 loudness measurement*, AES 2018) found them; for any rate from 4,000 Hz.
    """
    K, Q, gain = _warped(1681.974450955533, sample_rate), 0.7071752369554196, 10 ** (3.999843853973347 / 20)
    middle, a0 = gain**0.4996667741545416, 1 + K / Q + K**2
    b = [(gain + middle * K / Q + K**2) / a0, 2 * (K**2 - gain) / a0, (gain - middle * K / Q + K**2) / a0]
    shelf = [*b, 1.0, 2 * (K**2 - 1) / a0, (1 - K / Q + K**2) / a0]
    K, table, Q = _warped(38.13547087602444, sample_rate), _warped(38.13547087602444, 48_000), 0.5003270373238773
    a0 = 1 + K / Q + K**2
    level = (1 + table / Q + table**2) / a0  # the table's b is 1, -2, 1, so that its filter lets pass a little more than all
    return np.array([shelf, [level, -2 * level, level, 1.0, 2 * (K**2 - 1) / a0, (1 - K / Q + K**2) / a0]])


def _warped(hertz: float, sample_rate: int) -> float:
    return math.tan(math.pi * hertz / sample_rate)


def integrated_loudness(powers: np.ndarray) -> float | None:
    """Loudness in LUFS; None for less than 0.4 s, or if nothing is above -70 LUFS.

    Args:
        powers: (steps,) mean square of the K-weighted audio over each 0.1 s, summed over the channels. Every channel has the
            weight 1, which is the standard's for mono and stereo.

    Source: ITU-R BS.1770-5, annex 1.
    """
    if len(powers) < GATING_STEPS:
        return None
    blocks = np.lib.stride_tricks.sliding_window_view(powers, GATING_STEPS).mean(-1)
    blocks = blocks[blocks > _power(-70.0)]
    if len(blocks) == 0:
        return None
    blocks = blocks[blocks > blocks.mean() / 10]  # 10 LU below
    return -0.691 + 10 * math.log10(blocks.mean())


def _power(lufs: float) -> float:
    return 10 ** ((lufs + 0.691) / 10)
