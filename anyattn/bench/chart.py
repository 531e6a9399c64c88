"""The chart of `anyattn bench`: time over sequence length, as in FlashAttention's first paper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COLOURS = {
    "anyattn": "#d1495b",
    "FLASH": "#9fb3c8",
    "CUDNN": "#5b7fa6",
    "EFFICIENT": "#c9c9c9",
    "SDPA": "#5b7fa6",
    "FA2": "#6c8ebf",
    "FA3": "#66a182",
    "FA4": "#2e6b4f",
    "XFORMERS": "#a78bba",
    "MATH": "#7a7a7a",
    "plain": "#3d3d3d",
    "Reformer": "#edae49",
    "Performer": "#b8860b",
}
APPROXIMATE = ("Reformer", "Performer")  # drawn with dashes


def footer(meta: dict[str, Any]) -> str:
    """The machine, the versions and the commit, in one line."""
    versions = meta["versions"]
    packages = ("torch", "cuda", "cudnn", "flash-attn", "fa3-fwd", "flash-attn-4", "xformers")
    shown = [f"{name} {versions[name]}" for name in packages if name in versions]
    device = f"{meta['device']}, driver {meta.get('driver')}" if "device" in meta else meta.get("cpu") or "no GPU"
    return f"{device}; {', '.join(shown)}; commit {(meta['commit'] or 'unknown')[:12]}, {meta['time'][:10]}"


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw what `anyattn bench` wrote as JSON into a PNG. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    cells, summary = result["cells"], result["summary"]
    rows = list(dict.fromkeys(cell["direction"] for cell in cells))
    columns = list(dict.fromkeys((cell["head_dim"], cell["causal"]) for cell in cells))
    size = (4.2 * len(columns) + 1, 3.4 * len(rows) + 1.2)
    figure, axes = plt.subplots(len(rows), len(columns), figsize=size, squeeze=False, sharex=True, sharey="row")
    for line, direction in zip(axes, rows, strict=True):
        for axis, (head_dim, causal) in zip(line, columns, strict=True):
            panel = [c for c in cells if (c["direction"], c["head_dim"], c["causal"]) == (direction, head_dim, causal)]
            for name in summary:
                points = [(cell["seqlen"], cell["ms"][name]["median"]) for cell in panel if name in cell["ms"]]
                if points:
                    style: dict[str, Any] = {"linestyle": "--" if name in APPROXIMATE else "-", "marker": "o"}
                    style |= {"linewidth": 2.4 if name == "anyattn" else 1.4, "markersize": 4}
                    axis.plot(*zip(*points, strict=True), color=COLOURS.get(name), label=name, **style)
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            ticks = sorted({cell["seqlen"] for cell in panel})
            axis.set_xticks(ticks, [str(tick) for tick in ticks])
            axis.set_title(f"{direction}, head dim {head_dim}, {'causal' if causal else 'full'}", fontsize=10)
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
        line[0].set_ylabel("milliseconds")
    for axis in axes[-1]:
        axis.set_xlabel("sequence length")
    lines = {
        label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    labels = [name + _error(summary[name]) for name in lines]
    figure.legend(lines.values(), labels, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.suptitle(f"{result['dtype']}: time of one call, less is better (dashes: approximations)")
    figure.text(0.5, -0.02, footer(result["meta"]), ha="center", fontsize=8, color="#555555")
    figure.tight_layout()
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def _error(of: dict[str, Any]) -> str:
    errors = [part["error"] for part in of.values() if part["error"] is not None]
    return f" (error {max(errors):.1g})" if errors else ""
