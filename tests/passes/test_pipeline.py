"""The pipeline: its order, what it shows, and who is blamed."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from masks import attention, causal, masks, window

from attncc import passes
from attncc.errors import CompilerBug, Unsupported
from attncc.ir.attention import Attention, Call
from attncc.ir.expr import Expr
from attncc.passes.fuse import fuse


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


@pytest.mark.parametrize("key", ["prologue", "epilogue"])
def test_steps_are_refused_by_key_and_name(key: str) -> None:
    attn = replace(attention(causal), **{key: (Call("rope"), Call("gate"))})
    with pytest.raises(Unsupported, match="rope, gate") as caught:
        fuse(attn)
    assert caught.value.key == key


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
