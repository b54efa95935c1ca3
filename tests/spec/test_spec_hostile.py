"""Hostile specs: each is refused in under a second, with a place, and runs nothing."""

from __future__ import annotations

import time

import pytest
from spec_samples import HEAD

from attncc.errors import SpecError
from attncc.spec import loads

MEGABYTE = 1 << 20

LAUGHS = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))

DOCUMENTS = {
    "10 MB of flow nesting": "[" * (10 * MEGABYTE),
    "10 MB of mappings": "{a: " * (10 * MEGABYTE // 4),
    "10 MB of block nesting": "- " * (5 * MEGABYTE),
    "a megabyte of flow nesting": "[" * (MEGABYTE - 10),
    "nesting, a bracket a line": "[\n" * 40_000,
    "indented nesting": "\n".join(" " * k + "a:" for k in range(200)),
    "nesting of sequences": "a: " + "[" * 30 + "]" * 30,
    "a megabyte of keys": "".join(f"k{k}: 1\n" for k in range(80_000)),
    "more keys than values are read": "".join(f"k{k}: 1\n" for k in range(40_000)),
    "a megabyte of newlines": "\n" * (MEGABYTE - 1),
    "a megabyte of exclamation marks": "!" * (MEGABYTE - 1),
    "lines of exclamation marks": ("!" * 16_000 + "\n") * 60,
    "a multi-line scalar": "a: x\n" + "  x\n" * 49_000,
    "billion laughs": LAUGHS,
    "merge keys": "a: &a {x: 1}\nb: {<<: *a}",
    "python object": "a: !!python/object/apply:os.system ['touch /tmp/hostile']",
    "python name": "a: !!python/name:os.system",
    "binary": "a: !!binary aGVsbG8=",
    "a key of a megabyte": "k" * (MEGABYTE - 10) + ": 1",
    "a number of a megabyte": HEAD.replace("64", "9" * (MEGABYTE - 100)),
    "a number of 16 KB": HEAD.replace("64", "9" * 16_000),
    "a float of many digits": HEAD + f"dropout: 0.{'1' * 5000}",
    "an exponent": HEAD + "dropout: 1e999999999",
    "directives": "%YAML 1.2\n" * 10_000 + "---\na: 1",
    "byte order mark and nesting": "\ufeff" + "[" * 100_000,
}

EXPRESSIONS = {
    "attribute": "qk.__class__",
    "attribute of a number": "(1).__class__.__base__",
    "dunder import": "__import__('os').system('true')",
    "import by name": "__import__(qk)",
    "eval": "eval(qk)",
    "lambda": "(lambda: qk)()",
    "comprehension": "[x for x in qk]",
    "generator": "sum(x for x in qk)",
    "walrus": "(y := qk)",
    "string": "'a' * 1000000000",
    "f-string": "f'{qk}'",
    "bytes": "b'x'",
    "dictionary": '"{1: 2}"',
    "set of names": "qk if qk else qk",
    "starred": "max(*qk)",
    "keyword expansion": "softcap(**qk)",
    "await": "await qk",
    "yield": "(yield qk)",
    "ellipsis": "qk + ...",
    "complex": "qk * 1j",
    "statement": "import os",
    "assignment": "qk = 1",
    "two expressions": "qk; qk",
    "matrix product": "qk @ qk",
    "shift": "1 << 1000000",
    "tower of powers": "9 ** 9 ** 9 ** 9 ** 9",
    "huge exponent": "qk ** 100000",
    "huge integer power": "10 ** 1000",
    "huge product": "9223372036854775807 * 9223372036854775807",
    "huge literal": "9" * 5000,
    "literal beyond 64 bits": "qk + 9223372036854775808",
    "infinite literal": "qk + 1e999",
    "deep parentheses": "(" * 4000 + "qk" + ")" * 4000,
    "100 parentheses and sums": "(1.0 + " * 150 + "qk" + ")" * 150,
    "unary chain": "-" * 8000 + "qk",
    "not chain": "~" * 8000 + "qk",
    "words of not": "not " * 1500 + "qk",
    "lambdas": "lambda:" * 1000 + "qk",
    "conditional chain": "1 if 1 else " * 500 + "qk",
    "long sum": "qk" + " + qk" * 1500,
    "long comparison": "qk" + " < qk" * 1500,
    "long call chain": "f" + "()" * 3000,
    "nested indices": "x[" * 150 + "0" + "]" * 150,
    "nested calls": "exp(" * 150 + "qk" + ")" * 150,
    "a megabyte of sums": "qk" + " + qk" * 200_000,
    "a megabyte of parentheses": "(" * 500_000 + ")" * 500_000,
    "exploding softcap": "softcap(qk, " * 30 + "qk" + ")" * 30,
    "exploding softcap of scale": "softcap(scale, " * 90 + "scale" + ")" * 90,
    "exploding clamp": "clamp(qk, 0, softcap(qk, " * 40 + "qk" + "))" * 40,
    "unicode name": "qk + \u0430",
    "null byte": '"qk \\0"',
    "backslash": '"qk \\\\ 2"',
    "comment": '"qk # 2"',
}

MASKS = {
    "huge neighborhood": "neighborhood((2, 2), (" + "9" * 4000 + ", 1))",
    "many axes": "neighborhood((" + "2, " * 500 + "2), 1)",
    "deep where": "where(causal, " * 120 + "causal" + ", sink(1))" * 120,
    "nested windows": "window(" * 120 + "4" + ")" * 120,
    "chains of windows": " & ".join(["window(4)"] * 700),
}


def refused(text: str) -> SpecError:
    start = time.process_time()
    with pytest.raises(SpecError) as caught:
        loads(text, "hostile.yaml")
    assert time.process_time() - start < 1.0
    assert caught.value.location is not None
    assert len(str(caught.value)) < 2000
    return caught.value


@pytest.mark.parametrize("text", DOCUMENTS.values(), ids=DOCUMENTS)
def test_documents(text: str) -> None:
    refused(text)


def placed(key: str, text: str) -> SpecError:
    error = refused(f"{HEAD}{key}: {text}\n")
    assert error.location is not None
    assert error.location.line == len(HEAD.splitlines()) + 1
    return error


@pytest.mark.parametrize("text", EXPRESSIONS.values(), ids=EXPRESSIONS)
def test_expressions(text: str) -> None:
    placed("score", text)


@pytest.mark.parametrize("text", MASKS.values(), ids=MASKS)
def test_masks(text: str) -> None:
    placed("mask", text)


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("kv", "paged(" * 200 + ")" * 200),
        ("kv", "paged(9 ** 9 ** 9)"),
        ("kv", "__import__"),
        ("normalizer", "softmax(sink=().__class__)"),
        ("combine", "gate(" + "1.0, " * 1000 + "1.0)"),
        ("schedule", "split_kv(n=split_kv(n=1))"),
        ("scale", "2 ** 100000"),
    ],
)
def test_primitives(key: str, text: str) -> None:
    parts = "parts: [{mask: causal}, {mask: causal}]\n" if key == "combine" else ""
    error = refused(f"{HEAD}{parts}{key}: {text}\n")
    assert error.location is not None


def test_a_large_honest_document_is_read() -> None:
    comment = "# " + "why " * 25 + "\n"
    text = HEAD + comment * (900_000 // len(comment))
    start = time.process_time()
    assert loads(text).attention.name == "sample"
    assert time.process_time() - start < 1.0
