"""Solving for j: an equivalent mask, in which every solvable comparison has j alone on its left."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from masks import INPUTS, SEQUENCES, b, i, j, masks, n, tensors
from scalar_numpy import Scope, evaluate

from attncc.ir.expr import Expr, bucket, eq, ew, load, maximum, minimum, name, where
from attncc.ir.rewrite import walk
from attncc.passes.solve import J, Solver, is_simple, moves_with_key, push_not

solver = Solver({x.name: x for x in INPUTS if x.sorted})


def everywhere(seed: int, sk: int = 30) -> Scope:
    at = np.arange(-8, 40)[:, None]
    named = {"i": at, "row": at + 8, "j": np.arange(sk)[None, :], "n": 3, "b": seed % SEQUENCES, "h": 0}
    return Scope({**named, "Sq": 48, "Sk": sk, "B": SEQUENCES}, tensors(sk, seed))


@settings(max_examples=600, deadline=None)
@given(masks, st.integers(0, 40))
def test_solving_keeps_the_mask(mask: Expr, seed: int) -> None:
    atoms_negated = push_not(mask)
    scope = everywhere(seed)
    expected = evaluate(mask, scope)
    for new in (atoms_negated, push_not(~mask, False), solver.solve(atoms_negated)):
        np.testing.assert_array_equal(*np.broadcast_arrays(expected, evaluate(new, scope)))


@settings(max_examples=300, deadline=None)
@given(masks)
def test_negations_stand_at_atoms(mask: Expr) -> None:
    for node in walk(push_not(mask)):
        if node.op == "not":  # a conditional stays whole where spelling it out would multiply
            inner = node.args[0]
            assert inner.op not in ("and", "or", "not")
            assert inner.op != "where" or not is_simple(inner)


def _alone(e: Expr) -> bool:
    """Whether j is alone in every comparison that has it."""
    if e.op in ("and", "or"):
        return all(map(_alone, e.args))
    return not moves_with_key(e) or (e.op in ("le", "ge") and e.args[0] == J and not moves_with_key(e.args[1]))


@pytest.mark.parametrize(
    "mask",
    [
        j * 3 - 2 * i < 7,
        i - 4 * j > 7,
        i - (j + i) * 2 <= n,
        (j + 3) // 4 <= i // 2,
        eq(j // n, i // n),
        j * n > i,
        ew("abs", i - j) <= 4,
        ew("abs", i - j) > 4,
        minimum(j, i) >= 3,
        maximum(j - 1, i) < 9,
        where(i < 9, j, 2 * j) < 12,
        where(j < 9, i, j) < 12,
        ew("ne", j, i),
        eq(bucket("offsets", j), bucket("offsets", i)),
        bucket("starts", b, j * 2 + 1) > i,
        load("ids", b, j, dtype="i32") < i,
        load("pages", j // 2, dtype="i32") >= 3,
        -j >= -i,
    ],
    ids=range(18),
)
def test_solvable(mask: Expr) -> None:
    assert _alone(solver.solve(push_not(mask)))


@pytest.mark.parametrize(
    "mask",
    [
        eq((i - j) % 3, 0),
        j * j < i,
        j // 3 < j - i // 2,
        j // i < 2,
        j * i < 5,
        eq(load("document", b, j, dtype="i32"), 1),
        j < 0.5 * i,
        load("ids", j // 8, j, dtype="i32") < 3,
    ],
)
def test_what_no_rule_solves_stays_as_it_was(mask: Expr) -> None:
    assert solver.solve(push_not(mask)) == mask


def test_solved_forms_are_short() -> None:
    assert solver.solve(i - j < 1024) == (name("j") >= i - 1023)
    assert solver.solve(eq(i // 128, j // 128)) == (j >= i // 128 * 128) & (j <= i // 128 * 128 + 127)
    assert solver.solve(3 * j <= i) == (j <= i // 3)
