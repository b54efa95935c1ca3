"""A tuning report: its numbers are those of the records, and nothing in a record is markup."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from attncc import device
from attncc.autotune import report
from attncc.autotune.figures import importance_bars, number, prediction, roofline, times
from attncc.autotune.findings import Case, importance, outcomes, rejections, row_for
from attncc.autotune.record import Card, Certificate, Record, Sparsity, Toolchain, latest
from attncc.autotune.work import Work
from attncc.cli import app
from attncc.driver import EXAMPLES
from attncc.ir.text import digest
from attncc.spec import load

CARD = Card.of(device.H200)
START = datetime(2026, 3, 1, tzinfo=UTC)
SMALL, LARGE = {"B": 4, "Sq": 128, "Sk": 128}, {"B": 1, "Sq": 8192, "Sk": 8192}
DEFAULT = {"BM": 64, "BN": 64}
WORK = {
    Case(tuple(sorted(SMALL.items()))): Work(4e9, 1e8),
    Case(tuple(sorted(LARGE.items()))): Work(4e12, 1e9),
}


def trial(
    config: dict[str, int] = DEFAULT,
    ms: float | None = None,
    shape: dict[str, int] = SMALL,
    after: int = 0,
    **more: Any,
) -> Record:
    known = {"variant": "tiny", "program": "ab12cd34", "card": CARD, "status": "measured" if ms else "illegal"}
    known |= {"toolchain": Toolchain(attncc="1.0", torch="2.11", triton="3.6")}
    return Record(**known | more, shape=shape, config=config, ms=ms, when=START + timedelta(minutes=after))


TRIALS = (
    trial(DEFAULT, 0.05, after=1, predicted_ms=0.02),
    trial({"BM": 128, "BN": 64}, 0.04, after=2, predicted_ms=0.01),
    trial({"BM": 128, "BN": 128}, 0.1, after=3),
    trial({"BM": 256, "BN": 128}, after=4, why="300000 bytes of shared memory, 232448 allowed"),
    trial({"BM": 256, "BN": 256}, after=5, why="524288 bytes of shared memory, 232448 allowed"),
    trial({"BM": 16, "BN": 16}, after=6, status="hung", why="no end within 30 s"),
    trial(DEFAULT, 8.0, LARGE, after=7, predicted_ms=6.0),
    trial({"BM": 128, "BN": 128}, 5.0, LARGE, after=1500, predicted_ms=7.0),
)
TABLE = (({"Sq": 1024}, {"BM": 128, "BN": 128}), ({}, {"BM": 128, "BN": 128}))
FOUND = outcomes(TRIALS, [({}, DEFAULT)], TABLE)


def page(records: Sequence[Record] = TRIALS, table: Any = (), title: str = "tiny") -> str:
    return report.page(records, table, title, WORK, [({}, DEFAULT)])


class Reader(HTMLParser):
    """The elements of a page, its tables' rows, and the words outside scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.rows: list[list[str]] = []
        self.links: list[str] = []
        self.words = ""
        self.in_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [str(v) for k, v in attrs if k in ("src", "href")]
        if tag == "tr":
            self.rows.append([])
        self.in_cell = tag in ("td", "th")
        if self.in_cell:
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if self.cdata_elem is None:
            self.words += data
            if self.in_cell:
                self.rows[-1][-1] += data

    def handle_endtag(self, tag: str) -> None:
        self.in_cell = False

    def below(self, *columns: str) -> list[list[str]]:
        """The rows of the table whose head begins with these columns."""
        start = next(n for n, row in enumerate(self.rows) if tuple(row[: len(columns)]) == columns)
        width = len(self.rows[start])
        rest = self.rows[start + 1 :]
        heads = [n for n, row in enumerate(rest) if row[0] in ("ended as", "shape", "row") or len(row) != width]
        return rest[: heads[0] if heads else len(rest)]


# -- figures -------------------------------------------------------------------------------------


def test_the_roofline_is_the_cards_and_the_points_are_the_trials() -> None:
    roofs, small, large = roofline(FOUND, WORK, CARD).data
    ridge = CARD.bf16_tflops * 1e3 / CARD.bandwidth_gbps
    assert roofs.x[1] == pytest.approx(ridge)
    assert roofs.y[1:] == (CARD.bf16_tflops, CARD.bf16_tflops)
    assert roofs.y[0] / roofs.x[0] == pytest.approx(CARD.bandwidth_gbps / 1e3)
    assert small.x == (40.0, 40.0, 40.0)
    assert small.y == pytest.approx((80, 100, 40))
    assert (set(large.x), tuple(large.y)) == ({4000.0}, pytest.approx((500, 800)))
    assert small.hovertext[1].split("<br>") == ["0.04000 ms", "100.0 TFLOP/s", "BM=128 BN=64"]


@pytest.mark.parametrize("ms", [1e-6, 0.05, 1e6])
def test_every_point_is_in_view(ms: float) -> None:
    """Even one above the roof, which is a fault of the card's numbers and not to be hidden."""
    figure = roofline(outcomes([trial(ms=ms)]), WORK, CARD)
    low, high = (10**end for end in figure.layout.yaxis.range)
    assert all(low < y < high for trace in figure.data for y in trace.y)


def test_times_are_over_the_best_of_their_shape() -> None:
    every, best, default, chosen = times(FOUND).data
    assert every.x == pytest.approx((1.25, 1, 2.5, 1.6, 1))
    assert [round(y) for y in every.y] == [0, 0, 0, 1, 1]
    assert (best.x, best.y) == ((1, 1), (0, 1))
    assert default.x == pytest.approx((1.25, 1.6))
    assert chosen.x == pytest.approx((2.5, 1))
    ticks = times(FOUND).layout.yaxis.ticktext
    assert ticks == ("B=4 Sq=128 Sk=128<br>best: 0.04000 ms", "B=1 Sq=8192 Sk=8192<br>best: 5.000 ms")


def test_predictions_are_those_of_measured_trials() -> None:
    small, large, line = prediction(FOUND).data
    assert (small.x, small.y) == ((0.02, 0.01), (0.05, 0.04))
    assert (large.x, large.y) == ((6.0, 7.0), (8.0, 5.0))
    assert line.x == line.y == (0.01, 8.0)


def test_one_knob_that_explains_all() -> None:
    """Two shapes of unlike speed; BN does nothing, BM is a factor of two, W was never varied."""
    configs = [{"BM": bm, "BN": bn, "W": 4} for bm in (64, 128) for bn in (32, 64, 128)]
    speed = {"B": 0.01, "Sq": 30.0}
    found = outcomes([trial(c, s * c["BM"], {name: 2}) for name, s in speed.items() for c in configs])
    shares = importance(found)
    assert list(shares) == ["BM", "BN"]
    assert list(shares.values()) == pytest.approx([1.0, 0.0])
    (bars,) = importance_bars(shares).data
    assert (bars.y, bars.text) == (("BM", "BN"), ("100 %", "0 %"))


def test_two_knobs_share_what_they_explain() -> None:
    """log time = 2 a + b: variances of 4 and 1."""
    found = outcomes([trial({"A": a, "B": b}, 4.0**a * 2.0**b) for a in (0, 1) for b in (0, 1)])
    assert importance(found) == pytest.approx({"A": 0.8, "B": 0.2})


def test_a_knob_that_only_some_configs_have_counts() -> None:
    found = outcomes([trial({"A": a} | extra, 1 + len(extra)) for a in (0, 1) for extra in ({}, {"E": 0})])
    assert importance(found) == pytest.approx({"E": 1.0, "A": 0.0})


def test_times_that_do_not_differ_have_no_cause() -> None:
    assert importance(outcomes([trial({"A": a}, 3.0) for a in range(4)])) == {}


# -- findings ------------------------------------------------------------------------------------


def test_outcomes_know_best_default_and_chosen() -> None:
    small, large = FOUND
    assert (len(small.trials), len(small.measured), len(large.trials)) == (6, 3, 2)
    assert [(r.ms if r else None) for r in (small.best, small.default, small.chosen)] == [0.04, 0.05, 0.1]
    assert [(r.ms if r else None) for r in (large.best, large.default, large.chosen)] == [5.0, 8.0, 5.0]


def test_the_newest_trial_of_a_config_counts() -> None:
    again = trial(DEFAULT, 0.03, after=9)
    kept = latest([again, *TRIALS])
    assert len(kept) == len(TRIALS)
    assert again in kept
    assert TRIALS[0] not in kept


def test_rejections_are_counted_by_status_and_reason() -> None:
    first, second = rejections(TRIALS)
    assert (first.status, first.count, first.example) == ("illegal", 2, TRIALS[3])
    assert (second.status, second.count, second.example.why) == ("hung", 1, "no end within 30 s")


@pytest.mark.parametrize(
    ("rows", "shape", "row"),
    [
        ([({"Sq": 16}, {}), ({}, {})], {"Sq": 16}, 0),
        ([({"Sq": 16}, {}), ({}, {})], {"Sq": 17}, 1),
        ([({"Sq": 16, "B": 2}, {}), ({}, {})], {"Sq": 1, "B": 3}, 1),
        ([({"pairs": 100}, {}), ({}, {})], {"B": 1, "Sq": 10, "Sk": 10}, 0),
        ([({"pairs": 100}, {}), ({}, {})], {"B": 2, "Sq": 10, "Sk": 10}, 1),
        ([({"N": 4}, {})], {"Sq": 1}, None),
        ([], {"Sq": 1}, None),
    ],
)
def test_rows_are_read_as_packages_read_them(rows: Any, shape: dict[str, int], row: int | None) -> None:
    assert row_for(rows, shape) == row


def test_names_tell_masks_apart() -> None:
    sparse = [Sparsity(tiles=t, variance=0, full=0.5, skew=1) for t in (3, 3.5)]
    found = outcomes([trial(ms=1, sparsity=s) for s in sparse] + [trial(ms=1)])
    assert len({o.name for o in found}) == 3
    assert all(o.name.startswith("B=4 Sq=128 Sk=128, ") for o in found)


@pytest.mark.parametrize(
    ("x", "text"),
    [(0, "0"), (0.0123456, "0.01235"), (16.444, "16.44"), (999.96, "1,000.0"), (2039, "2,039"), (1e7, "10,000,000")],
)
def test_numbers_have_no_powers(x: float, text: str) -> None:
    assert number(x) == text


# -- the page ------------------------------------------------------------------------------------


def test_the_page_says_what_the_records_say() -> None:
    reader = Reader(page(table=TABLE))
    assert reader.below("ended as", "trials", "which means") == [
        ["measured", "5", "right, and timed"],
        ["illegal", "2", "beyond the card's limits, so never run"],
        ["hung", "1", "did not come to an end"],
    ]
    assert reader.below("shape", "measured") == [
        ["B=4 Sq=128 Sk=128", "3 of 6", "0.05000", "0.04000", "1.25", "100.0", "BM=128 BN=64"],
        ["B=1 Sq=8192 Sk=8192", "2 of 2", "8.000", "5.000", "1.60", "800.0", "BM=128 BN=128"],
    ]
    assert reader.below("shape", "rank correlation (Spearman)") == [
        ["B=4 Sq=128 Sk=128", "1.00", "2"],
        ["B=1 Sq=8192 Sk=8192", "-1.00", "2"],
        ["all shapes", "0.80", "4"],
    ]
    assert reader.below("ended as", "trials", "reason")[0] == ["illegal", "2", TRIALS[3].why, "BM=256 BN=128"]
    assert [row[1:3] for row in reader.below("row")] == [
        ["Sq ≤ 1,024", "BM=128 BN=128"],
        ["all others", "BM=128 BN=128"],
    ]
    assert [row[1:] for row in reader.below("shape", "row")] == [
        ["1", "0.1000", "0.04000", "150.0 %"],
        ["2", "5.000", "5.000", "0.0 %"],
    ]
    for words in ("nvidia_h200 (sm_90)", "4,800 GB/s", "989 TFLOP/s", "2026-03-01 to 2026-03-02", "triton 3.6"):
        assert words in reader.words


def test_the_page_needs_nothing_else() -> None:
    text = page()
    reader = Reader(text)
    assert reader.links == []
    assert not set(reader.tags) & {"link", "img", "iframe", "object", "base", "form"}
    assert text.count("default-src 'none'") == 1
    assert text.count("plotly.js v") == 1
    assert [i for i in ("roofline", "times", "prediction", "importance") if f'id="{i}"' not in text] == []


def test_the_same_records_make_the_same_page() -> None:
    assert page() == page()
    assert page() == page(TRIALS[::-1])


EVIL = '</script><script>alert("x")</script><img src=x onerror=alert(1)>&amp;'


def test_no_text_of_a_record_is_markup() -> None:
    words = EVIL[:64]
    toolchain = Toolchain(**dict.fromkeys(Toolchain.model_fields, words))
    certificate = Certificate(cases=1, inputs=(words,), worst=0.5)
    measured = trial(ms=0.05, toolchain=toolchain, certificate=certificate, predicted_ms=0.04)
    records = [
        measured,
        *(trial({"A": n}, status=s, why=EVIL, toolchain=toolchain) for n, s in enumerate(report.ENDS) if n),
    ]
    plain = [r.model_copy(update={"why": "x", "toolchain": TRIALS[0].toolchain}) for r in records]
    reader = Reader(page(records, title=EVIL))
    assert reader.tags == Reader(page(plain)).tags
    assert reader.words.count(EVIL) == 2 + len(records) - 1
    assert reader.words.count(words) >= len(Toolchain.model_fields)


@pytest.mark.parametrize("word", ["<b>", "a b", "", "a\n", "1a", "é" * 65, "a&b", '"'])
def test_names_that_figures_show_cannot_hold_markup(word: str) -> None:
    """Figures read a few tags in their words: shapes, knobs and cards have names instead."""
    for wrong in ({"shape": {word: 1}}, {"config": {word: 1}}, {"variant": word}):
        with pytest.raises(ValueError, match="pattern"):
            Record.model_validate(trial(ms=1).model_dump() | wrong)
    with pytest.raises(ValueError, match="pattern"):
        Card.model_validate(CARD.model_dump() | {"name": word})


def test_all_rejected() -> None:
    rejected = [r for r in TRIALS if r.ms is None]
    text = page(rejected, TABLE)
    assert Reader(text).below("shape", "measured") == [["B=4 Sq=128 Sk=128", "0 of 3", "not tried", "none", "", "", ""]]
    assert [row[1] for row in Reader(text).below("ended as", "trials", "reason")] == ["2", "1"]
    assert not re.search(r'id="(roofline|times|prediction|importance)"', text)


def test_one_record() -> None:
    text = page([trial(ms=0.05, predicted_ms=0.04)])
    reader = Reader(text)
    row = ["B=4 Sq=128 Sk=128", "1 of 1", "0.05000", "0.05000", "1.00", "80.00", "BM=64 BN=64"]
    assert reader.below("shape", "measured") == [row]
    assert reader.below("shape", "rank correlation (Spearman)") == [["B=4 Sq=128 Sk=128", "undefined", "1"]]
    assert 'id="roofline"' in text
    assert 'id="importance"' not in text


@pytest.mark.parametrize("tiles", [0.0, 1e-300, 999999999.0])
def test_odd_masks_make_a_page(tiles: float) -> None:
    record = trial(ms=1e-6, sparsity=Sparsity(tiles=tiles, variance=0, full=0, skew=0))
    flops = min(1.0, tiles)
    assert "1 of 1" in report.page([record], (), "tiny", {Case.of(record): Work(flops, 1.0)})


def test_many_reasons_are_cut_short() -> None:
    records = [trial({"A": n}, why=chr(97 + n % 26) * (n // 26 + 1)) for n in range(60)] + [trial(why="y" * 2000)]
    reader = Reader(page(records))
    assert len(reader.below("ended as", "trials", "reason")) == report.REASONS
    assert "And 21 more trials, of 21 other reasons." in reader.words


def test_records_of_two_programs_are_no_report() -> None:
    for other in (trial(ms=1, program="ffffffff"), trial(ms=1, card=Card.of(device.H100))):
        with pytest.raises(ValueError, match="one program on one card"):
            page([*TRIALS, other])
    with pytest.raises(ValueError, match="one program on one card"):
        page([])


# -- the command ---------------------------------------------------------------------------------

SPEC = "attncc: 1\nname: tiny\nheads: {q: 2, kv: 1}\ndims: 16\ndtype: fp16\nmask: causal\n"


@dataclass(frozen=True)
class Shelf:
    """A store that holds what a test put there."""

    root: Path
    held: tuple[Record, ...]

    def records(self, *, program: str) -> Iterator[Record]:
        return (r for r in self.held if r.program == program)


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(SPEC)
    return path


def run(monkeypatch: pytest.MonkeyPatch, held: Sequence[Record], *arguments: object) -> Result:
    monkeypatch.setattr(report, "Store", lambda root: Shelf(root, tuple(held)))
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


def recorded(spec: Path, **more: Any) -> Record:
    program = digest(load(spec).attention)
    return trial(**{"ms": 1.0, "program": program} | more)


def test_the_command_writes_the_page_of_the_specs_own_records(
    spec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dict(report.defaults(load(spec).attention, CARD)[-1][1])
    held = [recorded(spec, shape=LARGE, config=config), recorded(spec, config={"A": 1}, ms=0.5, shape=LARGE), TRIALS[0]]
    out = tmp_path / "out.html"
    result = run(monkeypatch, held, spec, "-o", out, "--store", tmp_path)
    assert (result.exit_code, result.stdout.strip()) == (0, str(out))
    (row,) = Reader(out.read_text()).below("shape", "measured")
    rate = 2 * 2 * 8192**2 * 32 / 0.5e-3 / 1e12
    assert row[1:6] == ["2 of 2", "1.000", "0.5000", "2.00", f"{rate:.2f}"]


def test_the_page_is_named_by_variant_and_card(spec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(monkeypatch, [recorded(spec)], spec, "--json")
    assert result.stdout == '{"report": "tiny-nvidia_h200.html"}\n'
    assert "<h1>Tuning of tiny on nvidia_h200</h1>" in (tmp_path / "tiny-nvidia_h200.html").read_text()


def test_without_records_tune_first(spec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(monkeypatch, TRIALS, spec)
    assert result.exit_code == 2
    assert f"attncc tune {spec} first" in result.stderr


def test_several_cards_need_a_choice(spec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = [recorded(spec), recorded(spec, card=Card.of(device.A100))]
    out = tmp_path / "a.html"
    result = run(monkeypatch, held, spec, "-o", out)
    assert result.exit_code == 2
    assert "2 cards: nvidia_a100, nvidia_h200" in result.stderr
    assert "--device" in result.stderr
    assert "did you mean 'nvidia_a100'?" in run(monkeypatch, held, spec, "--device", "nvidia_a10").stderr
    assert not out.exists()
    assert run(monkeypatch, held, spec, "-o", out, "--device", "nvidia_a100").exit_code == 0
    assert "2,039 GB/s" in out.read_text()


def test_a_record_of_an_odd_shape_is_refused(spec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(monkeypatch, [recorded(spec, shape={"N": 3})], spec, "-o", tmp_path / "a.html")
    assert result.exit_code == 2
    assert "B=None in N=3" in result.stderr


def test_a_card_that_no_rule_knows_has_no_defaults() -> None:
    odd = CARD.model_copy(update={"name": "odd", "arch": "sm_75"})
    assert report.defaults(load(EXAMPLES / "gemma2_local.yaml").attention, odd) == ()
    assert "no default for this kind of card" in report.page(TRIALS, (), "tiny", WORK)
