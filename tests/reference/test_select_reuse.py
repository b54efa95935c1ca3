"""Selections that serve again, and means of keys over runs and over chosen blocks."""

from __future__ import annotations

import math

import pytest
import torch
from choosing import H, attend, case, check, normal, run, selected, variant

from attncc import reference, spec

# -- use of earlier selections -----------------------------------------------------------------------


def test_every_third_call_selects_anew() -> None:
    attn, at = variant(reuse="every(3)"), case()
    first = run(attn, at)
    other = {**at, "s": -at["s"]}
    second = run(attn, other, before=first.selections)
    third = run(attn, other, before=second.selections)
    fourth = run(attn, other, before=third.selections)
    fresh = selected(run(attn, other))
    assert selected(first) == selected(second) == selected(third) != fresh
    assert selected(fourth) == fresh


def test_a_selection_lasts_while_queries_point_its_way() -> None:
    attn, at = variant(reuse="cosine(0.9)"), case()
    first = run(attn, at)
    mean = at["q"][0].mean(1).flatten()
    across = normal(mean.numel())
    across -= across @ mean / (mean @ mean) * mean
    for cosine, again in ((0.95, True), (0.85, False)):
        turned = cosine * mean / mean.norm() + math.sqrt(1 - cosine**2) * across / across.norm()
        q = turned.view(1, H, 1, 8).expand_as(at["q"]).contiguous()
        moved = run(attn, {**at, "q": q, "s": -at["s"]}, before=first.selections)
        assert (selected(moved) == selected(first)) == again


def test_queries_are_judged_by_those_that_selected() -> None:
    """Small turns add up: each is compared with the queries of the last selection, not of the last call."""
    attn, at = variant(reuse="cosine(0.9)"), case()
    x, y = normal(2, H * 8).unbind()
    x, y = x / x.norm(), y - (y @ x) / (x @ x) * x
    y = y / y.norm()
    result, made = None, []
    for step in range(4):  # 20 degrees each; 0.9 is 25.8
        angle = math.radians(20 * step)
        q = (math.cos(angle) * x + math.sin(angle) * y).view(1, H, 1, 8).expand_as(at["q"]).contiguous()
        here = {**at, "q": q, "s": normal(*at["s"].shape, seed=step)}
        result = run(attn, here, before=() if result is None else result.selections)
        made.append(selected(result))
    assert made[0] == made[1] != made[2] == made[3]


def test_a_given_selection_is_demanded() -> None:
    with pytest.raises(ValueError, match="before: missing"):
        run(variant(reuse="given"), case())


@pytest.mark.parametrize("reuse", ["given", "across_layers"])
def test_another_layer_may_bring_the_selection(reuse: str) -> None:
    at = case()
    first = run(variant(), at)
    later = {**case(seed=4), "s": -at["s"]}
    result = run(variant(reuse=reuse), later, before=first.selections)
    check(result, later, selected(first))


def test_forced_blocks_are_those_of_the_call() -> None:
    """A key is added between two decodes: the page that it opens is forced, the rule's choice is the earlier one."""
    attn = variant(rule="topk(1)", force=["local(1)"], charge=False, reuse="every(2)")
    before = run(attn, case(1, 9))
    picked = selected(before)[0][0] - {2}
    at = case(1, 10)
    after = run(attn, at, before=before.selections)
    assert [row[0] for row in selected(after)] == [s[0] - {2} | {3} for s in selected(before)]
    assert len(picked) == 1


def test_a_selection_for_other_queries_is_refused() -> None:
    before = run(variant(reuse="given"), case(13, 13), before=run(variant(), case(13, 13)).selections)
    with pytest.raises(ValueError, match="before: selects among 13 keys for 13 queries"):
        run(variant(reuse="given"), case(5, 13), before=before.selections)


def test_a_list_serves_calls_of_fewer_queries() -> None:
    """A chunk of the prefill makes it, decode goes on with it: both have one block of queries."""
    attn = variant(rule="topk(2)", q=4, reuse="every(2)", mask="true")
    before = run(attn, case(4, 12))
    at = case(1, 13)
    after = run(attn, at, before=before.selections)
    check(after, at, selected(before), sees=lambda i, j: True)


CLUSTERS = """
attncc: 1
name: t
heads: {q: 4, kv: 2}
dims: 8
inputs:
  qc: {shape: [B, Hq, 3, Dqk]}
  kc: {shape: [B, Hk, 4, Dqk]}
select:
  block: {q: token, k: cluster}
  score: centroid_dot(kc)
  normalize: weighted_softmax
  rule: topk(2)
  reuse: every(3)
"""


@pytest.mark.parametrize("clustered", [False, True])
def test_clusters_stay_and_later_keys_lie_in_none(clustered: bool) -> None:
    text = CLUSTERS.replace("q: token", "q: cluster").replace("(kc)", "(kc, q=qc)") if clustered else CLUSTERS
    attn, at, now = spec.loads(text).attention, case(3, 9), case(3, 11, seed=7)
    inputs = {"qc": normal(1, H, 3, 8), "kc": normal(1, 2, 4, 8)}
    first = reference.outputs(attn, at["q"], at["k"], at["v"], inputs=inputs)
    then = first.selections[0][0]
    assert then is not None
    second = reference.outputs(attn, now["q"], now["k"], now["v"], inputs=inputs, before=first.selections)
    taken = lambda h, r, j: j < 9 and int(then.classes[h, then.q_block[h, r], then.k_block[h, j]]) == 1
    o, _ = attend(now, taken, lambda i, j: True)
    torch.testing.assert_close(second.o[0], o, rtol=1e-9, atol=1e-9)
    if clustered:
        few = case(2, 11)
        with pytest.raises(ValueError, match="before: selects among 9 keys for 3 queries, this call has 11 keys and 2"):
            reference.outputs(attn, few["q"], few["k"], few["v"], inputs=inputs, before=first.selections)


# -- means of keys -----------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
def test_means_of_runs_of_keys(weighted: bool) -> None:
    text = """
attncc: 1
name: t
heads: {q: 4, kv: 2}
dims: 8
mask: (j + 1) * 3 <= i + 1
kv: pooled(3)
""".replace("pooled(3)", f"pooled(3, weighted={str(weighted).lower()})")
    attn, at = spec.loads(text).attention, case(10, 11)
    for n in "qkv":
        at[n].requires_grad_()
    result = reference.outputs(attn, at["q"], at["k"], at["v"])
    o, lse = torch.zeros(H, 10, 8, dtype=torch.float64), torch.full((H, 10), -math.inf, dtype=torch.float64)
    for h in range(H):
        k, v = at["k"][0, h // 2], at["v"][0, h // 2]
        for r in range(10):
            seen = [c for c in range(4) if (c + 1) * 3 <= r + 2]
            if seen:
                runs = [slice(3 * c, 3 * c + 3) for c in seen]
                logits = torch.stack([k[x].mean(0) for x in runs]) @ at["q"][0, h, r] / math.sqrt(8)
                if weighted:
                    logits = logits + torch.tensor([len(k[x]) for x in runs], dtype=torch.float64).log()
                lse[h, r] = logits.logsumexp(0)
                o[h, r] = logits.softmax(0) @ torch.stack([v[x].mean(0) for x in runs])
    torch.testing.assert_close(result.o[0], o, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(result.lse[0], lse, rtol=1e-9, atol=1e-9)  # type: ignore[index]
    weight = normal(H, 10, 8)
    leaves = [at[n] for n in "qkv"]
    got = torch.autograd.grad((result.o[0] * weight).sum(), leaves)
    expected = torch.autograd.grad((o * weight).sum(), leaves)
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("take", ["selected", "marginal", "rest"])
def test_means_of_a_selections_blocks(weighted: bool, take: str) -> None:
    """A mean is of the keys that the mask shows to some row, and a row sees it when it sees all of them."""
    kv = f"pooled(weighted={str(weighted).lower()})"
    attn = variant(rule="ternary(0.3, 0.3)", kv=kv, take=take, mask="causal & (j != 4)")
    at = case(9, 13)
    sees = lambda i, j: j <= i and j != 4
    result = run(attn, at)
    classes = result.taps["indices"][0]
    wanted = {"selected": [1], "marginal": [0], "rest": [0, -1]}[take]
    for h in range(H):
        k, v = at["k"][0, h // 2], at["v"][0, h // 2]
        for r in range(9):
            blocks = [[j for j in range(3 * c, min(3 * c + 3, 13)) if j != 4] for c in range(5)]
            taken = [m for c, m in enumerate(blocks) if int(classes[h, r // 4, c]) in wanted and max(m) <= r + 4]
            assert all(sees(r + 4, j) for m in taken for j in m)
            if not taken:
                assert result.lse[0, h, r] == -math.inf  # type: ignore[index]
                continue
            logits = torch.stack([k[m].mean(0) for m in taken]) @ at["q"][0, h, r] / math.sqrt(8)
            if weighted:
                logits = logits + torch.tensor([len(m) for m in taken], dtype=torch.float64).log()
            o = logits.softmax(0) @ torch.stack([v[m].mean(0) for m in taken])
            torch.testing.assert_close(result.o[0, h, r], o, rtol=1e-9, atol=1e-9)
