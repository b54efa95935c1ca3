"""One page of what tuning found for a variant on a card: HTML that needs no other file and no network."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from html import escape
from math import isnan
from pathlib import Path
from typing import Final

import plotly.graph_objects as go

from attncc import device, driver
from attncc.autotune import figures
from attncc.autotune.figures import config_text, number, tflops
from attncc.autotune.findings import (
    Case,
    Outcome,
    Rejection,
    Rows,
    importance,
    order,
    outcomes,
    predictions,
    rejections,
    row_for,
    time_ms,
)
from attncc.autotune.record import Card, Record, Toolchain, latest
from attncc.autotune.store import Store, default_root
from attncc.autotune.style import head
from attncc.autotune.table import LOSS, axes_of, certified, decide
from attncc.autotune.work import Work, kept, work
from attncc.errors import SpecError, nearest
from attncc.ir.attention import Attention
from attncc.ir.text import digest
from attncc.passes.lower.defaults import RULES, default_configs
from attncc.spec import Spec

ENDS: Final = {
    "measured": "right, and timed",
    "illegal": "beyond the card's limits, so never run",
    "wrong": "ran, but its result was off",
    "crashed": "its process died",
    "hung": "did not come to an end",
    "failed": "raised an error",
}
"""What a trial's status says, in words."""
REASONS: Final = 40
"""So many ways to be rejected are listed."""
REASON_CHARS: Final = 400
NOT_TRIED: Final = "not tried"
NONE: Final = "none"
UNDEFINED: Final = "undefined"
MISSING: Final = (NOT_TRIED, NONE, UNDEFINED, *ENDS)
"""What may stand in place of a number."""


def write_report(
    source: Spec | str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    root: Path | None = None,
    card: str | None = None,
) -> Path:
    """Writes the page of a spec's records on a card, and returns its path: NAME-CARD.html where none is named.

    The records are those of the store at `root`, a user's own where none is named; `card` may be left out where only
    one has records.
    """
    loaded = driver.load(source)
    records = of_one_card(loaded, Store(root or default_root()), card)
    attn, found = loaded.attention, records[-1].card
    cases = dict.fromkeys(map(Case.of, records))
    counted = {c: work(attn, c.shape, kept(c.sparsity, c.shape.get("Sk", 0))) for c in cases}
    untuned = defaults(attn, found)
    may = bool(untuned) and bool(certified(records))
    table = decide(records, untuned, LOSS, attn.layout == "varlen", axes_of(attn)).rows if may else ()
    text = page(records, table, f"Tuning of {attn.name} on {found.name}", counted, untuned)
    path = Path(f"{attn.name}-{found.name}.html" if out is None else out)
    path.write_text(text, encoding="utf-8")
    return path


def of_one_card(loaded: Spec, store: Store, card: str | None = None) -> list[Record]:
    """A spec's records on the card of this name, or on the only one that has any."""
    records = list(store.records(program=digest(loaded.attention)))
    name = loaded.attention.name
    if not records:
        raise SpecError(f"no trial of '{name}' is recorded in {store.root}", hint=f"attncc tune {loaded.file} first")
    cards = sorted({r.card.name for r in records})
    if card is None and len(cards) > 1:
        raise SpecError(f"'{name}' was tuned on {len(cards)} cards: {', '.join(cards)}", hint="choose with --device")
    if card is not None and card not in cards:
        raise SpecError(f"no trial of '{name}' on '{card}' is recorded in {store.root}", hint=nearest(card, cards))
    return sorted((r for r in records if card in (None, r.card.name)), key=lambda r: r.when)


def defaults(attn: Attention, card: Card) -> Rows:
    """The decision table that a package has for the card while nothing is tuned; none where no rule knows its kind."""
    if card.arch not in RULES:
        return ()
    alike = [d for d in device.CARDS.values() if d.arch == card.arch] or [device.A100]
    return default_configs(driver.lower(attn)[0], replace(alike[0], name=card.name, arch=card.arch))[0]


def page(records: Sequence[Record], table: Rows, title: str, work: Mapping[Case, Work], defaults: Rows = ()) -> str:
    """The HTML of one variant's records on one card; `work` says what each case has to compute and to move."""
    if len({(r.program, r.card.name) for r in records}) != 1:
        raise ValueError("a report is of one program on one card")
    trials = latest(records)
    found = outcomes(trials, defaults, table)
    card = trials[-1].card
    sections = (
        ("What was tuned", _summary(records, trials)),
        ("Default and best", _gains(found, work, bool(defaults))),
        ("Roofline", _roofline(found, work, card)),
        ("Time per shape", _times(found)),
        ("Prediction", _prediction(found)),
        ("Which knobs matter", _importance(found)),
        ("Rejected trials", _rejected(rejections(trials))),
        ("The chosen table", _chosen(found, table)),
    )
    body = "".join(f"<section><h2>{escape(name)}</h2>{content}</section>\n" for name, content in sections if content)
    return f"{head(title)}<h1>{escape(title)}</h1>{INTRODUCTION}\n{body}</main></body></html>\n"


INTRODUCTION: Final = """<p class="lead">attncc compiles attention kernels for GPUs. The same kernel can be launched in
many ways, called <em>configs</em>: the sizes of its tiles, the number of warps, the depth of its pipeline, each of them
a <em>knob</em>. Tuning tries configs on a card, checks each result against a float64 reference, and times those that
are right; each attempt is a <em>trial</em>. This page shows what they found. Point at a mark to see its config.</p>"""
ROOFLINE: Final = """<p>No call can be faster than the card multiplies (the flat roof) or its memory delivers (the
sloped one); the nearer to a roof, the better. Counted are the two matrix products over the query-key pairs that the
mask keeps (all, where a trial does not say how many those are), and every operand and result moved once.</p>"""
TIMES: Final = """<p>Each grey mark is a config that is right; further left is faster, and at 1 stands the best.</p>"""
PREDICTION: Final = """<p>What the model expected before anything ran, against what was measured. A model need not hit
the line to be of use: it has to put the configs of a shape in the right order; 1 in the table says that it does.</p>"""
IMPORTANCE: Final = """<p>How much of the differences in time a knob's value explains alone, over all shapes. What only
knobs together explain is in no bar, so the bars need not add up to 100 %; knobs that were tried together share.</p>"""
ALIKE: Final = "<p>No knob was varied among the trials that were measured, or no two of their times differ.</p>"


# -- figures with their words --------------------------------------------------------------------


def _roofline(found: Sequence[Outcome], work: Mapping[Case, Work], card: Card) -> str:
    shown = any(o.best and work[o.case].flops for o in found)
    return ROOFLINE + _plot("roofline", figures.roofline(found, work, card)) if shown else ""


def _times(found: Sequence[Outcome]) -> str:
    return TIMES + _plot("times", figures.times(found)) if any(o.best for o in found) else ""


def _prediction(found: Sequence[Outcome]) -> str:
    """The figure below a table of rank correlations, of each shape and of all trials."""
    everything = [r for o in found for r in o.trials]
    groups = [(o.name, o.trials) for o in found]
    groups += [("all shapes", tuple(everything))] if len(found) > 1 else []
    if not predictions(everything)[0]:
        return ""
    rows = [(name, _correlation(order(trials)), len(predictions(trials)[0])) for name, trials in groups]
    table = _table(("shape", "rank correlation (Spearman)", "trials"), rows)
    return PREDICTION + table + _plot("prediction", figures.prediction(found))


def _correlation(x: float) -> str:
    return UNDEFINED if isnan(x) else f"{x:.2f}"


def _importance(found: Sequence[Outcome]) -> str:
    shares = importance(found)
    if not shares:
        return ALIKE if any(o.best for o in found) else ""
    return IMPORTANCE + _plot("importance", figures.importance_bars(shares))


def _plot(name: str, figure: go.Figure) -> str:
    options = {"displayModeBar": False, "responsive": True}
    return figure.to_html(config=options, include_plotlyjs=False, full_html=False, div_id=name)


# -- words and tables ----------------------------------------------------------------------------


def _summary(records: Sequence[Record], trials: Sequence[Record]) -> str:
    newest, card = trials[-1], trials[-1].card
    days = sorted(r.when for r in trials)
    counts = Counter(r.status for r in trials)
    rate = f"{card.bandwidth_gbps:,g} GB/s of memory, {card.bf16_tflops:,g} TFLOP/s in bf16"
    memory = f"{card.shared_bytes_per_block // 1024} KB shared memory a block"
    facts = [
        ("variant", f"{newest.variant}, program {newest.program}"),
        ("card", f"{card.name} ({card.arch}): {card.sms} multiprocessors, {memory}, {rate}"),
        *(("toolchain", _toolchain(t)) for t in dict.fromkeys(r.toolchain for r in trials)),
        ("measured", " to ".join(dict.fromkeys(f"{d:%Y-%m-%d}" for d in (days[0], days[-1])))),
        ("trials", f"{len(trials)}{_repeats(len(records) - len(trials))}"),
    ]
    listed = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts)
    rows = [(status, counts[status], text) for status, text in ENDS.items() if counts[status]]
    return f"<dl>{listed}</dl>{_table(('ended as', 'trials', 'which means'), rows)}"


def _toolchain(t: Toolchain) -> str:
    return ", ".join(f"{k} {v}" for k, v in t.model_dump().items() if v)


def _repeats(n: int) -> str:
    return f", and {n} older of the same configs, left out below" if n else ""


def _gains(found: Iterable[Outcome], work: Mapping[Case, Work], has_defaults: bool) -> str:
    """Default and best of each shape."""
    columns = ("shape", "measured", "default, ms", "best, ms", "times as fast", "TFLOP/s", "the best config")
    rows = []
    for o in found:
        best, count = o.best, f"{len(o.measured)} of {len(o.trials)}"
        if best is None:
            rows.append((o.name, count, _time(o.default), NONE, "", "", ""))
            continue
        gain = f"{o.default.ms / time_ms(best):.2f}" if o.default and o.default.ms else ""
        rate = number(tflops(best, work[o.case]))
        rows.append((o.name, count, _time(o.default), _time(best), gain, rate, config_text(best.config)))
    note = "" if has_defaults else "<p>attncc knows no default for this kind of card.</p>"
    return note + _table(columns, rows, code="the best config")


def _time(record: Record | None) -> str:
    """The time of a trial, or why there is none."""
    if record is None:
        return NOT_TRIED
    return record.status if record.ms is None else number(record.ms)


def _rejected(found: Sequence[Rejection]) -> str:
    if not found:
        return "<p>None.</p>"
    rows = [
        (r.status, r.count, _short(r.example.why) or "no reason given", config_text(r.example.config))
        for r in found[:REASONS]
    ]
    more = sum(r.count for r in found[REASONS:])
    rest = f"<p>And {more} more trials, of {len(found) - REASONS} other reasons.</p>" if more else ""
    note = "<p>Reasons that differ only in their numbers are counted together; the first is shown.</p>"
    return note + _table(("ended as", "trials", "reason", "for example"), rows, code="for example") + rest


def _short(text: str) -> str:
    return text if len(text) <= REASON_CHARS else f"{text[:REASON_CHARS]}…"


def _chosen(found: Sequence[Outcome], table: Rows) -> str:
    """The decision table, and what it costs against the best of each shape."""
    if not table:
        return ""
    rows = [
        (at, " and ".join(f"{k} ≤ {most:,}" for k, most in bounds.items()) or "all others", config_text(config))
        for at, (bounds, config) in enumerate(table, 1)
    ]
    losses = []
    for o in found:
        at, chosen, best = row_for(table, o.case.shape), o.chosen, o.best
        loss = f"{100 * (chosen.ms / time_ms(best) - 1):.1f} %" if chosen and chosen.ms and best else ""
        losses.append((o.name, NONE if at is None else at + 1, _time(chosen), _time(best) if best else NONE, loss))
    first = "<p>The first row whose bounds hold for a call is taken. <em>pairs</em> is B × Sq × Sk.</p>"
    return (
        first
        + _table(("row", "where", "config"), rows, code="config")
        + "<p>What one table for all shapes costs against the best of each:</p>"
        + _table(("shape", "row", "time, ms", "best, ms", "loss"), losses)
    )


def _table(columns: Sequence[str], rows: Iterable[Sequence[object]], code: str = "") -> str:
    """Rows as HTML, all text escaped; numbers stand to the right, the column `code` is in fixed width."""
    filled = [[str(value) for value in row] for row in rows]
    cells = [[row[at] for row in filled] for at in range(len(columns))]
    kinds = [
        "code" if column == code else "number" if _are_numbers(texts) else "text"
        for column, texts in zip(columns, cells, strict=True)
    ]
    top, *body = (_row(tag, kinds, row) for tag, row in [("th", columns), *(("td", row) for row in filled)])
    table = f"<table><thead>{top}</thead><tbody>{''.join(body)}</tbody></table>"
    return f'<div class="wide">{table}</div>'


def _row(tag: str, kinds: Sequence[str], cells: Sequence[str]) -> str:
    inside = (f'<{tag} class="{kind}">{escape(cell)}</{tag}>' for kind, cell in zip(kinds, cells, strict=True))
    return f"<tr>{''.join(inside)}</tr>"


def _are_numbers(texts: Iterable[str]) -> bool:
    """Whether a column holds numbers, words in place of missing ones aside."""
    present = [t.removesuffix(" %").removeprefix("-") for t in texts if t not in ("", *MISSING)]
    return bool(present) and all(t.replace(".", "").replace(",", "").isdecimal() for t in present)
