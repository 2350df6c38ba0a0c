"""Flow matching: sound from noise along nearly straight lines, and from other sound by going a part of the way.

x_t = (1 - t) noise + t data, and a network learns the velocity data - noise of every point in between; following it from
noise at t = 0 to t = 1 makes a clip. Data are the samples themselves, or the latents of a trained autoencoder.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from s4audio.layers import S4D, ModulatedBlock, frozen
from s4audio.models.autoencoder import (
    Generators,
    WaveformAutoencoder,
    blocks_of_stages,
    check_audio,
    check_classes,
    check_counts,
    check_labels,
    check_sample_rate,
    check_stages,
    noise,
    within_full_scale,
)
from s4audio.models.samplers import Solver, Velocity, flow_times, heun, multistep, replayed

D_EMBEDDING = 128  # of the time and the label
NUM_STEPS, GUIDANCE = 32, 2.0  # of sampling, unless told otherwise
KNOWN_SHARE = 0.3  # of the clips of a training: those that are known but for a span
KNOWN_GUIDANCE = 2.0  # as of a label: 1 follows what was learned of what is around a span, and is too faint
HELD_OUT_TIMES = 8  # at which a clip is heard in a validation
LET_GO = 0.9  # time from which what is around a span may move with it, which takes the seams away; 3 steps reach it
FADE_SECONDS = 0.02  # in a span, from its borders
WINDOWS = 32  # of a variation, at most, that go through the network at a time
SMALLEST_DEVIATION = 1e-4  # of a channel of the data: what never changes is not blown up


class Flow(nn.Module):
    """Rectified flow by a U-Net of bidirectional S4D blocks, on raw audio or on the latents of an autoencoder.

    In training, all of some clips but a span of them is known to the network, which learns to make spans that fit what is
    around them, and what goes on with a beginning. What is longer than the clips of the training is made so, too: in windows
    as long as those, one after the other, each of which knows the part of it that is there already. S4D takes any length,
    but the sums that its slowest modes come to in a longer one were never seen, and what it makes of them is mush.

    Args:
        sample_rate: of the audio it is trained on, in Hz.
        autoencoder: makes the latents and decodes them; it is kept as it is. None works on the samples themselves.
        classes: names of the labels, in the order of their numbers; empty for a model without labels.
        strides: downsampling factors of the U-Net, 2 or more, outermost first.
        widths: channels of each stage, outermost first; one more than strides.
        num_blocks: S4D blocks of each stage, outermost first, on the way down and again on the way up; one number for all.
        d_state: real state size of each channel.
        label_dropout: share of the clips whose label is withheld in training, for guidance.
        channels: of the audio.
        dt_min: smallest step size at initialization, in steps of the layer's own rate.
        dt_max: largest step size at initialization.

    Raises:
        ValueError: arguments that do not fit each other or lie outside their range, or what S4D refuses.

    Source: Liu et al. 2023, "Flow straight and fast: learning to generate and transfer data with rectified flow"; guidance
    from Ho and Salimans 2022, "Classifier-free diffusion guidance"; the windows of variations from Bar-Tal et al. 2023,
    "MultiDiffusion".
    """

    def __init__(
        self,
        sample_rate: int,
        *,
        autoencoder: WaveformAutoencoder | None = None,
        classes: Sequence[str] = (),
        strides: Sequence[int] = (4, 4),
        widths: Sequence[int] = (32, 96, 192),
        num_blocks: int | Sequence[int] = 2,
        d_state: int = 32,
        label_dropout: float = 0.1,
        channels: int = 1,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
    ) -> None:
        super().__init__()
        check_sample_rate(sample_rate)
        check_stages(widths, strides)
        depths = blocks_of_stages(num_blocks, widths)
        if min(strides, default=2) < 2 or min(*widths, channels) < 1:
            raise ValueError(
                f"strides {list(strides)} must be at least 2, widths {list(widths)} and channels {channels} at least 1."
            )
        if not 0 <= label_dropout < 1:
            raise ValueError(f"label_dropout is {label_dropout}; wanted at least 0 and below 1.")
        check_classes(classes)
        _check_autoencoder(autoencoder, sample_rate, channels)
        self.sample_rate, self.classes, self.channels = sample_rate, tuple(classes), channels
        self.label_dropout = label_dropout
        self.strides, self.widths, self.d_state = tuple(strides), tuple(widths), d_state
        self.num_blocks = num_blocks if isinstance(num_blocks, int) else tuple(num_blocks)
        self.dt_min, self.dt_max = dt_min, dt_max
        self.autoencoder = None if autoencoder is None else autoencoder.eval().requires_grad_(False)
        self.frame = 1 if autoencoder is None else autoencoder.hop_length  # samples of a point of the data
        self.hop_length = self.frame * math.prod(strides)  # and of one of the innermost stage
        dims: int = channels if autoencoder is None else autoencoder.latent_channels

        def stage(index: int) -> nn.ModuleList:
            layer = partial(S4D, widths[index], d_state, dt_min=dt_min, dt_max=dt_max, bidirectional=True)
            return nn.ModuleList(ModulatedBlock(layer(), D_EMBEDDING) for _ in range(depths[index]))

        self.embed_time = nn.Sequential(nn.Linear(D_EMBEDDING, D_EMBEDDING), nn.GELU(), nn.Linear(D_EMBEDDING, D_EMBEDDING))
        self.embed_label = nn.Embedding(len(classes) + 1, D_EMBEDDING)  # the last is no label
        self.enter = nn.Conv1d(dims, widths[0], 7, padding=3)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        self.blocks_down, self.blocks_up = nn.ModuleList(), nn.ModuleList()
        for index, (width, wider, stride) in enumerate(zip(widths, widths[1:], strides, strict=False)):
            padding = -(-stride // 2)
            self.blocks_down.append(stage(index))
            self.down.append(nn.Conv1d(width, wider, 2 * stride, stride, padding=padding))
            self.up.append(nn.ConvTranspose1d(wider, width, 2 * stride, stride, padding=padding, output_padding=stride % 2))
            self.blocks_up.append(stage(index))
        self.blocks_inside = stage(len(strides))
        # Of what is known, and where: zeros, which change nothing, where nothing is.
        self.enter_known = nn.Conv1d(dims + 1, widths[0], 7, padding=3, bias=False)
        nn.init.zeros_(self.enter_known.weight)
        # No norm before it: the velocity holds the noise itself, which the shortcuts carry through.
        self.leave = nn.Conv1d(widths[0], dims, 7, padding=3)
        self.data_mean: Tensor
        self.data_square: Tensor
        self.num_batches: Tensor
        self.trained_length: Tensor
        self.register_buffer("trained_length", torch.zeros((), dtype=torch.long))  # of the longest clip, in points
        self.register_buffer("data_mean", torch.zeros(dims, 1))
        self.register_buffer("data_square", torch.ones(dims, 1))
        self.register_buffer("num_batches", torch.zeros(()))

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None, known: Tensor | None = None) -> Tensor:
        """Points (B, D, L) at times (B,) from 0 (noise) to 1 (data) -> velocities (B, D, L).

        label (B,) are numbers of their classes, and known (B, D + 1, L) the data where they are known, and 1 there; zeros
        elsewhere.
        """
        if label is not None and not self.classes:
            raise ValueError("there are labels, but the model has no classes; name them when it is built.")
        if label is None:
            label = torch.full(time.shape, len(self.classes), device=time.device)
        embedding = F.gelu(self.embed_time(_waves(time)) + self.embed_label(label))  # (B, E)
        length = x.shape[-1]
        padding = (0, -length % (self.hop_length // self.frame))
        u = self.enter(F.pad(x, padding))
        if known is not None:
            u = u + self.enter_known(F.pad(known, padding))
        kept = []
        for blocks, down in zip(self.blocks_down, self.down, strict=True):
            u = _through(blocks, u, embedding)
            kept.append(u)
            u = down(u)
        u = _through(self.blocks_inside, u, embedding)
        for up, blocks in zip(reversed(self.up), reversed(self.blocks_up), strict=True):
            u = _through(blocks, up(u) + kept.pop(), embedding)
        return self.leave(u)[..., :length]

    def train(self, mode: bool = True) -> "Flow":
        """As of nn.Module; but the autoencoder is not trained, and counts nothing of what it hears."""
        super().train(mode)
        if self.autoencoder is not None:
            self.autoencoder.eval()
        return self

    def training_losses(self, audio: Tensor, label: Tensor | None = None) -> dict[str, Tensor]:
        """`flow`, the mean squared error of velocities at random times, 0 where data are known; also follows their size.

        Validation knows nothing, and takes the same noise and times for every clip, so that it shows the model and neither
        the draw nor the batch.
        """
        data = self._data(audio).to(self.data_mean.dtype)  # also where autocast computes the latent in half of it
        if not self.training:
            data, free = self._normalized(data), torch.ones_like(data[:, :1])
            drawn = noise((1, *data.shape[1:]), torch.Generator().manual_seed(0)).to(data).expand_as(data)
            times = ((k + 0.5) / HELD_OUT_TIMES for k in range(HELD_OUT_TIMES))
            errors = [self._error(data, drawn, data.new_full((len(data),), t), label, free) for t in times]
            return {"flow": torch.stack(errors).mean()}
        self._follow(data)
        time, drawn, free = torch.rand_like(data[:, 0, 0]), torch.randn_like(data), _spans(data)
        if label is not None:
            withheld = torch.rand(label.shape, device=label.device) < self.label_dropout
            label = torch.where(withheld, len(self.classes), label)
        return {"flow": self._error(self._normalized(data), drawn, time, label, free)}

    def _error(self, data: Tensor, drawn: Tensor, time: Tensor, label: Tensor | None, free: Tensor) -> Tensor:
        """The mean square of a velocity's error, over all points, so that a batch can be taken in parts."""
        x = torch.lerp(drawn, data, time.view(-1, 1, 1))
        error = self(x, time, label, _known(data, free)).to(x.dtype) - (data - drawn)
        return (free * error.square()).mean()

    @torch.no_grad()
    def sample(
        self,
        batch_size: int,
        num_samples: int,
        *,
        label: Tensor | None = None,
        generator: Generators = None,
        num_steps: int = NUM_STEPS,
        guidance: float = GUIDANCE,
        solver: Solver = multistep,
    ) -> Tensor:
        """(B, channels, num_samples) from noise; a clip that would go beyond full scale is made quieter as a whole.

        Args:
            batch_size: B.
            num_samples: of each clip.
            label: (B,) numbers of classes; None leaves it to the noise.
            generator: one, or one per clip.
            num_steps: of the solver; fewer are quicker and fainter: clips of `classical-16k` by 14 dB at 4, 3 at 8, 1 at 16.
            guidance: 1 follows what was learned of the label, more than 1 exaggerates it, 0 forgets it.
            solver: one of samplers.

        Raises:
            ValueError: a label that does not exist, or an argument outside its range.
        """
        check_counts(batch_size=batch_size, num_samples=num_samples)
        length = -(-num_samples // self.frame)
        nothing = self.data_mean.new_zeros(batch_size, len(self.data_mean), length)
        x = self._made(nothing, 0, length, generator, label, num_steps, guidance, solver)
        return within_full_scale(self._audio(x, num_samples))

    @torch.no_grad()
    def vary(
        self,
        audio: Tensor,
        strength: float,
        generator: Generators = None,
        *,
        label: Tensor | None = None,
        num_steps: int = NUM_STEPS,
        guidance: float = GUIDANCE,
    ) -> Tensor:
        """The clips again, mixed with noise up to time 1 - strength and brought back.

        Args:
            audio: (B, channels, T), as loud as those of the training: at a peak of 1, of the models that come along.
            strength: 0 gives the clips back (through the autoencoder, if there is one), 1 makes others.
            generator: one, or one per clip.
            label: as all of what follows, of `sample`; another label than the clip's own changes what it says.

        Raises:
            ValueError: strength is outside [0, 1], the audio is not what is wanted, or as `sample`.
        """
        self._check(audio)
        if not 0 <= strength <= 1:
            raise ValueError(f"the variation is {strength}; wanted 0 (the clip itself) to 1 (another clip).")
        velocity = self._velocity(self._through_windows, label, guidance)
        times = flow_times(num_steps, 1 - strength)
        data = self._data(audio)
        if strength == 0:
            return audio if self.autoencoder is None else self.autoencoder.decode(data, audio.shape[-1])
        x = torch.lerp(noise(data.shape, generator).to(data), self._normalized(data), 1 - strength)
        return self._audio(self._solved(velocity, x, times), audio.shape[-1])

    @torch.no_grad()
    def inpaint(
        self,
        audio: Tensor,
        start: int,
        stop: int,
        generator: Generators = None,
        *,
        label: Tensor | None = None,
        num_steps: int = NUM_STEPS,
        guidance: float = GUIDANCE,
    ) -> Tensor:
        """The clips with the samples from `start` to `stop` made anew, to fit what is around them.

        The rest is the given audio bit for bit, and what stood in the span has no say. The network is told what is known
        around the span, as much as fits into a window with it; of a span of more than half a window, what is behind is told
        to the last windows only. It is heeded more than was learned, as a label is (KNOWN_GUIDANCE). At last the rest may
        move, too, which takes the seams away, and is put back; and over 20 ms from its borders the span is moved to where
        the audio is.

        Args:
            audio: (B, channels, T), as loud as those of the training: at a peak of 1, of the models that come along.
            start: first sample of the span.
            stop: the sample after its last.
            generator: one, or one per clip.
            label: as all of what follows, of `sample`.

        Raises:
            ValueError: the span is empty or not inside of the clips, or as `vary`.
        """
        self._check(audio)
        length = audio.shape[-1]
        if not isinstance(start, Integral) or not isinstance(stop, Integral):
            raise ValueError(f"the span is {start} to {stop}; wanted whole numbers, in samples.")
        if not 0 <= start < stop <= length:
            raise ValueError(f"the span is {start} to {stop}; wanted one inside of the {length} samples of the clip.")
        heard = -(-self._window(-(-length // self.frame)) * self.frame // self.hop_length) * self.hop_length
        first, last = max(0, start - heard), min(length, stop + heard)
        if (first, last) != (0, length):
            part = audio[..., first:last]
            how: dict[str, Any] = {"label": label, "num_steps": num_steps, "guidance": guidance}
            made = self.inpaint(part, start - first, stop - first, generator, **how)
            return torch.cat([audio[..., :first], made, audio[..., last:]], dim=-1)
        places = torch.arange(length, device=audio.device)
        outside = (places < start) | (places >= stop)
        data = self._normalized(self._data(audio * outside))
        beside = 0 if self.autoencoder is None else 1  # frame next to the span, whose latent hears most of the hole
        ends = max(0, start // self.frame - beside), min(data.shape[-1], -(-stop // self.frame) + beside)
        x = self._made(data, *ends, generator, label, num_steps, guidance)
        fade = min(round(FADE_SECONDS * self.sample_rate), stop - start - 1)  # what one border moves stays off the other
        return torch.where(outside, audio, _joined(audio, self._audio(x, length), start, stop, fade))

    def continue_(
        self,
        audio: Tensor,
        num_samples: int,
        *,
        generator: Generators = None,
        label: Tensor | None = None,
        num_steps: int = NUM_STEPS,
        guidance: float = GUIDANCE,
    ) -> Tensor:
        """(B, channels, num_samples) that follow on (B, channels, T), as `inpaint` makes them."""
        self._check(audio)
        check_counts(num_samples=num_samples)
        length, longer = audio.shape[-1], F.pad(audio, (0, num_samples))
        made = self.inpaint(
            longer, length, length + num_samples, generator, label=label, num_steps=num_steps, guidance=guidance
        )
        return made[..., length:]

    @torch.no_grad()
    def interpolate(
        self,
        first: Tensor,
        last: Tensor,
        num: int,
        *,
        label: Tensor | None = None,
        num_steps: int = NUM_STEPS,
    ) -> Tensor:
        """(num, channels, T) clips on the way from one to another: their noises, found by going back, and those in between.

        The ends are the two clips, as far as the flow there and back is exact.

        Args:
            first: (channels, T).
            last: of the same shape.
            num: how many clips, with both ends.
            label: the number of a class, (1,), of all of them.
            num_steps: of `heun`, which can go back and takes two velocities a step, there and back; followed as learned,
                without guidance.

        Raises:
            ValueError: the clips differ in shape, num is below 2, or as `vary`.
        """
        check_counts(num=num)
        if first.shape != last.shape:
            raise ValueError(f"the clips are {tuple(first.shape)} and {tuple(last.shape)}; wanted two of one shape.")
        if num < 2:
            raise ValueError(f"num is {num}; wanted at least 2, the two ends.")
        both = torch.stack([first, last])
        self._check(both)
        ends = self._normalized(self._data(both))
        if label is not None:
            check_labels(label, self.classes)
            if label.shape != (1,):
                raise ValueError(f"label is {label.tolist()}; wanted one number, in a list, of all clips.")
            label = label.expand(num)
        times = flow_times(num_steps)
        ours = partial(self._velocity, self._through_windows, guidance=1.0)
        a, b = self._solved(ours(None if label is None else label[:2]), ends, times[::-1], heun)
        x = torch.stack([_slerp(a, b, index / (num - 1)) for index in range(num)])
        return self._audio(self._solved(ours(label), x, times, heun), first.shape[-1])

    def _made(
        self,
        data: Tensor,
        start: int,
        stop: int,
        generator: Generators,
        label: Tensor | None,
        num_steps: int,
        guidance: float,
        solver: Solver = multistep,
    ) -> Tensor:
        """Normalized data (B, D, L) with the points from `start` to `stop` made anew, window after window.

        Each makes as much of the span as the others, or, where too little is known before, all that it holds, and knows what
        is before that and, near the span's end, behind it. What is known moves at last with what is made, less and less so
        away from it.
        """
        made, drawn = data.clone(), noise(data.shape, generator).to(data)
        length = data.shape[-1]
        window = self._window(length)
        network, times = replayed(self), flow_times(num_steps)
        with frozen(self):  # once: the graphs are of these systems
            while start < stop:
                rest = stop - start
                parts = -(-2 * rest // window)  # of half a window at most
                before = (window - rest) // 2 if parts == 1 else window - -(-rest // parts)
                first = min(max(0, start - before), length - window)
                last = first + window
                here, places = slice(first, last), torch.arange(first, last, device=data.device)
                free = (places >= start) & (places < stop)
                known = _known(made[..., here], free.to(data))
                heed = KNOWN_GUIDANCE if first < start or stop < last else 1.0
                velocity = self._velocity(partial(_told, network, known, heed), label, guidance)
                held = _holding(velocity, free, made[..., here] - drawn[..., here])
                x = solver(held, drawn[..., here], times)
                share = torch.minimum(
                    (places - first + 1) / (start - first + 1), (last - places) / (last - min(stop, last) + 1)
                )
                made[..., here] = torch.lerp(made[..., here], x, share.clamp_max(1).to(data))
                start = last
        return made

    def _window(self, length: int) -> int:
        """Points that are made at a time, of so many: a clip of the training, at most."""
        return min(int(self.trained_length) or length, length)

    def _through_windows(self, x: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        """The velocities (B, D, L) of points at one time (B,); of more than a window, the mean over several.

        Each of them overlaps the next by half or more.
        """
        length = x.shape[-1]
        window = self._window(length)
        if window == length:
            return self(x, time, label)
        count = 1 + math.ceil((length - window) / (window / 2))
        starts = [round(index * (length - window) / (count - 1)) for index in range(count)]
        parts = torch.cat([x[..., start : start + window] for start in starts]).split(WINDOWS)  # of (count B, D, window)
        labels = [None] * len(parts) if label is None else label.repeat(count).split(WINDOWS)
        found = torch.cat([self(part, time[:1].expand(len(part)), its) for part, its in zip(parts, labels, strict=True)])
        # A window counts most in its middle, where it hears as much of what was before as of what comes. In float32 the
        # ends of a long one would be zero.
        share = torch.hann_window(window + 2, periodic=False, device=x.device, dtype=torch.float64)[1:-1].to(x.dtype)
        total, shares = torch.zeros_like(x), x.new_zeros(length)
        for start, velocity in zip(starts, found.split(len(x)), strict=True):
            total[..., start : start + window] += share * velocity
            shares[start : start + window] += share
        return total / shares

    def _velocity(self, network: Callable[..., Tensor], label: Tensor | None, guidance: float) -> Velocity:
        """What a solver follows, of a network (x, times, labels) -> velocities: with guidance, where there are labels."""
        if label is None:
            return lambda x, t: network(x, x.new_full((len(x),), t), None)
        check_labels(label, self.classes)
        if not 0 <= guidance < math.inf:
            raise ValueError(f"guidance is {guidance}; wanted at least 0, usually 1 to 4.")
        both = torch.cat([label, torch.full_like(label, len(self.classes))])

        def velocity(x: Tensor, t: float) -> Tensor:
            if len(label) != len(x):
                raise ValueError(f"label has {len(label)} numbers for {len(x)} clips; wanted one for each.")
            if guidance == 1:
                return network(x, x.new_full((len(x),), t), label)
            guided, unguided = network(x.repeat(2, 1, 1), x.new_full((2 * len(x),), t), both).chunk(2)
            return torch.lerp(unguided, guided, guidance)

        return velocity

    def _solved(self, velocity: Velocity, x: Tensor, times: Sequence[float], solver: Solver = multistep) -> Tensor:
        """x at the last time."""
        with frozen(self):
            return solver(velocity, x, times)

    @torch.no_grad()
    def _data(self, audio: Tensor) -> Tensor:
        """What the flow ends at, (B, D, L), before it is normalized."""
        return audio if self.autoencoder is None else self.autoencoder.encode(audio)

    def _check(self, audio: Tensor) -> None:
        check_audio(audio, self.channels, self.data_mean.dtype)

    def _deviation(self) -> Tensor:
        return (self.data_square - self.data_mean.square()).clamp_min(SMALLEST_DEVIATION**2).sqrt()

    def _normalized(self, data: Tensor) -> Tensor:
        return (data - self.data_mean) / self._deviation()

    def _audio(self, x: Tensor, num_samples: int) -> Tensor:
        data = x * self._deviation() + self.data_mean
        return data[..., :num_samples] if self.autoencoder is None else self.autoencoder.decode(data, num_samples)

    @torch.no_grad()
    def _follow(self, data: Tensor) -> None:
        """The mean and the mean square of all data so far, channel by channel, and how long they were."""
        self.num_batches += 1
        self.trained_length.clamp_min_(data.shape[-1])
        self.data_mean.lerp_(data.mean((0, 2)).unsqueeze(-1), 1 / self.num_batches)
        self.data_square.lerp_(data.square().mean((0, 2)).unsqueeze(-1), 1 / self.num_batches)


def _check_autoencoder(autoencoder: Any, sample_rate: int, channels: int) -> None:
    """Raises: ValueError, if it is none, or hears other audio."""
    if autoencoder is None:
        return
    if not isinstance(autoencoder, WaveformAutoencoder):
        raise ValueError(f"autoencoder is a {type(autoencoder).__name__}; wanted a trained autoencoder, or null.")
    if (autoencoder.sample_rate, autoencoder.channels) != (sample_rate, channels):
        raise ValueError(
            f"the autoencoder hears {autoencoder.channels} channels at {autoencoder.sample_rate} Hz and the flow {channels} "
            f"at {sample_rate} Hz; make both the same."
        )


def _waves(time: Tensor) -> Tensor:
    """(B,) times in [0, 1] -> (B, D_EMBEDDING) cosines and sines of them, from half a period to 500."""
    frequency = math.pi * torch.logspace(0, 3, D_EMBEDDING // 2, device=time.device, dtype=time.dtype)
    angle = time.unsqueeze(-1) * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def _through(blocks: Any, u: Tensor, embedding: Tensor) -> Tensor:
    for block in blocks:
        u = block(u, embedding)
    return u


def _spans(data: Tensor) -> Tensor:
    """(B, 1, L) ones where a clip of the training is made, everywhere or in a span, and zeros where it is known.

    The two ends of a span lie anywhere from a quarter of a clip before it to a quarter after it, so that holes, beginnings
    and ends all come.
    """
    count, length = len(data), data.shape[-1]
    ends = (1.5 * torch.rand(count, 2, 1, 1, device=data.device, dtype=data.dtype) - 0.25) * length
    places = torch.arange(length, device=data.device)
    inside = (places >= ends.amin(1)) & (places < ends.amax(1))
    whole = torch.rand(count, 1, 1, device=data.device) >= KNOWN_SHARE
    return (inside | whole).to(data)


def _known(data: Tensor, free: Tensor) -> Tensor:
    """What the network is told, (B, D + 1, L), of data that are known where `free`, ones that broadcast, is zero."""
    known = (1 - free).expand(len(data), 1, -1)
    return torch.cat([known * data, known], dim=1)


def _told(
    network: Callable[..., Tensor], known: Tensor, heed: float, x: Tensor, time: Tensor, label: Tensor | None
) -> Tensor:
    """Its velocities (n B, D, L), told of what is known of the B clips; `heed` of 2 goes twice as far as was learned."""
    known = known.repeat(len(x) // max(1, len(known)), 1, 1)
    told = network(x, time, label, known)
    return told if heed == 1 else torch.lerp(network(x, time, label, torch.zeros_like(known)), told, heed)


def _holding(velocity: Velocity, free: Tensor, known: Tensor) -> Velocity:
    """The velocity where it is free, (L,) bools, and elsewhere, until LET_GO, a known one that leads to the data."""
    return lambda x, t: velocity(x, t) if t >= LET_GO else torch.where(free, velocity(x, t), known)


def _joined(audio: Tensor, made: Tensor, start: int, stop: int, fade: int) -> Tensor:
    """What was made, moved at both ends of the span to where the audio is, and less and less so over `fade` samples."""
    places, moved = torch.arange(audio.shape[-1], device=audio.device), made
    for border, distance in ((start - 1, places - start), (stop, stop - 1 - places)):
        if 0 <= border < audio.shape[-1]:
            share = (1 - distance / max(1, fade)).clamp(0, 1) * (distance >= 0)
            if stop - start == 1 and start > 0 and stop < audio.shape[-1]:  # both borders are next to it
                share = share / 2
            moved = moved + (audio - made)[..., border : border + 1] * share.to(audio.dtype)
    return moved


def _slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Between two noises along the sphere, so that their size stays what it is.

    Source: Shoemake 1985, "Animating rotation with quaternion curves".
    """
    cosine = F.cosine_similarity(a.flatten(), b.flatten(), dim=0)
    angle = cosine.clamp(-1, 1).arccos()
    if angle < 1e-3:
        return torch.lerp(a, b, share)
    return (((1 - share) * angle).sin() * a + (share * angle).sin() * b) / angle.sin()
