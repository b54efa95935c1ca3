"""New tokens that go through steps on their way into a cache, by Triton's interpreter, against the oracle.

The oracle has all keys as they were before their steps; a package is given them in several calls, and attends then.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from codegen.appended import empty, expected, given, offsets, same, sequences, write
from codegen.emitted import OUT, Package, normal, package, passes
from torch import Tensor

from attncc import driver, reference, spec
from attncc.check.cases import Case
from attncc.check.pages import Pages, lay_out, pack
from attncc.check.run import check_package
from attncc.codegen.aot import Failed, build_all
from attncc.codegen.offline import jobs
from attncc.device import find
from attncc.errors import CompilerBug, Unsupported
from attncc.ir.keeping import keep, writing
from attncc.ir.tile import Barrier, If, Statement
from attncc.ir.verify import verify_program
from attncc.reference.operands import Sequence
from attncc.reference.prologue import prologue
from attncc.reference.rows import Numbers, scope_of

HEAD = "heads: {q: 4, kv: 2}\ndims: 32\nmask: causal\n"
STEPS = {
    "half": "[rope]",
    "interleaved": "['rope(base=100, pairs=interleaved)']",
    "partial": "['rope(dims=16)']",
    "partial and odd": "['rope(base=50, dims=10)']",
    "partial and interleaved": "['rope(dims=24, pairs=interleaved)']",
    "of keys alone": "['rope(base=100, on=k)']",
    "norm and rope": "['rms_norm(weight=w, on=k)', 'rms_norm(on=q)', rope]\ninputs: {w: {shape: [Dqk]}}",
    "hadamard": "[rope, hadamard, 'hadamard(on=v)']",
    "by tables": "['rope(cos=c, sin=s)', 'silu(on=v)']\ninputs: {c: {shape: [P, 16]}, s: {shape: [P, 16]}}",
    "per sequence": "['temperature(t[b, hk] + hk, on=k)', rope]\ninputs: {t: {shape: [B, Hk]}}",
}
STORAGE = {
    "rows": "kv: cache",
    "bshd": "kv: cache\nlayout: bshd",
    "packed": "kv: cache\nlayout: varlen",
    "pages": "kv: paged(8)",
    "packed, into pages": "layout: varlen\nkv: paged(16)",
}
FORMS = [
    *("int8(per=token)", "int8(per=head)", "int8(per=group(5), symmetric=false)", "fp8_e4m3(per=group(16))"),
    *("int4(per=token, symmetric=false)", "int4(per=group(8))", "int4(per=channel)", "fp8_e5m2(per=token)"),
]
LENGTHS = [37, 0, 20, 1]


def built(storage: str, steps: str, form: str = "", dtype: str = "fp32") -> Package:
    quantize = f"\nquantize: {{cache: '{form}'}}" if form else ""
    return package(f"{HEAD}dtype: {dtype}\n{STORAGE[storage]}\nprologue: {STEPS[steps]}{quantize}").tiles(16, 16)


def drawn(p: Package, batch: int) -> dict[str, Tensor]:
    sizes = {"Hq": 4, "Hk": 2, "Dqk": 32, "B": batch, "P": 40}
    return {
        x.name: normal(*(sizes[n] if isinstance(n, str) else n for n in x.shape), seed=ord(x.name[0]))
        for x in p.attn.inputs
    }


def stepped(p: Package, rows: list[dict[str, Tensor]], inputs: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Keys and values of sequences behind their steps, by the oracle in fp64."""
    attn = replace(writing(keep(p.attn)), quantize=())
    out: list[dict[str, Tensor]] = []
    for at, s in enumerate(rows):
        k, v = (s[x].double().transpose(0, 1) for x in "kv")
        sequence = Sequence(at, k.new_zeros(attn.heads.q, 0, k.shape[2]), k, v)
        numbers = Numbers(torch.float64, torch.float64, None, 0, {"B": len(rows)}, inputs)
        made = prologue(attn, sequence, scope_of(attn, sequence, numbers))
        out.append({"k": made.k.transpose(0, 1), "v": made.v.transpose(0, 1)})
    return out


def lain_out(p: Package, rows: list[dict[str, Tensor]], pages: Pages | None) -> tuple[Tensor, Tensor]:
    """Keys and values as the oracle's call has them."""
    if pages is not None:
        k, v = (pages.fill([s[x] for s in rows], (2, 32)) for x in "kv")
        return k, v
    most = max(len(s["k"]) for s in rows)
    k, v = (
        pack([s[x] for s in rows], p.attn.layout, most, (2, 32), torch.device("cpu"), rows[0][x].dtype) for x in "kv"
    )
    return k, v


def queries(p: Package, lengths: list[int], count: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The last queries of each sequence, and where packed ones lie."""
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[p.attn.dtype]
    if p.attn.layout != "varlen":
        axes = (4, count) if p.attn.layout == "bhsd" else (count, 4)
        return normal(len(lengths), *axes, 32, seed=99, dtype=dtype), {}
    each = [min(count, n) for n in lengths]
    where = {"cu_seqlens_q": offsets(each)} | ({} if p.attn.page_size else {"cu_seqlens_k": offsets(lengths)})
    return normal(sum(each), 4, 32, seed=99, dtype=dtype), where


def unpacked(p: Package, name: str, t: Tensor) -> Tensor:
    """Codes as whole numbers, those of fp8 as what they stand for; other tensors as they are."""
    form = p.attn.quantize[0].dtype if p.attn.quantize else ""
    if name not in ("k", "v") or not form:
        return t.double()
    return torch.cat([t % 16, t // 16], -1).double() if form == "int4" else t.double()


def near(p: Package, got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """The same but for rounding: a hundredth of the codes may be next to the oracle's; poison stays as it was."""
    for name, t in wanted.items():
        ours, theirs = unpacked(p, name, got[name]), unpacked(p, name, t)
        assert torch.equal(ours.isnan(), theirs.isnan()), name
        ours, theirs = ours.nan_to_num(), theirs.nan_to_num()
        if name in ("k", "v") and p.attn.quantize:
            other = ours != theirs
            assert other.double().mean() < 0.01, name
            fine = theirs.abs() / 4 if p.attn.quantize[0].dtype.startswith("fp8") else torch.ones_like(theirs)
            assert bool(((ours - theirs).abs() <= fine + 1e-2).all()), name
        else:
            rounding = torch.finfo(t.dtype).eps if t.dtype != torch.float32 else 3e-6
            torch.testing.assert_close(
                ours, theirs, rtol=2 * rounding, atol=rounding, msg=lambda m, n=name: f"{n}: {m}"
            )


def agrees(p: Package, lengths: list[int], *cuts: int) -> None:
    """What calls have stored is what the oracle holds, and attention over it is the oracle's over keys and steps."""
    rows, size = sequences(p, lengths), p.attn.page_size
    pages = lay_out(lengths, 6, size, torch.Generator().manual_seed(0)) if size else None
    inputs = drawn(p, len(lengths))
    known = {x.name for x in keep(p.attn).inputs}
    wanted = expected(p, stepped(p, rows, inputs), pages)
    wanted = {x: t.to(rows[0]["k"].dtype) if x in "kv" and not p.attn.quantize else t for x, t in wanted.items()}
    got = empty(wanted, p)
    write(p, rows, pages, got, *cuts, **{x.name: inputs[x.name] for x in writing(keep(p.attn)).inputs})
    near(p, got, wanted)
    q, where = queries(p, lengths, 3)
    where |= {} if pages is None else {"block_table": pages.table, "seqused_k": pages.used}
    ours = p(q, **got, **where, **{x: t for x, t in inputs.items() if x in known})
    theirs = reference.attention(p.attn, q, *lain_out(p, rows, pages), inputs=inputs, **where)
    loose = 2e-2 if p.attn.quantize else {"fp32": 1e-5, "fp16": 2e-3, "bf16": 2e-2}[p.attn.dtype]
    torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=loose)


def ragged(storage: str) -> list[int]:
    return [21, 21] if storage in ("rows", "bshd") else LENGTHS


@pytest.mark.parametrize("steps", STEPS)
def test_steps(steps: str) -> None:
    agrees(built("pages", steps), LENGTHS, 11, 17)


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("form", ["", "int8(per=token)", "int4(per=head)"])
def test_storage(storage: str, form: str) -> None:
    agrees(built(storage, "partial", form), ragged(storage), 11)


@pytest.mark.parametrize("form", FORMS)
def test_formats(form: str) -> None:
    agrees(built("pages", "half", form), LENGTHS, 11)


@pytest.mark.parametrize("steps", ["interleaved", "partial and odd", "hadamard"])
def test_codes_that_share_a_byte(steps: str) -> None:
    """Steps have the columns of the two in different tiles."""
    agrees(built("packed, into pages", steps, "int4(per=group(8))"), LENGTHS, 11)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("form", ["", "int8(per=token)"])
def test_dtypes(dtype: str, form: str) -> None:
    if dtype == "fp16" or not form:
        agrees(built("pages", "interleaved", form, dtype), LENGTHS, 11)


def test_one_token_a_call() -> None:
    agrees(built("pages", "half"), [12, 9, 3], *range(1, 12))


def test_positions_far_out_are_turned_as_exactly() -> None:
    """fp32 would lose what is left of an angle of many turns."""
    p = package(f"{HEAD}dtype: fp32\nkv: paged(8)\nprologue: ['rope(base=10000)']\nsizes: {{Sk: {{max: 1048576}}}}")
    k, v = normal(1, 2, 1, 32), normal(1, 2, 1, 32, seed=1)
    cache, values = torch.zeros(1, 8, 2, 32), torch.zeros(1, 8, 2, 32)
    at = 1_000_003
    table = torch.zeros(1, 1_048_576 // 8, dtype=torch.int32)
    p.module.append(k, v, cache, values, positions=torch.tensor([[at]], dtype=torch.int32), block_table=table)
    angle = at * 10000.0 ** (-torch.arange(16).double() / 16)
    first, second = k[0, :, 0].double().chunk(2, -1)
    turned = torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], -1)
    torch.testing.assert_close(cache[0, at % 8].double(), turned, rtol=0, atol=1e-6)


def test_tokens_without_a_place_are_left_out() -> None:
    p = built("pages", "half", "int8(per=token)")
    rows = sequences(p, [9])
    pages = lay_out([9], 2, 8, torch.Generator().manual_seed(0))
    got = empty(expected(p, rows, pages), p)
    before = {name: t.clone() for name, t in got.items()}
    for place in (-1, 16, 2**31 - 1, -(2**31)):
        p.module.append(**given(p, rows, [torch.full((9,), place, dtype=torch.int32)], [9], pages), **got)
        same(got, before)


@pytest.mark.parametrize("form", ["paged(16)", "cache"])
def test_attention_reads_keys_as_they_are(form: str) -> None:
    p = package(f"{HEAD}dtype: fp32\nkv: {form}\nprologue: [rms_norm, 'rope(base=100)']").tiles(16, 16, split=1)
    passes(p, Case(3, 2, 37), Case(2, 21, 37), Case(1, 1, 20, "nan_keys"))


def test_a_check_says_what_it_has_not_checked() -> None:
    p = built("pages", "half")
    shapes = [{"B": 1, "Sq": 1, "Sk": 9}]
    report = check_package(p.attn, p.path, find("interpreter"), shapes)
    assert report.passed
    assert any("not the steps that append takes" in note for note in report.notes)


def test_each_call_is_given_what_its_own_steps_read() -> None:
    p = built("pages", "norm and rope")
    assert "w" in {t.name for t in p.module.APPENDING.tensors}
    assert "w" not in {t.name for t in p.module.VARIANT.tensors}
    both = built("pages", "by tables")
    for variant in (both.module.APPENDING, both.module.VARIANT):
        assert {"c", "s"} <= {t.name for t in variant.tensors}
    assert "go through rope, silu on their way" in both.module.append.__doc__


def test_variants_without_a_cache_take_keys_through_steps_in_every_call() -> None:
    attn = spec.loads(f"attncc: 1\nname: x\n{HEAD}prologue: [rope]").attention
    assert keep(attn) is attn


def test_keeping_is_done_once() -> None:
    attn = spec.loads(f"attncc: 1\nname: x\n{HEAD}kv: cache\nprologue: [rope, 'silu(on=v)', 'l2_norm(on=q)']").attention
    kept = keep(attn)
    assert keep(kept) == kept
    assert [s.name for s in kept.prologue] == ["rope", "l2_norm"]
    assert kept.kept is not None
    assert [s.name for s in kept.kept.steps] == ["rope", "silu"]


BUILT = {
    "pages": ("rope", ""),
    "norms": ("rms_norm, rope, hadamard", ""),
    "int8": ("'rope(pairs=interleaved)'", "int8(per=token)"),
    "fp8": ("'rope(dims=64)'", "fp8_e4m3(per=group(32))"),
    "int4": ("rope", "int4(per=token, symmetric=false)"),
    "int4 of neighbours": ("'rope(pairs=interleaved)'", "int4(per=token, symmetric=false)"),
    "int4 through memory": ("'rope(dims=96, pairs=interleaved)'", "int4(per=group(32))"),
}


@pytest.mark.parametrize("name", BUILT)
def test_kernels_for_hopper_do_not_spill(name: str) -> None:
    steps, form = BUILT[name]
    quantize = f"quantize: {{cache: '{form}'}}\n" if form else ""
    body = f"heads: {{q: 32, kv: 8}}\ndims: 128\nmask: causal\nkv: paged(64)\nprologue: [{steps}]\n{quantize}"
    p = package(body, target="sm_90")
    _, program = driver.lower(p.attn)
    assert program.append is not None
    found = jobs(program.append, str(p.path / "kernels.py"), find("sm_90"), {"num_warps": 4})
    (outcome,) = build_all([*found.values()])
    assert not isinstance(outcome, Failed), outcome.reason
    assert outcome.spill_bytes == 0
    assert bool(program.append.scratch) == (name == "int4 through memory")


def test_rows_in_scratch_memory_are_read_behind_a_barrier() -> None:
    _, program = driver.lower(built("pages", "partial and interleaved", "int4(per=token)").attn)
    assert program.append is not None
    (kernel,) = program.append.kernels

    def without(body: tuple[Statement, ...]) -> tuple[Statement, ...]:
        kept = (s for s in body if not isinstance(s, Barrier))
        return tuple(replace(s, body=without(s.body)) if isinstance(s, If) else s for s in kept)

    broken = replace(program.append, kernels=(replace(kernel, body=without(kernel.body)),))
    with pytest.raises(CompilerBug, match="scratch 'k_staged' is read before any launch wrote it"):
        verify_program(broken)


def test_it_can_be_traced() -> None:
    p = built("pages", "by tables", "int8(per=token)")
    rows = sequences(p, [9])
    pages = lay_out([9], 2, 8, torch.Generator().manual_seed(0))
    x = {**given(p, rows, [torch.arange(9, dtype=torch.int32)], [9], pages), **empty(expected(p, rows, pages), p)}
    named = [{**x, **drawn(p, 1)}[t.name] for t in p.module.APPENDING.tensors]
    torch.library.opcheck(p.module._APPEND, tuple(named), test_utils=("test_schema", "test_faketensor"))


def test_cpus_have_no_such_calls() -> None:
    loaded = spec.loads(f"attncc: 1\nname: on_cpu\n{HEAD}kv: cache\n")
    with pytest.raises(Unsupported, match="nor write caches"):
        driver.compile(loaded, OUT, ["cpu"])


BAD: list[tuple[str, Any, type[Exception], str]] = [
    ("c", lambda t: None, TypeError, "append: c must be a tensor, got nothing"),
    ("c", lambda t: t.half(), TypeError, "append: c must be torch.float32, got torch.float16"),
    ("s", lambda t: t[:3], ValueError, "s must have shape .* axis 0 is 3, not 40, as c has it"),
    ("c", lambda t: t[:, :3], ValueError, "c must have shape .* axis 1 is 3, not 16"),
    ("positions", lambda t: t.float(), TypeError, "positions must be torch.int32, got torch.float32"),
    ("k_new", lambda t: t.half(), TypeError, "k_new must be torch.float32, got torch.float16"),
]


@pytest.mark.parametrize(("name", "change", "kind", "message"), BAD)
def test_bad_calls(name: str, change: Any, kind: type[Exception], message: str) -> None:
    p = built("pages", "by tables")
    rows = sequences(p, [9])
    pages = lay_out([9], 2, 8, torch.Generator().manual_seed(0))
    x = {**given(p, rows, [torch.arange(9, dtype=torch.int32)], [9], pages), **empty(expected(p, rows, pages), p)}
    x |= drawn(p, 1)
    x[name] = change(x[name])
    with pytest.raises(kind, match=message):
        p.module.append(**x)


REFUSED = {
    "kv: paged(8)\nprologue: ['absorb(w, on=k)']\ninputs: {w: {shape: [Hk, 16, 32]}}": "multiply new keys",
    "kv: cache\nprologue: ['smooth(on=k)']": "all steps but smooth|mean over all tokens is not known",
    "kv: paged(8)\nprologue: ['lerp(x, 0.5, on=k)']\ninputs: {x: {shape: [B, Hk, Sk, Dqk]}}": "axes of their own",
    "kv: paged(8)\nprologue: ['temperature(float(Sk), on=k)']": "read no numbers of tokens",
    "kv: paged(8)\nprologue: ['rms_norm(weight=w, on=k)']\ninputs: {w: {shape: [3]}}": r"rms_norm by weights \[D\]",
    "kv: latent(rope=8, page_size=8)\nprologue: ['rope(on=k)']": "keys hold the values",
}


@pytest.mark.parametrize("body", REFUSED)
def test_what_is_not_carried(body: str) -> None:
    heads = "heads: {q: 4, kv: 2}\ndims: 32\nmask: causal\n"
    loaded = spec.loads(f"attncc: 1\nname: refused\n{heads}{body}\n")
    with pytest.raises(Unsupported, match=REFUSED[body]) as caught:
        driver.lower(loaded.attention)
    assert caught.value.key == "prologue"
