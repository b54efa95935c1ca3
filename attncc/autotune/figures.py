"""The figures of a tuning report, on clear ground: the page colours their words and grids for light and for dark."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from math import ceil, floor, log10
from typing import Any, Final

import plotly.graph_objects as go

from attncc.autotune.findings import Case, Config, Outcome, predictions, time_ms
from attncc.autotune.record import Card, Record
from attncc.autotune.work import Work

INK: Final = "#7d8590"
GRID: Final = "rgba(125,133,144,0.22)"
COLOURS: Final = ("#3f7fdb", "#d9622b", "#2b9a66", "#8e63ce", "#c2447c", "#b98900", "#1797a6")
SYMBOLS: Final = ("circle", "square", "diamond", "triangle-up", "x")
ROLES: Final = {
    "best": ("the best", "#3f7fdb", "circle", 10),
    "default": ("the default", "#d9622b", "diamond-open", 13),
    "chosen": ("chosen by the table", "#2b9a66", "triangle-up-open", 18),
}
"""What is marked among the trials of a shape: in words, in colour, by a symbol, and how large."""
HOVER_COLUMNS: Final = 46
GAP: Final = 6
"""Between an axis and its labels, in pixels."""


def roofline(outcomes: Sequence[Outcome], work: Mapping[Case, Work], card: Card) -> go.Figure:
    """Every measured trial under the card's two roofs; at least one is, and has something to compute."""
    known = [(o, w) for o in outcomes if (w := work[o.case]).flops and o.measured]
    ridge = 1e3 * card.bf16_tflops / card.bandwidth_gbps
    xs = [ridge, *(w.intensity for _, w in known)]
    left, right = min(xs) / 3, max(xs) * 3
    achieved = [tflops(r, w) for o, w in known for r in o.measured]
    figure = _figure()
    roofs = [left * card.bandwidth_gbps / 1e3, card.bf16_tflops, card.bf16_tflops]
    figure.add_scatter(x=[left, ridge, right], y=roofs, name="roofs", mode="lines", line=_line(), hoverinfo="skip")
    _label(figure, right, card.bf16_tflops, f"matrix products in bf16: {card.bf16_tflops:,g} TFLOP/s")
    _label(figure, ridge, card.bf16_tflops, f"memory: {card.bandwidth_gbps:,g} GB/s")
    for at, (outcome, w) in enumerate(known):
        figure.add_scatter(
            x=[w.intensity] * len(outcome.measured),
            y=[tflops(r, w) for r in outcome.measured],
            name=outcome.name,
            mode="markers",
            marker=_marker(at),
            hovertext=[_hover(r, f"{number(tflops(r, w))} TFLOP/s") for r in outcome.measured],
            hoverinfo="text",
        )
    _log(figure, "x", "arithmetic intensity (FLOP per byte moved)", [left, right])
    _log(figure, "y", "achieved (TFLOP/s)", [min(*achieved, *roofs) / 1.5, max(*achieved, *roofs) * 1.6])
    return figure


def tflops(record: Record, work: Work) -> float:
    """What a measured trial achieved."""
    return work.flops / time_ms(record) / 1e9


def times(outcomes: Sequence[Outcome]) -> go.Figure:
    """A row a shape: every measured time over the best one, with what is marked of them; there is at least one."""
    shown = [(o, time_ms(o.best)) for o in outcomes if o.best]
    figure = _figure(height=170 + 64 * len(shown))
    over = [time_ms(r) / best for o, best in shown for r in o.measured]
    figure.add_scatter(
        x=over,
        y=[row + _apart(at) for row, (o, _) in enumerate(shown) for at in range(len(o.measured))],
        name="a trial",
        mode="markers",
        marker={"color": INK, "size": 5, "opacity": 0.55},
        hovertext=[_hover(r) for o, _ in shown for r in o.measured],
        hoverinfo="text",
    )
    for role, (text, colour, symbol, size) in ROLES.items():
        marked = [(at, best, r) for at, (o, best) in enumerate(shown) if (r := getattr(o, role)) and r.ms]
        figure.add_scatter(
            x=[time_ms(r) / best for _, best, r in marked],
            y=[at for at, _, _ in marked],
            name=text,
            mode="markers",
            marker={"color": colour, "symbol": symbol, "size": size, "line": {"width": 2, "color": colour}},
            hovertext=[_hover(r, text) for _, _, r in marked],
            hoverinfo="text",
            showlegend=bool(marked),
        )
    _log(figure, "x", "median time, as a multiple of the shape's best", over, 1.06)
    names = [f"{o.name}<br>best: {number(best)} ms" for o, best in shown]
    figure.update_yaxes(
        tickvals=list(range(len(shown))), ticktext=names, range=[len(shown) - 0.5, -0.5], automargin=True,
        showgrid=False, zeroline=False, ticklabelstandoff=GAP,
    )  # fmt: skip
    return figure


def _apart(at: int) -> float:
    """Where in its row a trial stands, so that equal times do not hide each other."""
    return 0.5 * (at * 0.618 % 1 - 0.5)


def prediction(outcomes: Sequence[Outcome]) -> go.Figure:
    """Predicted against measured times, of which there are some; on the dashed line they agree."""
    figure = _figure()
    xs: list[float] = []
    ys: list[float] = []
    for at, outcome in enumerate(outcomes):
        predicted, measured = predictions(outcome.trials)
        xs, ys = xs + predicted, ys + measured
        figure.add_scatter(
            x=predicted,
            y=measured,
            name=outcome.name,
            mode="markers",
            marker=_marker(at),
            hovertext=[
                _hover(r, f"predicted {number(r.predicted_ms)} ms")
                for r in outcome.measured
                if r.predicted_ms is not None
            ],
            hoverinfo="text",
            showlegend=bool(predicted),
        )
    line = [min(xs + ys), max(xs + ys)]
    figure.add_scatter(x=line, y=line, name="as predicted", mode="lines", line=_line("dash"), hoverinfo="skip")
    _log(figure, "x", "predicted time (ms)", xs, 1.2)
    _log(figure, "y", "measured time (ms)", ys, 1.2)
    return figure


def importance_bars(shares: Mapping[str, float]) -> go.Figure:
    """A bar a knob, the most important on top."""
    figure = _figure(height=80 + 30 * len(shares))
    figure.add_bar(
        x=[100 * share for share in shares.values()],
        y=list(shares),
        orientation="h",
        marker={"color": COLOURS[0]},
        text=[f"{100 * share:.0f} %" for share in shares.values()],
        textposition="outside",
        cliponaxis=False,
        hoverinfo="skip",
    )
    title = "share of the variance of log time (%)"
    figure.update_xaxes(title=title, range=[0, 115 * max(shares.values())], gridcolor=GRID, zeroline=False)
    figure.update_yaxes(type="category", autorange="reversed", automargin=True, ticklabelstandoff=GAP)
    figure.update_layout(margin_t=10)
    return figure


def number(x: float) -> str:
    """Four digits that count, never a power of ten: 0.07324, 16.44, 2,039."""
    return f"{x:,.{max(0, 3 - floor(log10(x)))}f}" if x else "0"


def config_text(config: Config) -> str:
    """`BM=64 BN=128 num_warps=4`, as configs are written everywhere in a report."""
    return " ".join(f"{k}={v}" for k, v in config.items())


# -- how figures look ----------------------------------------------------------------------------


def _figure(height: int = 440) -> go.Figure:
    """A figure without data."""
    figure = go.Figure(layout={"template": {}})
    figure.update_layout(
        height=height,
        font={"color": INK, "family": "system-ui, sans-serif", "size": 13},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 70, "r": 30, "t": 50, "b": 60},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        hoverlabel={"align": "left", "bgcolor": "#24292f", "font": {"color": "#f0f3f6", "family": "monospace"}},
        bargap=0.3,
    )
    return figure


def _log(figure: go.Figure, axis: str, title: str, values: Sequence[float], margin: float = 1.0) -> None:
    """A logarithmic axis that holds the values, with round ticks: the fewer powers of ten, the more in each."""
    low, high = min(values) / margin, max(values) * margin
    powers = range(floor(log10(low)), ceil(log10(high)) + 1)
    steps = (1, 1.2, 1.5, 2, 3, 5, 7) if high < 12 * low else (1, 2, 5) if high < 1e5 * low else (1,)
    ticks = [step * 10.0**p for p in powers for step in steps]
    layout: dict[str, Any] = {
        "title": title, "type": "log", "range": [log10(low), log10(high)], "tickvals": ticks,
        "ticktext": [f"{t:,.12g}" for t in ticks], "gridcolor": GRID, "zeroline": False, "ticklabelstandoff": GAP,
    }  # fmt: skip
    figure.update_layout({f"{axis}axis": layout})


def _label(figure: go.Figure, x: float, y: float, text: str) -> None:
    """Words that end above a point of a figure with two logarithmic axes."""
    figure.add_annotation(text=text, x=log10(x), y=log10(y), xanchor="right", yanchor="bottom", showarrow=False)


def _marker(at: int) -> dict[str, Any]:
    symbol = SYMBOLS[at // len(COLOURS) % len(SYMBOLS)]
    return {"color": COLOURS[at % len(COLOURS)], "symbol": symbol, "size": 7, "opacity": 0.7}


def _line(dash: str = "solid") -> dict[str, Any]:
    return {"color": INK, "width": 1.5, "dash": dash}


def _hover(record: Record, more: str = "") -> str:
    """The time and the config of a trial; both are numbers and names, so nothing in it is markup."""
    lines = textwrap.wrap(config_text(record.config), HOVER_COLUMNS)
    return "<br>".join([f"{number(time_ms(record))} ms", *([more] if more else []), *lines])
