"""Draws evaluation/results/engine.png, the picture of the README: one state space as a convolution, in chunks and in steps.

    python evaluation/engine_picture.py

All three rows are computed, each by its own code, from the same input; the largest difference between them is in the title.
"""

from pathlib import Path

import torch
from matplotlib.figure import Figure

from s4audio import ssm
from s4audio.ssm import chunk, reference

OUT = Path(__file__).parent / "results" / "engine.png"
LENGTH, T = 192, 32
INK, OWN, CARRIED, FAINT = "#333333", "#1f6f8b", "#c4622d", "#b0b0b0"


def main() -> None:
    """Three ways to the same output, and what each looks at."""
    A = torch.tensor([[-0.7 + 9j, -0.35 + 3.1j]], dtype=torch.complex128)
    C = torch.tensor([[4.0 + 1.6j, 4.8 - 0.8j]], dtype=torch.complex128)
    system = ssm.diagonal_system(A, torch.ones_like(A), C, torch.tensor([[0.05]], dtype=torch.float64), "zoh")
    u = torch.zeros(1, 1, LENGTH, dtype=torch.float64)
    u[..., [6, 40, 90, 101]] = torch.tensor([1.0, -0.8, 1.0, 0.6], dtype=torch.float64)

    K = reference.vandermonde_kernel(system, LENGTH)[0]
    convolved = torch.nn.functional.conv1d(torch.nn.functional.pad(u, (LENGTH - 1, 0)), K.flip(0)[None, None])[0, 0]
    operators = chunk.diagonal_operators(system, T, torch.float64)
    chunks = u.reshape(1, -1, T)
    X, _ = chunk.scan(operators.A_T, (chunks @ operators.P).unsqueeze(1), torch.zeros(1, 1, 4, dtype=torch.float64))
    own, carried = (chunks @ operators.toeplitz).flatten(), (X[:, 0] @ operators.Q).flatten()
    state, steps = ssm.zero_state(system, 1, torch.float64), []
    for sample in u[0, 0]:
        y, state = ssm.step(system, sample.reshape(1, 1, 1), state)
        steps.append(y.item())
    stepped = torch.tensor(steps, dtype=torch.float64)
    difference = max((convolved - own - carried).abs().max().item(), (convolved - stepped).abs().max().item())

    figure = Figure(figsize=(8.4, 5.4), layout="constrained", facecolor="white")
    rows = figure.subplots(3, 1, sharex=True, sharey=True)
    time = torch.arange(LENGTH)
    figure.suptitle(f"One state space, three ways: the outputs agree to {difference:.0e}", fontsize=11, color=INK)
    rows[0].set_title("convolution   y = K * u : one kernel as long as the signal", loc="left", fontsize=9.5, color=INK)
    rows[0].plot(time, convolved, color=INK, linewidth=1.6)
    for start in u[0, 0].nonzero().flatten().tolist():
        rows[0].plot(time[start:], u[0, 0, start] * K[: LENGTH - start], color=OWN, linewidth=0.8, alpha=0.7)
        rows[0].annotate(
            "", (start, 0), (start, u[0, 0, start].item()), arrowprops={"arrowstyle": "-", "color": FAINT, "lw": 2}
        )
    rows[1].set_title(
        f"chunks   y = u · toeplitz(K) + x · Q : {T} samples at a time, what came before arrives as the state x",
        loc="left", fontsize=9.5, color=INK,
    )  # fmt: skip
    rows[1].plot(time, own + carried, color=INK, linewidth=1.6)
    rows[1].fill_between(time, own, color=OWN, alpha=0.45, linewidth=0, label="from the chunk's own input")
    rows[1].fill_between(time, carried, color=CARRIED, alpha=0.45, linewidth=0, label="from the carried state")
    for edge in range(T, LENGTH, T):
        rows[1].axvline(edge - 0.5, color=FAINT, linewidth=0.8)
        rows[1].annotate("x", (edge + 1.5, -1.15), ha="center", fontsize=9, color=CARRIED, fontstyle="italic")
    rows[1].legend(loc="upper right", fontsize=8, frameon=False, ncols=2)
    rows[2].set_title("steps   x ← A x + B u,  y = C x : one sample at a time", loc="left", fontsize=9.5, color=INK)
    rows[2].plot(time, stepped, color=INK, linewidth=0.5)
    rows[2].scatter(time, stepped, color=INK, s=5)
    rows[2].set_xlabel("sample", fontsize=9, color=INK)
    for axis in rows:
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(FAINT)
        axis.tick_params(colors=INK, labelsize=8)
        axis.set_ylim(-1.3, 1.7)
        axis.set_yticks([])
    figure.savefig(OUT, dpi=120)
    print(f"{OUT}: the outputs agree to {difference:.1e}")


if __name__ == "__main__":
    main()
