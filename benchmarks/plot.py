"""Bars of the ratios in a benchmark's JSON, as an SVG that reads on light and on dark pages.

`python -m benchmarks.plot FILE [-o SVG]`
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Final

INK: Final = "#8b949e"
COLOURS: Final = {
    "FlexAttention": "#e8590c", "cuDNN": "#4c8dff", "SDPA": "#4c8dff", "SDPA + mask": "#2f9e44", "torch.mm": "#9775fa",
    "bytes": "#2f9e44", "FlashAttention-4": "#9775fa",
}  # fmt: skip
WIDE: Final = 8.0
"""Ratios this far apart stand on a logarithmic axis."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("-o", "--output", type=Path, help="an .svg or a .png (default: FILE.svg)")
    args = parser.parse_args()
    draw(args.file, args.output)


def draw(file: Path, out: Path | None = None) -> None:
    """How many times as fast as each peer attncc is, a bar a case; the line at 1 is the peer."""
    import plotly.graph_objects as go

    out = out or file.with_suffix(".svg")
    data = json.loads(file.read_text())
    rows = [r for r in data["rows"] if "ratio" in r and r["case"].startswith(("fwd/", "decode/"))]
    names = list(dict.fromkeys(r["case"] for r in rows))[::-1]
    figure = go.Figure()
    for peer, colour in COLOURS.items():
        mine = {r["case"]: r for r in rows if r["peer"] == peer}
        if not mine:
            continue
        shown = [n for n in names if n in mine]
        figure.add_bar(
            y=[n.removeprefix("fwd/") for n in shown],
            x=[mine[n]["ratio"] for n in shown],
            text=[f"{mine[n]['ratio']:.2f}" for n in shown],
            name=f"against {peer}",
            orientation="h",
            marker_color=colour,
            textposition="outside",
        )
    figure.add_vline(x=1.0, line_color=INK, line_width=1)
    meta = data["meta"]
    with_ = f"triton {meta['triton']}" if "triton" in meta else f"{meta['threads']} threads, torch {meta['torch']}"
    ratios = [r["ratio"] for r in rows]
    figure.update_xaxes(type="log" if max(ratios) / min(ratios) > WIDE else "linear")
    figure.update_layout(
        title=f"attncc, times the peer's speed ({meta['device']}, {with_}, {meta['date']})",
        font={"color": INK, "family": "sans-serif", "size": 12},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        bargap=0.25,
        height=150 + 34 * len(names),
        width=960,
        margin={"l": 250, "r": 40, "t": 90, "b": 40},
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0.0},
    )
    figure.update_xaxes(gridcolor="rgba(139,148,158,0.25)", rangemode="tozero")
    figure.write_image(out)
    print(out)


if __name__ == "__main__":
    main()
