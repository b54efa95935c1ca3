"""Calls that run at once, by warps of their own, and reads that are under way meanwhile: one after the other here."""

from __future__ import annotations

import numpy as np

from attncc.ir import interp
from attncc.ir.build import Builder, function, program, read
from attncc.ir.expr import const, name
from attncc.ir.text import text
from attncc.ir.tile import AtOnce, Kernel, Launch, Param, Program, every
from attncc.ir.verify import verify_program
from attncc.passes.lower.tidy import tidy

X = Param("x", "buffer", "f32", rank=1)
Y = Param("y", "buffer", "f32", rank=1)


def doubled() -> Program:
    """Each program doubles two numbers by one function, and another clears a third."""
    params = {"x": X, "y": Y}
    inner = Builder(params)
    inner.let("coming", read(X, name("at")), ahead=True)
    inner.store(Y, (name("at"),), name("coming", "f32") * 2.0)
    twice = function("twice", inner, ())
    other = Builder(params)
    other.store(Y, (name("last"),), const(0.0))
    clear = function("clear", other, ())
    b = Builder(params)
    first = b.let("first", program() * 3)
    b.let("last", first + 2)
    b.let("unused", first + 3)
    b.at_once([(twice, {"at": first}), (twice, {"at": first + 1}), (clear, {})], (4, 1), (240, 24))
    params_, body = tidy(params.values(), b.body)
    return Program("p", (Kernel("k", params_, body, (twice, clear), const(2)),), (Launch("k"),), ())


def test_calls_at_once_are_all_done() -> None:
    verify_program(doubled())
    x, y = np.arange(6, dtype=np.float32), np.full(6, np.nan, np.float32)
    interp.run(doubled(), {"x": x, "y": y}, {}, {})
    np.testing.assert_array_equal(y, [0, 2, 0, 6, 8, 0])


def test_what_calls_at_once_are_given_is_kept() -> None:
    (kernel,) = doubled().kernels
    assert any(isinstance(s, AtOnce) for s in every(kernel.body))
    assert "unused" not in text(kernel)
    for line in (
        "    at once, warps 4, 1, registers 240, 24:\n",
        "        twice(x, y, first + 1)\n",
        "        clear(y, last)\n",
        "    ahead coming: f32 = x[at]\n",
    ):
        assert line in text(kernel)
