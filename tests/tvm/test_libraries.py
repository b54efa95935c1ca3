"""CPU libraries against the oracle over shapes, dtypes, layouts, heads, normalizers, masks; and how they are called."""

from __future__ import annotations

import importlib
import mmap
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from built import agrees, built, in_turn
from codegen.emitted import normal
from codegen.test_packages import HEADS, PLAIN
from jitted import RUNNABLE

from attncc import driver, spec
from attncc.check.cases import SMALL, TRAITS, Case
from attncc.check.run import check_package
from attncc.codegen import _cpu
from attncc.codegen.tvm import decode
from attncc.codegen.tvm.isa import ISAS

ALL = [Case(*shape) for shape in SMALL] + [Case(b, n, 130, t) for b, n in ((2, 35), (16, 3)) for t in TRAITS]
"""What `attncc check` runs, and its traits on the kernel for few queries too."""
DIMS = ["1", "5", "16", "40", "72", "128", "{qk: 192, v: 128}", "256", "{qk: 5, v: 16}", "{qk: 16, v: 5}"]
DTYPES = ["fp32", "bf16", "fp16"]
LAYOUTS = ["bhsd", "bshd", "varlen"]
GRID = [(d, DTYPES[n % 3], LAYOUTS[n // 2 % 3]) for n, d in enumerate(DIMS)]
BLOCKS = f"{PLAIN}inputs: {{on: {{shape: [Hq, m, n], dtype: bool}}}}\n"
SINKS = f"{HEADS}dims: 16\ninputs: {{z: {{shape: [Hq], dtype: bf16}}}}\n"
WINDOWS = f"{PLAIN}inputs: {{w: {{shape: [], dtype: int32}}, starts: {{shape: [B], dtype: int32}}}}\n"
IDS = f"{HEADS}dims: 16\ninputs: {{ids: {{shape: [B, Sk], dtype: int32}}}}\n"
VARIANTS = {
    "one head": "heads: 1\ndims: 16\ndtype: bf16\nmask: causal",
    "eight a key head": "heads: {q: 8, kv: 1}\ndims: 16\ndtype: bf16\nmask: causal",
    "three a key head, tiled": "heads: {q: 6, kv: 2, map: tile}\ndims: 24\ndtype: fp16\nmask: causal",
    "more value heads": "heads: {q: 4, kv: 2, v: 4}\ndims: 16\ndtype: fp16\nmask: causal",
    "fewer value heads, tiled": "heads: {q: 6, kv: 3, v: 2, map: tile}\ndims: 16\ndtype: fp32",
    "sigmoid": f"{HEADS}dims: 24\nnormalizer: sigmoid\noutputs: [o]\nmask: causal",
    "linear": f"{PLAIN}normalizer: linear(0.1)\noutputs: [o]\nscore: exp(qk * 0.1)\nmask: causal & window(30)",
    "sinks": f"{SINKS}normalizer: softmax(sink=z[h])\nmask: causal",
    "a sink by sequence": f"{PLAIN}normalizer: softmax(sink=h * 0.5 - b)\nmask: causal & (i % 4 > 0)",
    "a far sink": f"{PLAIN}normalizer: softmax(sink=900.0)",
    "chunks": f"{HEADS}dims: 16\nmask: causal & chunked(40)",
    "several ranges": f"{PLAIN}mask: (j < 3) | ((j >= 62) & (j < 70) & causal) | ((i - j < 4) & causal)",
    "documents": f"{IDS}mask: causal & document(ids)",
    "blocks": f"{PLAIN}inputs: {{on: {{shape: [m, n], dtype: bool}}}}\nmask: on[i // 64, j // 64]",
    "small blocks": f"{BLOCKS}mask: causal & on[h, i // 16, j // 16]",
    "top left": f"{PLAIN}align: top_left\nmask: causal & window(40)",
    "given starts": f"{WINDOWS}align: starts\nmask: causal & window(w)",
}


@pytest.mark.parametrize(("dims", "dtype", "layout"), GRID)
def test_shapes(dims: str, dtype: str, layout: str) -> None:
    body = f"{HEADS}dims: {dims}\ndtype: {dtype}\nmask: causal\nlayout: {layout}"
    agrees_or_refuses(body, in_turn(DIMS.index(dims)))


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name: str) -> None:
    number = list(VARIANTS).index(name)
    agrees_or_refuses(f"{VARIANTS[name]}\nlayout: {LAYOUTS[number % 3]}", in_turn(number))


def agrees_or_refuses(body: str, isa: str) -> None:
    p = built(body, isa)
    strided = [c for c in ALL if c.trait == "last_axis_strided"]
    agrees(p, [c for c in ALL if c not in strided])
    assert {p.agrees(c).passed for c in strided} == {True}


def test_check_runs_the_library_of_this_machine(tmp_path: Any) -> None:
    loaded = spec.loads(f"attncc: 1\nname: checked\n{PLAIN}mask: causal\n")
    report = driver.check(loaded)
    assert report.passed
    assert report.device == "cpu"
    assert "no GPU here: the library for this CPU was checked, on small shapes" in report.notes
    device = driver.resolve(["cpu"])[0]
    broken = driver.compile(loaded, tmp_path, [device])
    wrong = spec.loads(f"attncc: 1\nname: checked\n{PLAIN}mask: causal & (j != 1)\n").attention
    assert not check_package(wrong, broken, device).passed


# -- memory --------------------------------------------------------------------------------------

CAUSAL = f"{PLAIN}mask: causal"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [3, 70])
def test_views(dtype: str, rows: int) -> None:
    """Rows that begin anywhere, sequences and heads in any order, heads that are one: the same bits as copies."""
    p = built(f"{HEADS}dims: 16\ndtype: {dtype}\nmask: causal")
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    room = normal(2, 150, 8, 19, dtype=kind)
    places = ((rows, 0, 4, 1), (150, 4, 2, 2), (150, 6, 2, 3))
    q, k, v = (room[:, :n, h : h + m, o : o + 16].transpose(1, 2) for n, h, m, o in places)
    want = p(q.contiguous(), k.contiguous(), v.contiguous())
    assert torch.equal(p(q, k, v), want)
    at = torch.empty(k.numel() + 1, dtype=kind)[1:].view(k.shape).copy_(k)  # off every alignment but an element's
    assert torch.equal(p(q, at, v), want)
    every_second = torch.empty(2, 2, 300, 16, dtype=kind)[:, :, ::2].copy_(v)
    assert torch.equal(p(q, k, every_second), want)
    one = k[:1, :1].expand(2, 2, 150, 16)
    assert torch.equal(p(q, one, one), p(q, one.contiguous(), one.contiguous()))


def test_addresses_beyond_32_bits() -> None:
    """Rows 2**28 elements apart lie 2**34 bytes apart; what is never touched costs no memory."""
    p = built("heads: 1\ndims: 16\ndtype: fp32")
    stride, keys = 2**28, 12
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
    room = torch.frombuffer(mmap.mmap(-1, 4 * stride * keys, flags=flags), dtype=torch.float32)
    k = room.as_strided((1, 1, keys, 16), (1, 1, stride, 1))
    values = normal(1, 1, keys, 16)
    k.copy_(values)
    for rows in (2, 40):
        q = normal(1, 1, rows, 16, seed=1)
        assert torch.equal(p(q, k, k), p(q, values, values))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("isa", [isa.name for isa in RUNNABLE])
def test_hidden_keys_and_values_do_not_matter(bad: float, isa: str) -> None:
    p = built(CAUSAL, isa)
    q, k, v = normal(1, 4, 90, 16), normal(1, 2, 90, 16, seed=1), normal(1, 2, 90, 16, seed=2)
    clean = p(q, k, v)
    v[:, :, 75] = bad
    k[:, :, 80] = bad
    o = p(q, k, v)
    assert torch.equal(o[:, :, :48], clean[:, :, :48])
    torch.testing.assert_close(o[:, :, :75], clean[:, :, :75])  # beside rows that see it products are summed otherwise
    assert not o[:, :, 75:].isfinite().any()
    few = p(q[:, :, 73:76], k[:, :, :76], v[:, :, :76])  # rows 73 to 75 of 76 keys
    torch.testing.assert_close(few[:, :, :2], clean[:, :, 73:75])
    assert not few[:, :, 2].isfinite().any()


def test_rows_behind_the_last_sequence() -> None:
    p = built(f"{CAUSAL}\nlayout: varlen")
    q, k = normal(20, 4, 16), normal(25, 2, 16)
    cuts_q, cuts_k = (torch.tensor(x, dtype=torch.int32) for x in ([0, 7, 7, 12], [0, 7, 9, 21]))
    o, lse = p(q, k, k, cu_seqlens_q=cuts_q, cu_seqlens_k=cuts_k, return_lse=True)
    assert (o[12:] == 0).all()
    assert (lse[:, 12:] == -torch.inf).all()
    k[21:] = torch.nan
    again = p(q, k, k, cu_seqlens_q=cuts_q, cu_seqlens_k=cuts_k)
    assert torch.equal(o, again)


def test_both_sides_of_a_call_for_few_queries_agree() -> None:
    """What a package says of its kernel, and makes room for, is what the kernel was built for."""
    assert _cpu.FEW_ROWS == decode.ROWS
    assert _cpu.OWN_KEYS == decode.OWN_KEYS
    assert max(isa.lanes for isa in ISAS) == _cpu.WIDEST
    p = built(f"{HEADS}dims: {{qk: 16, v: 40}}\ndtype: fp32")
    runner = p.module._RUNNER
    for rows, keys in ((1, 70), (8, 100_000), (9, 70)):
        shares, work = runner.split({"B": 3, "Sq": rows, "Sk": keys})
        assert (shares > 0) == (runner.group * rows <= decode.ROWS)
        assert shares <= _cpu.MOST_SHARES
        for isa in ISAS:
            state = -(-40 // isa.lanes) * isa.lanes + 2  # as `Decode.state` counts: m, l and whole vectors of o
            assert work >= 3 * 2 * shares * runner.group * rows * state


APART = f"{HEADS}dims: 16\ndtype: fp32\ninputs: {{lens: {{shape: [B], dtype: int32}}}}\nmask: j < lens[b]\n"


@pytest.mark.parametrize("rows", [1, 8, 20])
def test_a_sequence_does_not_depend_on_its_neighbours(rows: int) -> None:
    """Nor on how far the keys of others reach, nor on threads: shares are of so many keys."""
    p = built(f"{APART}numerics: {{reproducible: batch}}")
    q, k, v = normal(3, 4, rows, 16), normal(3, 2, 2100, 16, seed=1), normal(3, 2, 2100, 16, seed=2)
    lens = torch.tensor([2100, 1030, 0], dtype=torch.int32)
    o, lse = p(q, k, v, lens=lens, return_lse=True)
    threads = torch.get_num_threads()
    for n, length in enumerate(lens.tolist()):
        for keys, count in ((max(length, 1), 1), (2100, 4)):
            torch.set_num_threads(count)
            alone = [x[n : n + 1, :, :keys] for x in (k, v)]
            own, own_lse = p(q[n : n + 1], *alone, lens=lens[n : n + 1], return_lse=True)
            torch.set_num_threads(threads)
            assert torch.equal(own, o[n : n + 1])
            assert torch.equal(own_lse, lse[n : n + 1])


def test_shares_of_a_variant_whose_sequences_are_apart() -> None:
    """As many as the keys make, where others have as many as there are threads for."""
    runner = built(f"{APART}numerics: {{reproducible: batch}}").module._RUNNER
    other = built(APART).module._RUNNER
    for batch in (1, 64):
        for keys, wanted in ((1, 1), (512, 1), (513, 2), (100_000, 196)):
            assert runner.split({"B": batch, "Sq": 1, "Sk": keys})[0] == wanted
    threads = torch.get_num_threads()
    torch.set_num_threads(8)
    assert [other.split({"B": batch, "Sq": 1, "Sk": 100_000})[0] for batch in (1, 64)] == [8, 1]
    torch.set_num_threads(threads)


# -- calls ---------------------------------------------------------------------------------------


def test_given_scale() -> None:
    p = built(CAUSAL)
    for rows in (2, 70):
        q, k = normal(1, 4, rows, 16), normal(1, 2, 70, 16, seed=1)
        torch.testing.assert_close(p(q * 2, k, k, scale=0.125), p(q, k, k, scale=0.25))
        assert torch.equal(p(q, k, k), p(q, k, k, scale=0.25))
        assert not torch.equal(p(q, k, k, scale=0.5), p(q, k, k))


def test_the_lse_changes_nothing() -> None:
    p = built(CAUSAL)
    for rows in (2, 70):
        q, k = normal(2, 4, rows, 16), normal(2, 2, 70, 16, seed=1)
        o, lse = p(q, k, k, return_lse=True)
        assert torch.equal(o, p(q, k, k))
        assert lse.shape == (2, 4, rows)


@pytest.mark.parametrize("layout", ["bhsd", "varlen"])
def test_threads_do_not_matter(layout: str) -> None:
    p = built(f"{CAUSAL}\nlayout: {layout}")
    shapes = [(300, n, 16) if layout == "varlen" else (2, n, 300, 16) for n in (4, 2, 2)]
    q, k, v = (normal(*shape, seed=n) for n, shape in enumerate(shapes))
    cuts = torch.tensor([0, 100, 300], dtype=torch.int32)
    more = {"cu_seqlens_q": cuts, "cu_seqlens_k": cuts} if layout == "varlen" else {}
    before = torch.get_num_threads()
    results: list[torch.Tensor] = []
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            results.append(p(q, k, v, **more))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(r, results[0]) for r in results)


def test_calls_from_several_threads() -> None:
    p = built(CAUSAL)
    calls = [(normal(1, 4, rows, 16, seed=rows), normal(1, 2, 130, 16)) for rows in (1, 5, 64, 130) * 8]
    want = [p(q, k, k) for q, k in calls]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            got = list(pool.map(lambda call: p(call[0], call[1], call[1]), calls))
            assert all(map(torch.equal, got, want))


def test_torch_traces_and_compiles_it() -> None:
    p = built(CAUSAL)
    q, k = normal(1, 4, 20, 16), normal(1, 2, 20, 16, seed=1)
    op = p.module._OP
    torch.library.opcheck(op, (q, k, k, None), test_utils=("test_schema", "test_faketensor"))
    compiled = torch.compile(lambda q, k: p(q, k, k) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k), p(q, k, k) * 2)
    exported = torch.export.export(Layer(p.module.attention), (q, k)).module()
    assert torch.equal(exported(q, k), p(q, k, k))


class Layer(torch.nn.Module):
    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return self.attention(q, k, k)


def test_a_package_for_both_kinds_of_device() -> None:
    loaded = spec.loads(f"attncc: 1\nname: for_both\n{CAUSAL}\n")
    only = built(CAUSAL)
    path = driver.compile(loaded, only.path.parent, ["sm_90", "cpu"])
    assert {p.name for p in path.iterdir()} >= {"_cpu.py", "_gpu.py", "kernels.py", "cpu", "configs"}
    module = importlib.import_module("for_both")
    q, k = normal(1, 4, 40, 16), normal(1, 2, 40, 16, seed=1)
    assert torch.equal(module.attention(q, k, k), only(q, k, k))
    assert "library" in module.choose("cpu", Sq=64)[1]
    with pytest.raises(RuntimeError, match="compiled for sm_90"):
        module.choose("meta", Sq=64)
    with pytest.raises(RuntimeError, match="tensors are on meta"):
        module.attention(q.to("meta"), k.to("meta"), k.to("meta"))
