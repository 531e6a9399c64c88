"""Draw a result file of `benchmarks.grid` or `benchmarks.library` as bars, into a PNG beside it.

python -m benchmarks.chart benchmarks/results/FILE.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from anyattn.bench.chart import COLOURS, footer


def draw(path: Path) -> Path:
    """Draw the JSON file at `path`; return the PNG's path, or `path` where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        print("no chart: pip install matplotlib")
        return path
    matplotlib.use("Agg")
    result = json.loads(path.read_text(encoding="utf-8"))
    figure = (_grid if result["benchmark"] == "grid" else _library)(result)
    figure.savefig(path.with_suffix(".png"), dpi=120, bbox_inches="tight")
    return path.with_suffix(".png")


def _grid(result: dict[str, Any]) -> Any:
    """A panel for each head dim and mask: TFLOP/s over the sequence length, a bar for each contender."""
    from matplotlib import pyplot as plt

    cells, means = result["cells"], result["geometric_mean"]
    head_dims = sorted({cell["head_dim"] for cell in cells})
    names = list(means["tflops"])
    figure, axes = plt.subplots(2, len(head_dims), figsize=(5 * len(head_dims), 7), sharey=True, squeeze=False)
    for row, causal in zip(axes, (False, True), strict=True):
        for axis, head_dim in zip(row, head_dims, strict=True):
            panel = [cell for cell in cells if (cell["head_dim"], cell["causal"]) == (head_dim, causal)]
            width = 0.8 / len(names)
            for i, name in enumerate(names):
                places = [x + (i - (len(names) - 1) / 2) * width for x in range(len(panel))]
                heights = [cell["tflops"].get(name, 0.0) for cell in panel]
                axis.bar(places, heights, width, color=COLOURS.get(name), label=f"{name} {means['tflops'][name]:.0f}")
            axis.set_title(f"head dim {head_dim}, {'causal' if causal else 'full'}")
            axis.set_xticks(range(len(panel)), [str(cell["seqlen"]) for cell in panel])
            axis.grid(axis="y", alpha=0.3)
            axis.set_axisbelow(True)
            axis.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel("TFLOP/s")
    for axis in axes[-1]:
        axis.set_xlabel("sequence length (16384 tokens in all)")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0.96), ncols=len(names), frameon=False)
    kernel = "" if result["kernel"] == "auto" else f", kernel {result['kernel']}"
    ratio = means["ratio"]["FLASH"]
    title = f"{result['dtype']} {result['direction']}{kernel}: anyattn is {ratio:.2f}x FLASH (geometric means below)"
    figure.suptitle(title, y=1.0)
    figure.text(0.5, 0.0, footer(result["meta"]), ha="center", fontsize=8, color="#555555")
    figure.subplots_adjust(top=0.88, hspace=0.3, bottom=0.09, wspace=0.05)
    return figure


def _library(result: dict[str, Any]) -> Any:
    """A bar for each row: how many times better than its limit we are, on a logarithmic axis."""
    from matplotlib import pyplot as plt

    rows = result["rows"][::-1]
    figure, axis = plt.subplots(figsize=(10, 1 + 0.32 * len(rows)))
    for place, row in enumerate(rows):
        margin = row["ours"] / row["limit"] if row["more"] else row["limit"] / row["ours"]
        axis.barh(place, margin - 1, left=1, color="#66a182" if margin >= 1 else "#d1495b")
        figures = [f"{row['ours']:.4g} {row['unit']}", *(f"{name} {x:.4g}" for name, x in row["rivals"].items())]
        axis.annotate(
            "  " + ", ".join(figures), (max(margin, 1), place), va="center", fontsize=8, annotation_clip=False
        )
    axis.set_xscale("log")
    axis.set_yticks(range(len(rows)), [f"{row['group']}: {row['what']}" for row in rows], fontsize=8)
    axis.axvline(1, color="black", linewidth=1)
    axis.set_xlabel(f"times better than the limit (1 = just met)\n{footer(result['meta'])}", fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="+", help="a JSON file that a benchmark wrote")
    for path in parser.parse_args().file:
        print(draw(path))


if __name__ == "__main__":
    main()
