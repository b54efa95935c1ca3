"""Packages whose output goes through steps behind attention, run by Triton's interpreter against the oracle."""

from __future__ import annotations

import pytest
from codegen.emitted import normal, package, passes

from attncc import driver, spec
from attncc.check.cases import Case
from attncc.errors import Unsupported

GQA = "heads: {q: 4, kv: 2}\ndims: 16\ndtype: fp32\nmask: causal\n"
STEPS = {
    "gate": "epilogue: ['gate(g[h])']\ninputs: {g: {shape: [Hq]}}",
    "gate of rows": "epilogue: ['gate(sigmoid(g[b, h, row]))']\ninputs: {g: {shape: [B, Hq, Sq]}}",
    "gate of positions": "epilogue: ['gate(float(i) / Sk + hk)']",
    "skip": "epilogue: [skip(0.5)]",
    "lerp": "epilogue: ['lerp_v(w[b, h])']\ninputs: {w: {shape: [B, Hq]}}",
    "several": "epilogue: ['gate(0.5)', 'skip(float(h))', 'lerp_v(0.25)']",
    "values behind steps": "prologue: ['l2_norm(on=v)', rope]\nepilogue: ['skip(1)']",
    "absorb": "epilogue: ['absorb(w)']\ninputs: {w: {shape: [Hq, 16, 24]}}",
    "absorb by one matrix": "epilogue: ['absorb(w)']\ninputs: {w: {shape: [16, 7], dtype: fp16}}",
    "absorb behind others": "epilogue: ['gate(2)', 'skip(1)', 'absorb(w)']\ninputs: {w: {shape: [1, Dv, 80]}}",
}


@pytest.mark.parametrize("steps", STEPS)
def test_steps(steps: str) -> None:
    p = package(GQA + STEPS[steps]).tiles(16, 16)
    passes(p, Case(2, 21, 37), Case(1, 37, 21, "nan_keys"), Case(2, 5, 37, "nan_around"))
    passes(p.tiles(16, 16, split=1), Case(2, 1, 37), Case(2, 2, 40, "nan_keys"))


PLACES = {
    "bshd": f"{GQA}layout: bshd",
    "varlen": f"{GQA}layout: varlen",
    "top left": f"{GQA}align: top_left",
    "odd heads": "heads: {q: 4, kv: 2}\ndims: {qk: 24, v: 7}\ndtype: fp16\nmask: causal",
    "wide heads": "heads: 2\ndims: {qk: 80, v: 200}\ndtype: fp16",
    "bf16": "heads: 2\ndims: 16\ndtype: bf16\nmask: causal",
    "served in turn": "heads: {q: 4, kv: 2, v: 4, map: tile}\ndims: 16\ndtype: fp32",
    "a part of the keys": "heads: {q: 4, kv: 1}\ndims: {qk: 32, v: 16}\ndtype: fp32\nkv: latent(rope=16)",
    "no softmax": f"{GQA}normalizer: sigmoid\noutputs: [o]",
    "quantised": f"{GQA}quantize: {{q: int8(per=head), k: int8(per=head)}}",
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("steps", ["'lerp_v(0.4)'", "'gate(1.5)', 'absorb(w)'"])
def test_places(place: str, steps: str) -> None:
    p = package(f"{PLACES[place]}\nepilogue: [{steps}]\ninputs: {{w: {{shape: [Hq, Dv, 12]}}}}").tiles(16, 16)
    passes(p, *([Case(3, 21, 37)] if place == "varlen" else [Case(2, 21, 37), Case(2, 1, 33)]))


def test_pages_of_keys() -> None:
    p = package(f"{GQA}kv: paged(16)\n{STEPS['absorb']}").tiles(16, 16, split=1)
    passes(p, Case(3, 2, 37), Case(1, 1, 20, "nan_keys"))


def test_the_output_has_the_columns_of_the_matrix() -> None:
    p = package(GQA + STEPS["absorb"]).tiles(16, 16)
    q, k, v = normal(2, 4, 5, 16), normal(2, 2, 7, 16, seed=1), normal(2, 2, 7, 16, seed=2)
    assert p(q, k, v, w=normal(4, 16, 24)).shape == (2, 4, 5, 24)
    with pytest.raises(ValueError, match=r"w must have shape \[4, 16, 24\]"):
        p(q, k, v, w=normal(4, 16, 23))


@pytest.mark.parametrize(
    ("more", "supported"),
    [
        ("epilogue: ['absorb(w)', 'gate(1)']\ninputs: {w: {shape: [16, 16]}}", "behind the other steps"),
        ("epilogue: ['absorb(w)']\ninputs: {w: {shape: [16, n]}}", "known when compiled"),
        ("epilogue: ['absorb(w)']\ninputs: {w: {shape: [3, 16, 16]}}", "[Hq, Dv, n]"),
        ("epilogue: ['skip(1)']\nkv: paged(16)", "in pages"),
        ("epilogue: ['skip(1)']\nquantize: {v: int8}", "quantised"),
        ("epilogue: ['lerp_v(0.5)']\nquantize: {cache: int8(per=token)}", "quantised"),
    ],
)
def test_what_is_not_carried(more: str, supported: str) -> None:
    with pytest.raises(Unsupported) as error:
        driver.lower(spec.loads(f"attncc: 1\nname: odd\n{GQA}{more}\n").attention)
    assert supported in str(error.value.hint)
