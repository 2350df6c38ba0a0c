"""Draws evaluation/results/roofline.png: how close the fused engine comes to what an H100 can do.

    python evaluation/bench/roofline.py

From results/ssm_conv_cuda.json. Intensity is the engine's multiply-adds, two operations each, over the bytes of the floor: 2
tensor passes forward, 5 forward + backward. The slope is the copy speed of that run; the flat ceilings are NVIDIA's
datasheet (H100 SXM, dense): 989 TFLOP/s in bfloat16 and, as three products make one, a third of TF32's 495.
"""

import json
from pathlib import Path

import matplotlib.pyplot as plt

RESULTS = Path(__file__).parents[1] / "results"
CEILINGS = {"bfloat16": 989e12, "float32": 495e12 / 3}
CHUNK = {"bfloat16": 64, "float32": 32}  # T of s4audio/ssm/triton.py
COLORS = {"bfloat16": "#1f6f8b", "float32": "#c4622d"}
MARKS = {"forward": "o", "forward + backward": "s"}


def operations(T: int, S: int, backward: bool) -> int:
    """Operations a sample: U toeplitz(K), U P, X Q forward; dY and dZ through them, and their three gradients, backward."""
    return 2 * (T + 2 * S) + (2 * (2 * T + 4 * S) if backward else 0)


def main() -> None:
    found = json.loads((RESULTS / "ssm_conv_cuda.json").read_text())
    copy = found["copy_bytes_per_second"]
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    intensities = [4, 2000]
    axis.plot(intensities, [copy * x / 1e12 for x in intensities], color="#555555", label=f"memory, {copy / 1e12:.2f} TB/s")
    for dtype, ceiling in CEILINGS.items():
        label = "tensor cores, bfloat16" if dtype == "bfloat16" else "tensor cores, three TF32 products"
        axis.axhline(ceiling / 1e12, color=COLORS[dtype], linestyle="--", linewidth=1, label=label)
    seen = set()
    for row in found["rows"]:
        size = row["shape"][0] * row["shape"][1] * row["shape"][2]
        if row["path"] != "ours" or size < 2**24:
            continue  # smaller ones are bound by launches, and say nothing about the kernels
        backward = row["pass"] != "forward"
        done = operations(CHUNK[row["dtype"]], row["d_state"], backward) * size
        moved = row["floor_ms"] / 1e3 * copy
        name = f"{row['dtype']}, {row['pass']}"
        axis.plot(
            done / moved, done / row["ms"] / 1e9, MARKS[row["pass"]], color=COLORS[row["dtype"]], markersize=7,
            label=None if name in seen else name, fillstyle="none" if backward else "full",
        )  # fmt: skip
        seen.add(name)
    axis.set(xscale="log", yscale="log", xlim=intensities, ylim=(8, 2000), xlabel="operations per byte of the floor",
        ylabel="TFLOP/s", title=f"The fused engine on one {found['machine'].split(',')[0]}, N = 64")  # fmt: skip
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8, loc="lower right")
    figure.savefig(RESULTS / "roofline.png", dpi=110)


if __name__ == "__main__":
    main()
