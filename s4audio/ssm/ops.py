"""Which implementation runs: `run`, `kernel` and `step` on a discrete system, by the backend in force."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from s4audio.ssm import chunk, diagonal, reference
from s4audio.ssm.diagonal import DiagonalSystem
from s4audio.ssm.dplr import DPLRSystem

try:
    from s4audio.ssm import triton as fused
except ModuleNotFoundError as error:  # not every platform has Triton
    if error.name != "triton":
        raise
    fused = None  # type: ignore[assignment]

System = DiagonalSystem | DPLRSystem
BACKENDS = ("auto", "reference", "chunk", "triton")

_backend = "auto"  # of the whole process; a plain global, which torch.compile can guard


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run state spaces by `reference` (sample by sample), `chunk` (the engine in PyTorch), `triton` (the same, fused, on
    CUDA) or `auto` (the fastest that can; the default). For the whole process, all its threads. `triton` has no second
    derivatives.

    Raises:
        ValueError: an unknown name.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend is {name!r}; choose one of {', '.join(BACKENDS)}.")
    global _backend
    before, _backend = _backend, name
    try:
        yield
    finally:
        _backend = before


def diagonal_system(
    A: Tensor,
    B: Tensor,
    C: Tensor,
    dt: Tensor,
    discretization: str = "zoh",
    rate: float = 1.0,
    alpha: float = 0.5,
    gap: float | Tensor = 1.0,
) -> DiagonalSystem:
    """`diagonal.diagonal_system`, whose arguments and errors it has; in one kernel where the fused engine is in force."""
    diagonal.check(A, B, C, dt, discretization, alpha, gap)
    if fuses(A) and fused.discretizes(A, B, C, dt):
        return fused.diagonal_system(A, B, C, dt, discretization, rate, alpha, gap)
    return diagonal.diagonal_system(A, B, C, dt, discretization, rate, alpha, gap)


def run(
    system: System, u: Tensor, state: Tensor | None = None, D: Tensor | None = None, kept: dict | None = None
) -> tuple[Tensor, Tensor]:
    """The system's output and final state.

    Args:
        u: (batch, H, L) real input, any L. The arithmetic is float64 if u is, and otherwise float32; but `triton`
            multiplies in bfloat16 if u is, and sums in float32 (triton.py says how).
        state: (batch, H, N/2) complex, or (batch, H, N) real for real modes; zero if None.
        D: (H,), the skip term y + D u; none if None.
        kept: where the plain engine keeps what it makes of the system, for the next call with the same one.

    Returns:
        y (batch, H, L) in u's dtype, and the state after the last sample.

    Raises:
        ValueError: u, state or D has the wrong shape or kind, or the system has one gap per sample and not L of them.
        RuntimeError: the backend in force is `triton`, and it cannot run this; the message says why.
    """
    _check_input(system, u)
    _check_skip(u, D)
    if system.gap is not None:
        _check_gaps(system.gap, u)
    with torch.autocast(u.device.type, enabled=False):
        dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
        x = _to_real(system, state, u, dtype)
        if _runs_fused(system, u):
            y, x = fused.run(system, u, x, D)
        else:
            y, x = _run_plain(system, u, x, D, kept)
        return y, _to_state(system, x)


def both_ways(system: System, C: Tensor) -> System:
    """Twice the channels of a system, forward and then backward in time, for `convolve`; C (2 H, N/2) differs."""
    C = C.to(system.C.dtype)
    if isinstance(system, DPLRSystem):  # whose matrices stay those of one direction, for both
        return system._replace(C=C)
    log_A_bar, B_bar = (torch.cat([value, value]) for value in (system.log_A_bar, system.B_bar))
    return system._replace(log_A_bar=log_A_bar, B_bar=B_bar, C=C)


def _of_each_channel(system: System) -> System:
    """The system with matrices for every channel, also where two channels share them."""
    if isinstance(system, DiagonalSystem) or len(system.A_bar) == len(system.C):
        return system
    A_bar, B_bar, Lambda, P, B, dt = (
        torch.cat([v, v]) for v in (system.A_bar, system.B_bar, system.Lambda, system.P, system.B, system.dt)
    )
    return system._replace(A_bar=A_bar, B_bar=B_bar, Lambda=Lambda, P=P, B=B, dt=dt)


def convolve(
    system: System, u: Tensor, D: Tensor | None = None, bidirectional: bool = False, kept: dict | None = None
) -> Tensor:
    """The system's output from silence: `run` for whoever needs no state, which saves memory and time.

    Args:
        u: (batch, H, L), as of `run`.
        D: (H,), as of `run`.
        bidirectional: the system has 2 H channels (`both_ways`), of which the first H run forward in time and the others
            backward; y is their sum.
        kept: as of `run`.

    Returns:
        y (batch, H, L) in u's dtype.

    Raises:
        ValueError: as `run`; or a bidirectional system has one gap per sample.
        RuntimeError: as `run`.
    """
    _check_input(system, u, 1 + bidirectional)
    _check_skip(u, D)
    if system.gap is not None:
        if bidirectional:
            raise ValueError(
                "a system with one gap per sample varies in time, and has no backward direction of its own; run it one way."
            )
        _check_gaps(system.gap, u)
    with torch.autocast(u.device.type, enabled=False):
        if _runs_fused(system, u):
            return fused.convolve(system, u, D)
        both = torch.cat([u, u.flip(-1)], dim=1) if bidirectional else u
        dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
        y = _run_plain(system, both, _to_real(system, None, both, dtype), None, kept)[0]
        if bidirectional:
            ahead, back = y.chunk(2, dim=1)
            y = ahead + back.flip(-1)
        return _skip(y, u, D)


def _run_plain(system: System, u: Tensor, x: Tensor, D: Tensor | None, kept: dict | None = None) -> tuple[Tensor, Tensor]:
    """By the engine in PyTorch or sample by sample, on the real state (H, batch, S)."""
    if _backend == "reference" or system.gap is not None:
        system = _of_each_channel(system)
    exact = u.to(x.dtype)
    y, x = reference.run(system, exact, x) if _backend == "reference" else chunk.run(system, exact, x, kept)
    return _skip(y.to(u.dtype), u, D), x


def _check_skip(u: Tensor, D: Tensor | None) -> None:
    if D is not None and tuple(D.shape) != u.shape[1:2]:
        raise ValueError(f"D has shape {tuple(D.shape)}; wanted ({u.shape[1]},).")


def _skip(y: Tensor, u: Tensor, D: Tensor | None) -> Tensor:
    return y if D is None else torch.addcmul(y, u, D.to(y.dtype).unsqueeze(-1))


def _in_forward_mode() -> bool:
    """Operations of torch.library have no forward-mode derivatives, and torch.func.jvp takes them for constants."""
    interpreter = None if torch.compiler.is_compiling() else torch._C._functorch.peek_interpreter_stack()
    return interpreter is not None and interpreter.key() == torch._C._functorch.TransformType.Jvp


def fuses(tensor: Tensor) -> bool:
    """Whether small kernels around the engine run fused too: where Triton is, on CUDA unless the backend is another."""
    wanted = _backend == "triton" or (_backend == "auto" and tensor.is_cuda)
    return wanted and fused is not None and fused.runs_on(tensor) and tensor.numel() > 0 and not _in_forward_mode()


def fused_refusal(system: System, u: Tensor) -> str | None:
    """Why the fused engine cannot run the system on u; None if it can."""
    return "Triton is not installed" if fused is None else fused.refusal(system, u)


def _runs_fused(system: System, u: Tensor) -> bool:
    """Whether the fused engine is in force and can run the system on u.

    Raises:
        RuntimeError: the backend is `triton`, and it cannot; or forward-mode derivatives are asked of an engine.
    """
    if _backend != "reference" and _in_forward_mode():
        raise RuntimeError("the engine has no forward-mode derivatives; take them within s4audio.backend('reference').")
    if _backend not in ("auto", "triton") or (_backend == "auto" and not u.is_cuda) or u.numel() == 0:
        return False
    refusal = fused_refusal(system, u)
    if refusal and _backend == "triton":
        raise RuntimeError(f"the backend is triton, but {refusal}; use auto or chunk.")
    return refusal is None


def step(system: System, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One sample by the recurrence: y (batch, H, 1) and the next state from u (batch, H, 1) and a state as in `run`.

    Raises:
        ValueError: as `run`; u is not one sample; the system has one gap per sample.
    """
    _check_input(system, u)
    if u.shape[-1] != 1:
        raise ValueError(f"u has {u.shape[-1]} samples; a step takes one. Use run for more.")
    if system.gap is not None:
        raise ValueError("a system with one gap per sample varies in time and has no step of its own; use run.")
    with torch.autocast(u.device.type, enabled=False):
        working = u if u.dtype == torch.float64 else u.float()
        y, x = reference.step(_of_each_channel(system), working[..., 0], _to_real(system, state, working, working.dtype))
        return y.unsqueeze(-1).to(u.dtype), _to_state(system, x)


def kernel(system: System, length: int) -> Tensor:
    """The SSM kernel K_l = 2 Re(C A_bar^l B_bar) for l < length, (H, L), in the parameters' precision.

    Raises:
        ValueError: length is below 1, or the system varies in time and so has no kernel.
    """
    if length < 1:
        raise ValueError(f"length is {length}; a kernel has at least one tap.")
    if system.gap is not None:
        raise ValueError("a system with one gap per sample varies in time and has no kernel; use run.")
    if _backend != "reference":
        impulse = torch.zeros(1, system.C.shape[0], length, dtype=system.C.real.dtype, device=system.C.device)
        impulse[..., 0] = 1
        return run(system, impulse)[0][0]
    system = _of_each_channel(system)
    if isinstance(system, DiagonalSystem):
        return reference.vandermonde_kernel(system, length)
    K = reference.dense_kernel(system, length) if system.alpha is None else reference.cauchy_kernel(system, length)
    return K.to(system.C.real.dtype)


def poles(system: System) -> tuple[Tensor, Tensor]:
    """Frequency in cycles a sample, 0 to 0.5, and time to decay to 1/e in samples, of every mode: each (H, modes) float64.

    They say what a channel can remember, and for how long. An undamped mode has a decay of infinity. Of a system with one
    gap per sample they are per unit of gap.
    """
    log = system.log_A_bar if isinstance(system, DiagonalSystem) else torch.linalg.eigvals(system.A_bar).log()
    angle = torch.remainder(log.imag.abs(), 2 * torch.pi)
    return torch.minimum(angle, 2 * torch.pi - angle) / (2 * torch.pi), 1 / log.real.clamp_max(0).abs()


def zero_state(system: System, batch_size: int, dtype: torch.dtype) -> Tensor:
    """The state before the first sample, for inputs of the real `dtype`."""
    kind = dtype.to_complex() if system.C.is_complex() else dtype
    return torch.zeros(batch_size, *system.C.shape, dtype=kind, device=system.C.device)


def _check_input(system: System, u: Tensor, directions: int = 1) -> None:
    if u.dim() != 3 or directions * u.shape[1] != system.C.shape[0]:
        raise ValueError(f"u has shape {tuple(u.shape)}; wanted (batch, {system.C.shape[0] // directions}, length).")
    if not u.is_floating_point():
        raise ValueError(f"u is {u.dtype}; wanted a real floating-point tensor.")
    if u.device != system.C.device:
        raise ValueError(f"u is on {u.device} and the system on {system.C.device}; move one of them.")


def _check_gaps(gap: Tensor, u: Tensor) -> None:
    if gap.shape[-1] != u.shape[-1]:
        raise ValueError(f"the system has {gap.shape[-1]} intervals and u has {u.shape[-1]} samples.")
    if gap.dim() == 2 and gap.shape[0] != u.shape[0]:
        raise ValueError(f"the system has intervals for {gap.shape[0]} sequences and u is a batch of {u.shape[0]}.")


def _to_real(system: System, state: Tensor | None, u: Tensor, dtype: torch.dtype) -> Tensor:
    """The engine's state (H, batch, S): [Re x, Im x], or x itself for real modes."""
    channels, modes = system.C.shape
    is_complex = system.C.is_complex()
    if state is None:
        return torch.zeros(channels, u.shape[0], 2 * modes if is_complex else modes, dtype=dtype, device=u.device)
    wanted = (u.shape[0], *system.C.shape)
    if tuple(state.shape) != wanted or state.is_complex() != is_complex:
        kind = "complex" if is_complex else "real"
        raise ValueError(f"state is {state.dtype} {tuple(state.shape)}; wanted a {kind} tensor of shape {wanted}.")
    x = state.transpose(0, 1)
    if is_complex:
        x = torch.cat([x.real, x.imag], dim=-1)
    return x.to(dtype)


def _to_state(system: System, x: Tensor) -> Tensor:
    if system.C.is_complex():
        x = torch.complex(*x.chunk(2, dim=-1))
    return x.transpose(0, 1)
