"""`reproducible: batch`: a sequence has the same bits alone as among others, whatever those are and hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from codegen.emitted import Package, normal, package

from attncc.check.pages import lay_out

BATCH = "mask: causal\nnumerics: {reproducible: batch}"
PLAIN = "heads: {q: 4, kv: 2}\ndims: 16\ndtype: fp32\n"
LATENT = "heads: {q: 4, kv: 2}\ndims: {qk: 32, v: 16}\ndtype: fp32\n"
STORAGES = {
    "rows": f"{PLAIN}{BATCH}",
    "latents": f"{LATENT}kv: latent(rope=16)\n{BATCH}",
    "pages of 8": f"{PLAIN}kv: paged(8)\n{BATCH}",
    "pages of 64": f"{PLAIN}kv: paged(64)\n{BATCH}",
    "latents in pages of 8": f"{LATENT}kv: latent(rope=16, page_size=8)\n{BATCH}",
    "latents in pages of 64": f"{LATENT}kv: latent(rope=16, page_size=64)\n{BATCH}",
}
SCHEDULES = {"auto": "", "split_kv": "\nschedule: split_kv(3)"}
LENGTHS = (150, 67, 1, 0, 129)
ROWS = 2


def together(p: Package, lengths: tuple[int, ...], numbers: tuple[int, ...], room: int = 192) -> dict[str, Any]:
    """A call of sequences that are drawn by their number; in rows all have the longest's keys."""
    heads, dims = p.attn.heads, p.attn.dims
    x: dict[str, Any] = {"q": torch.cat([normal(1, heads.q, ROWS, dims.qk, seed=n) for n in numbers])}
    if not p.attn.page_size:
        k, v = (
            torch.cat([normal(1, heads.kv, max(LENGTHS), d, seed=at + n) for n in numbers])
            for at, d in ((100, dims.qk), (200, dims.v))
        )
        return x | ({"k": k} if p.attn.is_latent else {"k": k, "v": v})
    pages = lay_out([*lengths], room // p.attn.page_size, p.attn.page_size, torch.Generator().manual_seed(sum(numbers)))
    for name, at, dim in (("k", 100, dims.qk), ("v", 200, dims.v)):
        keys = [normal(n, heads.kv, dim, seed=at + number) for n, number in zip(lengths, numbers, strict=True)]
        x[name] = pages.fill(keys, (heads.kv, dim))
    if p.attn.is_latent:
        del x["v"]
    return x | {"block_table": pages.table, "seqused_k": pages.used}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("storage", STORAGES)
def test_a_sequence_alone_has_the_bits_that_it_has_among_others(storage: str, schedule: str) -> None:
    """Where there are pages, also where its table is narrower, and where its pages lie elsewhere."""
    p = package(STORAGES[storage] + SCHEDULES[schedule]).tiles(16, 16, split=1, fill=24)
    numbers = tuple(range(len(LENGTHS)))
    o, lse = p(**together(p, LENGTHS, numbers), return_lse=True)
    for n, length in enumerate(LENGTHS):
        for room in {192, max(64, -(-length // 64) * 64)} if p.attn.page_size else {192}:
            own, own_lse = p(**together(p, (length,), (n,), room), return_lse=True)
            assert torch.equal(own[0], o[n])
            assert torch.equal(own_lse[0], lse[n])


@pytest.mark.parametrize("storage", STORAGES)
def test_what_neighbours_hold_does_not_matter(storage: str) -> None:
    """Nor which they are, nor where among them a sequence stands."""
    p = package(STORAGES[storage]).tiles(16, 16, split=1, fill=24)
    lengths, numbers = (150, 67, 129), (0, 1, 4)
    x = together(p, lengths, numbers)
    want = p(**x)
    turned = p(**together(p, lengths[::-1], numbers[::-1]))
    assert torch.equal(turned.flip(0), want)
    others = p(**together(p, (3, 67, 40), (7, 1, 9)))
    assert torch.equal(others[1], want[1])
    spoilt = {name: t.clone() for name, t in x.items()}
    for name in {"k", "v"} & set(x):
        if p.attn.page_size:
            spoilt[name][x["block_table"][0, :3].long()] = torch.nan
        else:
            spoilt[name][0] = torch.nan
    spoilt["q"][2] *= 1000.0
    assert torch.equal(p(**spoilt)[1], want[1])


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("target", ["sm_90", "sm_80", "interpreter"])
def test_a_config_does_not_depend_on_neighbours(storage: str, target: str) -> None:
    assert bounded(STORAGES[storage], target) == {"Sq"}


WITHOUT_SHARES = {
    "a prompt's": f"{PLAIN}{BATCH}\nmodes: [prefill]",
    "by wish": f"{PLAIN}{BATCH}\nschedule: tile",
    "packed": f"{PLAIN}{BATCH}\nlayout: varlen",
    "packed, in pages": f"{PLAIN}kv: paged(8)\n{BATCH}\nlayout: varlen",
    "listed": f"{PLAIN}inputs: {{ids: {{shape: [B, Sk], dtype: int32}}}}\nmask: document(ids)\n"
    "numerics: {reproducible: batch}",
}


@pytest.mark.parametrize("variant", WITHOUT_SHARES)
def test_nor_does_one_of_calls_without_shares(variant: str) -> None:
    assert bounded(WITHOUT_SHARES[variant], "sm_90") <= {"Sq"}
    assert "pairs" in bounded(WITHOUT_SHARES[variant].replace("reproducible: batch", "reproducible: run"), "sm_90")


def bounded(body: str, target: str) -> set[str]:
    """The sizes that tell a package's configs apart."""
    table = package(body, target=target).module.VARIANT.configs[target].TABLE
    return {size for bounds, _ in table for size in bounds}
