"""Keys in pages that a table finds, run by Triton's interpreter; pages are in no order, and all else is NaN."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from codegen.emitted import normal, package, passes, said_when_checked

from attncc import driver, spec
from attncc.check.cases import Case
from attncc.check.operands import draw
from attncc.check.pages import lay_out
from attncc.codegen.aot import Failed, build_all
from attncc.codegen.offline import jobs
from attncc.device import find
from attncc.errors import Unsupported
from attncc.passes.lower.defaults import default_configs

FP32 = "dims: 16\ndtype: fp32\n"
PLAIN = f"heads: {{q: 4, kv: 2}}\n{FP32}kv: paged(8)\n"
CAUSAL = f"{PLAIN}mask: causal"
FEATURES = {
    "no mask": PLAIN,
    "one page a key": f"heads: 1\n{FP32}kv: paged(1)\nmask: causal",
    "pages wider than tiles, three heads a key head": f"heads: {{q: 6, kv: 2}}\n{FP32}kv: paged(64)\nmask: causal",
    "pages of no power of two": f"heads: {{q: 6, kv: 2, map: tile}}\n{FP32}kv: paged(24)\nmask: causal",
    "bshd, heads of several pieces": "heads: {q: 4, kv: 2}\ndims: {qk: 72, v: 40}\ndtype: fp16\nlayout: bshd\n"
    "kv: paged(16)\nmask: causal",
    "other value heads": f"heads: {{q: 12, kv: 2, v: 3}}\n{FP32}kv: paged(8)\nmask: causal",
    "a window, softcap": f"{PLAIN}score: softcap(qk * scale, 3)\nmask: causal & window(20)",
    "sinks": f"{PLAIN}inputs: {{z: {{shape: [Hq]}}}}\nmask: causal & (window(9) | sink(3))\n"
    "normalizer: softmax(sink=z[h])",
    "alibi, rows of their own": f"{PLAIN}score: qk * scale - 0.1 * (h + 1) * abs(i - j)\nalign: top_left",
    "given positions": f"{PLAIN}inputs: {{at: {{shape: [B], dtype: int32}}}}\nalign: at\nmask: causal",
    "along diagonals": f"{PLAIN}inputs: {{rel: {{shape: [Hq, 11]}}}}\n"
    "score: qk * scale + rel[h, i - j + 5]\nmask: causal",
    "sigmoid": f"{PLAIN}normalizer: sigmoid\noutputs: [o]\nmask: causal",
    "the same alone as among others": f"{CAUSAL}\nnumerics: {{reproducible: batch}}",
}
LISTED = {
    "documents": f"{PLAIN}inputs: {{ids: {{shape: [B, Sk], dtype: int32}}, own: {{shape: [B], dtype: int32}}}}\n"
    "mask: ids[b, j] == own[b]",
    "blocks of heads": f"{PLAIN}inputs: {{map: {{shape: [Hq, 9], dtype: bool}}}}\nmask: map[h, j // 16] & causal",
    "blocks": f"{PLAIN}inputs: {{map: {{shape: [9], dtype: bool}}}}\nmask: map[j // 16] & causal",
}
PACKED = {
    "packed queries": f"{CAUSAL}\nlayout: varlen",
    "packed queries, listed tiles": f"{LISTED['blocks of heads']}\nlayout: varlen",
}


@pytest.mark.parametrize("feature", FEATURES)
def test_features(feature: str) -> None:
    p = package(FEATURES[feature])
    passes(p.tiles(16, 16), Case(3, 5, 45), Case(2, 20, 41, "nan_keys"))
    passes(p.tiles(16, 32, one_pass=1, split=1, fill=12), Case(3, 2, 70), Case(2, 1, 41, "nan_around"))


@pytest.mark.parametrize("feature", [*LISTED, *PACKED])
def test_features_without_shares(feature: str) -> None:
    p = package((LISTED | PACKED)[feature])
    passes(p.tiles(16, 16), Case(3, 20, 45), Case(2, 3, 70, "nan_keys"))


@pytest.mark.parametrize("split", [0, 1])
@pytest.mark.parametrize("trait", ["nan_neighbour", "unaligned", "expanded", "large_logits"])
def test_operands(trait: str, split: int) -> None:
    passes(package(CAUSAL).tiles(16, 16, split=split), Case(3, 3, 41, trait))


@pytest.mark.parametrize("split", [0, 1])
@pytest.mark.parametrize("shape", [(1, 1, 1), (4, 1, 17), (1, 5, 3), (2, 0, 16), (1, 4, 0), (0, 16, 16)])
def test_shapes(shape: tuple[int, int, int], split: int) -> None:
    passes(package(CAUSAL).tiles(16, 16, split=split), Case(*shape))


# -- what a call means -----------------------------------------------------------------------------


def operands(lengths: list[int], rows: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    """A call of CAUSAL."""
    pages = lay_out(lengths, 9, 8, torch.Generator().manual_seed(seed))
    k, v = ([normal(n, 2, 16, seed=2 * at + odd) for at, n in enumerate(lengths)] for odd in range(2))
    return {
        "q": normal(len(lengths), 4, rows, 16, seed=99),
        "k": pages.fill(k, (2, 16)),
        "v": pages.fill(v, (2, 16)),
        "block_table": pages.table,
        "seqused_k": pages.used,
    }


@pytest.mark.parametrize("split", [0, 1])
def test_where_pages_lie_does_not_matter(split: int) -> None:
    p = package(CAUSAL).tiles(16, 16, split=split)
    first, second = operands([70, 3, 24]), operands([70, 3, 24], seed=1)
    assert not torch.equal(first["block_table"], second["block_table"])
    assert torch.equal(p(**first), p(**second))


@pytest.mark.parametrize("split", [0, 1])
def test_a_sequence_without_keys(split: int) -> None:
    o, lse = package(CAUSAL).tiles(16, 16, split=split)(**operands([0, 9]), return_lse=True)
    assert (o[0] == 0).all()
    assert (lse[0] == -torch.inf).all()
    assert o[1].isfinite().all()


def test_sequences_may_share_pages() -> None:
    p, x = package(CAUSAL).tiles(16, 16), operands([40, 40])
    x["block_table"][1] = x["block_table"][0]
    x["q"][1] = x["q"][0]
    o = p(**x)
    assert torch.equal(o[0], o[1])


def test_lengths_that_no_table_has_room_for_read_nothing_else() -> None:
    p, x = package(CAUSAL).tiles(16, 16), operands([72, 8])
    full = p(**x)
    x["seqused_k"][0] = 2**30
    x["seqused_k"][1] = -3
    o = p(**x)
    assert torch.equal(o[0], full[0])
    assert (o[1] == 0).all()


def test_the_table_s_width_does_not_change_a_row_that_is_reproducible() -> None:
    p = package(FEATURES["the same alone as among others"]).tiles(16, 16, split=1)
    x = operands([50, 17])
    narrow = x | {"block_table": x["block_table"][:, :7].contiguous()}
    assert torch.equal(p(**x), p(**narrow))
    alone = {name: t[1:] if name in ("q", "block_table", "seqused_k") else t for name, t in x.items()}
    assert torch.equal(p(**x)[1:], p(**alone))


# -- bad calls -------------------------------------------------------------------------------------

Change = Callable[[torch.Tensor], Any]
BAD: list[tuple[str, Change, type[Exception], str]] = [
    ("block_table", lambda t: None, TypeError, "block_table must be a tensor, got nothing"),
    ("seqused_k", lambda t: None, TypeError, "seqused_k must be a tensor, got nothing"),
    ("block_table", lambda t: t.long(), TypeError, "block_table must be torch.int32, got torch.int64"),
    ("seqused_k", lambda t: t.float(), TypeError, "seqused_k must be torch.int32, got torch.float32"),
    ("block_table", lambda t: t[0], ValueError, r"block_table must have the 2 axes \[B=2, Sk / 8\]"),
    ("block_table", lambda t: t[:1], ValueError, "block_table must have shape .* axis 0 is 1, not 2, as q has it"),
    ("seqused_k", lambda t: t[:1], ValueError, "seqused_k must have shape .* axis 0 is 1, not 2, as q has it"),
    ("k", lambda t: t[:, :4], ValueError, r"k must have shape \[all pages, 8, 2, 16\].* axis 1 is 4, not 8"),
    ("v", lambda t: t[1:], ValueError, "v must have shape .* axis 0 is .*, as k has it"),
    ("k", lambda t: t.transpose(1, 2), ValueError, "k must have shape .* axis 1 is 2, not 8"),
    ("v", lambda t: t.transpose(2, 3).contiguous().transpose(2, 3), ValueError, "v must be contiguous along its last"),
    ("block_table", lambda t: t.to("meta"), ValueError, "block_table must be on cpu like q, got meta"),
]


@pytest.mark.parametrize(("name", "change", "kind", "message"), BAD)
def test_bad_calls(name: str, change: Change, kind: type[Exception], message: str) -> None:
    x = operands([20, 9])
    x[name] = change(x[name])
    with pytest.raises(kind, match=message):
        package(CAUSAL).tiles(16, 16)(**x)


def test_a_table_longer_than_the_spec_allows() -> None:
    with pytest.raises(ValueError, match="Sk is 72, the package was compiled for at most 64"):
        package(f"{CAUSAL}\nsizes: {{Sk: {{max: 64}}}}").tiles(16, 16)(**operands([20, 9]))


PAGES, KEYS = "expected 0 to 6", "expected 0 to 72"
CONTENTS: list[tuple[str, tuple[int, ...], int, str]] = [
    ("seqused_k", (0,), 20, "True"),
    ("block_table", (0, 8), -7, "True"),  # behind its last page
    (
        "block_table",
        (0, 2),
        -1,
        f"block_table[0, 2] is -1, {PAGES}: the sequence has 20 keys, and k has 7 pages",
    ),
    ("block_table", (1, 0), 7, f"block_table[1, 0] is 7, {PAGES}: the sequence has 9 keys, and k has 7 pages"),
    ("seqused_k", (1,), 73, f"seqused_k[1] is 73, {KEYS}: block_table has 9 pages of 8 a sequence"),
    ("seqused_k", (0,), -1, f"seqused_k[0] is -1, {KEYS}: block_table has 9 pages of 8 a sequence"),
]


@pytest.mark.parametrize("layout", ["bhsd", "varlen"])
def test_checked_mode_looks_at_contents(layout: str, tmp_path: Path) -> None:
    calls: list[dict[str, torch.Tensor]] = []
    for name, place, value, _ in CONTENTS:
        x = operands([20, 9])
        x[name][place] = value
        if layout == "varlen":
            x["q"] = x["q"].transpose(1, 2).flatten(0, 1)
            x["cu_seqlens_q"] = torch.tensor([0, 2, 4], dtype=torch.int32)
        calls.append(x)
    p = package(f"{CAUSAL}\nlayout: {layout}").tiles(16, 16)
    assert said_when_checked(p, calls, tmp_path) == [wanted for *_, wanted in CONTENTS]


# -- what is compiled ------------------------------------------------------------------------------


def test_operands_to_check_with_are_of_every_kind() -> None:
    x = draw(package(CAUSAL).attn, Case(3, 2, 30), torch.float32, torch.Generator().manual_seed(0))
    assert x.offsets["seqused_k"].tolist() == [30, 0, 10]
    assert x.offsets["block_table"].shape == (3, 5)
    assert set(x.offsets["block_table"][:, -1].tolist()) <= {-1, 2**31 - 1}
    assert x.k.isnan().any()


@pytest.mark.parametrize(
    ("more", "key"),
    [("quantize: {k: int8(per=head)}", "quantize"), ("scale: rsqrt(Sk)", "scale"), ("dropout: 0.1", "dropout")],
)
def test_what_is_not_carried(more: str, key: str) -> None:
    with pytest.raises(Unsupported) as error:
        driver.lower(spec.loads(f"attncc: 1\nname: odd\n{CAUSAL}\n{more}\n").attention)
    assert error.value.key == key


@pytest.mark.newest
def test_kernels_compile_for_gpus() -> None:
    """Loads of a page's rows are vectors of 16 bytes, and no turn of the main loop reloads what it had no room for."""
    example = driver.load(Path(__file__).parents[2] / "examples" / "paged_decode.yaml")
    attn, program = driver.lower(example.attention)
    body = example.text.split("name: paged_decode\n")[1]
    kernels = package(body, "paged_decode", target="sm_90").path / "kernels.py"
    wanted = {}
    for device in ("sm_80", "sm_90"):
        rows = default_configs(attn, find(device))[0]
        config = next(dict(c) for _, c in rows if c["SPLIT"])
        found = jobs(program, str(kernels), find(device), config)
        wanted |= {f"{device} {n}": j for n, j in found.items() if n.endswith("_stream PASS=0")}
    assert len(wanted) == 2
    for name, outcome in zip(wanted, build_all(list(wanted.values())), strict=True):
        assert not isinstance(outcome, Failed), (name, outcome.reason)
        assert outcome.loop.get("spill_load", 0) == 0, name
        assert "mma" in outcome.loop or "wgmma" in outcome.loop, name
