"""The verifier on variants: legal samples pass, each broken rule is named in its context, and all of them at once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from ir_samples import PLAIN, h, i, j, qk, scale

from attncc.errors import CompilerBug
from attncc.ir.attention import (
    Align,
    Attention,
    Call,
    Dims,
    Heads,
    Input,
    KeyRange,
    KeyTiles,
    Normalizer,
    Quantizer,
    Select,
    Size,
    State,
    Storage,
)
from attncc.ir.expr import TRUE, Expr, bucket, const, ew, load, name
from attncc.ir.verify import verify_attention

BIAS = Input("bias", ("Hq", "Sk"))
CUTS = Input("cuts", ("B", "n_cuts"), "int32", sorted=True)
OWN = Input("own", ("B", 1, "N", 16))
ROWS = Input("rows", ("Hq", "Sk", "Dqk"))
SELECT = Select(
    block=("token", 8),
    score=Call("pooled_dot", kwargs=(("pool", "mean"),)),
    normalize="softmax",
    heads="none",
    rule=Call("topk", (h + 2,)),
    force=(Call("diagonal"),),
    reuse=Call("every_call"),
)
STATE = State("elu1", Call("const", (h * 0.5,)), Call("add"), True, 64, "own", scale=const(1.0), prescale=h * 0.5)


def part(**changes: Any) -> Attention:
    return replace(PLAIN, parts=(replace(PLAIN.part, **changes),), inputs=(BIAS, CUTS, OWN, ROWS))


def select(**changes: Any) -> Attention:
    return part(select=replace(SELECT, **changes))


def stairs(*steps: tuple[int | None, str]) -> Attention:
    return replace(PLAIN, quantize=(Quantizer("cache", "staircase", staircase=steps),))


def state(**changes: Any) -> Attention:
    return part(state=replace(STATE, **changes), normalizer=Normalizer("none"))


LEGAL = {
    "plain": PLAIN,
    "inputs": part(score=qk * scale + load("bias", h, j), mask=bucket("cuts", name("b"), i) > 0),
    "own sizes": part(mask=j < name("n_cuts")),
    "sink": part(normalizer=Normalizer(sink=load("bias", h, const(0)))),
    "sizes in the score": part(score=qk * scale * ew("log", name("Sk"))),
    "solved": part(
        key_tiles=KeyTiles(
            (KeyRange(const(0), name("i1") + 1, const(0), Expr("rows_min", (i + 1,), None, "i32")),),
            name("j0") <= name("row1"),
        )
    ),
    "gathered": replace(
        part(kv=Storage("gathered", index="picks")), inputs=(Input("picks", ("B", "Hk", "Sq", 8), "int32"),)
    ),
    "given": part(kv=Storage("given", index="own", values="own")),
    "pooled": part(kv=Storage("pooled", block=8, weighted=True), columns=(0, 8)),
    "selected": part(select=SELECT, kv=Storage("pooled")),
    "every kind of formula": part(
        select=replace(
            SELECT,
            rule=Call("bernoulli", (ew("exp2", i - j),)),
            force=(Call("rows", (i < 3,)), Call("columns", (j < 3,)), Call("sink", (const(2),))),
        )
    ),
    "clusters": part(
        select=replace(
            SELECT, block=("token", "cluster"), score=Call("centroid_dot", words=("own",)), normalize="weighted_softmax"
        )
    ),
    "state": part(state=STATE, normalizer=Normalizer("linear")),
    "steps": replace(
        part(score=qk + Expr("qdot", (h, j), "rows")),
        prologue=(
            Call("rope", kwargs=(("cos", "bias"), ("on", "q"), ("sin", "bias"))),
            Call("temperature", (h * 0.5,)),
        ),
        epilogue=(Call("gate", (load("bias", h, i),)), Call("absorb", words=("own",))),
        outputs=(Call("o"), Call("column_mass", (i < 3,)), Call("row_mass", (j * 0.5,))),
        combine=Call("lerp", (load("bias", h, i),)),
        quantize=(Quantizer("cache", "staircase", staircase=((16, "fp16"), (None, "int4"))),),
    ),
    "aligned": replace(PLAIN, align=Align("input", "at"), inputs=(Input("at", ("B",), "int64"),)),
}


@pytest.mark.parametrize("case", LEGAL)
def test_legal_variants_pass(case: str) -> None:
    verify_attention(LEGAL[case])


BROKEN = {
    "unknown name": (part(mask=j <= name("k")), "'k' is not known here"),
    "qk in the mask": (part(mask=qk > 0.0), "'qk' is not known here"),
    "tile names in the mask": (part(mask=j <= name("i1")), "'i1' is not known here"),
    "mask of floats": (part(mask=qk * 0.5), "expected bool, got f32"),
    "mask of integers": (part(mask=i + j), "expected bool, got i32"),
    "score of integers": (part(score=i - j), "expected f16 or bf16 or f32 or f64, got i32"),
    "score of booleans": (part(score=j <= i), "got bool"),
    "unknown input": (part(score=qk + load("nope", h)), "tensor 'nope' is not known"),
    "too few indices": (part(score=qk + load("bias", h)), "'bias' has 2 axes, got 1"),
    "too many indices": (part(score=qk + load("bias", h, i, j)), "'bias' has 2 axes, got 3"),
    "float index": (part(score=qk + load("bias", h, qk)), "'bias' is indexed by a f32"),
    "wrong dtype of a load": (part(mask=load("bias", h, j, dtype="bool")), "its arguments make it f32"),
    "bucket of floats": (part(mask=bucket("bias", h, i) > 0), "'bias' is f32"),
    "name with another dtype": (part(score=name("i", "f32")), "'i' is given as f32"),
    "name with a shape": (part(score=name("qk", "f32", ("BM",))), "'qk' is given as f32"),
    "unknown operator": (part(score=Expr("softplus", (qk,))), "'softplus' is no operator"),
    "missing argument": (part(score=Expr("add", (qk,))), "'add' takes 2 arguments, got 1"),
    "wrong dtype of an operator": (part(score=Expr("add", (i, j), None, "f32")), "its arguments make it i32"),
    "logic on integers": (part(mask=Expr("and", (i, j), None, "bool")), "'and' takes booleans"),
    "choice by an integer": (part(score=Expr("where", (i, qk, qk))), "'where' chooses by a boolean"),
    "choice of two kinds": (part(score=Expr("where", (j <= i, qk, TRUE))), "'where' chooses f32 or bool"),
    "odd constant": (part(score=Expr("const", (), "one")), "a constant f32 cannot be 'one'"),
    "float in an integer constant": (part(score=qk + Expr("const", (), 0.5, "i32")), "a constant i32 cannot be 0.5"),
    "tile operator": (part(score=Expr("iota", (), 4, "f32")), "'iota' does not exist at the scalar level"),
    "sink over keys": (part(normalizer=Normalizer(sink=qk)), "'qk' is not known here"),
    "sink of sigmoid": (part(normalizer=Normalizer("sigmoid", sink=const(1.0))), "sigmoid has no sink"),
    "negative eps": (part(normalizer=Normalizer("linear", eps=-1.0)), "eps >= 0"),
    "eps not a number": (part(normalizer=Normalizer("linear", eps=float("nan"))), "eps >= 0"),
    "certain dropout": (part(dropout=1.0), r"\[0, 1\)"),
    "negative dropout": (part(dropout=-0.1), r"\[0, 1\)"),
    "pages without a size": (part(kv=Storage("paged")), "page size"),
    "empty pages of latents": (
        part(kv=Storage("latent", 0, 4)),
        "latent storage needs a page size of at least 1, got 0",
    ),
    "a page size without pages": (part(kv=Storage("dense", 16)), "dense storage has no pages, got a page size of 16"),
    "latent too narrow": (replace(part(kv=Storage("latent")), dims=Dims(16, 32)), "Dv 32 > Dqk 16"),
    "gathered from nothing": (part(kv=Storage("gathered", index="nope")), "'nope' is not declared"),
    "gathered from floats": (part(kv=Storage("gathered", index="bias")), "integer input of 4 axes"),
    "aligned by floats": (replace(part(), align=Align("input", "bias")), "integer input of 1 axes"),
    "aligned by nothing": (replace(PLAIN, align=Align("input", "nope")), "'nope' is not declared"),
    "no query heads": (replace(PLAIN, heads=Heads(0, 1, 1)), "at least 1, got 0"),
    "heads that do not divide": (replace(PLAIN, heads=Heads(6, 4, 4)), "divisor of the 6 query heads, got 4"),
    "more key heads than queries": (replace(PLAIN, heads=Heads(2, 4, 2)), "divisor of the 2 query heads, got 4"),
    "no columns": (replace(PLAIN, dims=Dims(0, 16)), "1 to 1024, got 0"),
    "too many columns": (replace(PLAIN, dims=Dims(16, 2000)), "1 to 1024, got 2000"),
    "no parts": (replace(PLAIN, parts=()), "there is none"),
    "two inputs of a name": (replace(PLAIN, inputs=(BIAS, BIAS)), "declared twice"),
    "input called qk": (replace(PLAIN, inputs=(Input("qk", ()),)), "the name is taken"),
    "input called Sk": (replace(PLAIN, inputs=(Input("Sk", ()),)), "the name is taken"),
    "unknown dtype": (replace(PLAIN, inputs=(Input("x", (), "float"),)), "unknown dtype 'float'"),
    "sorted floats": (replace(PLAIN, inputs=(Input("x", ("Sk",), sorted=True),)), "only integers can be sorted"),
    "empty axis": (replace(PLAIN, inputs=(Input("x", (0,)),)), "impossible shape"),
    "impossible size": (replace(PLAIN, sizes=(Size("Sk", multiple=0),)), "impossible bounds"),
    "scale over rows": (replace(PLAIN, scale=ew("sqrt", i)), "'i' is not known here"),
    "gate over keys": (replace(part(), combine=Call("lerp", (load("bias", h, j),))), "'j' is not known here"),
    "range over keys": (
        part(key_tiles=KeyTiles((KeyRange(const(0), j, const(0), const(0)),))),
        "ranges.0..hi: j\n    'j' is not known here",
    ),
    "float range": (
        part(key_tiles=KeyTiles((KeyRange(const(0.0), const(0), const(0), const(0)),))),
        "expected i8 or u8 or i32 or i64, got f32",
    ),
    "skip of integers": (part(key_tiles=KeyTiles((), skip=name("j0"))), "expected bool, got i32"),
    "row of a table of other width": (part(score=Expr("qdot", (h,), "bias")), "'bias' has no rows of 16 for a query"),
    "query in a mask": (part(mask=Expr("qdot", (h, j), "rows") > 0.0), "'qk' is not known here"),
    "columns beyond the head": (part(columns=(8, 17)), r"some of the 16 columns, got .8, 17"),
    "no columns of a part": (part(columns=(8, 8)), r"some of the 16 columns"),
    "given by nothing": (part(kv=Storage("given", index="own", values="nope")), "'nope' is not declared"),
    "given by integers": (part(kv=Storage("given", index="cuts", values="own")), "a float input of 4 axes"),
    "given of two axes": (part(kv=Storage("given", index="bias", values="own")), "a float input of 4 axes"),
    "pooled over nothing": (part(kv=Storage("pooled")), "needs a size, or the blocks of a selection"),
    "dense means": (part(kv=Storage("dense", block=4)), "dense storage has no means of blocks"),
    "weighted pages": (part(kv=Storage("paged", page_size=4, weighted=True)), "paged storage has no means"),
    "empty means": (part(kv=Storage("pooled", block=0)), "impossible block of 0 keys"),
    "pages of dense keys": (select(block=(8, "page")), "dense storage has no pages"),
    "pages of queries": (select(block=("page", 8)), "block.q\n    expected a size or token or cluster, got page"),
    "empty blocks": (select(block=(8, 0)), "block.k\n    expected a size or page or token or cluster, got 0"),
    "means of clusters": (select(block=(8, "cluster")), "'pooled_dot' does not score blocks of cluster"),
    "centroids of blocks": (select(score=Call("centroid_dot", words=("own",))), "does not score blocks of 8"),
    "weights of blocks": (select(normalize="weighted_softmax"), "blocks of 8 have no weights"),
    "a middle of two": (select(take="marginal"), "'topk' has no middle class"),
    "unknown selector": (select(score=Call("pooled_dott")), "no 'pooled_dott' here; did you mean 'pooled_dot'"),
    "unknown rule": (select(rule=Call("top")), "parts.0..select.rule\n    there is no 'top' here"),
    "unknown reuse": (select(reuse=Call("never")), "there is no 'never' here"),
    "rule over keys": (select(rule=Call("topk", (j,))), "select.rule.args.0.: j\n    'j' is not known here"),
    "rule over queries": (select(rule=Call("mass", (qk,))), "'qk' is not known here"),
    "rows by key": (select(force=(Call("rows", (j < 3,)),)), "select.force.0..args.0.: j < 3\n    'j' is not known"),
    "columns by row": (select(force=(Call("diagonal"), Call("columns", (i < 3,)))), "'i' is not known here"),
    "selected by nothing": (select(score=Call("given", words=("nope",))), "'nope' is not declared"),
    "lse of nothing": (select(score=Call("exact_mass", kwargs=(("lse", "nope"),))), "'nope' is not declared"),
    "least over rows": (select(rule=Call("mass", (const(0.5),), (("least", ew("exp", i)),))), "'i' is not known here"),
    "unknown feature": (state(feature="softmac"), "unknown feature map 'softmac'; did you mean 'softmax'"),
    "state under softmax": (part(state=STATE), "a state is not normalised by softmax"),
    "no chunk": (state(chunk=0), "chunk\n    expected at least 1"),
    "state from nothing": (state(initial="nope"), "'nope' is not declared"),
    "state from integers": (state(initial="cuts"), "a float input, 'cuts' is int32"),
    "mass from nothing": (state(initial_mass="nope"), "state.initial_mass\n    input 'nope'"),
    "fixed state of nothing": (state(initial="", update=Call("none")), "needs an initial one"),
    "scale of a state by row": (state(scale=load("bias", h, i)), "state.scale.*\n    'i' is not known here"),
    "prescale of a state by key": (state(prescale=j * 0.5), "state.prescale.*\n    'j' is not known here"),
    "decay by token": (state(decay=Call("const", (j * 0.5,))), "'j' is not known here"),
    "decay by integers": (state(decay=Call("scalar", words=("cuts",))), "a float input, 'cuts' is int32"),
    "unknown decay": (state(decay=Call("slow")), "there is no 'slow' here"),
    "unknown step": (replace(PLAIN, prologue=(Call("rope"), Call("turn"))), "prologue.1.\n    there is no 'turn' here"),
    "temperature by row": (replace(PLAIN, prologue=(Call("temperature", (i,)),)), "'i' is not known here"),
    "step by nothing": (replace(PLAIN, prologue=(Call("absorb", words=("nope",)),)), "'nope' is not declared"),
    "option by nothing": (replace(PLAIN, prologue=(Call("rms_norm", kwargs=(("weight", "w"),)),)), "'w' is not decl"),
    "gate by key": (replace(PLAIN, epilogue=(Call("gate", (j,)),)), "epilogue.0..args.0.: j\n    'j' is not known"),
    "gate by condition": (replace(PLAIN, epilogue=(Call("gate", (i < 3,)),)), "got bool"),
    "unknown output": (replace(PLAIN, outputs=(Call("o"), Call("p"))), "outputs.1.\n    there is no 'p' here"),
    "no output": (replace(PLAIN, outputs=(Call("lse"),)), "'o' is missing"),
    "mass of columns by key": (replace(PLAIN, outputs=(Call("o"), Call("column_mass", (j,)))), "'j' is not known"),
    "mass of rows by row": (replace(PLAIN, outputs=(Call("o"), Call("row_mass", (i,)))), "'i' is not known here"),
    "unknown way to combine": (replace(PLAIN, combine=Call("sum")), "there is no 'sum' here"),
    "gates by key": (replace(PLAIN, combine=Call("gate", (const(0.5), j))), "combine.args.1.: j"),
    "projected by nothing": (replace(PLAIN, combine=Call("add", words=("nope",))), "'nope' is not declared"),
    "unknown wish": (replace(PLAIN, schedule=Call("fast")), "there is no 'fast' here"),
    "quantised twice": (replace(PLAIN, quantize=(Quantizer("q", "int8"),) * 2), "quantised twice"),
    "unknown format": (replace(PLAIN, quantize=(Quantizer("q", "int9"),)), "unknown format 'int9'; did you mean"),
    "unknown grain": (replace(PLAIN, quantize=(Quantizer("q", "int8", Call("row")),)), "there is no 'row' here"),
    "steps of a format": (
        replace(PLAIN, quantize=(Quantizer("cache", "int8", staircase=((None, "int8"),)),)),
        "ages of a staircase",
    ),
    "falling ages": (
        replace(
            PLAIN, quantize=(Quantizer("cache", "staircase", staircase=((9, "fp16"), (8, "int8"), (None, "int4"))),)
        ),
        "ages of a staircase",
    ),
    "an end of ages": (
        replace(PLAIN, quantize=(Quantizer("cache", "staircase", staircase=((9, "fp16"),)),)),
        "ages of a staircase",
    ),
    "no granularity": (part(key_tiles=KeyTiles((), granularity=(0, 1))), "impossible granularity"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_variants_are_refused(case: str) -> None:
    attn, message = BROKEN[case]
    with pytest.raises(CompilerBug, match=message):
        verify_attention(attn)


def test_all_faults_of_a_variant_at_once() -> None:
    attn = replace(part(mask=j <= name("k"), dropout=2.0), heads=Heads(6, 4, 4))
    with pytest.raises(CompilerBug) as bug:
        verify_attention(attn)
    message = str(bug.value)
    assert message.startswith("attention 'plain' breaks 4 rules of the IR:")
    assert "parts[0].mask: j <= k\n    'k' is not known here" in message
    assert "parts[0].dropout" in message
    assert "heads.kv" in message
