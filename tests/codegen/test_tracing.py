"""Emitted packages under torch's tracers: shapes without data, torch.compile, torch.export, operator checks."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import pytest
import torch
from codegen.emitted import Package, normal, package
from torch._subclasses.fake_tensor import FakeTensorMode

from attncc import driver, spec

DENSE = "heads: {q: 4, kv: 2}\ndims: {qk: 16, v: 24}\ndtype: fp32\nmask: causal"
BIASED = f"{DENSE}\ninputs: {{bias: {{shape: [Hq, Sk]}}}}\nscore: qk * scale + bias[h, j]"
RELU = f"{DENSE}\nnormalizer: relu\noutputs: [o]"
PACKED = f"{DENSE}\nlayout: varlen"
TRANSPOSED = f"{DENSE}\nlayout: bshd"


def operands(p: Package, rows: int = 20, keys: int = 30) -> dict[str, Any]:
    layout, b = p.attn.layout, 2
    sizes = {"q": (4, rows, 16), "k": (2, keys, 16), "v": (2, keys, 24)}
    if layout == "varlen":
        out: dict[str, Any] = {x: normal(b * s, h, d, seed=n) for n, (x, (h, s, d)) in enumerate(sizes.items())}
        cuts = [torch.arange(b + 1, dtype=torch.int32) * s for s in (rows, keys)]
        out |= {"cu_seqlens_q": cuts[0], "cu_seqlens_k": cuts[1]}
    else:
        out = {x: normal(b, h, s, d, seed=n) for n, (x, (h, s, d)) in enumerate(sizes.items())}
        out = {x: t.transpose(1, 2) for x, t in out.items()} if layout == "bshd" else out
    return out | {x.name: normal(4, keys, seed=9) for x in p.attn.inputs}


BODIES = {"dense": DENSE, "biased": BIASED, "relu": RELU, "packed": PACKED, "transposed": TRANSPOSED}
ALL = pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)


def positional(p: Package, given: dict[str, Any]) -> list[torch.Tensor]:
    return [given[t.name] for t in p.module.VARIANT.tensors]


@ALL
def test_opcheck(body: str) -> None:
    p = package(body).tiles(16, 16)
    torch.library.opcheck(p.module._OP, (*positional(p, operands(p)), 0.5 if body == RELU else None))


@ALL
def test_fake_tensors_have_the_shapes_of_real_ones(body: str) -> None:
    p = package(body).tiles(16, 16)
    given = operands(p)
    lse = {} if "relu" in body else {"return_lse": True}
    real = p(**given, **lse)
    with FakeTensorMode() as mode:
        fake = p(**{name: mode.from_tensor(t) for name, t in given.items()}, **lse)
    for x, y in zip(real if lse else [real], fake if lse else [fake], strict=True):
        assert (x.shape, x.dtype, x.stride(), x.device) == (y.shape, y.dtype, y.stride(), y.device)


@ALL
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(body: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    p = package(body).tiles(16, 16)

    def twice(**x: Any) -> Any:
        return p(**x) * 2.0

    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    with torch.no_grad():
        for rows, keys in ((20, 30), (33, 40)):
            given = operands(p, rows, keys)
            assert torch.equal(compiled(**given), twice(**given))


def test_compile_with_lse_and_scale() -> None:
    torch._dynamo.reset()
    p = package(DENSE).tiles(16, 16)
    given = operands(p)
    compiled = torch.compile(lambda **x: p(**x, return_lse=True, scale=0.5), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for x, y in zip(compiled(**given), p(**given, return_lse=True, scale=0.5), strict=True):
            assert torch.equal(x, y)


@ALL
def test_export(body: str) -> None:
    p = package(body).tiles(16, 16)
    given = operands(p)

    class Block(torch.nn.Module):
        def forward(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
            return p(**tensors) + 1.0

    with torch.no_grad():
        exported = torch.export.export(Block(), (given,))
        assert torch.equal(exported.module()(given), Block()(given))
    names = [str(n.target) for n in exported.graph.nodes if n.op == "call_function"]
    assert any(f"attncc_{p.attn.name}" in n for n in names)


def test_export_with_dynamic_sizes() -> None:
    p = package(DENSE).tiles(16, 16)

    class Block(torch.nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return p(q, k, v)

    batch, rows, keys = (torch.export.Dim(n, min=2, max=4096) for n in ("batch", "rows", "keys"))
    shapes = {"q": {0: batch, 2: rows}, "k": {0: batch, 2: keys}, "v": {0: batch, 2: keys}}
    with torch.no_grad():
        exported = torch.export.export(Block(), tuple(positional(p, operands(p))), dynamic_shapes=shapes)
        other = positional(p, operands(p, 9, 50))
        assert torch.equal(exported.module()(*other), p(*other))


def test_tensors_that_want_gradients_are_refused_while_compiling_too() -> None:
    torch._dynamo.reset()
    p = package(DENSE).tiles(16, 16)
    given = operands(p)
    given["q"].requires_grad_()
    with pytest.raises(Exception, match="q requires a gradient"):
        torch.compile(lambda **x: p(**x), fullgraph=True, backend="aot_eager")(**given)


def test_a_package_that_is_compiled_again_replaces_the_operator() -> None:
    first = package(DENSE, "compiled_again").tiles(16, 16)
    given = operands(first)
    before = first(**given)
    driver.compile(
        spec.loads(f"attncc: 1\nname: compiled_again\n{DENSE}\nscore: qk * 0.1\n"), first.path.parent, ["cpu"]
    )
    for name in [m for m in sys.modules if m.split(".")[0] == "compiled_again"]:
        del sys.modules[name]
    second = importlib.import_module("compiled_again")
    assert not torch.equal(second.attention(**given), before)
    with FakeTensorMode() as mode:
        assert second.attention(**{n: mode.from_tensor(t) for n, t in given.items()}).shape == before.shape
