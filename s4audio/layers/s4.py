"""S4D and S4: state-space layers that train as a convolution and stream the same weights, sample by sample if need be."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from s4audio import ssm


class S4State(NamedTuple):
    """What a state-space layer remembers between blocks."""

    x: Tensor  # (B, H, N/2) complex


class S4D(nn.Module):
    """Diagonal state-space layer with a skip term.

    Args:
        d_model: channels, H.
        d_state: real size of each channel's state, N; N/2 conjugate pairs.
        init: one of ssm.INITS.
        discretization: one of ssm.DISCRETIZATIONS.
        alpha: of the generalized bilinear transform, in [0.5, 1].
        gap: of async: the interval between samples, in units of dt.
        dt_min: smallest step size at initialization; the sizes are log-uniform.
        dt_max: largest step size at initialization.
        bidirectional: adds a second state space that runs backwards in time; then the layer cannot stream.
        learn_B: False keeps B as it is initialized: of a diagonal system only the product of B and C matters.
        rate: training sample rate / target sample rate, to run trained weights at another rate.

    Raises:
        ValueError: an argument outside its range.

    Every channel has a state space of its own; channels do not mix. The parameters log_dt, log_A_real, A_imag and B want a
    small learning rate and no weight decay: tasks/optim.py sees to it.

    Source: Gu et al. 2022, "On the parameterization and initialization of diagonal state space models".

    Example:
        >>> layer = S4D(d_model=2)
        >>> layer(torch.zeros(1, 2, 1000)).shape
        torch.Size([1, 2, 1000])
    """

    B: Tensor

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        *,
        init: str = "lin",
        discretization: str = "zoh",
        alpha: float = 0.5,
        gap: float = 1.0,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        bidirectional: bool = False,
        learn_B: bool = True,
        rate: float = 1.0,
    ) -> None:
        super().__init__()
        if d_model < 1:
            raise ValueError(f"d_model is {d_model}; a layer has at least one channel.")
        if not 0 < dt_min <= dt_max:
            raise ValueError(f"dt_min is {dt_min} and dt_max {dt_max}; wanted 0 < dt_min <= dt_max.")
        ssm.check_discretization(discretization, alpha)
        ssm.check_gap(gap, discretization)
        self.d_model, self.d_state, self.bidirectional = d_model, d_state, bidirectional
        self.discretization, self.alpha, self.gap, self.rate = discretization, alpha, gap, rate
        self._frozen: tuple[ssm.System, dict] | None = None
        A, B, _ = ssm.initial_system(init, d_state)
        # Undamped modes (FouT) keep a little damping, so that -Re A has a logarithm and A an inverse.
        self.log_A_real = nn.Parameter(torch.log((-A.real).clamp_min(1e-4)).float().repeat(d_model, 1))  # (H, N/2)
        self.A_imag = nn.Parameter(A.imag.float().repeat(d_model, 1))
        self.log_dt = nn.Parameter(torch.rand(d_model) * math.log(dt_max / dt_min) + math.log(dt_min))
        # Complex parameters are stored as (..., 2) real numbers: optimizers, autocast and safetensors want those.
        B = torch.view_as_real(B.to(torch.complex64).repeat(d_model, 1))
        if learn_B:
            self.B = nn.Parameter(B)
        else:
            self.register_buffer("B", B)
        directions = 2 if bidirectional else 1
        self.C = nn.Parameter(torch.view_as_real(torch.randn(directions * d_model, d_state // 2, dtype=torch.complex64)))
        self.D = nn.Parameter(torch.randn(d_model))

    def A(self) -> Tensor:
        """(H, N/2) complex; the real part is negative whatever the parameters."""
        return torch.complex(-torch.exp(self.log_A_real), self.A_imag)

    def system(self, rate: float | None = None) -> ssm.System:
        """The discrete system at `rate` (None: the layer's); the only place that discretizes.

        Of a bidirectional layer it has 2 H channels: forward in time, then backward, sharing all but C.
        """
        C = torch.view_as_complex(self.C)
        if not self.bidirectional:
            return self._system(C, self.rate if rate is None else rate)
        return ssm.both_ways(self._system(C[: self.d_model], self.rate if rate is None else rate), C)

    def _system(self, C: Tensor, rate: float) -> ssm.System:
        return ssm.diagonal_system(
            self.A(), torch.view_as_complex(self.B), C, self.log_dt.exp(), self.discretization,
            rate=rate, alpha=self.alpha, gap=self.gap,
        )  # fmt: skip

    def forward(self, u: Tensor) -> Tensor:
        """(B, H, L) -> (B, H, L)"""
        system, kept = self._frozen or (self.system(), None)
        return ssm.convolve(system, u, self.D, self.bidirectional, kept)

    def initial_state(self, batch_size: int) -> S4State:
        """The state before the first sample: silence."""
        self._refuse_if_bidirectional()
        shape = (batch_size, self.d_model, self.d_state // 2)
        return S4State(torch.zeros(shape, dtype=self.D.dtype.to_complex(), device=self.D.device))

    def stream(self, u: Tensor, state: S4State) -> tuple[Tensor, S4State]:
        """A block of any length: (B, H, L) and the state before it -> (B, H, L) and the state after it."""
        self._refuse_if_bidirectional()
        system, kept = self._frozen or (self.system(), None)
        y, x = ssm.run(system, u, state.x, self.D, kept)
        return y, S4State(x)

    def step(self, u: Tensor, state: S4State) -> tuple[Tensor, S4State]:
        """One sample by the recurrence: (B, H, 1) -> (B, H, 1)"""
        self._refuse_if_bidirectional()
        y, x = ssm.step(self.system(), u, state.x)
        return torch.addcmul(y, u, self.D.to(y.dtype).unsqueeze(-1)), S4State(x)

    @torch.no_grad()
    def freeze(self) -> None:
        """`forward` and `stream` go on with the system of now, whatever becomes of the parameters but D, and make it no more
        at every call. It has no gradients then, and a layer that is moved or converted is frozen no more.

        The demo's model streams 2.3 to 4.3 times as fast in blocks of 16 to 4,096 samples.
        """
        system = self.system()  # some of it lies in the parameters' own memory
        copies: dict[str, Any] = {name: v.detach().clone() for name, v in system._asdict().items() if isinstance(v, Tensor)}
        self._frozen = system._replace(**copies), {}

    def _apply(self, *arguments: Any, **options: Any) -> Any:
        self._frozen = None
        return super()._apply(*arguments, **options)

    def extra_repr(self) -> str:
        direction = ", bidirectional" if self.bidirectional else ""
        return f"{self.d_model}, d_state={self.d_state}, {self.discretization}{direction}"

    def _refuse_if_bidirectional(self) -> None:
        if self.bidirectional:
            raise RuntimeError(
                f"{type(self).__name__}({self.extra_repr()}) hears the future and cannot stream; "
                "build it with bidirectional=False."
            )


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Has all S4D layers of a model frozen meanwhile: for whoever calls it many times with the same weights."""
    before = {layer: layer._frozen for layer in model.modules() if isinstance(layer, S4D)}
    try:
        for layer in before:
            layer.freeze()
        yield
    finally:
        for layer, system in before.items():
            layer._frozen = system


class S4(S4D):
    """Diagonal-plus-low-rank state-space layer with a skip term: S4D plus P, which wants a small learning rate too.

    Args: as S4D, but `init` must be one that has a low-rank term: legs or fout.

    Source: Gu et al. 2022, "Efficiently modeling long sequences with structured state spaces".
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        *,
        init: str = "legs",
        discretization: str = "bilinear",
        alpha: float = 0.5,
        gap: float = 1.0,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        bidirectional: bool = False,
        learn_B: bool = True,
        rate: float = 1.0,
    ) -> None:
        super().__init__(
            d_model, d_state, init=init, discretization=discretization, alpha=alpha, gap=gap,
            dt_min=dt_min, dt_max=dt_max, bidirectional=bidirectional, learn_B=learn_B, rate=rate,
        )  # fmt: skip
        P = ssm.initial_system(init, d_state)[2]
        if P is None:
            raise ValueError(f"init is {init!r}, which has no low-rank term; S4 takes legs or fout. For {init} use S4D.")
        self.P = nn.Parameter(torch.view_as_real(P.to(torch.complex64).repeat(d_model, 1)))

    def _system(self, C: Tensor, rate: float) -> ssm.System:
        return ssm.dplr_system(
            self.A(), torch.view_as_complex(self.P), torch.view_as_complex(self.B), C, self.log_dt.exp(),
            self.discretization, rate=rate, alpha=self.alpha, gap=self.gap,
        )  # fmt: skip
