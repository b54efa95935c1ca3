"""What the interpreter runs instead: fewer heads only where no formula knows them, never another meaning."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from attncc import spec
from attncc.check.stand_in import stand_in
from attncc.device import find
from attncc.ir.attention import Attention, Dims, Heads, Input, Normalizer, Part
from attncc.ir.expr import Expr, const, load, name

QK, H, HK, J = name("qk", "f32"), name("h"), name("hk"), name("j")
LARGE = Attention("large", Heads(32, 16, 16), Dims(64, 64), (Part(QK),), scale=const(1.0), dtype="bf16")
CPU = find("interpreter")


def test_a_gpu_runs_the_variant_itself() -> None:
    assert stand_in(LARGE, find("sm_90")) == (LARGE, ())


def test_bf16_and_many_heads_are_replaced_and_said() -> None:
    attn, notes = stand_in(LARGE, CPU)
    assert attn == replace(LARGE, dtype="fp16", heads=Heads(4, 2, 2))
    assert [word for word in ("interpreter", "bf16", "32 query") if not any(word in n for n in notes)] == []


@pytest.mark.parametrize(
    ("heads", "fewer"),
    [
        (Heads(32, 8, 16), Heads(8, 2, 4)),
        (Heads(28, 4, 4, "tile"), Heads(14, 2, 2, "tile")),
        (Heads(4, 2, 2), Heads(4, 2, 2)),
        (Heads(7, 1, 1), Heads(7, 1, 1)),
        (Heads(16, 16, 16), Heads(2, 2, 2)),
    ],
)
def test_the_ratio_stays(heads: Heads, fewer: Heads) -> None:
    assert stand_in(replace(LARGE, heads=heads), CPU)[0].heads == fewer


@pytest.mark.parametrize(
    "part",
    [
        Part(QK * (H + 1)),
        Part(QK, J < HK),
        Part(QK, name("Hq") > J),
        Part(QK, normalizer=Normalizer(sink=load("sink", H))),
        Part(QK + load("own", H + 1)),
        Part(QK + load("own", J, dtype="f32") * H),
    ],
)
def test_heads_that_differ_stay(part: Part) -> None:
    attn = replace(LARGE, parts=(part,), inputs=(Input("sink", (32,)), Input("own", ("Hq",))))
    assert stand_in(attn, CPU)[0].heads == LARGE.heads


@pytest.mark.parametrize("at", [HK, const(0)])
def test_heads_that_only_read_what_is_theirs_do_not_differ(at: Expr) -> None:
    mask: Expr = load("table", at, J) > 0
    attn = replace(LARGE, parts=(Part(QK, mask),), inputs=(Input("table", ("Hk", "Sk")),))
    assert stand_in(attn, CPU)[0].heads == Heads(4, 2, 2)
    assert stand_in(attn, CPU, captured={"table"})[0].heads == LARGE.heads, "the tensor has as many heads"


def test_a_staircase_begins_with_the_dtype_that_takes_the_place_of_another() -> None:
    loaded = spec.load(Path(__file__).parents[2] / "examples" / "saq_staircase.yaml")
    attn, _ = stand_in(loaded.attention, CPU)
    (cache,) = attn.quantize
    assert (attn.dtype, cache.staircase[0][1]) == ("fp16", "fp16")
    assert [step for _, step in cache.staircase[1:]] == [step for _, step in loaded.attention.quantize[0].staircase[1:]]
