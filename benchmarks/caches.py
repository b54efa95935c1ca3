"""One query a sequence over a cache of few bits, beside one of bf16; and over latents, as MLA has them.

`python -m benchmarks.caches emit DIR` writes the packages (any machine with attncc); `run DIR --json FILE` checks each
against float64 and measures on the GPU here, from CUDA graphs. A ratio to `bf16` is its time over that of few bits.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Final

import torch
from torch import Tensor

from attncc.check.pages import Pages, lay_out
from benchmarks import report
from benchmarks.cases import SCALE
from benchmarks.check import LIMITS, Errors, Rejected, poisoned
from benchmarks.command import compile_all, measure_all, two_steps
from benchmarks.timing import Call, Timing, interleaved_graphs

Row = dict[str, Any]
PAGE: Final = 64
LATENT_SCALE: Final = SCALE / 2


# -- what is measured ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cache:
    """Keys and values in pages: 16 sequences of 32768, 32 query heads over 8 key heads of 128."""

    name: str
    quantizer: str = ""
    """Of the spec; empty: bf16."""
    bits: int = 16
    b: int = 16
    s: int = 32768
    hq: int = 32
    hk: int = 8
    d: int = 128

    @property
    def has_zeros(self) -> bool:
        return "symmetric=false" in self.quantizer

    @property
    def package(self) -> str:
        return f"cache_{self.name}"

    @property
    def spec(self) -> str:
        few = f"quantize: {{cache: '{self.quantizer}'}}\n" if self.quantizer else ""
        heads = f"heads: {{q: {self.hq}, kv: {self.hk}}}\ndims: {self.d}"
        return f"attncc: 1\nname: {self.package}\n{heads}\nscale: {SCALE}\nkv: paged({PAGE})\n{few}modes: [decode]\n"

    @property
    def case(self) -> str:
        return f"cache/B{self.b}Hq{self.hq}Hk{self.hk}S{self.s}D{self.d}P{PAGE}"

    @property
    def bytes(self) -> int:
        """Of codes and of what each token has beside them."""
        beside = 4 * (1 + self.has_zeros) if "token" in self.quantizer else 0
        return 2 * self.b * self.s * self.hk * (self.d * self.bits // 8 + beside)


@dataclass(frozen=True, slots=True)
class Latent:
    """Latents of 512 columns and 64 of a rope, in rows or in pages: 64 sequences of 8192."""

    hq: int
    in_pages: bool
    b: int = 64
    s: int = 8192

    @property
    def package(self) -> str:
        return f"latent_{self.hq}_{'pages' if self.in_pages else 'rows'}"

    @property
    def spec(self) -> str:
        kv = f"latent(rope=64, page_size={PAGE})" if self.in_pages else "latent(rope=64)"
        shape = f"heads: {{q: {self.hq}, kv: 1}}\ndims: {{qk: 576, v: 512}}\nscale: {LATENT_SCALE}"
        return f"attncc: 1\nname: {self.package}\n{shape}\nkv: {kv}\nmodes: [decode]\n"

    @property
    def case(self) -> str:
        return f"latent/B{self.b}Hq{self.hq}S{self.s}D576-512{f'P{PAGE}' if self.in_pages else ''}"

    @property
    def bytes(self) -> int:
        return self.b * self.s * 576 * 2

    @property
    def flops(self) -> int:
        return 2 * self.b * self.hq * self.s * (576 + 512)


CACHES: Final = (
    Cache("bf16"),
    Cache("int8", "int8(per=token)", 8),
    Cache("int8_zeros", "int8(per=token, symmetric=false)", 8),
    Cache("fp8", "fp8_e4m3(per=head)", 8),
    Cache("int4", "int4(per=token)", 4),
    Cache("int4_zeros", "int4(per=token, symmetric=false)", 4),
)
LATENTS: Final = tuple(Latent(heads, in_pages) for heads in (128, 16) for in_pages in (True, False))


def main() -> int:
    return two_steps("caches", __doc__, emit_packages, measure)


def emit_packages(args: argparse.Namespace) -> int:
    return compile_all((each.spec for each in (*CACHES, *LATENTS)), args.dir, args.target)


def measure(args: argparse.Namespace) -> int:
    return measure_all(args, of_caches, of_latents)


def of_caches(rounds: int) -> list[Row]:
    """All of them in turns."""
    generator = torch.Generator("cuda").manual_seed(0)
    calls: dict[str, Call] = {}
    found: dict[str, Errors] = {}
    for cache in CACHES:
        given = stored(cache, generator)
        calls[cache.name] = attention_of(cache.package, given)
        found[cache.name] = checked(cache.name, calls[cache.name], given, SCALE, lambda *at, c=cache: numbers(c, *at))
    times = interleaved_graphs(calls, rounds)
    rows = [_row(c, c.name, times[c.name], found[c.name]) for c in CACHES]
    few = [row | report.ratio("bf16", times[row["impl"]].against(times["bf16"])) for row in rows[1:]]
    return [*rows[:1], *few]


def of_latents(rounds: int) -> list[Row]:
    rows: list[Row] = []
    for latent in LATENTS:
        given = latents(latent, torch.Generator("cuda").manual_seed(0))
        call = attention_of(latent.package, given)
        found = checked(latent.package, call, given, LATENT_SCALE, latent_numbers)
        time = interleaved_graphs({"attncc": call}, rounds)["attncc"]
        rows.append(_row(latent, "attncc", time, found) | {"tflops": _rate(latent.flops, time)})
        del given, call
        torch.cuda.empty_cache()
    return rows


def attention_of(package: str, given: Mapping[str, Tensor]) -> Call:
    attention = import_module(package).attention
    return lambda: attention(**given, return_lse=True)


# -- tensors -------------------------------------------------------------------------------------


def stored(cache: Cache, generator: torch.Generator) -> dict[str, Tensor]:
    """Queries, and pages in no order whose codes are random, so scaled that what they stand for has a variance of 1."""
    pages = lay_out([cache.s] * cache.b, cache.s // PAGE, PAGE, generator)
    given = {"q": _normal((cache.b, cache.hq, 1, cache.d), generator)} | _places(pages)
    for side in "kv":
        given |= _codes(cache, side, pages.count, generator)
    return given


def latents(latent: Latent, generator: torch.Generator) -> dict[str, Tensor]:
    q = _normal((latent.b, latent.hq, 1, 576), generator)
    if not latent.in_pages:
        return {"q": q, "k": _normal((latent.b, 1, latent.s, 576), generator)}
    pages = lay_out([latent.s] * latent.b, latent.s // PAGE, PAGE, generator)
    return {"q": q, "k": _normal((pages.count, PAGE, 1, 576), generator)} | _places(pages)


def _codes(cache: Cache, side: str, pages: int, generator: torch.Generator) -> dict[str, Tensor]:
    shape = (pages, PAGE, cache.hk, cache.d * cache.bits // 8 if cache.bits < 8 else cache.d)
    if cache.bits == 16:
        return {side: _normal(shape, generator)}
    if cache.name == "fp8":
        scales = _about(1.0, (cache.b, cache.hk), generator)
        return {side: _normal(shape, generator).to(torch.float8_e4m3fn), f"{side}_scales": scales}
    is_signed = cache.bits == 8 and not cache.has_zeros
    low, high = (-127, 128) if is_signed else (0, 256)
    codes = torch.randint(low, high, shape, generator=generator, device="cuda", dtype=torch.int16)
    levels = 2.0**cache.bits - 1
    beside = (pages, cache.hk, PAGE)
    scales = _about(math.sqrt(12) / levels, beside, generator)
    out = {side: codes.to(torch.int8 if is_signed else torch.uint8), f"{side}_scales": scales}
    return out | ({f"{side}_zeros": -scales * levels / 2} if cache.has_zeros else {})


def _places(pages: Pages) -> dict[str, Tensor]:
    return {"block_table": pages.table, "seqused_k": pages.used}


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)


def _about(size: float, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return size * (0.8 + 0.4 * torch.rand(shape, generator=generator, device="cuda"))


# -- what it should be ---------------------------------------------------------------------------


def checked(
    name: str, call: Call, given: Mapping[str, Tensor], scale: float, read: Callable[..., tuple[Tensor, Tensor]]
) -> Errors:
    """Distances from float64 of a few heads; `read` gives the keys and the values of a sequence's head.

    Raises:
        Rejected: it is wrong.
    """
    with poisoned():
        o, lse = call()
    q = given["q"]
    pairs: list[tuple[float, float]] = []
    for b, h in ((0, 0), (q.shape[0] - 1, q.shape[1] - 1), (q.shape[0] // 2, q.shape[1] // 2)):
        k, v = read(given, b, h)
        s = k @ q[b, h, 0].double() * scale
        want = torch.softmax(s, 0) @ v
        off = float((o[b, h, 0].double() - want).norm() / want.norm())
        pairs.append((off, float((lse[b, h, 0].double() - s.logsumexp(0)).abs())))
    found = Errors(max(e for e, _ in pairs), max(e for _, e in pairs), LIMITS["bf16"])
    if not (found.ok and bool(torch.isfinite(o).all()) and bool(torch.isfinite(lse).all())):
        raise Rejected(f"{name}: {found}")
    return found


def numbers(cache: Cache, given: Mapping[str, Tensor], b: int, h: int) -> tuple[Tensor, Tensor]:
    """Keys and values [S, D] that query head h of a sequence sees."""
    head, pages = h // (cache.hq // cache.hk), given["block_table"][b].long()

    def read(side: str) -> Tensor:
        codes = given[side][pages][:, :, head].flatten(0, 1).double()
        if cache.bits == 16:
            return codes
        if cache.bits == 4:
            codes = torch.cat([codes % 16, codes // 16], -1) - (0 if cache.has_zeros else 8)
        scales = given[f"{side}_scales"]
        beside = scales[b, head] if cache.name == "fp8" else scales[pages, head].flatten()[:, None]
        zeros = given[f"{side}_zeros"][pages, head].flatten()[:, None] if cache.has_zeros else 0.0
        return codes * beside.double() + zeros

    return read("k"), read("v")


def latent_numbers(given: Mapping[str, Tensor], b: int, h: int) -> tuple[Tensor, Tensor]:
    in_pages = "block_table" in given
    k = given["k"][given["block_table"][b].long()].flatten(0, 2) if in_pages else given["k"][b, 0]
    return k.double(), k[:, :512].double()


def _row(each: Cache | Latent, impl: str, t: Timing, found: Errors) -> Row:
    return {
        "case": each.case, "impl": impl, "ms": round(t.ms, 5), "spread": t.spread, "tbps": _rate(each.bytes, t),
        "o_error": found.o, "lse_error": found.lse,
    }  # fmt: skip


def _rate(work: float, t: Timing) -> float:
    return float(f"{work / t.ms / 1e9:.4g}")


if __name__ == "__main__":
    sys.exit(main())
