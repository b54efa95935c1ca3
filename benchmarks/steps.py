"""The kernels of steps before attention, apart from it, against a copy of as many bytes; and all of a prefill by
compressed attention against attention of the model's width, which has twice as many heads.

All of a prefill is every kernel of a call: the steps before attention and attention itself, at the compressed width,
against attention of the model's width, by the same compiler and by torch, in turns in one run. Projections are left
out on both sides; those of compressed attention would be half as wide, or less.

`python -m benchmarks.steps emit DIR` writes the packages (any machine with attncc); `run DIR --json FILE` checks a
small call against plain torch in float64 and measures on the GPU here. A ratio to `copy` is the share of what memory
allows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import torch
from torch.nn.functional import conv1d, normalize, pad, scaled_dot_product_attention

from benchmarks import report
from benchmarks.command import measure_all, two_steps
from benchmarks.timing import interleaved

EXAMPLES: Final = Path(__file__).parents[1] / "examples"
HEADS: Final[Mapping[str, tuple[int, int]]] = {"cca": (8, 8), "ccgqa": (8, 2)}
MHA: Final = 16
WHOLE: Final = f"""
attncc: 1
name: mha
heads: {MHA}
dims: 128
mask: causal
modes: [prefill]
"""
NAMES: Final = ("conv0", "bias0", "conv1", "bias1", "temp")
DIM: Final = 128
BATCH: Final = 4
TOKENS: Final = 16384
CHECKED: Final = (300, 1337)


def main() -> int:
    return two_steps("steps", __doc__, emit_packages, measure)


def emit_packages(args: argparse.Namespace) -> int:
    """The examples as they are for prefill."""
    driver: Any = import_module("attncc.driver")
    spec: Any = import_module("attncc.spec")
    driver.compile(spec.loads(WHOLE), args.dir, [args.target])
    for name in HEADS:
        loaded = driver.load(EXAMPLES / f"{name}.yaml")
        driver.compile(
            replace(loaded, attention=replace(loaded.attention, modes=("prefill",))), args.dir, [args.target]
        )
    return 0


def measure(args: argparse.Namespace) -> int:
    return measure_all(args, of_steps)


def of_steps(rounds: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for name, heads in HEADS.items():
        package = import_module(name)
        _check(package, heads)
        tensors = _operands(heads, BATCH, TOKENS)
        kernels = tuple(k for k in package.VARIANT.kernels if "_prologue" in k.function.__name__)
        runner = type(package._RUNNER)(replace(package.VARIANT, kernels=kernels), package._RUNNER.way)
        source = torch.cat([x.flatten() for x in tensors[:3]])
        goal = torch.empty_like(source)
        calls = {"attncc": lambda r=runner, g=tensors: r(g, None, False), "copy": lambda g=goal, s=source: g.copy_(s)}
        times = interleaved(calls, rounds)
        case = f"prologue/{name}/B{BATCH}Hq{heads[0]}Hk{heads[1]}S{TOKENS}D{DIM}"
        rows += report.compared(case, times, 2 * source.nbytes, "tbps")
        print(report.line(rows[-2:]), flush=True)
        del source, goal
        rows += _prefill(package, name, tensors, rounds)
        print(report.line(rows[-4:]), flush=True)
    return rows


def _prefill(package: ModuleType, name: str, tensors: list[torch.Tensor], rounds: int) -> list[dict[str, Any]]:
    """All of a call, and calls of the model's width."""
    mha = import_module("mha")
    wide = [torch.randn(BATCH, MHA, TOKENS, DIM, device="cuda", dtype=torch.bfloat16) for _ in "qkv"]
    given = dict(zip(NAMES, tensors[3:], strict=True))
    calls = {
        "attncc": lambda: package.attention(*tensors[:3], **given),
        "mha": lambda: mha.attention(*wide),
        "sdpa": lambda: scaled_dot_product_attention(*wide, is_causal=True),
    }
    case = f"prefill/{name}/B{BATCH}Hq{tensors[0].shape[1]}Hk{tensors[1].shape[1]}S{TOKENS}D{DIM}"
    flops = 2 * BATCH * tensors[0].shape[1] * TOKENS**2 * DIM
    return report.compared(case, interleaved(calls, rounds), flops)


def _operands(heads: tuple[int, int], batch: int, tokens: int) -> list[torch.Tensor]:
    """In the order of the package's signature."""
    queries, keys = heads
    both = queries + keys
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int, gain: float = 1.0) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda") * gain

    q, k, v = (normal(batch, n, tokens, DIM).bfloat16() for n in (queries, keys, keys))
    conv0, bias0 = normal(both, DIM, 2, gain=0.7), normal(both, DIM)
    conv1, bias1 = normal(both, DIM, DIM, 2, gain=0.06), normal(both, DIM)
    return [q, k, v, conv0, bias0, conv1, bias1, normal(keys)]


def _check(package: ModuleType, heads: tuple[int, int]) -> None:
    """A small call, and one that the engine serves, beside the same in float64."""
    for tokens in CHECKED:
        x = _operands(heads, 2, tokens)
        o = package.attention(*x[:3], **dict(zip(NAMES, x[3:], strict=True)))
        error = float((o.double() - _plainly(heads, [t.double() for t in x])).abs().max())
        assert error < 3e-2, f"{package.__name__}, {tokens} tokens: {error} from float64"
        print(f"{package.__name__}, {tokens} tokens: {error:.1e} from float64", flush=True)


def _plainly(heads: tuple[int, int], x: list[torch.Tensor]) -> torch.Tensor:
    """Compressed convolutional attention, arXiv 2510.04476."""
    q, k, v, conv0, bias0, conv1, bias1, temperature = x
    queries, keys = heads
    tokens = q.shape[2]
    both = torch.cat([q, k], 1).transpose(2, 3).flatten(1, 2)
    mixed = conv1d(pad(both, (2, 0)), conv0.flatten(0, 1)[:, None], bias0.flatten(), groups=len(bias0.flatten()))
    mixed = conv1d(mixed, conv1.flatten(0, 1), bias1.flatten(), groups=queries + keys)
    mixed = mixed.unflatten(1, (-1, DIM)).transpose(2, 3)
    pair = 0.5 * (q + k.repeat_interleave(queries // keys, 1))
    q = mixed[:, :queries] + pair
    k = mixed[:, queries:] + pair.unflatten(1, (keys, -1)).mean(2)
    q, k = (normalize(t, dim=-1) * DIM**0.5 for t in (q, k))
    flat = v.transpose(1, 2).flatten(2)
    half = flat.shape[-1] // 2
    shifted = pad(flat[..., half:], (0, 0, 1, 0))[:, :tokens]
    v = torch.cat([flat[..., :half], shifted], -1).unflatten(-1, (keys, DIM)).transpose(1, 2)
    q, k = _turned(q), _turned(k * temperature[:, None, None])
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def _turned(x: torch.Tensor) -> torch.Tensor:
    at = torch.arange(x.shape[2], device=x.device, dtype=x.dtype)[:, None]
    angle = at * 5e6 ** (-torch.arange(32, device=x.device, dtype=x.dtype) / 32)
    first, second, rest = x.split([32, 32, DIM - 64], -1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)


if __name__ == "__main__":
    sys.exit(main())
