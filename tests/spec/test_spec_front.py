"""The Python front: the same attention as the same keys in YAML, in canonical text."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from spec_samples import INPUTS
from test_spec_schema import EVERY_KEY

import attncc
from attncc.errors import SpecError
from attncc.spec import loads
from attncc.spec.source import read

HEAD: dict[str, Any] = {"name": "sample", "heads": {"q": 8, "kv": 2}, "dims": 64}


def test_the_readme_call() -> None:
    spec = attncc.attention(
        name="gemma2_local",
        heads={"q": 32, "kv": 16},
        dims=128,
        score="softcap(qk * scale, 50)",
        mask="causal & window(4096)",
    )
    text = "attncc: 1\nname: gemma2_local\nheads: {q: 32, kv: 16}\ndims: 128\n"
    text += "score: softcap(qk * scale, 50)\nmask: causal & window(4096)\n"
    assert spec.attention == loads(text).attention
    assert loads(spec.text).attention == spec.attention
    assert spec.captured == {}


def test_every_key_of_yaml_is_an_argument() -> None:
    keys = read(EVERY_KEY).data()
    keys.pop("attncc")
    spec = attncc.attention(**keys)
    assert spec.attention == loads(EVERY_KEY).attention
    place = spec.locate("parts[1].state.chunk")
    assert place is not None
    assert place.text.endswith("chunk: 128")


def test_python_values() -> None:
    spec = attncc.attention(
        **HEAD,
        doc='It\'s: "quoted" # and so on',
        score=None,
        mask=True,
        outputs=("o",),
        modes=["prefill"],
        inputs={"x": {"shape": ("B", 3), "dtype": "int32"}},
        dropout=0.5,
        state=None,
    )
    assert spec.attention.doc == 'It\'s: "quoted" # and so on'
    assert spec.attention.modes == ("prefill",)
    assert spec.attention.inputs[0].shape == ("B", 3)
    assert loads(spec.text).attention == spec.attention


@pytest.mark.parametrize(
    ("keys", "message", "hint"),
    [
        ({"maks": "causal"}, "no argument 'maks'", "mask"),
        ({"mask": "causl"}, "unknown name 'causl'", "causal"),
        ({"score": "qk * scale, 3"}, "tuple", ""),
        ({"heads": 7.5}, "whole number", ""),
        ({"heads": {"q": 8, 2: 3}}, "keys must be texts", ""),
        ({"dtype": object()}, "object is not a value", ""),
        ({"mask": lambda b, h, q, k: q, "score": "qk"}, "must be a bool", ""),
        ({"kv": lambda: 3}, "function is not a value", ""),
        ({"parts": "all"}, "expected a list", ""),
        ({"parts": [3]}, "expected a mapping", ""),
        ({"inputs": ["x"]}, "expected a mapping", ""),
        ({"inputs": 3}, "expected a mapping", ""),
        ({"doc": "two\nlines"}, "one line", ""),
        ({"name": "a: b"}, "not an identifier", ""),
        ({"name": "a\nattncc: 2"}, "not an identifier", ""),
        ({"mask": "causal\nlayout: varlen"}, "not part of the language|not an expression|no meaning", ""),
    ],
)
def test_wrong_arguments(keys: dict[str, Any], message: str, hint: str) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        attncc.attention(**{**HEAD, **keys})
    assert hint in caught.value.hint


def test_faults_of_texts_are_underlined() -> None:
    with pytest.raises(SpecError) as caught:
        attncc.attention(**HEAD, score="qk * scal")
    assert str(caught.value).splitlines() == [
        "<attention sample>:5:13: unknown name 'scal'",
        "  5 | score: qk * scal",
        "                  ^^^^",
        "  did you mean 'scale'?",
    ]


def test_masks_of_a_callable_and_a_text_meet() -> None:
    spec = attncc.attention(**HEAD, score="qk", mask=lambda b, h, i, j: i >= j)
    assert spec.text.endswith("score: qk\nmask: i >= j\n")


def test_the_front_needs_neither_torch_nor_triton() -> None:
    text = f"attncc: 1\nname: x\nheads: 8\ndims: 64\n{INPUTS}mask: segments(offsets)\n"
    code = f"""
import sys
import attncc, attncc.errors
from attncc.spec import document, loads, schema
loads({text!r}); schema()
attncc.attention(name="x", heads=2, dims=8, mask=lambda b, h, i, j: i >= j)
heavy = {{"torch", "triton", "numpy.random", "sympy"}} & set(sys.modules)
assert not heavy - {{"numpy.random"}}, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True)
