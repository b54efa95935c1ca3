"""Stream-K: the key tiles of all sequences in one line, cut in equal ranges; run by Triton's interpreter."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from codegen.emitted import normal, package, passes
from codegen.test_split import FEATURES, FP32, PLAIN
from hypothesis import given
from hypothesis import strategies as st

from attncc import driver, spec
from attncc.check.cases import Case
from attncc.check.pages import lay_out
from attncc.codegen.aot import Failed, build_all
from attncc.codegen.host import host_expr
from attncc.codegen.offline import jobs
from attncc.device import find
from attncc.errors import Unsupported
from attncc.ir.build import Builder
from attncc.ir.expr import name
from attncc.passes.lower import stream
from attncc.passes.lower.defaults import default_configs

EXAMPLES = Path(__file__).parents[2] / "examples"
WISH = "\nschedule: stream_k"
CAUSAL = f"{PLAIN}mask: causal{WISH}"
RAGGED = f"{PLAIN}mask: causal\nkv: paged(8)"


@pytest.mark.parametrize("feature", FEATURES)
def test_features(feature: str) -> None:
    p = package(FEATURES[feature] + WISH)
    passes(p.tiles(16, 16, split=1, fill=5), Case(2, 5, 45), Case(1, 2, 41, "nan_keys"), Case(2, 1, 41, "nan_keys"))
    passes(p.tiles(16, 32, one_pass=1, split=2, fill=7), Case(2, 1, 70))


@pytest.mark.parametrize("trait", ["large_logits", "nan_around", "nan_neighbour", "unaligned", "one_hot"])
def test_operands(trait: str) -> None:
    passes(package(CAUSAL).tiles(16, 16, split=1, fill=9), Case(2, 3, 41, trait))


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 17), (1, 5, 3), (1, 20, 40), (1, 0, 16), (1, 16, 0), (0, 16, 16)])
def test_shapes(shape: tuple[int, int, int]) -> None:
    passes(package(CAUSAL).tiles(16, 16, split=1), Case(*shape))


@pytest.mark.parametrize("fill", [1, 2, 3, 5, 7, 26, 100])
def test_ranges_of_sequences_that_differ_in_length(fill: int) -> None:
    """From one range of everything to more ranges than tiles; some begin or end in an item's midst."""
    passes(package(RAGGED).tiles(16, 16, split=1, fill=fill), Case(4, 2, 130), Case(5, 1, 37))


def test_items_of_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "AT_ONCE", 4)
    p = package(RAGGED, "stream_in_chunks")
    assert "arange(0, 4)" in (p.path / "kernels.py").read_text()
    for fill in (1, 5, 26):
        passes(p.tiles(16, 16, split=1, fill=fill), Case(5, 1, 70))


def ragged(lengths: list[int], rows: int = 1) -> dict[str, torch.Tensor]:
    pages = lay_out(lengths, 20, 8, torch.Generator().manual_seed(0))
    k, v = ([normal(n, 2, 16, seed=2 * at + odd) for at, n in enumerate(lengths)] for odd in range(2))
    caches = {"k": pages.fill(k, (2, 16)), "v": pages.fill(v, (2, 16))}
    q = normal(len(lengths), 4, rows, 16, seed=9)
    return {"q": q, **caches, "block_table": pages.table, "seqused_k": pages.used}


def test_launches_do_not_depend_on_lengths() -> None:
    """A CUDA graph may be replayed with others: nothing is read on the host."""
    p = package(RAGGED).tiles(16, 16, split=1, fill=6)

    def launched(lengths: list[int], rows: int) -> list[int]:
        x = ragged(lengths, rows)
        operands = tuple(x[n] for n in ("q", "k", "v", "block_table", "seqused_k"))
        return [launch.programs for launch in p.module._RUNNER.plan(operands, False, True).launches]

    assert launched([150, 3, 20], 1) == launched([0, 0, 1], 1) == [6, 6, 12]  # plan, ranges, rows to merge
    assert launched([150, 3, 20], 2) == launched([0, 0, 1], 2) == [6, 6, 6, 24]  # ranges lost to NaN once more


def test_the_same_call_has_the_same_bits() -> None:
    p, x = package(RAGGED).tiles(16, 16, split=1, fill=5), ragged([150, 0, 40])
    first, second = (p(**x, return_lse=True) for _ in range(2))
    assert all(map(torch.equal, first, second))
    assert (first[0][1] == 0).all()
    assert (first[1][1] == -torch.inf).all()


def test_ranges_do_not_matter_much() -> None:
    p, x = package(RAGGED), ragged([150, 9, 77], rows=3)
    whole = p.tiles(16, 16)(**x)
    for split, fill in ((1, 1), (1, 6), (1, 100), (3, 100)):
        torch.testing.assert_close(p.tiles(16, 16, split=split, fill=fill)(**x), whole, rtol=1e-5, atol=1e-6)


# -- the cut ---------------------------------------------------------------------------------------


def evaluated(e: object, **sizes: int) -> int:
    return eval(host_expr(e), {"n": sizes, "min": min, "max": max})  # type: ignore[arg-type]


def cut(total: int, programs: int, least: int, items: int) -> dict[str, int]:
    """The numbers by which a line is cut."""
    b = Builder({})
    stream._bind_cut(b, name("total"), name("items"))
    known = {"total": total, "FILL": programs, "SPLIT": least, "items": items}
    for statement in b.body:
        if hasattr(statement, "var"):
            known[str(statement.var.attr)] = evaluated(statement.value, **known)
    return known


@given(st.integers(1, 400), st.integers(1, 90), st.integers(1, 9), st.integers(1, 99))
def test_every_tile_is_in_one_range_and_ranges_are_equal(total: int, programs: int, least: int, items: int) -> None:
    known = cut(total, programs, least, items)
    begin, owner = stream._begin(name("p")), stream._range_of(name("t"), name("total"))
    ends = [evaluated(begin, p=p, **known) for p in range(known["ranges"] + 1)]
    sizes = [b - a for a, b in pairwise(ends)]
    assert (ends[0], ends[-1]) == (0, total)
    assert max(sizes) - min(sizes) <= 1
    assert known["ranges"] <= programs
    assert len(sizes) == 1 or min(sizes) >= least
    owners = [evaluated(owner, t=t, **known) for t in range(total)]
    assert owners == [p for p, size in enumerate(sizes) for _ in range(size)]


# -- wishes ----------------------------------------------------------------------------------------


def program_names(body: str) -> list[str]:
    program = driver.lower(spec.loads(f"attncc: 1\nname: t\n{body}\n").attention)[1]
    return [k.name.removeprefix("t_") for k in program.kernels]


def test_who_gets_which_schedule() -> None:
    dense, shared, line = ["forward"], ["split", "merge"], ["plan", "stream", "merge"]
    one = f"heads: 1\n{FP32}"
    assert program_names(one) == [*dense, *shared]
    assert program_names(f"{one}schedule: split_kv(8)") == [*dense, *shared]
    assert program_names(f"{one}schedule: stream_k") == [*dense, *line]
    assert program_names(f"{one}schedule: tile") == dense
    assert program_names(f"{one}kv: paged(16)") == [*dense, *line]
    assert program_names(f"{one}kv: paged(16)\nschedule: split_kv(8)") == [*dense, *shared]
    assert program_names(f"{one}kv: paged(16)\nnumerics: {{reproducible: batch}}") == [*dense, *shared]
    assert program_names(f"{one}modes: [prefill]") == dense


def test_a_wish_for_so_many_shares() -> None:
    p = package(f"{PLAIN}mask: causal\nschedule: split_kv(3)")
    passes(p.tiles(16, 16, one_pass=1, split=4), Case(2, 2, 130), Case(1, 1, 9))
    q, k = normal(2, 4, 1, 16), normal(2, 2, 130, 16)
    assert [x.programs for x in p.module._RUNNER.plan((q, k, k), False, True).launches] == [2 * 2 * 3, 8]


def test_a_wish_for_shares_that_do_not_depend_on_neighbours() -> None:
    """So many equal ones are such: all keys are in them, however many there are."""
    p = package(f"{PLAIN}mask: causal\nschedule: split_kv(3)\nnumerics: {{reproducible: batch}}")
    passes(p.tiles(16, 16, split=1), Case(2, 2, 130), Case(1, 1, 9))


@pytest.mark.parametrize("wish", ["stream_k", "split_kv(4)"])
@pytest.mark.parametrize(
    "why",
    [
        "layout: varlen",
        "quantize: {k: int8}",
        "modes: [prefill]",
        "inputs: {ids: {shape: [B, Sk], dtype: int32}}\nmask: document(ids)",
    ],
)
def test_wishes_that_cannot_come_true_are_refused(why: str, wish: str) -> None:
    with pytest.raises(Unsupported) as error:
        program_names(f"heads: 2\ndims: 32\nschedule: {wish}\n{why}")
    assert error.value.key == "schedule"
    assert "auto" in error.value.hint


@pytest.mark.parametrize("more", ["schedule: persistent", "schedule: stream_k\nnumerics: {reproducible: batch}"])
def test_schedules_that_nothing_carries(more: str) -> None:
    with pytest.raises(Unsupported) as error:
        program_names(f"heads: 2\ndims: 32\n{more}")
    assert error.value.key == "schedule"


# -- what is compiled ------------------------------------------------------------------------------


@pytest.mark.newest
def test_kernels_compile_for_gpus() -> None:
    attn, program = driver.lower(driver.load(EXAMPLES / "lean_attention.yaml").attention)
    body = (EXAMPLES / "lean_attention.yaml").read_text().split("name: lean_attention\n")[1]
    kernels = package(body, "lean_attention", target="sm_90").path / "kernels.py"
    wanted = {}
    for device in ("sm_80", "sm_90"):
        config = next(dict(c) for _, c in default_configs(attn, find(device))[0] if c["SPLIT"])
        found = jobs(program, str(kernels), find(device), config)
        wanted |= {f"{device} {n}": j for n, j in found.items() if n.endswith(("_plan", "_stream PASS=0", "_merge"))}
    assert len(wanted) == 6
    for text, outcome in zip(wanted, build_all(list(wanted.values())), strict=True):
        assert not isinstance(outcome, Failed), (text, outcome.reason)
        assert outcome.spill_bytes <= 8 * ("_merge" in text), text  # two words, by Triton 3.9
        assert ("mma" in outcome.loop or "wgmma" in outcome.loop) == ("_stream" in text), text


@given(st.integers(1, 70), st.integers(1, 40), st.integers(60, 140))
def test_ranges_end_where_items_of_equal_length_do(items: int, tiles: int, programs: int) -> None:
    """If that leaves few programs without one, and never more than one of twenty."""
    known = cut(items * tiles, programs, 1, items)
    even = programs // items * items
    assert known["ranges"] >= min(programs * 19 // 20, items * tiles)
    if even >= programs * 19 / 20 and tiles % (even // items) == 0:
        assert known["ranges"] == even
        assert (known["size"] * (even // items), known["longer"]) == (tiles, 0)
