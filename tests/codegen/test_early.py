"""Launches that begin before the one ahead of them has ended: which ones do, and how cubins are asked to."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from codegen.emitted import Package, normal, package

from attncc import driver, spec
from attncc.codegen import _driver
from attncc.codegen._cards import row
from attncc.device import find
from attncc.passes.lower.defaults import default_configs

PLAIN = "heads: {q: 4, kv: 2}\ndims: 16\ndtype: fp16\n"
PAGES = f"{PLAIN}kv: paged(8)\n"


def half(*shape: int) -> torch.Tensor:
    return normal(*shape).half()


def launches(p: Package, tensors: list[torch.Tensor], may: bool) -> dict[str, bool]:
    """Of a call on the CPU, by the kernel's last name: whether it would begin early."""
    way = replace(p.module._launch.BY_TRITON, may_be_early=lambda: may)
    plan = p.module._gpu.Runner(p.module.VARIANT, way).plan(tensors, True, True)
    found = {x.function.fn.__name__.rpartition("_")[2]: x for x in plan.launches}
    return {text: bool(x.options.get("launch_pdl")) for text, x in found.items()}


def test_all_but_the_first_launch_of_a_call() -> None:
    rows = [half(1, 4, 1, 16), half(1, 2, 90, 16), half(1, 2, 90, 16)]
    p = package(PLAIN).tiles(16, 16, split=2, fill=4)
    assert launches(p, rows, False) == {"split": False, "merge": False}
    assert launches(p, rows, True) == {"split": False, "merge": True}
    table, used = torch.arange(4, dtype=torch.int32)[None], torch.tensor([30], dtype=torch.int32)
    pages = [half(1, 4, 1, 16), half(4, 8, 2, 16), half(4, 8, 2, 16), table, used]
    p = package(PAGES).tiles(16, 16, split=1, fill=4)
    assert launches(p, pages, True) == {"plan": False, "stream": True, "merge": True}


def test_programs_that_walk_codes_wait_for_the_launch_ahead() -> None:
    p = package(f"{PAGES}quantize: {{cache: int8(per=token)}}\n").tiles(16, 16, split=1, fill=4)
    early = {
        k.function.fn.__name__.rpartition("_")[2]: ("flag", "EARLY") in k.parameters for k in p.module.VARIANT.kernels
    }
    assert (early["stream"], early["merge"]) == (False, True)


def test_kernels_wait_before_anything_else() -> None:
    """For a launch may begin early whose own launch ahead did so, too: all that was launched before has ended then."""
    for p in (package(PLAIN), package(PAGES)):
        text = (p.path / "kernels.py").read_text()
        for kernel in ("split", "merge", "plan", "stream"):
            _, found, body = text.partition(f"_{kernel}(\n")
            if found:
                assert body.partition('"""\n')[2].startswith("    begin_early(EARLY)\n")


ONE, TWO, FEW = (132, 128), (264, 64), (512, 64)
"""FILL and BN."""


@pytest.mark.parametrize(
    ("heads", "entries"),
    [
        ((32, 8), {1: ONE, 2: ONE, 3: FEW, 4: ONE, 5: FEW, 7: FEW, 8: ONE, 9: FEW}),
        ((64, 8), {1: ONE, 2: ONE, 3: FEW, 4: ONE, 5: FEW, 7: FEW, 8: ONE, 9: FEW}),
        ((32, 32), {1: ONE, 2: ONE, 3: FEW, 4: ONE, 5: FEW}),
        ((8, 1), {1: ONE, 6: ONE, 7: FEW, 8: ONE, 9: FEW}),
        ((8, 4), {1: ONE, 4: ONE, 5: FEW}),
        ((48, 48), {1: FEW, 2: FEW}),
        ((132, 132), {1: ONE, 2: FEW}),
    ],
    ids=str,
)
def test_where_it_is_even_a_multiprocessor_has_one_program(
    heads: tuple[int, int], entries: dict[int, tuple[int, int]]
) -> None:
    text = f"attncc: 1\nname: few\nheads: {{q: {heads[0]}, kv: {heads[1]}}}\ndims: 128\n"
    attn, _ = driver.lower(spec.loads(text).attention)
    rows, _ = default_configs(attn, find("sm_90"))
    for b, wanted in entries.items():
        sizes = {"B": b, "Sq": 1, "Sk": 65536, "pairs": b * 65536}
        _, config = row(SimpleNamespace(TABLE=rows), sizes)
        assert (config["FILL"], config["BN"]) == wanted
        _, config = row(SimpleNamespace(TABLE=rows), {**sizes, "Sk": 8192})
        assert (config["FILL"], config["BN"]) == (
            TWO if wanted == ONE and all(entries.get(n, ONE) == ONE for n in range(1, b + 1)) else FEW
        )


def test_the_driver_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def launched(how: Any, function: Any, each: Any, extra: Any) -> int:
        c = how._obj
        attribute = c.attributes[0]
        asked.append(([*c.grid], [*c.block], c.shared_bytes, c.stream, c.count, attribute.which, attribute.value))
        assert (function, extra) == (7, None)
        return 201 * (len(asked) == 1)  # no context yet

    fake = SimpleNamespace(
        cuLaunchKernelEx=launched, cuDevicePrimaryCtxRetain=lambda *_: 0, cuCtxSetCurrent=lambda *_: 0
    )
    monkeypatch.setattr(_driver, "driver", lambda: fake)
    function = _driver.Function(7, torch.device("cuda", 0), 64, 4096)
    _driver.start(function, 9, 5, _driver.Parameters(b"\0" * 8, [0]), early=True)
    assert asked == [([9, 1, 1], [64, 1, 1], 4096, 5, 1, 6, 1)] * 2
    assert ctypes.sizeof(_driver.Attribute) == 72
    assert ctypes.sizeof(_driver.Launch) == 56
