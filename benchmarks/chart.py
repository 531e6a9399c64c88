"""Draw a result file of a benchmark here into a PNG beside it.

python -m benchmarks.chart benchmarks/results/FILE.json
"""

from __future__ import annotations

import argparse
import json
import math
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
    draw_it = {"grid": _grid, "library": _library, "host": _host, "memory": _memory}.get(result.get("benchmark"))
    if draw_it is None:
        raise SystemExit(f"{path}: there is no chart of this benchmark")
    figure = draw_it(result)
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
    ratio, rival = means["ratio"]["FLASH"], "FLASH"
    if math.isnan(ratio):  # it was not among the contenders
        ratio, rival = means["ratio"]["best"], "the best other in each cell"
    title = f"{result['dtype']} {result['direction']}{kernel}: anyattn is {ratio:.2f}x {rival} (geometric means below)"
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


def _host(result: dict[str, Any]) -> Any:
    """Three bars for each call: all of it, its copies, its kernels."""
    from matplotlib import pyplot as plt

    cells = result["cells"]
    figure, axis = plt.subplots(figsize=(1.3 * len(cells) + 2, 4.5))
    colours = {"everything": COLOURS["anyattn"], "copies": COLOURS["FLASH"], "kernels": COLOURS["CUDNN"]}
    for i, (name, colour) in enumerate(colours.items()):
        heights = [cell["ms"][name]["median"] for cell in cells]
        axis.bar([x + (i - 1) * 0.27 for x in range(len(cells))], heights, 0.27, color=colour, label=name)
    for x, cell in enumerate(cells):
        axis.annotate(f"{cell['ratio']:.2f}", (x - 0.27, cell["ms"]["everything"]["median"]), ha="center", va="bottom")
    names = [
        f"{cell['direction']}\n{cell['dtype']}{' causal' if cell['causal'] else ''}\n"
        f"B{cell['batch']} S{cell['seqlen']}\nH{cell['heads']} D{cell['head_dim']}"
        + ("" if cell["memory"] is None else f"\nin {cell['memory'] / 2**30:g} GiB")
        for cell in cells
    ]
    axis.set_xticks(range(len(cells)), names, fontsize=8)
    axis.set_yscale("log")
    axis.set_ylabel("ms")
    axis.set_title(f"NumPy arrays on a GPU: times the larger of copies and kernels (limit {result['limit']})")
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    axis.spines[["top", "right"]].set_visible(False)
    figure.text(0.5, -0.12, footer(result["meta"]), ha="center", fontsize=8, color="#555555")
    return figure


def _memory(result: dict[str, Any]) -> Any:
    """A panel for each path: memory over the sequence length, beside that of the whole matrix of scores."""
    from matplotlib import pyplot as plt

    paths = list(dict.fromkeys(cell["path"] for cell in result["cells"]))
    figure, axes = plt.subplots(1, len(paths), figsize=(4.5 * len(paths) + 0.5, 4.2), squeeze=False)
    for axis, path in zip(axes[0], paths, strict=True):
        cells = [cell for cell in result["cells"] if cell["path"] == path]
        for direction, colour in (("forward", COLOURS["CUDNN"]), ("backward", COLOURS["anyattn"])):
            some = [cell for cell in cells if cell["direction"] == direction]
            lengths = [cell["seqlen"] for cell in some]
            axis.plot(lengths, [c["peak"] / 2**20 for c in some], marker="o", color=colour, label=direction)
            results = [cell["results"] / 2**20 for cell in some]
            axis.plot(lengths, results, ":", color=colour, label=f"{direction}: its results alone")
        axis.plot(
            lengths, [c["scores"] / 2**20 for c in some], "--", color=COLOURS["plain"], label="a matrix of scores"
        )
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.set_xticks(lengths, [f"{n >> 10}k" for n in lengths])
        heads, head_dim, _ = result["shapes"][path]
        axis.set_title(f"{path}: {heads} heads of {head_dim}", fontsize=10)
        axis.set_xlabel("sequence length")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("MiB beyond the inputs, at the peak")
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.text(0.5, -0.03, footer(result["meta"]), ha="center", fontsize=8, color="#555555")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="+", help="a JSON file that a benchmark wrote")
    for path in parser.parse_args().file:
        print(draw(path))


if __name__ == "__main__":
    main()
