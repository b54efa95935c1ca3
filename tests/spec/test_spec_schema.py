"""The schema: defaults, every key, and impossible specs, each refused at the place that is wrong."""

from __future__ import annotations

import json
from typing import Any

import pytest
from spec_samples import HEAD, INPUTS, refusal, spec, underlined

from attncc.ir.attention import (
    Align,
    Attention,
    Call,
    Dims,
    Heads,
    Input,
    Normalizer,
    Numerics,
    Part,
    Quantizer,
    Select,
    Size,
    State,
    Storage,
)
from attncc.ir.expr import TRUE, const, ew, load, name
from attncc.spec import document, loads, schema

QK, SCALE = name("qk", "f32"), name("scale", "f32")
B, H, I, J = (name(n) for n in ("b", "h", "i", "j"))


def test_defaults() -> None:
    part = Part(QK * SCALE, TRUE, Normalizer("softmax"), kv=Storage("dense"))
    expected = Attention("sample", Heads(8, 2, 2), Dims(64, 64), (part,), ew("rsqrt", const(64)))
    assert spec().attention == expected
    assert spec(head="attncc: 1\nname: s\nheads: 4\ndims: 72\n").attention.heads == Heads(4, 4, 4)


EVERY_KEY = """\
attncc: 1
name: everything
doc: Every key that one spec can have at once.
heads: {q: 16, kv: 4, v: 8, map: tile}
dims: {qk: 96, v: 80}
dtype: fp16
layout: varlen
inputs:
  g: {shape: [B, Hq, Sq, 2]}
  starts: {shape: [B], dtype: int64}
  sinks: {shape: [Hq], grad: true}
  cos_table: {shape: [Sk, 48], dtype: bf16}
  sin_table: {shape: [Sk, 48], dtype: bf16}
  w_up: {shape: [96, 32]}
  own_k: {shape: [B, Hk, N, 96]}
  own_v: {shape: [B, Hk, N, 80]}
  log_decay: {shape: [B, Hq, N]}
  beta: {shape: [B, Hq, N]}
  s0: {shape: [B, Hq, 96, 80]}
  tau: {shape: [Hq]}
sizes:
  B: 2
  Sk: {max: 65536, multiple: 16}
scale: 1.5 / Dqk
align: starts
quantize:
  q: int8(per=token)
  k: int8(per=block(64))
  v: fp8_e4m3(per=channel)
  p: fp8_e4m3
parts:
  - name: near
    score: softcap(qk * scale, 20)
    mask: causal
    normalizer: softmax(sink=sinks[h])
    dropout: 0.25
    kv: paged(16)
    select:
      block: {q: 64, k: page}
      score: minmax_bound
      normalize: softmax
      heads: group_sum
      rule: mass(tau[h], crossing=in)
      force: [sink(1), local(2), diagonal, first_column, last_pages(3), rows(i < 4)]
      reuse: cosine(0.9)
  - name: far
    normalizer: none
    kv: given(own_k, own_v)
    state:
      feature: elu1
      decay: scalar(log_decay)
      update: delta(beta)
      causal: true
      chunk: 128
      initial: s0
combine: gate(g[b, h, row, 0], g[b, h, row, 1])
prologue:
  - rope(cos=cos_table, sin=sin_table, dims=96, pairs=interleaved, on=qk)
  - rms_norm(eps=1e-6, on=q)
  - l2_norm(to=2.0)
  - temperature(1.0 + 0.1 * h, on=k)
  - causal_conv(w_up, kernel=2, groups=heads)
  - mean_residual(scale=0.5)
  - value_shift(fraction=0.5)
  - smooth(on=k)
  - absorb(w_up, on=q)
epilogue:
  - lerp_v(0.25)
  - gate(g[b, h, row, 0])
  - absorb(w_up)
  - skip(sinks[h])
outputs: [o, max_score, column_mass(i < 64), row_mass(j < 4), block_mass, final_state, indices]
modes: [prefill, decode]
numerics: {reproducible: config, exp: exact, accumulate: fp32}
schedule: split_kv(8)
tune:
  - {B: 2, Sq: 4096, Sk: 4096, sparsity: 0.9}
  - {Sk: 65536, documents: lognormal}
"""


def test_every_key() -> None:
    attn = loads(EVERY_KEY).attention
    gates = tuple(load("g", B, H, name("row"), k) for k in (0, 1))
    near, far = attn.parts
    assert attn.heads == Heads(16, 4, 8, "tile")
    assert attn.dims == Dims(96, 80)
    assert (attn.dtype, attn.layout, attn.align) == ("fp16", "varlen", Align("input", "starts"))
    assert attn.input("sinks") == Input("sinks", ("Hq",), "fp32", grad=True)
    assert attn.sizes == (Size("B", 2), Size("Sk", None, 65536, 16))
    assert attn.scale == 1.5 / const(96.0)
    assert attn.quantize == (
        Quantizer("q", "int8", Call("token")),
        Quantizer("k", "int8", Call("block", (const(64),))),
        Quantizer("v", "fp8_e4m3", Call("channel")),
        Quantizer("p", "fp8_e4m3"),
    )
    assert near.normalizer == Normalizer("softmax", load("sinks", H))
    assert (near.name, near.dropout, near.kv) == ("near", 0.25, Storage("paged", 16))
    assert near.select == Select(
        block=(64, "page"),
        score=Call("minmax_bound"),
        normalize="softmax",
        heads="group_sum",
        rule=Call("mass", (load("tau", H),), (("crossing", "in"),)),
        force=(
            Call("sink", (const(1),)),
            Call("local", (const(2),)),
            Call("diagonal"),
            Call("first_column"),
            Call("last_pages", (const(3),)),
            Call("rows", (I < 4,)),
        ),
        reuse=Call("cosine", (const(0.9),)),
    )
    assert far.state == State(
        "elu1", Call("scalar", words=("log_decay",)), Call("delta", words=("beta",)), True, 128, "s0"
    )
    assert far.normalizer.kind == "none"
    assert attn.combine == Call("gate", gates)
    rope, norm, *_, absorb = attn.prologue
    assert rope == Call(
        "rope",
        kwargs=(
            ("cos", "cos_table"),
            ("dims", const(96)),
            ("on", "qk"),
            ("pairs", "interleaved"),
            ("sin", "sin_table"),
        ),
    )
    assert norm == Call("rms_norm", kwargs=(("eps", const(1e-6)), ("on", "q")))
    assert absorb == Call("absorb", kwargs=(("on", "q"),), words=("w_up",))
    assert attn.epilogue[0] == Call("lerp_v", (const(0.25),))
    assert attn.outputs[2:4] == (Call("column_mass", (I < 64,)), Call("row_mass", (J < 4,)))
    assert attn.numerics == Numerics("config", "exact", "fp32")
    assert attn.schedule == Call("split_kv", (const(8),))
    assert attn.tune == (
        (("B", 2), ("Sk", 4096), ("Sq", 4096), ("sparsity", 0.9)),
        (("Sk", 65536), ("documents", "lognormal")),
    )
    assert loads(document(attn)).attention == attn


@pytest.mark.parametrize(
    ("body", "read", "expected"),
    [
        ("kv: latent(rope=32)", lambda a: a.part.kv, Storage("latent", rope=32)),
        ("kv: latent(32)", lambda a: a.part.kv, Storage("latent", rope=32)),
        ("kv: latent(rope=32, page_size=16)", lambda a: a.part.kv, Storage("latent", 16, 32)),
        ("kv: gathered(picks)", lambda a: a.part.kv, Storage("gathered", index="picks")),
        ("quantize: {k: int8(smooth=mean)}", lambda a: a.quantize, (Quantizer("k", "int8", smooth="mean"),)),
        ("kv: paged(page_size=64)", lambda a: a.part.kv, Storage("paged", 64)),
        ("normalizer: linear(1e-6)", lambda a: a.part.normalizer, Normalizer("linear", eps=1e-6)),
        ("normalizer: linear(eps=0)", lambda a: a.part.normalizer, Normalizer("linear", eps=0.0)),
        ("normalizer: sigmoid", lambda a: a.outputs, (Call("o"),)),
        ("normalizer: column_softmax", lambda a: a.outputs, (Call("o"),)),
        ("normalizer: softmax(sink=0)", lambda a: a.part.normalizer, Normalizer("softmax", const(0.0))),
        ("mask: true", lambda a: a.part.mask, TRUE),
        ("scale: 1", lambda a: a.scale, const(1.0)),
        ("scale: 0.125", lambda a: a.scale, const(0.125)),
        ("scale: 1 / sqrt(Dqk + Hq)", lambda a: a.scale, 1.0 / ew("sqrt", const(72))),
        ("align: top_left", lambda a: a.align, Align("top_left")),
        ("align: lengths", lambda a: a.align, Align("input", "lengths")),
        ("quantize: {k: int8(per=block)}", lambda a: a.quantize, (Quantizer("k", "int8", Call("block")),)),
        (
            "quantize:\n  cache: staircase([(128, bf16), (1024, int8), (inf, int4)], per=token)",
            lambda a: a.quantize,
            (
                Quantizer(
                    "cache", "staircase", Call("token"), staircase=((128, "bf16"), (1024, "int8"), (None, "int4"))
                ),
            ),
        ),
        (
            "quantize: {q: 'int4(per=group(32), symmetric=false)'}",
            lambda a: a.quantize,
            (Quantizer("q", "int4", Call("group", (const(32),)), symmetric=False),),
        ),
        ("state: {decay: const(log(1 - exp2(-5 - h)))}", lambda a: a.part.normalizer.kind, "none"),
        ("state: {feature: elu1}\nnormalizer: linear(0)", lambda a: [o.name for o in a.outputs], ["o", "lse"]),
        ("parts: [{mask: causal}, {mask: sink(4)}]", lambda a: a.combine, Call("lse")),
        ("parts: [{mask: causal}, {}]\nkv: paged(32)", lambda a: a.parts[1].kv, Storage("paged", 32)),
        ("parts: [{}, {}]\ncombine: add(bias)", lambda a: a.combine, Call("add", words=("bias",))),
        ("parts: [{}, {}]\ncombine: lerp(0.5)", lambda a: a.combine, Call("lerp", (const(0.5),))),
        ("dropout: 0", lambda a: a.part.dropout, 0.0),
    ],
)
def test_values(body: str, read: Any, expected: Any) -> None:
    attn = spec(body + "\n", inputs=INPUTS).attention
    assert read(attn) == expected
    assert loads(document(attn)).attention == attn


SELECT = "select:\n  block: {q: 128, k: 128}\n  score: antidiagonal(stride=16)\n  rule: mass(0.9)\n"

# What is put behind the head (a key given there is replaced), the message, and what is underlined.
IMPOSSIBLE: list[tuple[str, str, str]] = [
    # keys and types
    ("heds: 3", "unknown key 'heds'", "heds"),
    ("heads: {q: 8, kvs: 2}", "unknown key 'kvs'", "kvs"),
    ("heads: eight", "heads: expected a mapping", "eight"),
    ("heads: 8.0", "whole number", "8.0"),
    ("heads: true", "expected a mapping", "true"),
    ("heads: 0", "at least 1", "0"),
    ("heads: -4", "at least 1", "-4"),
    ("heads: {kv: 2}", "'q' is missing in 'heads'", "heads"),
    ("heads: [8, 2]", "expected a mapping", "8"),
    ("heads:", "'heads' has no value", "heads"),
    ("dims: 0", "at least 1", "0"),
    ("dims: 1025", "at most 1024", "1025"),
    ("dims: {qk: 64, v: 2000}", "at most 1024", "2000"),
    ("dims: '64'", "expected a mapping", "64"),
    ("attncc: 2", "schema 1", "2"),
    ("attncc: true", "schema 1", "true"),
    ("attncc: 1.0", "schema 1", "1.0"),
    ("attncc: '1'", "schema 1", "1"),
    ("name: 3", "expected a text", "3"),
    ("name: two words", "not an identifier", "two words"),
    ("name: _hidden", "not an identifier", "_hidden"),
    ("name: lambda", "Python keyword", "lambda"),
    ("name: torch", "another package", "torch"),
    ("doc: {a: 1}", "expected a text", "a"),
    ('doc: "two\\nlines"', "one line", '"two\\nlines"'),
    ("dtype: bf61", "not one of its values", "bf61"),
    ("dtype: 16", "not one of its values", "16"),
    ("layout: bhds", "not one of its values", "bhds"),
    ("dropout: 1.0", "below 1", "1.0"),
    ("dropout: 1", "below 1", "1"),
    ("dropout: -0.1", "at least 0", "-0.1"),
    ("dropout: high", "expected a number", "high"),
    ("score:", "'score' has no value", "score"),
    ("score: [qk]", "expected a text", "qk"),
    ("mask: ''", "is empty", "''"),
    ("modes: [prefil]", "not one of its values", "prefil"),
    ("modes: prefill", "expected a list", "prefill"),
    ("modes: []", "at least 1", "]"),
    ("modes: [prefill, prefill]", "given twice", "prefill"),
    ("numerics: {exp: quick}", "not one of its values", "quick"),
    ("numerics: {accumulate: fp64}", "not one of its values", "fp64"),
    ("tune: {B: 1}", "expected a list", "B"),
    ("tune: [{B: 0}]", "at least 1", "0"),
    ("tune: [{B: two}]", "whole number", "two"),
    ("tune: [{Bs: 1}]", "unknown key 'Bs'", "1"),
    ("tune: [{B: [1]}]", "a number or a word", "1"),
    ("tune: [{sparsity: 2}]", "in [0, 1]", "2"),
    ("sizes: {Sk: 128}\ntune: [{Sk: 256}]", "is fixed to 128", "256"),
    # heads
    ("heads: {q: 8, kv: 3}", "cannot be shared among 3 key heads", "3"),
    ("heads: {q: 8, kv: 16}", "cannot be shared among 16 key heads", "16"),
    ("heads: {q: 8, kv: 3, map: tile}", "cannot be shared", "3"),
    ("heads: {q: 8, kv: 2, v: 3}", "cannot be shared among 3 value heads", "3"),
    ("heads: {q: 8, kv: 2, map: tiles}", "not one of its values", "tiles"),
    # inputs and sizes
    ("inputs: {q: {shape: [B]}}", "argument of the emitted function", "q"),
    ("inputs: {scale: {shape: []}}", "word of the language", "scale"),
    ("inputs: {causal: {shape: []}}", "word of the language", "causal"),
    ("inputs: {Hq: {shape: []}}", "word of the language", "Hq"),
    ("inputs: {j: {shape: []}}", "word of the language", "j"),
    ("inputs: {class: {shape: []}}", "Python keyword", "class"),
    ("inputs: {block_table: {shape: [B]}}", "argument of the emitted function", "block_table"),
    ("inputs: {a-b: {shape: [B]}}", "not an identifier", "a-b"),
    ("inputs: {x: {shape: [0]}}", "at least 1 entry", "0"),
    ("inputs: {x: {shape: [2.5]}}", "a number or the name", "2.5"),
    ("inputs: {x: {shape: [x]}}", "is an input", "x"),
    ("inputs: {x: {shape: [qk]}}", "word of the language", "qk"),
    ("inputs: {x: {shape: B}}", "expected a list", "B"),
    ("inputs: {x: {}}", "'shape' is missing in 'x'", "x"),
    ("inputs: {x: [B]}", "expected a mapping", "B"),
    ("inputs: {x: {shape: [B], dtype: float}}", "not one of its values", "float"),
    ("inputs: {x: {shape: [B], sorted: true}}", "only an int input", "sorted"),
    ("inputs: {x: {shape: [], dtype: int32, sorted: true}}", "only an int input", "sorted"),
    ("inputs: {x: {shape: [B], dtype: int32, grad: true}}", "no gradient", "grad"),
    ("inputs: {x: {shape: [B], grad: 1}}", "true or false", "1"),
    ("sizes: {Hq: 8}", "follows from 'heads'", "Hq"),
    ("sizes: {Dv: 8}", "follows from 'dims'", "Dv"),
    ("sizes: {N: 8}", "no shape has a size 'N'", "N"),
    ("sizes: {SK: {max: 8}}", "no shape has a size 'SK'", "SK"),
    ("sizes: {Sk: 0}", "at least 1", "0"),
    ("sizes: {Sk: {max: many}}", "whole number", "many"),
    ("sizes: {Sk: {fixed: 4, max: 8}}", "no other bounds", "fixed"),
    ("sizes: {Sk: {max: 8, multiple: 16}}", "no multiple of 16", "8"),
    ("align: bottom_left", "no alignment and no input", "bottom_left"),
    ("inputs: {x: {shape: [B]}}\nalign: x", "int input of shape [B]", "x"),
    ("inputs: {x: {shape: [B, 2], dtype: int32}}\nalign: x", "int input of shape [B]", "x"),
    # expressions in their places
    ("scale: qk", "'qk' has no value here", "qk"),
    ("scale: h", "'h' has no value here", "h"),
    ("scale: true", "must be a float", "true"),
    ("scale: Sk", "must be a float", "Sk"),
    ("mask: 1", "must be a bool", "1"),
    ("score: 1.0 + true", "takes numbers", "1.0 + true"),
    ("normalizer: softmax(sink=i)", "'i' has no value here", "i"),
    ("normalizer: softmax(sink=h)", "must be a float", "h"),
    ("epilogue: [gate(qk)]", "'qk' has no value here", "qk"),
    ("epilogue: [lerp_v(j * 1.0)]", "'j' has no value here", "j"),
    # primitives
    ("normalizer: softmix", "unknown normalizer 'softmix'", "softmix"),
    ("normalizer: sigmoid(sink=1.0)", "no such argument", "sink=1.0"),
    ("normalizer: sigmoid(1)", "no further argument", "1"),
    ("normalizer: softmax(snk=1.0)", "no such argument", "snk=1.0"),
    ("normalizer: linear", "lacks its argument 'eps'", "linear"),
    ("normalizer: linear(-1)", "in [0, 1]", "-1"),
    ("normalizer: softmax + 1", "must be a name", "softmax + 1"),
    ("kv: page(64)", "unknown storage 'page'", "page"),
    ("kv: page(64)\nparts: [{kv: paged(8)}]", "unknown storage 'page'", "page"),
    ("kv: paged", "lacks its argument", "paged"),
    ("kv: paged(0)", "at least 1", "0"),
    ("kv: paged(64.0)", "must be an int", "64.0"),
    ("kv: paged(Sk)", "must be a number", "Sk"),
    ("kv: latent(rope=8, page_size=0)", "at least 1", "0"),
    ("kv: latent(rope=8, page_size=Sk)", "must be a number", "Sk"),
    ("kv: latent(page_size=64)", "lacks its argument 'rope'", "latent(page_size=64)"),
    ("kv: latent(rope=8, pages=64)", "no such argument", "pages=64"),
    ("kv: gathered(idx)", "names no input", "idx"),
    ("kv: gathered(3)", "the name of an input", "3"),
    ("kv: latent(rope=64)", "leaves nothing", "latent(rope=64)"),
    ("dims: {qk: 64, v: 128}\nkv: latent(rope=0)", "Dv 128 > Dqk 64", "latent(rope=0)"),
    ("heads: {q: 8, kv: 2, v: 4}\nkv: latent(rope=8)", "heads.v must be heads.kv", "latent(rope=8)"),
    ("inputs: {x: {shape: [B]}}\nkv: gathered(x)", "needs an int input", "gathered(x)"),
    ("inputs: {x: {shape: [B], dtype: int32}}\nkv: gathered(x)", "an int input [B, Hk, Sq, N]", "gathered(x)"),
    ("schedule: streamk", "unknown schedule 'streamk'", "streamk"),
    ("schedule: split_kv", "lacks its argument", "split_kv"),
    ("schedule: split_kv(0)", "at least 1", "0"),
    ("prologue: [ropes]", "unknown prologue step", "ropes"),
    ("prologue: [rope(on=z)]", "must be one of q, k, v, qk", "z"),
    ("prologue: [rope(dims=65)]", "even number", "rope(dims=65)"),
    ("prologue: [rope(dims=128)]", "even number of the 64 columns", "rope(dims=128)"),
    ("dims: 72\nprologue: [hadamard]", "power of two", "hadamard"),
    ("dims: {qk: 64, v: 72}\nprologue: [hadamard(on=v)]", "the head has 72", "hadamard(on=v)"),
    ('dims: {qk: 64, v: 32}\nprologue: ["rope(dims=64, on=v)"]', "of the 32 columns", "rope(dims=64, on=v)"),
    ("inputs: {w: {shape: [Hq]}}\nprologue: [absorb(w)]", "an input of 2 to 3 axes, 'w' has 1", "absorb(w)"),
    ("inputs: {w: {shape: [64, 64]}}\nprologue: ['lerp(w, 0.5)']", "an input of 4 axes, 'w' has 2", "lerp(w, 0.5)"),
    ("inputs: {w: {shape: [Hq, 1, 64]}}\nprologue: [rms_norm(weight=w)]", "of 1 to 2 axes", "rms_norm(weight=w)"),
    ("inputs: {w: {shape: [B, Hq, 8, 64]}}\nepilogue: [absorb(w)]", "of 2 to 3 axes", "absorb(w)"),
    ("prologue: [causal_conv(w)]", "names no input", "w"),
    ("prologue: [rope(dims=32, on=q)]", "unbalanced parentheses", "rope(dims=32"),
    ("epilogue: [lerp_w(0.5)]", "unknown epilogue step", "lerp_w"),
    # normalizer, outputs, dropout
    ("normalizer: sigmoid\noutputs: [o, lse]", "no output 'lse'", "lse"),
    ("normalizer: none\noutputs: [o, lse]", "no output 'lse'", "lse"),
    ("normalizer: linear(0)\noutputs: [o, lse]", "no output 'lse'", "lse"),
    ("normalizer: column_softmax\noutputs: [lse, o]", "no output 'lse'", "lse"),
    ("normalizer: column_softmax\nmodes: [decode]", "a column needs all its queries", "column_softmax"),
    ("outputs: [lse]", "'o' cannot be left out", "lse"),
    ("outputs: [o, o]", "given twice", "o"),
    ("outputs: [o, ls]", "unknown output 'ls'", "ls"),
    ("outputs: [o, final_state]", "no part has a state", "final_state"),
    ("state: {}\noutputs: [o, final_mass]", "no state is normalised", "final_mass"),
    ("outputs: [o, indices]", "no part selects", "indices"),
    ("outputs: [o, column_mass(j < 3)]", "'j' has no value here", "j"),
    ("normalizer: relu\noutputs: [o, block_mass]", "one of softmax", "block_mass"),
    # parts
    ("combine: lse", "nothing to combine", "combine"),
    ("parts: [{mask: causal}]\ncombine: add", "nothing to combine", "combine"),
    ("parts: []", "at least 1", "]"),
    ("parts: [{}, {}]\nscore: qk", "'score' stands beside 'parts'", "score"),
    ("mask: causal\nparts: [{}, {}]", "'mask' stands beside 'parts'", "mask"),
    ("parts: [{}, {}]\nnormalizer: softmax", "'normalizer' stands beside 'parts'", "normalizer"),
    ("parts: [{}, {}]\ndropout: 0.1", "'dropout' stands beside 'parts'", "dropout"),
    ("parts: [{}, {heads: 8}]", "unknown key 'heads'", "heads"),
    ("parts: [{name: a}, {name: a}]", "two parts are called 'a'", "a"),
    ("parts: [{}, {}]\ncombine: lerp(0.5, 0.5)", "no further argument", "0.5"),
    ("parts: [{}, {}, {}]\ncombine: lerp(0.5)", "between 2 parts", "lerp(0.5)"),
    ("parts: [{}, {}, {}]\ncombine: gate(0.5)", "1 gates for 3 parts", "gate(0.5)"),
    ("parts: [{}, {}]\ncombine: add(proj)", "names no input", "proj"),
    ("parts: [{}, {normalizer: relu}]", "merges parts", "parts"),
    ("parts: [{}, {normalizer: relu}]\ncombine: lse", "merges parts", "lse"),
    ("parts: [{}, {}]\ncombine: add\noutputs: [o, lse]", "no output 'lse'", "lse"),
    # state
    ("state: {feature: elu2}", "not one of its values", "elu2"),
    ("state: {decay: scalar(g)}", "names no input", "g"),
    ("inputs: {g: {shape: [B], dtype: int32}}\nstate: {decay: scalar(g)}", "needs a float input", "scalar(g)"),
    ("state: {decay: const(j)}", "'j' has no value here", "j"),
    ("state: {update: delta}", "lacks its argument 'beta'", "delta"),
    ("state: {initial: s0}", "'s0' is no input", "s0"),
    ("state: {chunk: 0}", "at least 1", "0"),
    ("state: {}\nscore: qk", "no meaning beside 'state'", "score"),
    ("state: {}\nmask: causal", "no meaning beside 'state'", "mask"),
    ("state: {}\ndropout: 0.5", "no meaning beside 'state'", "dropout"),
    ("state: {}\nnormalizer: softmax", "normalised by none or linear", "softmax"),
    ("state: {}\noutputs: [o, lse]", "no output 'lse'", "lse"),
    ("state: {causal: false, decay: const(-0.1)}", "no order to decay in", "const(-0.1)"),
    ("inputs: {beta: {shape: [B]}}\nstate: {causal: false, update: delta(beta)}", "token by token", "delta(beta)"),
    (
        "inputs: {beta: {shape: [B]}}\nstate: {update: delta(beta)}\nnormalizer: linear(0)",
        "no sum of weights",
        "linear(0)",
    ),
    ("inputs: {g: {shape: [B]}}\nstate: {decay: scalar(g)}", "has axes [B, H, Sk]", "scalar(g)"),
    ("inputs: {g: {shape: [B, Hq, Sk]}}\nstate: {decay: vector(g)}", "has axes [B, H, Sk, Dqk]", "vector(g)"),
    ("inputs: {g: {shape: [B, 1, Sk, 4]}}\nstate: {feature: taylor2, decay: vector(g)}", "products", "vector(g)"),
    ("inputs: {x: {shape: [B, 1, Sk, 4]}}\nstate: {update: delta(x)}", "has axes [B, H, Sk]", "delta(x)"),
    ("inputs: {s: {shape: [64, 64]}}\nstate: {initial: s}", "has axes [B, H, F, Dv]", "s"),
    ("inputs: {s: {shape: [1, 1, 64, 64]}}\nstate: {update: none, initial: s, decay: const(-1)}", "stays", "const(-1)"),
    ("inputs: {p: {shape: [64]}}\nparts: [{}, {}]\ncombine: add(p)", "has axes [Dv, Dv]", "add(p)"),
    ("state: {}\nkv: paged(16)", "not kept in paged storage", "paged(16)"),
    ("state: {}\nkv: latent(rope=8, page_size=16)", "not kept in paged storage", "latent(rope=8, page_size=16)"),
    ("state: {}\nschedule: split_kv(4)", "no keys to split", "split_kv(4)"),
    # select
    (SELECT + "  heads: group_max", "not one of its values", "group_max"),
    (SELECT.replace("16", "24"), "does not divide the q block", "antidiagonal(stride=24)"),
    (SELECT.replace("k: 128", "k: page"), "paged storage", "page"),
    (SELECT.replace("q: 128", "q: page"), "queries are not kept", "page"),
    (SELECT.replace("q: 128", "q: row"), "a block is a number", "row"),
    (SELECT.replace("q: 128", "q: 0"), "1 to 65536", "0"),
    (SELECT.replace("mass(0.9)", "mass(1.5)"), "in [0, 1]", "1.5"),
    (SELECT.replace("mass(0.9)", "topk(0)"), "at least 1", "0"),
    (SELECT.replace("mass(0.9)", "topk(0.5)"), "must be an int", "0.5"),
    (SELECT.replace("mass(0.9)", "ternary(0.7, 0.6)"), "exceed the whole", "ternary(0.7, 0.6)"),
    (SELECT.replace("mass(0.9)", "mass(0.9, crossing=at)"), "one of in, out", "at"),
    (SELECT.replace("antidiagonal(stride=16)", "token_dot"), "scores a token", "token_dot"),
    (SELECT.replace("antidiagonal(stride=16)", "token_dot"), "scores a token", "token_dot"),
    (SELECT.replace("antidiagonal(stride=16)", "given(map)"), "names no input", "map"),
    (SELECT + "  normalize: weighted_softmax", "sizes of clusters", "weighted_softmax"),
    (SELECT + "  normalize: anchor", "forced by sink or local", "anchor"),
    (SELECT + "  normalize: none", "share of normalised scores", "mass(0.9)"),
    (SELECT + "  force: [last_pages(2)]", "paged storage", "last_pages(2)"),
    (SELECT + "  force: [sinks(2)]", "unknown forced set", "sinks"),
    (SELECT + "  force: [rows(i)]", "must be a bool", "i"),
    (SELECT + "  reuse: every", "lacks its argument", "every"),
    (SELECT + "heads: 8", "given twice", "heads"),
    ("select: {block: {q: 1, k: 1}, rule: topk(4)}", "'score' is missing", "select"),
    (SELECT + "normalizer: column_softmax", "no whole columns", "block"),
    # quantize
    ("quantize: {o: int8}", "unknown key 'o'", "o"),
    ("quantize: {k: int9}", "unknown quantizer 'int9'", "int9"),
    ("quantize: {k: int8(per=blocks)}", "unknown 'per' of int8", "blocks"),
    ("quantize: {k: int8(per=group)}", "lacks its argument", "group"),
    ("quantize: {k: int8(per=group(128))}", "wider than a head", "int8(per=group(128))"),
    ("quantize: {k: fp8_e4m3(symmetric=false)}", "no zero point", "fp8_e4m3(symmetric=false)"),
    ("quantize: {k: int8(symmetric=maybe)}", "one of true, false", "maybe"),
    ("quantize: {k: nvfp4(per=token)}", "one scale a group", "nvfp4(per=token)"),
    ("quantize: {v: int8(smooth=mean)}", "a mean from q or k", "int8(smooth=mean)"),
    ("quantize: {k: int8(smooth=mean)}\ncolumns: [0, 8]", "products of whole queries", "int8(smooth=mean)"),
    ("quantize: {k: int8(smooth=mean)}\nkv: pooled(4)", "products of whole queries", "int8(smooth=mean)"),
    ("quantize: {q: int8(smooth=mean)}\nstate: {}", "products of whole queries", "int8(smooth=mean)"),
    ("parts: [{kv: dense}, {kv: paged(8)}]", "lie in one way", "paged(8)"),
    (
        "kv: latent(rope=8)\nparts: [{}, {kv: 'latent(rope=8, page_size=8)'}]",
        "lie in one way",
        "latent(rope=8, page_size=8)",
    ),
    ("parts: [{kv: paged(4)}, {kv: pooled(2)}, {kv: paged(8)}]", "lie in one way", "paged(8)"),
    ("quantize: {p: int8(per=channel)}", "no channels", "int8(per=channel)"),
    ("quantize: {k: int8, cache: int8}", "the cache holds k and v", "int8"),
    ("quantize:\n  k: staircase([(inf, int8)])", "unknown quantizer 'staircase'", "staircase"),
    ("quantize:\n  cache: staircase([])", "list of (age, dtype)", "[]"),
    ("quantize:\n  cache: staircase([(128, int8)])", "last step must be without end", "128"),
    ("quantize:\n  cache: staircase([(64, int8), (32, int8), (inf, int4)])", "ages rise", "32"),
    ("quantize:\n  cache: staircase([(inf, int8), (inf, int4)])", "only the last step", "inf"),
    ("quantize:\n  cache: staircase([(inf, int3)])", "must be one of", "int3"),
    ("quantize:\n  cache: int8\nmodes: [backward]", "quantised cache", "backward"),
    ("kv: paged(16)\nmodes: [prefill, backward]", "paged or gathered", "backward"),
    ("kv: latent(rope=8, page_size=16)\nmodes: [prefill, backward]", "paged or gathered", "backward"),
]


@pytest.mark.parametrize(("body", "message", "pointed"), IMPOSSIBLE, ids=[b.replace("\n", "|") for b, *_ in IMPOSSIBLE])
def test_impossible(body: str, message: str, pointed: str) -> None:
    given = {line.partition(":")[0] for line in body.splitlines()[:1]}
    head = "".join(f"{line}\n" for line in HEAD.splitlines() if line.partition(":")[0] not in given)
    error = refusal(f"{head}{body}\n")
    assert message in error.message
    assert underlined(error) == pointed
    assert str(error).count("^") >= len(pointed)


@pytest.mark.parametrize("key", ["attncc", "name", "heads", "dims"])
def test_missing_keys(key: str) -> None:
    text = "".join(f"{line}\n" for line in HEAD.splitlines() if not line.startswith(key))
    error = refusal(text)
    assert error.message == f"'{key}' is missing"
    assert f"{key}:" in error.hint


@pytest.mark.parametrize(
    ("body", "hint"),
    [
        ("hads: 3", "heads"),
        ("scor: qk", "score"),
        ("layout: bhsq", "bhsd"),
        ("normalizer: sofmax", "softmax"),
        ("kv: pagd(3)", "paged"),
        ("numerics: {exp: exac}", "exact"),
        ("inputs: {x: {shap: []}}", "shape"),
        ("parts: [{maks: causal}]", "mask"),
        ("state: {featur: relu}", "feature"),
        ("outputs: [o, max_scor]", "max_score"),
    ],
)
def test_nearest_word(body: str, hint: str) -> None:
    assert refusal(f"{HEAD}{body}\n").hint == f"did you mean '{hint}'?"


def test_not_a_mapping() -> None:
    assert "mapping of keys" in refusal("- attncc: 1").message
    assert "mapping of keys" in refusal("attncc").message


def test_locate() -> None:
    found = loads(EVERY_KEY, "e.yaml")
    for key, text in {
        "heads.kv": "4",
        "parts[0].kv": "paged(16)",
        "parts[1].state.chunk": "128",
        "inputs.g.shape[3]": "2",
        "outputs[1]": "max_score",
        "quantize.k": "int8(per=block(64))",
        "combine": "gate(g[b, h, row, 0], g[b, h, row, 1])",
    }.items():
        place = found.locate(key)
        assert place is not None, key
        assert place.text[place.column - 1 :][: place.width] == text
    assert found.locate("kv") == found.locate("parts[0].kv")
    assert found.locate("state.chunk") == found.locate("parts[1].state.chunk")
    assert found.locate("pages") is None
    assert found.locate("parts[7]") is None
    assert found.text == EVERY_KEY
    assert found.captured == {}


def test_json_schema() -> None:
    found = schema()
    json.dumps(found)
    assert found["required"] == ["attncc", "name", "heads", "dims"]
    assert found["additionalProperties"] is False
    top = found["properties"]
    assert all("description" in entry for entry in top.values())
    assert set(top) >= {"parts", "combine", "select", "state", "quantize", "prologue", "epilogue", "outputs", "tune"}
    assert found["$defs"]["HeadsModel"]["anyOf"][0] == {"type": "integer", "minimum": 1}
    assert "paged(page_size)" in top["kv"]["examples"]
