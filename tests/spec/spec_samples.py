"""Specs for the tests of the spec front: a small valid one, and ways to change it."""

from __future__ import annotations

from attncc.errors import SpecError
from attncc.ir.expr import Expr
from attncc.spec import Spec, loads

HEAD = "attncc: 1\nname: sample\nheads: {q: 8, kv: 2}\ndims: 64\n"

INPUTS = """\
inputs:
  bias: {shape: [Hq, W]}
  table: {shape: [B, 1, Sq, Sk]}
  slopes: {shape: [Hq], dtype: bf16}
  per_kv: {shape: [Hk]}
  tau: {shape: []}
  ids: {shape: [B, Sk], dtype: int32}
  flat_ids: {shape: [Sk], dtype: int64}
  offsets: {shape: [B, N], dtype: int32, sorted: true}
  edges: {shape: [E], dtype: int32, sorted: true}
  lengths: {shape: [B], dtype: int32}
  picks: {shape: [B, Hk, Sq, P], dtype: int32}
  blocks: {shape: [M, M], dtype: bool}
  grid: {shape: [M, M], dtype: int32}
  tree_bits: {shape: [B, Sq], dtype: int32}
  tree_words: {shape: [B, Sq, T], dtype: int32}
"""


def spec(body: str = "", head: str = HEAD, inputs: str = "") -> Spec:
    return loads(head + inputs + body)


def score(text: str) -> Expr:
    return spec(f"score: {text}\n", inputs=INPUTS).attention.part.score


def mask(text: str) -> Expr:
    return spec(f"mask: {text}\n", inputs=INPUTS).attention.part.mask


def refusal(text: str) -> SpecError:
    """The error a text is refused with; fails where it is not."""
    try:
        loads(text, "sample.yaml")
    except SpecError as e:
        return e
    raise AssertionError(f"this was accepted:\n{text}")


def underlined(error: SpecError) -> str:
    """The characters an error points at."""
    place = error.location
    assert place is not None, f"no location: {error}"
    assert place.file == "sample.yaml"
    return place.text[place.column - 1 : place.column - 1 + place.width]
