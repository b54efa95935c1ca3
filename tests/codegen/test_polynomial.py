"""Exponentials by polynomial: the assembly that the engine writes, carried out in NumPy, instruction by instruction."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from attncc import driver, spec
from attncc.device import find
from attncc.passes.lower.defaults import default_configs

F32 = np.float32
WORST = 7.6e-5
"""Relative, of a polynomial of degree 3."""
OPERATIONS: dict[str, Callable[..., Any]] = {
    "max.NaN.f32": np.maximum,  # NaN wins in NumPy, too
    "add.rn.f32": lambda a, b: a + b,
    "sub.rn.f32": lambda a, b: a - b,
    "mul.rn.f32": lambda a, b: a * b,
    "fma.rn.f32": lambda a, b, c: (a.astype(np.float64) * b + c).astype(F32),
    "shl.b32": lambda a, n: a << np.uint32(n),
    "add.s32": lambda a, n: a + np.uint32(n),
    "ex2.approx.ftz.f32": np.exp2,
}


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The engine's steps in a package that has it."""
    folder = tmp_path_factory.mktemp("polynomial")
    driver.compile(spec.loads("attncc: 1\nname: powers\nheads: 2\ndims: 64\n"), folder, ["sm_90"])
    sys.path.insert(0, str(folder))
    yield importlib.import_module("powers._softmax")
    sys.path.remove(str(folder))


def number(text: str) -> Any:
    if text.startswith("0f"):
        return np.array(int(text[2:], 16), np.uint32).view(F32)[()]
    return int(text, 0)


def run(assembly: str, inputs: list[Any]) -> tuple[list[Any], int]:
    """The outputs of an assembly text, and how many of them are polynomials."""
    count = len(inputs)
    registers = {f"${count + n}": x for n, x in enumerate(inputs)}
    polynomials = 0
    for line in filter(None, (part.strip(" {}") for part in assembly.split(";"))):
        if line.startswith(".reg"):
            continue
        opcode, rest = line.split(" ", 1)
        target, *operands = (x.strip() for x in rest.split(","))
        values = [registers[x] if x in registers else number(x) for x in operands]
        if opcode == "mov.b32":
            registers[target] = values[0].view(np.uint32 if values[0].dtype == F32 else F32)
        else:
            registers[target] = OPERATIONS[opcode](*values)
        polynomials += opcode.startswith("mul")
    return [registers[f"${n}"] for n in range(count)], polynomials


def text_of(steps: Any, share: int) -> str:
    found = steps._powers(share)
    return getattr(found, "value", found)


@pytest.mark.parametrize("share", [1, 2, 3, 8])
def test_shares_are_exponentials_up_to_a_small_error(steps: Any, share: int) -> None:
    x = np.concatenate([np.linspace(-125.9, 0, 100_001), np.linspace(0, 9, 1001)]).astype(F32)
    with np.errstate(all="ignore"):
        out, polynomials = run(text_of(steps, share), [x] * 8)
    assert polynomials == share
    exact = np.exp2(x.astype(np.float64))
    assert max(np.abs(y / exact - 1).max() for y in out) < WORST


def test_ends(steps: Any) -> None:
    """What is hidden weighs nothing, and NaN is not lost."""
    x = np.array([-np.inf, -1e30, -127.6, np.nan, 0.0, -1.0], F32)
    with np.errstate(all="ignore"):
        out, _ = run(text_of(steps, 8), [x] * 8)
    for y in out:
        assert (y[:3] == 0).all()
        assert np.isnan(y[3])
        assert np.allclose(y[4:], [1.0, 0.5], rtol=WORST)


def test_the_tuner_may_choose_where_it_can_pay_unless_functions_are_to_be_exact() -> None:
    few_bits = "quantize: {q: fp8_e4m3, k: fp8_e4m3, v: fp8_e4m3, p: fp8_e4m3}\n"
    programs = [
        driver.lower(spec.loads(f"attncc: 1\nname: t\nheads: 2\ndims: 64\n{more}").attention)[1]
        for more in (few_bits, few_bits + "numerics: {exp: exact}\n", "")
    ]

    def choices(knob: str) -> list[tuple[int, ...]]:
        return [next(k.choices for k in p.engine.knobs if k.name == knob) for p in programs]  # type: ignore[union-attr]

    assert choices("E_POLY") == [(0, 1, 2, 3), (0,), (0,)]
    assert choices("E_TURNS") == [(0, 1, 2), (0, 1, 2), (0, 1)]


def test_by_default_fp8_takes_turns_that_last_and_no_polynomials() -> None:
    def defaults(more: str) -> tuple[int, int]:
        attn, _ = driver.lower(spec.loads(f"attncc: 1\nname: t\nheads: 2\ndims: 128\n{more}").attention)
        config = default_configs(attn, find("sm_90"))[0][-1][1]
        return config["E_TURNS"], config["E_POLY"]

    assert defaults("quantize: {q: fp8_e4m3, k: fp8_e4m3, v: fp8_e4m3, p: fp8_e4m3}\n") == (2, 0)
    assert defaults("") == (0, 0)


def test_the_text_is_read_as_it_is_written() -> None:
    """The reader above, on two instructions."""
    out, polynomials = run(
        "{ .reg .f32 p; add.rn.f32 p, $1, 0f3F800000; mul.rn.f32 $0, p, p; }", [np.array([2.0], F32)]
    )
    assert out[0] == 9
    assert polynomials == 1
