"""The latent engine's functions against brute force, its machine code, and what keeps it from a variant."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from codegen.test_engine import Pointer, load
from hypothesis import given, settings
from hypothesis import strategies as st

from attncc import driver, spec
from attncc.autotune.space import branches, candidates
from attncc.codegen.engine import print_engine
from attncc.codegen.parameters import constants
from attncc.device import A100, H200, find
from attncc.ir.tile import Program
from attncc.passes.lower.defaults import default_configs
from attncc.passes.lower.latent import gap
from attncc.passes.lower.stream import collector, ranges

DIMS = "dims: {qk: 576, v: 512}\n"
FEW = f"heads: {{q: 16, kv: 1}}\n{DIMS}"
MANY = f"heads: {{q: 128, kv: 1}}\n{DIMS}"
BATCH = "numerics: {reproducible: batch}\n"
ROWS, SPLIT = 64, 2
MASKS = {
    "causal": lambda i, j: j <= i,
    "causal & window(200)": lambda i, j: (j <= i) & (i - j < 200),
    "true": lambda i, j: i == i,
}


def lowered(body: str) -> tuple[Any, Program]:
    return driver.lower(spec.loads(f"attncc: 1\nname: variant\n{body}\n").attention)


def functions(body: str) -> Any:
    """The variant's functions in NumPy, which computes what Gluon would; the text is attncc's own output."""
    attn, program = lowered(body)
    made = program.engine
    assert made is not None
    numpy = SimpleNamespace(
        constexpr=int, minimum=np.minimum, maximum=np.maximum, where=np.where, log2=np.log2, exp2=np.exp2, load=load,
        int64=np.int64,
    )  # fmt: skip
    scope: dict[str, Any] = {"gl": numpy, "gluon": SimpleNamespace(jit=lambda f: f)}
    exec("\n".join(print_engine(made)), scope)
    return SimpleNamespace(**scope, engine=made, constants=constants(attn, made))


def walked(v: Any, args: Any, programs: int, fill: int, sizes: tuple[int, int, int]) -> tuple[Counter[Any], Any]:
    """How often the engine multiplies each (batch entry, head, query, key), walking as `_latent_consumer.py` does; and
    where it leaves the states of rows that it does not end, each of them once."""
    heads = sizes[0]
    seen: Counter[Any] = Counter()
    places: Counter[Any] = Counter()
    for number in range(programs):
        item, end, *job = (int(x) for x in v.job(number, args, ROWS, ROWS, SPLIT, fill))
        while item < end:
            at, (hk, row0, end_row) = v.place(item, args, ROWS, 0, 0)
            assert hk == 0
            cuts, wholes, s = v.walk(at, args, ROWS, ROWS)
            count = int(cuts + wholes)
            first, last, stride, ends, slot = v.part(number, job, count, args, ROWS, ROWS, SPLIT, fill)
            r = v.rows(row0 + np.arange(ROWS), s, args)
            inside = np.asarray(r[0]) < end_row
            last_key = int(s[v.constants["KEYS_AT"]])
            for t in range(int(first), int(last), int(stride)):
                is_cut = t >= wholes
                n = int(v.cut(t - wholes, s, args, ROWS) if is_cut else v.whole(t, s, args, ROWS))
                j = n + np.arange(ROWS)
                kept = np.broadcast_to(v.keep(j, r, s, args) & (j < last_key)[None], (ROWS, ROWS))
                # what the first row sees, all see: by that the engine blanks the values of the others
                if inside.all() and heads % ROWS == 0:
                    assert (kept == kept[0]).all()
                assert is_cut or (kept[inside].all() and n + ROWS <= last_key)
                for row, key in zip(*np.nonzero(kept & inside[:, None]), strict=True):
                    seen[int(at[0]), int(r[2][row]), int(r[1][row]), int(j[key])] += 1
            if not ends:
                one, other = v.state(slot, at, r, s, args)
                pairs = np.broadcast_arrays(np.asarray(one), np.asarray(other))
                places.update(zip(*(x[inside].tolist() for x in pairs), strict=True))
            job[2] += count
            item += 1
    assert not places or max(places.values()) == 1
    return seen, places


def visible(mask: str, heads: int, queries: int, lengths: list[int]) -> Counter[Any]:
    found: Counter[Any] = Counter()
    for b, keys in enumerate(lengths):
        i, j = np.arange(queries)[:, None] + keys - queries, np.arange(keys)[None]
        for query, key in zip(*np.nonzero(np.broadcast_to(MASKS[mask](i, j), (queries, keys))), strict=True):
            found.update({(b, h, int(query), int(key)): 1 for h in range(heads)})
    return found


@pytest.mark.parametrize("mask", MASKS)
@settings(max_examples=6, deadline=None)
@given(st.integers(1, 2), st.integers(1, 700), st.sampled_from([1, 5, 132]))
def test_each_visible_pair_is_in_one_share(mask: str, batch: int, keys: int, fill: int) -> None:
    v = functions(f"{FEW}mask: {mask}\nkv: latent(rope=64)")
    tiles = (keys + ROWS - 1) // ROWS
    shares = min((tiles + SPLIT - 1) // SPLIT, max(fill // batch, 1))
    seen, places = walked(v, (batch, 1, keys, 0.1), batch * shares, fill, (16, 1, keys))
    assert seen == visible(mask, 16, 1, [keys] * batch)
    assert set(places) == ({(row, n) for row in range(16 * batch) for n in range(shares)} if shares > 1 else set())


def test_tiles_of_many_heads_have_rows_of_one_query_each() -> None:
    v = functions(f"{MANY}mask: causal\nkv: latent(rope=64)")
    seen, _ = walked(v, (1, 3, 150, 0.1), 6, 1, (128, 3, 150))
    assert seen == visible("causal", 128, 3, [150])


def cut_line(v: Any, counts: list[int], fill: int) -> np.ndarray:
    """What the kernel `ranges` finds, plainly."""
    ends = np.cumsum(counts)
    line = int(ends[-1])
    most = fill // len(counts) * len(counts)
    number = max(min(most if most * 20 >= fill * 19 else fill, line // SPLIT), 1)
    bounds = [min(p * line // number, line) for p in range(fill + 1)]
    rows = []
    for number, (begin, end) in enumerate(pairwise(bounds)):
        first = int((ends <= begin).sum())
        behind = int((ends - counts < end).sum()) if begin < end else first
        rows.append((first, behind, begin, end, int(ends[first - 1]) if first else 0, number))
    return np.array(rows, np.int32)


@settings(max_examples=12, deadline=None)
@given(st.lists(st.integers(0, 500), min_size=1, max_size=5), st.sampled_from([1, 3, 7, 40]))
def test_each_visible_pair_is_in_one_range(lengths: list[int], fill: int) -> None:
    """Of the line of all key tiles, where sequences differ in length and lie in pages."""
    v = functions(f"{FEW}mask: causal\nkv: latent(rope=64, page_size=64)")
    batch, pages = len(lengths), 8
    used, table = np.array(lengths, np.int32), np.random.default_rng(0).permutation(batch * pages).astype(np.int32)
    found = cut_line(v, [-(-n // ROWS) for n in lengths], fill)
    args = (Pointer(table), pages, 1, Pointer(used), 1, Pointer(found.ravel()), 6, 1, batch, 1, pages * 64, 0.1)
    seen, _ = walked(v, args, fill, fill, (16, 1, pages * 64))
    assert seen == visible("causal", 16, 1, lengths)
    for b, keys in enumerate(lengths):
        for n in range(0, keys, ROWS):
            assert v.locate(n, (b, 0, 0), args) == (table[b * pages + n // 64], n % 64)


def test_ranges_are_found_by_the_portable_kernels_rule() -> None:
    attn, program = lowered(f"{FEW}mask: causal\nkv: latent(rope=64, page_size=64)")
    assert program.engine is not None
    kernel, tables = ranges(attn)
    assert kernel in program.kernels
    assert [x.kernel for x in program.engine.before] == [kernel.name]
    assert program.engine.scratch == tables
    assert [x.kernel for x in program.engine.after] == [collector(attn).name]


GAPS = {
    f"heads: {{q: 16, kv: 1}}\ndims: {{qk: 160, v: 96}}\n{'kv: latent(rope=64)'}": "power of two",
    f"heads: {{q: 16, kv: 1}}\ndims: {{qk: 384, v: 256}}\n{'kv: latent(rope=128)'}": "64 columns wider",
    f"{FEW}kv: latent(rope=64, page_size=16)": "multiple of 64 keys",
    f"{FEW}dtype: fp32\nkv: latent(rope=64)": "fp32",
    f"{FEW}normalizer: sigmoid\nkv: latent(rope=64)": "other than softmax",
    f"heads: 4\n{DIMS}kv: latent(rope=64)": "share no keys",
    f"{FEW}mask: 'j <= i - h'\nkv: latent(rope=64)": "from head to head",
}


@pytest.mark.parametrize("body", GAPS)
def test_what_it_does_not_carry_is_told(body: str) -> None:
    attn, program = lowered(body)
    assert GAPS[body] in gap(attn)
    assert program.engine is None
    assert program.engine_gap == gap(attn)
    assert all("ENGINE" not in c for _, c in default_configs(attn, find("sm_90"))[0])


def test_it_serves_calls_of_one_query_or_of_few() -> None:
    """Of several where the rows of a tile are of one query each."""
    for body, most in ((FEW, 1), (MANY, 16)):
        attn, program = lowered(f"{body}mask: causal\nkv: latent(rope=64)")
        rows = [(b, c) for b, c in default_configs(attn, H200)[0] if c.get("ENGINE")]
        assert [b for b, _ in rows] == [{"Sq": most}]
        assert (rows[0][1]["BM"], rows[0][1]["BN"], rows[0][1]["FILL"]) == (64, 64, H200.sms)
        assert program.engine is not None
        assert ("Sq" in str(program.engine.is_due)) == (most == 1)
    assert all("ENGINE" not in c for _, c in default_configs(attn, A100)[0])


def test_the_tuner_tries_it_for_few_queries() -> None:
    attn, program = lowered(f"{FEW}mask: causal\nkv: latent(rope=64)")
    default = next(c for _, c in default_configs(attn, H200)[0] if c.get("ENGINE"))
    for queries, tried in ((1, True), (4096, False)):
        found = [dict(c.config) for c in candidates(attn, branches(attn, program, H200, queries), H200)]
        assert (dict(default) in found) == tried
        assert any(c.get("ENGINE") for c in found) == tried


def test_its_machine_code_may_run(tmp_path: Any) -> None:
    """Nothing is serialised, no loop spills, nothing is read before it is written: else it would be left out."""
    body = f"heads: {{q: 24, kv: 2}}\ndims: {{qk: 320, v: 256}}\nmask: causal & window(300)\n{BATCH}kv: latent(rope=64)"
    path = driver.compile(spec.loads(f"attncc: 1\nname: examined\n{body}\n"), tmp_path, ["sm_90"])
    text = (path / "configs" / "sm_90.py").read_text()
    assert "left out" not in text
    assert '"ENGINE": 1' in text
    assert {f"_latent{part}.py" for part in ("", "_consumer", "_steps")} <= {f.name for f in path.iterdir()}
