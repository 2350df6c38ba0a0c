"""State spaces: the mathematics. Read in this order: discretize, diagonal, dplr, reference, chunk, ops; then hippo, init.

| letter       | shape              | meaning                                                                         |
| ------------ | ------------------ | ------------------------------------------------------------------------------- |
| u, y         | (B, H, L)          | input and output, one state space a channel                                     |
| x            | (B, H, N/2)        | state: one of each conjugate pair                                               |
| A, B, C, D   | (H, N/2), D (H,)   | x' = A x + B u, y = 2 Re(C x) + D u; A is the diagonal, also called Lambda       |
| P            | (H, N/2)           | the low-rank term of S4: A_full = diag(Lambda) - P P^*                           |
| dt           | (H, 1)             | step size; layers store log_dt                                                  |
| A_bar, B_bar |                    | x_k = A_bar x_{k-1} + B_bar u_k                                                  |
| K            | (H, L)             | SSM kernel, K_l = 2 Re(C A_bar^l B_bar)                                          |
| H, N, L      |                    | d_model, d_state (real numbers, N/2 stored pairs), length                       |
| T, M, S      |                    | samples in a chunk, chunks, real size of the state                              |
"""

from s4audio.ssm.diagonal import DiagonalSystem, check_gap
from s4audio.ssm.discretize import DISCRETIZATIONS, check_discretization
from s4audio.ssm.dplr import DPLRSystem, dplr_system
from s4audio.ssm.init import INITS, initial_system
from s4audio.ssm.ops import (
    BACKENDS,
    System,
    backend,
    both_ways,
    convolve,
    diagonal_system,
    kernel,
    poles,
    run,
    step,
    zero_state,
)

__all__ = [
    "BACKENDS",
    "DISCRETIZATIONS",
    "INITS",
    "DPLRSystem",
    "DiagonalSystem",
    "System",
    "backend",
    "both_ways",
    "check_discretization",
    "check_gap",
    "convolve",
    "diagonal_system",
    "dplr_system",
    "initial_system",
    "kernel",
    "poles",
    "run",
    "step",
    "zero_state",
]
