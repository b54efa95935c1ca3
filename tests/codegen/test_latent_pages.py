"""Latents in pages, run by Triton's interpreter: values are the first columns of keys that a table finds."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from codegen.emitted import normal, package, passes, said_when_checked

from attncc import driver, reference, spec
from attncc.check.cases import Case
from attncc.check.operands import draw
from attncc.check.pages import lay_out
from attncc.codegen.aot import Failed, build_all
from attncc.codegen.offline import jobs
from attncc.device import find
from attncc.errors import Unsupported
from attncc.ir.rewrite import walk
from attncc.ir.tile import reads as tile_reads
from attncc.passes.lower.defaults import default_configs

HEADS, DIM, VALUES = 6, 48, 32
MLA = f"heads: {{q: {HEADS}, kv: 1}}\ndims: {{qk: {DIM}, v: {VALUES}}}\ndtype: fp32\n"
SIZES = (1, 16, 64)


def in_pages(size: int, more: str = "mask: causal") -> str:
    return f"{MLA}kv: latent(rope=16, page_size={size})\n{more}"


FEATURES = {
    "no mask": in_pages(16, ""),
    "one page a key": in_pages(1),
    "pages wider than tiles": in_pages(64),
    "pages of no power of two": in_pages(24),
    "values of other pieces": "heads: {q: 4, kv: 2}\ndims: {qk: 80, v: 40}\ndtype: fp16\n"
    "kv: latent(rope=40, page_size=16)\nmask: causal",
    "values of other pieces, pages wider than tiles": "heads: {q: 4, kv: 2}\ndims: {qk: 80, v: 40}\ndtype: fp16\n"
    "kv: latent(rope=40, page_size=64)\nmask: causal",
    "bshd, a window": in_pages(16, "layout: bshd\nmask: causal & window(20)"),
    "sinks, softcap": in_pages(
        64,
        "inputs: {z: {shape: [Hq]}}\nscore: softcap(qk * scale, 3)\nmask: causal & (window(9) | sink(3))\n"
        "normalizer: softmax(sink=z[h])",
    ),
    "split-KV": in_pages(64, "mask: causal\nschedule: split_kv(3)"),
    "by batch": in_pages(16, "mask: causal\nnumerics: {reproducible: batch}"),
    "a score without qk": in_pages(16, "score: 0.1 * (h + 1)\nmask: causal"),
}
DENSE_ONLY = {
    "packed queries": in_pages(16, "mask: causal\nlayout: varlen"),
    "packed queries, pages wider than tiles": in_pages(64, "mask: causal\nlayout: varlen"),
    "listed tiles": in_pages(16, "inputs: {map: {shape: [Hq, 9], dtype: bool}}\nmask: map[h, j // 16] & causal"),
}


@pytest.mark.parametrize("feature", FEATURES)
def test_features(feature: str) -> None:
    p = package(FEATURES[feature])
    passes(p.tiles(16, 16), Case(3, 5, 45), Case(2, 20, 41, "nan_keys"))
    passes(p.tiles(16, 32, one_pass=1, split=1, fill=12), Case(3, 2, 70), Case(2, 1, 41, "nan_around"))


@pytest.mark.parametrize("feature", DENSE_ONLY)
def test_features_without_shares(feature: str) -> None:
    passes(package(DENSE_ONLY[feature]).tiles(16, 16), Case(3, 20, 45), Case(2, 3, 70, "nan_keys"))


@pytest.mark.parametrize("split", [0, 1])
@pytest.mark.parametrize("trait", ["nan_neighbour", "nan_keys", "unaligned", "expanded", "large_logits", "one_hot"])
def test_operands(trait: str, split: int) -> None:
    passes(package(in_pages(16)).tiles(16, 16, split=split), Case(3, 3, 41, trait))


@pytest.mark.parametrize("split", [0, 1])
@pytest.mark.parametrize("shape", [(1, 1, 1), (4, 1, 17), (1, 5, 3), (2, 0, 16), (1, 4, 0), (0, 16, 16)])
def test_shapes(shape: tuple[int, int, int], split: int) -> None:
    passes(package(in_pages(64)).tiles(16, 16, split=split), Case(*shape))


# -- what a call means -----------------------------------------------------------------------------


def operands(size: int, lengths: list[int], rows: int = 2, most: int = 80, seed: int = 0) -> dict[str, torch.Tensor]:
    """A call of `in_pages(size)`: pages in no order, NaN where no key is, wild entries behind the last page."""
    pages = lay_out(lengths, -(-most // size), size, torch.Generator().manual_seed(seed))
    latents = [normal(n, 1, DIM, seed=at) for at, n in enumerate(lengths)]
    return {
        "q": normal(len(lengths), HEADS, rows, DIM, seed=99),
        "k": pages.fill(latents, (1, DIM)),
        "block_table": pages.table,
        "seqused_k": pages.used,
    }


@pytest.mark.parametrize("split", [0, 1])
@pytest.mark.parametrize("size", SIZES)
def test_ragged_lengths(size: int, split: int) -> None:
    """Among them none, one key, whole pages and a key more; by the oracle, and plainly."""
    p, lengths = package(in_pages(size)), [70, 0, 64, 1, 65, 17]
    x = operands(size, lengths)
    o, lse = p.tiles(16, 16, split=split)(**x, return_lse=True)
    expected = reference.outputs(p.attn, **x)
    torch.testing.assert_close(o.double(), expected.o, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse.double(), expected.lse, rtol=1e-4, atol=1e-5)
    for b, n in enumerate(lengths):
        latent = normal(n, 1, DIM, seed=b)[:, 0]
        s = (x["q"][b] @ latent.T) * DIM**-0.5
        s = s.masked_fill(torch.arange(n) > torch.arange(2)[:, None] + n - 2, -torch.inf)
        plain = s.softmax(-1).nan_to_num(0.0) @ latent[:, :VALUES] if n else torch.zeros(HEADS, 2, VALUES)
        torch.testing.assert_close(o[b], plain, rtol=1e-4, atol=1e-5)
    assert (o[1] == 0).all()
    assert (lse[1] == -torch.inf).all()


@pytest.mark.parametrize("split", [0, 1])
@pytest.mark.parametrize("size", SIZES)
def test_what_no_sequence_has_is_not_read(size: int, split: int) -> None:
    """Spare pages, rows behind the last key and entries behind the last page may hold anything."""
    p, lengths = package(in_pages(size)).tiles(16, 16, split=split), [70, 3, 24]
    x = operands(size, lengths)
    want = p(**x)
    assert want.isfinite().all()
    wild = x["block_table"].clone()
    for row, n in zip(wild, lengths, strict=True):
        row[-(-n // size) :] = 2**31 - 1 if n % 2 else -(2**31)
    other = operands(size, lengths, seed=1)
    assert not torch.equal(other["block_table"], x["block_table"])
    assert torch.equal(p(**x | {"k": x["k"].nan_to_num(7.0)}), want)
    assert torch.equal(p(**x | {"block_table": wild}), want)
    assert torch.equal(p(**other), want)


def test_lengths_that_no_table_has_room_for_read_nothing_else() -> None:
    p, x = package(in_pages(16)).tiles(16, 16), operands(16, [80, 8])
    full = p(**x)
    x["seqused_k"][0] = 2**30
    x["seqused_k"][1] = -3
    o = p(**x)
    assert torch.equal(o[0], full[0])
    assert (o[1] == 0).all()


def test_sequences_may_share_pages() -> None:
    p, x = package(in_pages(16)).tiles(16, 16), operands(16, [40, 40])
    x["block_table"][1] = x["block_table"][0]
    x["q"][1] = x["q"][0]
    o = p(**x)
    assert torch.equal(o[0], o[1])


# -- bad calls -------------------------------------------------------------------------------------


def test_a_call_has_a_table_and_no_values() -> None:
    p = package(in_pages(16)).tiles(16, 16)
    names = ["q", "k", "block_table", "seqused_k", "scale", "return_lse"]
    assert list(inspect.signature(p.module.attention).parameters) == names
    x = operands(16, [20, 9])
    with pytest.raises(TypeError, match="unexpected keyword argument 'v'"):
        p(**x, v=x["k"][..., :VALUES])


Change = Callable[[torch.Tensor], Any]
BAD: list[tuple[str, Change, type[Exception], str]] = [
    ("block_table", lambda t: None, TypeError, "block_table must be a tensor, got nothing"),
    ("seqused_k", lambda t: None, TypeError, "seqused_k must be a tensor, got nothing"),
    ("block_table", lambda t: t.long(), TypeError, "block_table must be torch.int32, got torch.int64"),
    ("block_table", lambda t: t[0], ValueError, r"block_table must have the 2 axes \[B=2, Sk / 16\]"),
    ("seqused_k", lambda t: t[:1], ValueError, "seqused_k must have shape .* axis 0 is 1, not 2, as q has it"),
    ("k", lambda t: t[:, :8], ValueError, r"k must have shape \[all pages, 16, 1, 48\].* axis 1 is 8, not 16"),
    ("k", lambda t: t[..., :VALUES], ValueError, "k must have shape .* axis 3 is 32, not 48"),
    ("k", lambda t: t[0], ValueError, "k must have the 4 axes"),
    ("k", lambda t: t.double(), TypeError, "k must be torch.float32, got torch.float64"),
    ("k", lambda t: t.transpose(1, 3).contiguous().transpose(1, 3), ValueError, "k must be contiguous along its last"),
]


@pytest.mark.parametrize(("name", "change", "kind", "message"), BAD)
def test_bad_calls(name: str, change: Change, kind: type[Exception], message: str) -> None:
    x = operands(16, [20, 9])
    x[name] = change(x[name])
    with pytest.raises(kind, match=message):
        package(in_pages(16)).tiles(16, 16)(**x)


PAGES, KEYS = "expected 0 to 4", "expected 0 to 80"
CONTENTS: list[tuple[str, tuple[int, ...], int, str]] = [
    ("seqused_k", (0,), 0, "True"),
    ("block_table", (0, 4), -7, "True"),  # behind its last page
    ("block_table", (0, 1), -1, f"block_table[0, 1] is -1, {PAGES}: the sequence has 20 keys, and k has 5 pages"),
    ("block_table", (1, 0), 5, f"block_table[1, 0] is 5, {PAGES}: the sequence has 9 keys, and k has 5 pages"),
    ("seqused_k", (1,), 81, f"seqused_k[1] is 81, {KEYS}: block_table has 5 pages of 16 a sequence"),
    ("seqused_k", (0,), -1, f"seqused_k[0] is -1, {KEYS}: block_table has 5 pages of 16 a sequence"),
]


def test_checked_mode_looks_at_contents(tmp_path: Path) -> None:
    calls: list[dict[str, torch.Tensor]] = []
    for name, place, value, _ in CONTENTS:
        x = operands(16, [20, 9])
        x[name][place] = value
        calls.append(x)
    said = said_when_checked(package(in_pages(16)).tiles(16, 16), calls, tmp_path)
    assert said == [wanted for *_, wanted in CONTENTS]


@pytest.mark.parametrize(
    ("more", "key"),
    [
        ("quantize: {k: int8}", "quantize"),
        ("scale: rsqrt(Sk)", "scale"),
        ("prologue: [l2_norm]", "prologue"),
    ],
)
def test_what_is_not_carried(more: str, key: str) -> None:
    with pytest.raises(Unsupported) as error:
        driver.lower(spec.loads(f"attncc: 1\nname: odd\n{in_pages(16)}\n{more}\n").attention)
    assert error.value.key == key


def test_the_cpu_does_not_carry_them(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="do not read keys from pages, nor values from keys"):
        driver.compile(spec.loads(f"attncc: 1\nname: odd\n{in_pages(16)}\n"), tmp_path, ["cpu"])


# -- what is compiled ------------------------------------------------------------------------------


def test_operands_to_check_with_have_no_values() -> None:
    x = draw(package(in_pages(16)).attn, Case(3, 2, 30), torch.float32, torch.Generator().manual_seed(0))
    assert x.v is None
    assert x.k.shape[1:] == (16, 1, DIM)
    assert x.offsets["seqused_k"].tolist() == [30, 0, 10]
    assert set(x.offsets["block_table"][:, -1].tolist()) <= {-1, 2**31 - 1}
    assert x.k.isnan().any()


@pytest.mark.parametrize("size", SIZES)
def test_a_latent_is_loaded_once(size: int) -> None:
    """Where the values' pieces are pieces of the keys, and a page is looked up once."""
    _, program = driver.lower(package(in_pages(size)).attn)
    for kernel in (f"{program.name}_forward", f"{program.name}_stream"):
        (step,) = program.kernel(kernel).functions
        read = [e for s in step.body for r in tile_reads(s) for e in walk(r) if e.op in ("tile", "load")]
        assert [e.attr for e in read].count("K") == 2
        assert [e.attr for e in read].count("block_table") == 1


@pytest.mark.parametrize("size", [1, 64])
def test_the_widths_of_deepseek_compile(size: int, tmp_path: Path) -> None:
    """Of the loops over key tiles, both together, no turn reloads more than a twentieth of its instructions."""
    text = (Path(__file__).parents[2] / "examples" / "mla_paged.yaml").read_text()
    loaded = spec.loads(text.replace("page_size=64", f"page_size={size}"))
    attn, program = driver.lower(loaded.attention)
    kernels = driver.compile(loaded, tmp_path, ["sm_90"]) / "kernels.py"
    rows = [dict(c) for _, c in default_configs(attn, find("sm_90"), with_engine=False)[0]]
    due = {"_stream PASS=0": next(c for c in rows if c["SPLIT"]), "_forward PASS=0": rows[-1]}
    found = {end: jobs(program, str(kernels), find("sm_90"), config) for end, config in due.items()}
    wanted = {name: job for end, named in found.items() for name, job in named.items() if name.endswith(end)}
    assert len(wanted) == 2
    for name, outcome in zip(wanted, build_all(list(wanted.values())), strict=True):
        assert not isinstance(outcome, Failed), (name, outcome.reason)
        assert outcome.shared_bytes <= find("sm_90").shared_bytes_per_block, name
        assert outcome.loop["wgmma"] == 148, name
        assert outcome.loop.get("spill_load", 0) <= 32, name
        assert not outcome.notes, name
