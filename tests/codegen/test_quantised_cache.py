"""Packages over a cache that the caller holds quantised, run by Triton's interpreter against the oracle's numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from codegen.emitted import Package, package, passes

from attncc import driver, spec
from attncc.check.cases import Case
from attncc.check.operands import draw
from attncc.codegen.aot import Failed, build_all
from attncc.codegen.offline import jobs
from attncc.device import find
from attncc.errors import Unsupported
from attncc.ir.cache import beside, cached
from attncc.passes.lower.defaults import default_configs, filling
from attncc.reference.cache import hold
from attncc.reference.formats import read_back

HEAD = "heads: {q: 4, kv: 2}\ndims: 32\ndtype: fp32\nmask: causal\n"
PAGED = "kv: paged(8)"
FORMATS = [
    *("int8", "int8(per=token)", "int8(per=token, symmetric=false)", "int8(per=channel, symmetric=false)"),
    *("int8(per=head, symmetric=false)", "int8(per=group(5), symmetric=false)"),
    *("int4(per=token)", "int4(per=token, symmetric=false)", "int4(per=group(8), symmetric=false)", "int4(per=head)"),
    *("fp8_e4m3(per=head)", "fp8_e4m3(per=group(16))", "fp8_e5m2", "fp8_e5m2(per=token)"),
]
STORAGE = {
    "rows": "",
    "bshd": "layout: bshd",
    "small pages": PAGED,
    "pages of whole tiles": "kv: paged(64)",
    "packed": "layout: varlen",
    "packed queries over pages": "layout: varlen\nkv: paged(16)",
}
OTHERS = {
    "pieces": "heads: {q: 4, kv: 2}\ndims: {qk: 96, v: 64}\ndtype: fp16\nmask: causal\nkv: paged(16)",
    "other value heads": "heads: {q: 12, kv: 2, v: 3}\ndims: 32\ndtype: fp32\nmask: causal\nkv: paged(8)",
    "a score that is not linear": f"{HEAD}{PAGED}\nscore: softcap(qk * scale, 3) - 0.1 * (i - j)",
    "listed tiles": f"{HEAD[:-13]}{PAGED}\ninputs: {{on: {{shape: [B, Sk], dtype: bool}}}}\nmask: on[b, j]",
    "sigmoid": f"{HEAD}{PAGED}\nnormalizer: sigmoid\noutputs: [o]",
}


def cache(form: str, more: str = PAGED, head: str = HEAD) -> Package:
    return package(f"{head}{more}\nquantize: {{cache: '{form}'}}")


@pytest.mark.parametrize("form", FORMATS)
def test_formats(form: str) -> None:
    p = cache(form)
    passes(p.tiles(16, 16), Case(3, 5, 45))
    passes(p.tiles(16, 32, one_pass=1, split=1, fill=12), Case(3, 2, 70, "nan_keys"))


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("form", ["int8(per=token, symmetric=false)", "int4(per=group(8))"])
def test_storage(form: str, storage: str) -> None:
    p = cache(form, STORAGE[storage])
    passes(p.tiles(16, 16), Case(3, 20, 41, "nan_around"))
    if "varlen" not in STORAGE[storage]:
        passes(p.tiles(16, 16, split=1, fill=12), Case(3, 1, 41, "nan_neighbour"))


@pytest.mark.parametrize("other", OTHERS)
def test_other_variants(other: str) -> None:
    p = cache("int4(per=token, symmetric=false)", OTHERS[other], "")
    passes(p.tiles(16, 16), Case(2, 5, 45))


@pytest.mark.parametrize("wish", ["tile", "split_kv(3)", "stream_k"])
def test_schedules(wish: str) -> None:
    p = cache("int8(per=token)", f"schedule: {wish}\nkv: paged(8)")
    passes(p.tiles(16, 16, split=0 if wish == "tile" else 1, fill=12), Case(3, 1, 70))


@pytest.mark.parametrize("trait", ["unaligned", "expanded", "large_logits", "last_axis_strided"])
def test_operands(trait: Any) -> None:
    outcome = cache("int8(per=token, symmetric=false)").tiles(16, 16).agrees(Case(3, 3, 41, trait))
    assert outcome.passed, outcome


@pytest.mark.parametrize("split", [0, 1])
@pytest.mark.parametrize("shape", [(1, 1, 1), (4, 1, 17), (2, 0, 16), (1, 4, 0), (0, 16, 16)])
def test_shapes(shape: tuple[int, int, int], split: int) -> None:
    passes(cache("int4(per=token, symmetric=false)").tiles(16, 16, split=split), Case(*shape))


def test_absorbed_projections_over_latents() -> None:
    """Steps of queries and of the output go with any cache: DeepSeek's latents in fp8."""
    head = "heads: {q: 4, kv: 1}\ndims: {qk: 80, v: 64}\ndtype: fp16\nmask: causal\nkv: latent(rope=16)\n"
    head += "inputs: {up: {shape: [Hq, 32, 64]}, down: {shape: [Hq, 64, 32]}}\n"
    steps = "prologue: ['absorb(up, on=q)']\nepilogue: [absorb(down)]\n"
    p = package(f"{head}{steps}quantize: {{cache: fp8_e4m3(per=group(16))}}")
    passes(p.tiles(16, 16), Case(2, 20, 41))
    passes(p.tiles(16, 16, split=1), Case(3, 1, 70))


def test_values_that_are_a_part_of_the_keys() -> None:
    """Their codes, scales and rope columns lie one behind the other in rows, as FlashMLA has them."""
    head = "heads: {q: 4, kv: 1}\ndims: {qk: 80, v: 64}\ndtype: fp16\nmask: causal\n"
    p = package(f"{head}kv: latent(rope=16)\nquantize: {{cache: fp8_e4m3(per=group(16))}}").tiles(16, 16)
    passes(p, Case(2, 20, 41), Case(2, 3, 41, "nan_keys"), Case(0, 16, 16))
    passes(p.tiles(16, 16, split=1), Case(3, 1, 70, "nan_around"))
    x = draw(p.attn, Case(2, 1, 41), torch.float16, torch.Generator().manual_seed(0))
    rows = torch.zeros(2, 1, 41, 64 + 16 + 32, dtype=torch.uint8)
    parts = (
        rows[..., :64].view(torch.float8_e4m3fn),
        rows[..., 64:80].view(torch.float32),
        rows[..., 80:].view(x.q.dtype),
    )
    for part, given in zip(parts, (x.cache["k"], x.cache["k_scales"], x.cache["k_rope"]), strict=True):
        part.copy_(given)
    beside_codes = {"k_scales": parts[1], "k_rope": parts[2]}
    assert torch.equal(p(x.q, parts[0], **beside_codes), p(*x.positional, **x.keywords))


@pytest.mark.parametrize("form", FORMATS)
def test_codes_stand_for_the_numbers_of_the_oracle(form: str) -> None:
    attn = cache(form).attn
    (z,) = attn.quantize
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
    for c in cached(attn):
        held = hold(attn, c, x)
        assert torch.equal(held.numbers, read_back(x, z.dtype, z.per, z.symmetric, c.operand))
        assert held.codes.shape == (2, 9, 16 if z.dtype == "int4" else 32)


# -- bad calls -------------------------------------------------------------------------------------

Change = Callable[[torch.Tensor], Any]
BAD: list[tuple[str, Change, type[Exception], str]] = [
    ("k_scales", lambda t: None, TypeError, "k_scales must be a tensor, got nothing"),
    ("v_zeros", lambda t: t.half(), TypeError, "v_zeros must be torch.float32, got torch.float16"),
    ("k", lambda t: t.to(torch.int8), TypeError, "k must be torch.uint8, got torch.int8"),
    ("k", lambda t: t.repeat(1, 1, 1, 2), ValueError, r"k must have shape \[all pages, 8, 2, 16\], got"),
    ("k_scales", lambda t: t.transpose(1, 2), ValueError, "k_scales must have shape .* axis 1 is 8, not 2"),
    ("k_zeros", lambda t: t[1:], ValueError, "k_zeros must have shape .* axis 0 is .*, as k has it"),
    ("v_scales", lambda t: t[..., None], ValueError, "v_scales must have the 3 axes"),
    ("v_scales", lambda t: t.to("meta"), ValueError, "v_scales must be on cpu like q, got meta"),
]


@pytest.mark.parametrize(("name", "change", "kind", "message"), BAD)
def test_bad_calls(name: str, change: Change, kind: type[Exception], message: str) -> None:
    p = cache("int4(per=token, symmetric=false)")
    x = draw(p.attn, Case(2, 1, 20), torch.float32, torch.Generator().manual_seed(0))
    given = {"q": x.q, **x.cache, **x.offsets}
    given[name] = change(given[name])
    with pytest.raises(kind, match=message):
        p.tiles(16, 16)(**given)


@pytest.mark.parametrize(
    ("quantizers", "more"),
    [
        ("cache: int8(per=block(16))", ""),
        ("cache: int2(per=token)", ""),
        ("cache: nvfp4", ""),
        ("cache: 'int8(per=token, smooth=mean)'", ""),
        ("cache: 'staircase([(128, bf16), (inf, int8)])'", ""),
        ("cache: int8(per=token), q: int8", ""),
        ("cache: int4(per=token)", "dims: 40"),
        ("cache: int8(per=token)", "inputs: {k_scales: {shape: [Hq]}}\nscore: qk * k_scales[h]"),
    ],
)
def test_what_is_not_carried(quantizers: str, more: str) -> None:
    body = f"attncc: 1\nname: odd\nheads: 2\n{more or 'dims: 32'}\nquantize: {{{quantizers}}}\n"
    body = body if "dims" in body else f"{body}dims: 32\n"
    with pytest.raises(Unsupported) as error:
        driver.lower(spec.loads(body).attention)
    assert error.value.key == "quantize"


def test_what_lies_beside_codes() -> None:
    attn = cache("int8(per=token, symmetric=false)", "layout: varlen").attn
    assert [(x.name, x.axes) for x in beside(attn)] == [
        (name, (2, "Tk")) for name in ("k_scales", "k_zeros", "v_scales", "v_zeros")
    ]


# -- what is compiled ------------------------------------------------------------------------------


@pytest.mark.parametrize("example", ["kv_int8", "kv_int4"])
def test_default_configs_hardly_spill(example: str) -> None:
    """Of calls of one query and of large ones; tiles that are walked again aside."""
    loaded = driver.load(Path(__file__).parents[2] / "examples" / f"{example}.yaml")
    attn, program = driver.lower(loaded.attention)
    assert program.append is not None
    body = loaded.text.split(f"name: {example}\n")[1]
    kernels = str(package(body, example, target="sm_90").path / "kernels.py")
    rows, device = default_configs(attn, find("sm_90"))[0], find("sm_90")
    few, large = (next(dict(c) for _, c in reversed(rows) if bool(c["SPLIT"]) == split) for split in (True, False))
    few |= {"BM": 8, "BN": 64, "num_warps": 1, "num_stages": 3, "SPLIT": 4, "FILL": filling(device, 8)}
    wanted = {n: j for n, j in jobs(program, kernels, device, few).items() if n.endswith("_stream")}
    wanted |= {n: j for n, j in jobs(program, kernels, device, large).items() if n.endswith("_forward")}
    wanted |= jobs(program.append, kernels, device, {"num_warps": 4})
    assert len(wanted) == 3
    assert few in [dict(c) for _, c in rows]
    for name, outcome in zip(wanted, build_all(list(wanted.values())), strict=True):
        assert not isinstance(outcome, Failed), (name, outcome.reason)
        assert outcome.spill_bytes <= 512 * name.endswith("_stream"), name  # mostly outside of the loop
        assert outcome.loop.get("spill_load", 0) <= 16, name
        assert "append" in name or {"mma", "wgmma"} & set(outcome.loop), name
