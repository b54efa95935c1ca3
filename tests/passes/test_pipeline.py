"""The pipeline: its order, what it shows, and who is blamed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from masks import attention, causal, i, j, masks, window

from attncc import passes
from attncc.errors import CompilerBug, Unsupported
from attncc.ir.attention import Attention, Call, Input
from attncc.ir.expr import Expr, const, eq, ew, maximum, minimum, name, where
from attncc.ir.rewrite import names, walk
from attncc.ir.text import text
from attncc.passes.lower.select import gaps, select


def test_every_pass_is_shown_in_order() -> None:
    seen: list[tuple[str, Attention]] = []
    result = passes.run(attention(causal), lambda name, attn: seen.append((name, attn)))
    assert [name for name, _ in seen] == [name for name, _ in passes.PIPELINE]
    assert seen[-1][1] is result
    assert result.part.key_tiles is not None


def test_passes_are_pure_and_idempotent() -> None:
    attn = attention(causal & window(64))
    once = passes.run(attn)
    assert attn == attention(causal & window(64))
    assert passes.run(once) == once


@settings(max_examples=200, deadline=None)
@given(masks)
def test_every_result_is_legal(mask: Expr) -> None:
    """`run` verifies after each pass."""
    assert passes.run(attention(mask)).part.key_tiles is not None


def _nest(step: Callable[[Expr, int], Expr], innermost: Expr) -> Expr:
    for depth in range(40):
        innermost = step(innermost, depth)
    return innermost


@pytest.mark.parametrize(
    "mask",
    [
        _nest(lambda e, k: eq(e, j < k), causal),
        _nest(lambda e, k: where(j < k, e, causal), causal),
        _nest(lambda e, k: ew("abs", e - k), j) <= 3,
        _nest(lambda e, k: where(e <= k, j, i), j) <= 3,
        _nest(lambda e, k: where(e <= k, i + 1, i), i) <= j,
        _nest(lambda e, k: (e + k) % 97, j - i) <= 3,
        _nest(lambda e, k: minimum(maximum(e, i - k), i + k), j) <= 3,
        _nest(lambda e, k: e & ((j <= i - k) | (j >= i + 2 * k)), causal),
        _nest(lambda e, k: e | (j <= i + 7 * k) & (j >= i + 7 * k - 2) & (i > k), causal),
        _nest(lambda e, k: e & ew("ne", j, i - 2 * k), causal),
    ],
    ids=range(10),
)
def test_nesting_does_not_multiply(mask: Expr) -> None:
    """Each of these hung, or grew to megabytes, when every choice was spelt out."""
    part = passes.run(attention(mask)).part
    assert part.key_tiles is not None
    assert len(part.key_tiles.ranges) <= 4
    assert len(text(part.mask)) < 20_000
    assert all(len(text(e)) < 2_000 for r in part.key_tiles.ranges for e in (r.lo, r.hi, r.full_lo, r.full_hi))


@pytest.mark.parametrize(
    ("key", "steps"),
    [("prologue", (Call("smooth"),)), ("epilogue", (Call("absorb", words=("w",)), Call("skip", (const(1),))))],
)
def test_steps_pass_and_are_refused_by_the_lowering(key: str, steps: tuple[Call, ...]) -> None:
    attn = replace(attention(causal), inputs=(Input("w", ("Dv", 8)),), **{key: steps})
    rewritten = passes.run(attn)
    assert getattr(rewritten, key) == steps
    assert [gap.key for gap in gaps(rewritten)] == [key]
    with pytest.raises(Unsupported, match=key) as caught:
        select(rewritten)
    assert caught.value.key == key


def test_expressions_of_steps_take_the_form_of_others() -> None:
    """Sizes known when compiled are numbers, and products of positions have room."""
    gate = Call("gate", (ew("exp", i * i * (name("Dv") - 30)),))
    attn = replace(attention(causal), epilogue=(gate,), prologue=(Call("temperature", (name("Hq") * 1.0,)),))
    rewritten = passes.run(attn)
    assert not names(rewritten.prologue[0].args[0])
    assert {node.dtype for node in walk(rewritten.epilogue[0].args[0]) if node.op == "mul"} == {"i64"}


def test_a_bug_names_its_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(attn: Attention) -> Attention:
        raise CompilerBug("lost a part")

    monkeypatch.setattr(passes, "PIPELINE", (("break things", broken),))
    with pytest.raises(CompilerBug, match="pass 'break things': lost a part"):
        passes.run(attention(causal))


def test_an_illegal_result_is_blamed_on_its_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "PIPELINE", (("drop", lambda attn: replace(attn, parts=())),))
    with pytest.raises(CompilerBug, match="pass 'drop'"):
        passes.run(attention(causal))
