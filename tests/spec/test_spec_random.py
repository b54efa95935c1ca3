"""Random specs over the whole language: each is read, written, verified, rewritten and evaluated; damaged, refused."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import random_specs
import torch
from hypothesis import HealthCheck, assume, given, note, settings
from hypothesis import strategies as st
from random_specs import documents
from spec_samples import refusal
from systems.draw import Drawn, draw, outputs

from attncc import passes
from attncc.ir.attention import Attention
from attncc.ir.primitives import FEATURES, FORMATS, PRIMITIVES, TENSORS, calls
from attncc.ir.text import text
from attncc.ir.verify import verify_attention
from attncc.reference import Outputs
from attncc.spec import document, loads
from attncc.spec.schema import SelectModel, SpecModel
from attncc.spec.yaml_text import mapping

SLOW = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much)


SIZES = st.tuples(st.integers(1, 3), st.sampled_from([5, 6, 3, 1, 0]), st.sampled_from([9, 5, 4, 1, 0]))
"""Sequences, queries and keys of a call."""


@given(documents(), SIZES)
@settings(max_examples=150, deadline=None, suppress_health_check=SLOW)
def test_valid_specs(spec: dict[str, Any], sizes: tuple[int, int, int]) -> None:
    yaml = mapping(spec)
    note(yaml)
    attn = loads(yaml).attention
    written = loads(document(attn)).attention
    assert written == attn
    assert text(written) == text(attn)
    verify_attention(attn)
    rewritten = passes.run(attn)  # verifies behind each pass
    drawn = draw(attn, *sizes, seed=sum(sizes))
    made = outputs(attn, drawn)
    check_outputs(attn, drawn, made)
    narrow = outputs(attn, draw(attn, *sizes, seed=sum(sizes), dtype=torch.bfloat16), dtype=None)
    assert narrow.o.dtype == torch.bfloat16
    assert narrow.o.isfinite().all()
    if any(part.select for part in attn.parts):  # what the same call selected, reused or made anew
        again = outputs(attn, drawn, before=made.selections)
        torch.testing.assert_close(again.o, made.o, rtol=1e-9, atol=1e-9)
    else:  # a selection may turn on a score's last bit
        whole = with_all_steps(rewritten, attn)
        torch.testing.assert_close(outputs(whole, drawn).o, made.o, rtol=1e-5, atol=1e-5)


def with_all_steps(rewritten: Attention, attn: Attention) -> Attention:
    """The variant behind the passes over keys as they were before the steps that a cache has behind it."""
    if rewritten.kept is None:
        return rewritten
    return replace(rewritten, prologue=(*rewritten.prologue, *rewritten.kept.steps), inputs=attn.inputs, kept=None)


@given(documents(), SIZES)
@settings(max_examples=60, deadline=None, suppress_health_check=SLOW)
def test_gradients_are_numbers(spec: dict[str, Any], sizes: tuple[int, int, int]) -> None:
    note(mapping(spec))
    attn = loads(mapping(spec)).attention
    assume(not attn.quantize)
    drawn = draw(attn, *sizes)
    leaves = {n: x.requires_grad_() for n, x in drawn.arguments["inputs"].items() if x.is_floating_point()}
    operands = [x.requires_grad_() for x in (drawn.q, drawn.k, drawn.v) if x is not None]
    o = outputs(attn, drawn.with_inputs(**leaves)).o
    if o.requires_grad:
        found = torch.autograd.grad(o.square().sum(), [*operands, *leaves.values()], allow_unused=True)
        assert all(g.isfinite().all() for g in found if g is not None)


def test_every_word_is_drawn() -> None:
    written = set(re.findall(r"\w+", Path(random_specs.__file__).read_text()))
    words = {word for table in PRIMITIVES.values() for word in table}
    assert not (words | {*FEATURES, *FORMATS, *SpecModel.model_fields, *SelectModel.model_fields}) - written


def check_outputs(attn: Attention, drawn: Drawn, made: Outputs) -> None:
    """Every output that the spec names is there, in its shape, and is a number."""
    columns = attn.input(attn.epilogue[-1].words[0]).shape[-1] if _absorbs(attn) else attn.dims.v
    assert made.o.shape == (*drawn.q.shape[:-1], columns)
    assert made.o.isfinite().all()
    rows = (
        drawn.q.shape[:2][::-1] if attn.layout == "varlen" else (len(drawn.lengths), attn.heads.q, drawn.lengths[0][0])
    )
    for name, x in (("lse", made.lse), ("max_score", made.max_score)):
        if attn.wants(name):
            assert x is not None
            assert x.shape == rows
            assert not (x.isnan() | (x == torch.inf)).any()
    wanted = {o.name for o in attn.outputs} - {"o", "lse", "max_score"}
    assert {re.sub(r"_\d+$", "", name) for name in made.taps} == wanted
    for tap in made.taps.values():
        pieces = tap if isinstance(tap, tuple) else (tap,)
        assert all(piece.isfinite().all() for piece in pieces)


def _absorbs(attn: Attention) -> bool:
    return bool(attn.epilogue) and attn.epilogue[-1].name == "absorb"


# -- damage --------------------------------------------------------------------------------------

Draw = Callable[..., Any]

FREE = {"name", "doc", "family", "source", "inputs", "sizes", "attncc"}
"""Keys below which the user's own words stand."""


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value of a document that is not the user's own word."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        if path or key not in FREE:
            yield from places(inner, (*path, key))


def at(spec: Any, path: tuple[Any, ...]) -> Any:
    for step in path:
        spec = spec[step]
    return spec


def misspelt(draw: Draw, spec: dict[str, Any]) -> None:
    """One word of the language, or the name of an input."""
    word = re.compile(r"[A-Za-z_]\w*")
    path = draw(st.sampled_from([p for p in places(spec) if isinstance(at(spec, p), str) and word.search(at(spec, p))]))
    found = draw(st.sampled_from(list(word.finditer(at(spec, path)))))
    whole = at(spec, path)
    at(spec, path[:-1])[path[-1]] = f"{whole[: found.end()]}zz{whole[found.end() :]}"


def unknown_key(draw: Draw, spec: dict[str, Any]) -> None:
    path = draw(st.sampled_from([p for p in places(spec) if isinstance(at(spec, p), dict) and p[:1] != ("tune",)]))
    at(spec, path)["zz"] = 1


def undeclared(draw: Draw, spec: dict[str, Any]) -> None:
    """An input that something reads."""
    assume(spec.get("inputs"))
    del spec["inputs"][draw(st.sampled_from(sorted(spec["inputs"])))]


def out_of_range(draw: Draw, spec: dict[str, Any]) -> None:
    """A number that counts something becomes 0 or less."""
    counts = [p for p in places(spec) if type(at(spec, p)) is int and p[0] != "tune" and "columns" not in p]
    path = draw(st.sampled_from(counts))
    at(spec, path[:-1])[path[-1]] = draw(st.sampled_from([0, -1, 2**41]))


def reversed_columns(draw: Draw, spec: dict[str, Any]) -> None:
    found = [p for p in places(spec) if p[-1:] == ("columns",)]
    assume(found)
    at(spec, found[0]).reverse()


def wrong_kind(draw: Draw, spec: dict[str, Any]) -> None:
    """A value becomes a list of lists, which no key takes."""
    path = draw(st.sampled_from([p for p in places(spec) if p]))
    at(spec, path[:-1])[path[-1]] = [[]]


def no_output(draw: Draw, spec: dict[str, Any]) -> None:
    spec["outputs"] = draw(st.sampled_from([["max_score"], ["o", "o"], []]))


def cut_short(draw: Draw, spec: dict[str, Any]) -> None:
    """A call or an index loses its last bracket."""
    found = [p for p in places(spec) if isinstance(at(spec, p), str) and at(spec, p).endswith((")", "]"))]
    assume(found)
    path = draw(st.sampled_from(found))
    at(spec, path[:-1])[path[-1]] = at(spec, path)[:-1]


def wrong_input(draw: Draw, spec: dict[str, Any]) -> None:
    """An input that a primitive reads, not a formula, holds booleans, or has axes that it has not."""
    attn = loads(mapping(spec)).attention
    words = {w for _, _, call in calls(attn) for w in (*call.words, *(v for o, v in call.kwargs if o in TENSORS))}
    words |= {w for p in attn.parts if p.state for w in (p.state.initial, p.state.initial_mass)}
    words |= {w for p in attn.parts for w in (p.kv.index, p.kv.values)}
    assume(words - {""})
    x = spec["inputs"][draw(st.sampled_from(sorted(map(str, words - {""}))))]
    x |= {"dtype": "bool"} if draw(st.booleans()) else {"shape": [*x["shape"], 1, 1, 1]}


DAMAGE = (
    misspelt,
    unknown_key,
    undeclared,
    out_of_range,
    reversed_columns,
    wrong_kind,
    no_output,
    cut_short,
    wrong_input,
)


@given(documents(), st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=SLOW)
def test_damaged_specs(spec: dict[str, Any], data: st.DataObject) -> None:
    broken = deepcopy(spec)
    data.draw(st.sampled_from(DAMAGE))(data.draw, broken)
    yaml = mapping(broken)
    note(yaml)
    error = refusal(yaml)
    assert error.location is not None
    assert 1 <= error.location.line <= yaml.count("\n") + 1
    assert error.location.underline()
