"""Packages whose operands go through steps before attention, run by Triton's interpreter against the oracle."""

from __future__ import annotations

import pytest
from codegen.emitted import package, passes

from attncc.check.cases import Case

GQA = "heads: {q: 4, kv: 2}\ndims: 16\ndtype: fp32\nmask: causal\n"
ROWS = {
    "rope": "prologue: [rope]",
    "rope of some columns": "prologue: ['rope(base=100, dims=6)']",
    "rope of neighbours": "prologue: ['rope(pairs=interleaved)']",
    "rope of some neighbours": "prologue: ['rope(pairs=interleaved, dims=10, on=k)']",
    "rope of values": "prologue: ['rope(on=v)', 'rope(dims=4, on=q)']",
    "rope by tables": "prologue: ['rope(cos=c, sin=s)']\ninputs: {c: {shape: [40, 8]}, s: {shape: [40, 8]}}",
    "rope by tables of sequences": "prologue: ['rope(cos=c, sin=s, on=q)']\n"
    "inputs: {c: {shape: [B, 1, 4], dtype: fp16}, s: {shape: [1, Sk, 4]}}",
    "rms norm": "prologue: [rms_norm]",
    "rms norm by weights": "prologue: ['rms_norm(weight=w, eps=0.1, on=q)', 'rms_norm(weight=u, on=k)']\n"
    "inputs: {w: {shape: [Dqk]}, u: {shape: [Hk, 16]}}",
    "l2 norm": "prologue: ['l2_norm(to=3, eps=2)', 'l2_norm(on=v)']",
    "silu": "prologue: ['silu(on=v)', 'silu(on=k)']",
    "temperature": "prologue: ['temperature(t[h], on=q)', 'temperature(u[b, hk], on=k)']\n"
    "inputs: {t: {shape: [Hq]}, u: {shape: [B, Hk]}}",
    "temperature of served heads": "prologue: ['temperature(t[hk] + h, on=q)']\ninputs: {t: {shape: [Hk]}}",
    "lerp": "prologue: ['lerp(x, 0.25, on=q)']\ninputs: {x: {shape: [B, Hq, Sq, Dqk], dtype: fp16}}",
    "lerp to what is shared": "prologue: ['lerp(x, w[hk], on=k)']\n"
    "inputs: {x: {shape: [1, Hk, Sk, 1]}, w: {shape: [Hk]}}",
    "several": "prologue: ['rms_norm(weight=w)', rope, 'temperature(2.0, on=q)']\ninputs: {w: {shape: [Dqk]}}",
}


PLACES = {
    "bshd": f"{GQA}layout: bshd",
    "varlen": f"{GQA}layout: varlen",
    "top left": f"{GQA}align: top_left",
    "offsets": f"{GQA}align: at\ninputs: {{at: {{shape: [B], dtype: int32}}}}",
    "odd heads": "heads: {q: 4, kv: 2}\ndims: {qk: 24, v: 7}\ndtype: fp16\nmask: causal",
    "wide heads": "heads: 2\ndims: {qk: 80, v: 200}\ndtype: fp32",
    "bf16": "heads: 2\ndims: 16\ndtype: bf16\nmask: causal",
    "served in turn": "heads: {q: 4, kv: 2, v: 4, map: tile}\ndims: 16\ndtype: fp32",
}


@pytest.mark.parametrize("place", PLACES)
def test_places(place: str) -> None:
    steps = "prologue: [rms_norm, 'rope(base=50)', 'l2_norm(on=v)']"
    cases = [Case(3, 21, 37)] if "varlen" in place else [Case(2, 21, 37), Case(2, 1, 33), Case(2, 9, 37, "unaligned")]
    passes(package(f"{PLACES[place]}\n{steps}").tiles(16, 16), *cases)


@pytest.mark.parametrize("form", ["paged(16)", "latent(rope=4)"])
def test_queries_before_other_storage(form: str) -> None:
    p = package(f"heads: {{q: 4, kv: 2}}\ndims: 16\ndtype: fp32\nmask: causal\nkv: {form}\nprologue: ['rope(on=q)']")
    passes(p.tiles(16, 16, split=1), Case(3, 2, 37), Case(1, 1, 20, "nan_keys"))


def test_one_sequences_rows_do_not_depend_on_where_tiles_begin() -> None:
    """Tokens of all sequences are counted in one line: tiles of them begin within sequences."""
    p = package(f"{GQA}prologue: [rope]").tiles(16, 16)
    passes(p, Case(5, 70, 70), Case(33, 1, 3))


@pytest.mark.parametrize("steps", ROWS)
def test_steps_of_rows(steps: str) -> None:
    p = package(GQA + ROWS[steps]).tiles(16, 16)
    passes(p, Case(2, 21, 37), Case(1, 37, 21, "nan_keys"), Case(2, 5, 37, "nan_around"))
    passes(p.tiles(16, 16, split=1), Case(2, 1, 37))
