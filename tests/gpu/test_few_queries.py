"""On a CUDA GPU: calls of few queries, with keys in pages, in graphs, and from several streams."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from gpu import compiled

from attncc import spec
from attncc.check.cases import Case
from attncc.check.pages import lay_out
from attncc.check.run import check_case

pytestmark = pytest.mark.gpu

CUDA = "cuda"
HEADS, DIM, PAGE, ROOM = (32, 8), 128, 64, 40
MLA = "heads: {q: 128, kv: 1}\ndims: {qk: 576, v: 512}\nmask: causal\n"
BODY = f"heads: {{q: {HEADS[0]}, kv: {HEADS[1]}}}\ndims: {DIM}\nmask: causal\n"
SCHEDULES = {
    "rows": BODY,
    "rows, stream-K": f"{BODY}schedule: stream_k\n",
    "pages": f"{BODY}kv: paged({PAGE})\n",
    "pages of 16": f"{BODY}kv: paged(16)\n",
    "pages of one": f"{BODY}kv: paged(1)\n",
    "pages, split": f"{BODY}kv: paged({PAGE})\nschedule: split_kv(8)\n",
    "pages, by batch": f"{BODY}kv: paged({PAGE})\nnumerics: {{reproducible: batch}}\n",
    "latents": f"{MLA}kv: latent(rope=64)\n",
    "latents in pages": f"{MLA}kv: latent(rope=64, page_size={PAGE})\n",
    "latents in pages of 16": f"{MLA}kv: latent(rope=64, page_size=16)\n",
    "latents in pages of one": f"{MLA}kv: latent(rope=64, page_size=1)\n",
    "latents in pages, by batch": f"{MLA}kv: latent(rope=64, page_size={PAGE})\nnumerics: {{reproducible: batch}}\n",
}


def package(folder: Path, schedule: str) -> ModuleType:
    return compiled.package(folder, f"decode_{[*SCHEDULES].index(schedule)}", SCHEDULES[schedule])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_few_queries_agree_with_the_oracle(folder: Path, schedule: str) -> None:
    attn = spec.loads(f"attncc: 1\nname: t\n{SCHEDULES[schedule]}").attention
    attention = package(folder, schedule).attention
    shapes = [(1, 1, 8192), (4, 1, 4097), (3, 5, 1000), (2, 16, 2050), (1, 1, 1), (3, 1, 70)]
    traits = [Case(3, 2, 1500, trait) for trait in ("nan_keys", "nan_around", "nan_neighbour", "large_logits")]
    outcomes = [check_case(attn, attention, case, CUDA) for case in [*(Case(*s) for s in shapes), *traits]]
    assert not [(str(o.case), o.verdict, o.detail, o.deviations) for o in outcomes if not o.passed]


def cache(lengths: list[int], seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator(CUDA).manual_seed(seed)
    pages = lay_out(lengths, ROOM, PAGE, g)
    keys = [[torch.randn(n, HEADS[1], DIM, device=CUDA, generator=g) for n in lengths] for _ in range(2)]
    k, v = (pages.fill(x, (HEADS[1], DIM)).bfloat16() for x in keys)
    return {"k": k, "v": v, "block_table": pages.table, "seqused_k": pages.used}


def test_a_graph_is_replayed_with_other_lengths(folder: Path) -> None:
    attention = package(folder, "pages").attention
    x = cache([ROOM * PAGE, 1500, 3, 0])
    q = torch.randn(4, HEADS[0], 1, DIM, device=CUDA, dtype=torch.bfloat16)
    attention(q, **x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = attention(q, **x)
    for lengths in ([100, 1400, 1, 0], [ROOM * PAGE, 0, 2, 0], [64, 65, 3, 0]):
        x["seqused_k"].copy_(torch.tensor(lengths, dtype=torch.int32))
        graph.replay()
        assert torch.equal(o, attention(q, **x))
        assert (o[3] == 0).all()


def test_streams_have_workspaces_of_their_own(folder: Path) -> None:
    attention = package(folder, "pages").attention
    calls = [(torch.randn(4, HEADS[0], 1, DIM, device=CUDA).bfloat16(), cache([2500, 900, n, 64])) for n in (1, 70)]
    want = [attention(q, **x) for q, x in calls]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in calls]
    got: list[list[torch.Tensor]] = [[], []]
    for _ in range(50):
        for at, (stream, (q, x)) in enumerate(zip(streams, calls, strict=True)):
            with torch.cuda.stream(stream):
                got[at].append(attention(q, **x))
    torch.cuda.synchronize()
    assert all(torch.equal(o, w) for os, w in zip(got, want, strict=True) for o in os)
