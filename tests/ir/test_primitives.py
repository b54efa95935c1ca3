"""The table of primitives is the language's vocabulary, and `primitives` finds each one that a variant uses."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

from ir_samples import FULL, PLAIN

from attncc.ir.attention import Call, Storage
from attncc.ir.primitives import FEATURES, FORMATS, KEYS, PRIMITIVES, READS, TENSORS, primitives
from attncc.spec import vocabulary
from attncc.spec.expression import CONTEXTS
from attncc.spec.schema import StateModel

TABLES = {
    "combine": vocabulary.COMBINE,
    "schedule": vocabulary.SCHEDULE,
    "prologue": vocabulary.PROLOGUE,
    "epilogue": vocabulary.EPILOGUE,
    "outputs": vocabulary.OUTPUTS,
    "select.score": vocabulary.SELECT_SCORE,
    "select.rule": vocabulary.SELECT_RULE,
    "select.force": vocabulary.SELECT_FORCE,
    "select.reuse": vocabulary.SELECT_REUSE,
    "state.decay": vocabulary.DECAY,
    "state.update": vocabulary.UPDATE,
    "quantize.per": vocabulary.PER,
}


def test_the_table_has_every_word_of_the_language() -> None:
    assert {key: set(table) for key, table in PRIMITIVES.items()} == {key: set(table) for key, table in TABLES.items()}
    assert set(FORMATS) == set(vocabulary.DTYPES)
    assert set(FEATURES) == set(get_args(StateModel.model_fields["feature"].annotation))


def test_expressions_may_read_what_the_language_lets_them() -> None:
    """Of every primitive: the widest context of its expressions, which the verifier must allow."""
    for key, table in TABLES.items():
        for name, signature in table.items():
            read = {n for arg in signature if arg.kind in ("expr", "exprs") for n in CONTEXTS[arg.context]}
            wanted = set(READS[PRIMITIVES[key][name]])
            constant = {arg.context for arg in signature if arg.kind in ("expr", "exprs")} <= {"head"}
            assert read == wanted or (constant and read <= wanted), (key, name)


def test_options_that_name_inputs() -> None:
    named = {a.name for t in TABLES.values() for s in t.values() for a in s if a.kind == "input" and a.keyword}
    assert named == TENSORS


def test_plain_attention_uses_nothing_but_its_mask() -> None:
    assert primitives(PLAIN) == {"mask": ("positions",)}


def test_latents_in_pages_are_both() -> None:
    parts = (replace(PLAIN.part, kv=Storage("latent", page_size=4, rope=2)),)
    assert primitives(replace(PLAIN, parts=parts))["kv"] == ("latent", "paged")


def test_everything_is_found() -> None:
    far = replace(FULL.parts[1], columns=(0, 16))
    found = primitives(replace(FULL, parts=(FULL.parts[0], far), epilogue=(*FULL.epilogue, Call("skip"))))
    assert found == {
        "layout": ("varlen",),
        "align": ("input",),
        "score": ("data", "positions", "tanh"),
        "mask": ("bucket", "positions"),
        "normalizer": ("linear", "sink"),
        "dropout": ("philox",),
        "kv": ("paged",),
        "select": ("antidiagonal", "mass", "sink", "diagonal"),
        "state": ("elu1", "scalar", "initial", "causal"),
        "columns": ("[0, 16)",),
        "quantize": ("k int8 per block", "smooth mean"),
        "combine": ("lerp",),
        "prologue": ("rope", "temperature"),
        "epilogue": ("gate", "skip"),
        "outputs": ("column_mass",),
    }
    assert tuple(found) == KEYS
