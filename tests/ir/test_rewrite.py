"""Walking and rewriting expressions."""

from __future__ import annotations

import pytest

from attncc.ir.expr import Expr, bucket, const, ew, load, name, where
from attncc.ir.rewrite import buffers, names, rebuild, substitute, transform, walk

i, j, h, x = name("i"), name("j"), name("h"), name("x", "f32")
formula = where(j <= i, load("bias", h, i - j), 0.0) + x * load("bias", h, i - j)


def test_walk_meets_parents_first_and_nothing_twice() -> None:
    shared = i - j
    nodes = list(walk(shared * shared))
    assert [n.op for n in nodes] == ["mul", "sub", "name", "name"]
    for n, node in enumerate(nodes):
        assert not any(a is earlier for earlier in nodes[:n] for a in node.args)


def test_names_and_buffers_are_what_is_read() -> None:
    assert names(formula) == {"i", "j", "h", "x"}
    assert buffers(formula + bucket("offsets", i)) == {"bias", "offsets"}
    assert names(const(1)) == frozenset()


def test_nothing_changed_is_the_same_object() -> None:
    assert transform(formula, lambda node: None) is formula
    assert substitute(formula, {"unknown": 1}) is formula
    assert rebuild(formula, formula.args) is formula


def test_substitute_folds_what_it_can() -> None:
    assert substitute((i + j) * h, {"j": 0, "h": 1}) == i
    assert substitute(where(j <= i, x, 1.0), {"i": 3, "j": 2}) == x


def test_substitute_does_not_look_into_what_it_put_in() -> None:
    assert substitute(i + j, {"i": j, "j": i}) == j + i


def test_substituted_names_change_the_dtype_of_what_holds_them() -> None:
    assert substitute(i + 1, {"i": x}).dtype == "f32"
    assert substitute(i + 1, {"i": name("t", "i64", ("BM",))}) == name("t", "i64", ("BM",)) + 1


def test_reads_take_the_shape_of_their_indices() -> None:
    rows, columns = name("m", "i32", ("BM", 1)), name("n", "i32", (1, "BN"))
    assert substitute(load("bias", h, i - j), {"i": rows, "j": columns}).shape == ("BM", "BN")
    assert substitute(bucket("offsets", j), {"j": columns}).shape == (1, "BN")


def test_transform_goes_bottom_up() -> None:
    seen: list[str] = []

    def note(node: Expr) -> Expr | None:
        seen.append(node.op if node.op in ("neg", "exp") else str(node.attr))
        return None

    transform(ew("exp", -x), note)
    assert seen == ["x", "neg", "exp"]


def test_a_rewrite_sees_rewritten_arguments() -> None:
    doubled = transform(x + 1.0, lambda node: node * 2.0 if node.op in ("name", "const") else None)
    assert doubled == x * 2.0 + const(1.0) * 2.0


@pytest.mark.parametrize("depth", [1, 200])
def test_shared_parts_are_rewritten_once(depth: int) -> None:
    e, calls = x, []
    for _ in range(depth):
        e = e + e
    transform(e, lambda node: calls.append(node))
    assert len(calls) == depth + 1
