"""Selections against their rules written out in loops: scores are given, so that only the choosing is tested."""

from __future__ import annotations

import math
from collections.abc import Set as AbstractSet
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from attncc import reference, spec
from attncc.errors import Unsupported
from attncc.ir.attention import Attention
from attncc.reference import Outputs

H, G = 4, 2
SPEC = """
attncc: 1
name: t
heads: {{q: 4, kv: 2}}
dims: 8
inputs:
  s: {{shape: [Hq, nq, nk]}}
  share: {{shape: [Hq]}}
mask: {mask}
kv: {kv}
select:
  block: {{q: {q}, k: {k}}}
  score: {score}
  normalize: {normalize}
  heads: {heads}
  rule: {rule}
  force: {force}
  charge: {charge}
  take: {take}
  reuse: {reuse}
outputs: [o, lse, indices]
"""
DEFAULTS = {
    "mask": "causal", "kv": "dense", "q": 4, "k": 3, "score": "given(s)", "normalize": "none", "heads": "none",
    "rule": "topk(2)", "force": [], "charge": "true", "take": "selected", "reuse": "every_call",
}  # fmt: skip


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + sum(shape)))


def variant(**changes: Any) -> Attention:
    made = {**DEFAULTS, **changes}
    made["charge"] = str(made["charge"]).lower()
    made["force"] = str([str(word) for word in made["force"]])
    return spec.loads(SPEC.format(**made)).attention


def case(Sq: int = 13, Sk: int = 13, bq: int = 4, bk: int = 3, seed: int = 0) -> dict[str, Tensor]:
    nq, nk = -(-Sq // bq), -(-Sk // bk)
    scores = normal(H, nq, nk, seed=seed)
    scores[:, :, nk // 2] = scores[:, :, 0]  # ties
    return {
        "q": normal(1, H, Sq, 8, seed=seed + 1),
        "k": normal(1, G, Sk, 8, seed=seed + 2),
        "v": normal(1, G, Sk, 8, seed=seed + 3),
        "s": scores,
        "share": torch.tensor([0.0, 0.3, 0.6, 1.0], dtype=torch.float64),
    }


def run(attn: Attention, at: dict[str, Tensor], **more: Any) -> Outputs:
    inputs = {name: at[name] for name in ("s", "share")}
    return reference.outputs(attn, at["q"], at["k"], at["v"], inputs=inputs, **more)


def visible(at: dict[str, Tensor], bq: int = 4, bk: int = 3, sees: Any = lambda i, j: j <= i) -> list[list[bool]]:
    """Which blocks hold a pair that the mask shows."""
    Sq, Sk = at["q"].shape[2], at["k"].shape[2]
    rows, columns = range(-(-Sq // bq)), range(-(-Sk // bk))
    pairs = [[sees(r + Sk - Sq, j) for j in range(Sk)] for r in range(Sq)]
    block = lambda a, c: [x for row in pairs[a * bq : a * bq + bq] for x in row[c * bk : c * bk + bk]]
    return [[any(block(a, c)) for c in columns] for a in rows]


def selected(result: Outputs) -> list[list[set[int]]]:
    """The blocks of class 1, by head and query block."""
    classes = result.taps["indices"][0]
    return [[set((row == 1).nonzero().flatten().tolist()) for row in head] for head in classes]


def attend(at: dict[str, Tensor], allowed: Any, sees: Any = lambda i, j: j <= i) -> tuple[Tensor, Tensor]:
    """o and lse, a pair at a time: allowed(h, row, j) beside the mask."""
    q, k, v = (at[n][0] for n in "qkv")
    o, lse = torch.zeros_like(q), torch.full(q.shape[:2], -math.inf, dtype=torch.float64)
    for h in range(H):
        for r in range(q.shape[1]):
            i = r + k.shape[1] - q.shape[1]
            keys = [j for j in range(k.shape[1]) if sees(i, j) and allowed(h, r, j)]
            if keys:
                logits = k[h // (H // G), keys] @ q[h, r] / math.sqrt(8)
                lse[h, r] = logits.logsumexp(0)
                o[h, r] = logits.softmax(0) @ v[h // (H // G), keys]
    return o, lse


def check(result: Outputs, at: dict[str, Tensor], sets: Any, bq: int = 4, bk: int = 3, **more: Any) -> None:
    """The selection is `sets`, by head and query block, and o and lse are those over it."""
    assert selected(result) == sets
    o, lse = attend(at, lambda h, r, j: j // bk in sets[h][r // bq], **more)
    torch.testing.assert_close(result.o[0], o, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(result.lse[0], lse, rtol=1e-9, atol=1e-9)  # type: ignore[index]


def order(scores: list[float], among: list[int], first: AbstractSet[int] = frozenset()) -> list[int]:
    """Blocks from the best on: forced ones, then by score, the lower number at a tie."""
    return sorted(among, key=lambda c: (c not in first, -scores[c], c))


def each(at: dict[str, Tensor], choose: Any, **blocks: Any) -> list[list[set[int]]]:
    """choose(head, query block, scores, visible blocks) for all of them."""
    seen = visible(at, **blocks)
    rows = [[c for c, yes in enumerate(row) if yes] for row in seen]
    return [[choose(h, a, at["s"][h, a].tolist(), row) for a, row in enumerate(rows)] for h in range(H)]


# -- rules -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(13, 13), (16, 12), (5, 14), (1, 9)], ids=str)
@pytest.mark.parametrize("k", [1, 2, 50])
def test_topk(shape: tuple[int, int], k: int) -> None:
    at = case(*shape)
    check(run(variant(rule=f"topk({k})"), at), at, each(at, lambda h, a, s, row: set(order(s, row)[:k])))


def test_topk_by_head() -> None:
    at = case()
    result = run(variant(rule="topk(h + 1)"), at)
    check(result, at, each(at, lambda h, a, s, row: set(order(s, row)[: h + 1])))


@pytest.mark.parametrize("nearest", [True, False])
@pytest.mark.parametrize("least", [0, 1, 3])
def test_topk_ratio_counts_all_blocks(nearest: bool, least: int) -> None:
    at = case()
    word = "nearest" if nearest else "down"
    result = run(variant(rule=f"topk_ratio(share[h], round={word}, least={least})"), at)
    counts = [int(x * 5 + 0.5 * nearest) for x in at["share"].tolist()]
    check(result, at, each(at, lambda h, a, s, row: set(order(s, row)[: max(least, counts[h])])))


def test_a_share_is_rounded_in_double() -> None:
    at = case(8, 30, 8, 3)
    result = run(variant(rule="topk_ratio(0.3)", mask="true", q=8), at)
    assert [len(row) for head in selected(result) for row in head] == [3] * H


def _mass(p: dict[int, float], ranked: list[int], tau: float, crossing: bool, least: int) -> set[int]:
    need, held, taken = tau * sum(p.values()), 0.0, set[int]()
    for rank, c in enumerate(ranked):
        inside = held < need if crossing else held + p.get(c, 0.0) <= need
        if inside or rank < least:
            taken.add(c)
        held += p.get(c, 0.0)
    return taken


def _softmax(s: list[float], among: list[int]) -> dict[int, float]:
    e = {c: math.exp(s[c]) for c in among}
    return {c: x / sum(e.values()) for c, x in e.items()}


@pytest.mark.parametrize("crossing", ["in", "out"])
@pytest.mark.parametrize("least", [0.0, 0.41])
@pytest.mark.parametrize("tau", ["0.5", "0.9", "share[h]"])
def test_mass(crossing: str, least: float, tau: str) -> None:
    at = case(seed=3)
    result = run(variant(rule=f"mass({tau}, crossing={crossing}, least={least})", normalize="softmax"), at)
    taus = at["share"].tolist() if "share" in tau else [float(tau)] * H

    def choose(h: int, a: int, s: list[float], row: list[int]) -> set[int]:
        return _mass(_softmax(s, row), order(s, row), taus[h], crossing == "in", max(1, int(least * 5)))

    # at tau = 1 the last block is in or out by the last bit of the sums: only its weight is compared
    expected = each(at, choose)
    got = selected(result)
    heads = range(H - 1) if "share" in tau else range(H)
    assert [got[h] for h in heads] == [expected[h] for h in heads]
    o, _ = attend(at, lambda h, r, j: j // 3 in got[h][r // 4])
    torch.testing.assert_close(result.o[0], o, rtol=1e-9, atol=1e-9)


def test_all_of_the_mass_is_dense() -> None:
    at = case()
    at["s"] = at["s"].clamp(-1, 1)
    result = run(variant(rule="mass(1.0)", normalize="softmax"), at)
    check(result, at, each(at, lambda h, a, s, row: set(row)))


def test_any_above() -> None:
    at = case()
    result = run(variant(rule="any_above(share[h])"), at)
    check(result, at, each(at, lambda h, a, s, row: {c for c in row if s[c] > float(at["share"][h])}))


def test_any_above_the_anchor() -> None:
    at = case()
    result = run(variant(rule="any_above(share[h])", normalize="anchor", force=["sink(2)"]), at)

    def choose(h: int, a: int, s: list[float], row: list[int]) -> set[int]:
        tau, near = float(at["share"][h]), [math.exp(s[c]) for c in (0, 1) if c in row]
        return {c for c in row if c in (0, 1) or math.exp(s[c]) > tau * sum(near)}

    check(result, at, each(at, choose))


def test_bernoulli_reads_block_numbers() -> None:
    at = case()
    at["s"] = at["s"].abs().clamp(max=0.99)
    result = run(variant(rule="bernoulli(exp(-abs(i - j) / 2))"), at)
    check(result, at, each(at, lambda h, a, s, row: {c for c in row if s[c] < math.exp(-abs(a - c) / 2)}))


@pytest.mark.parametrize("take", ["selected", "marginal", "rest"])
def test_ternary(take: str) -> None:
    at = case()
    attn = variant(rule="ternary(0.25, 0.45)", mask="true", take=take)
    classes = run(attn, at).taps["indices"][0]
    sees = lambda i, j: True
    expected = torch.zeros_like(classes)
    for h in range(H):
        for a in range(4):
            ranked = order(at["s"][h, a].tolist(), list(range(5)))
            expected[h, a, ranked[:1]] = 1
            expected[h, a, ranked[3:]] = -1
    assert torch.equal(classes, expected)
    wanted = {"selected": [1], "marginal": [0], "rest": [0, -1]}[take]
    o, _ = attend(at, lambda h, r, j: int(expected[h, r // 4, j // 3]) in wanted, sees)
    result = run(attn, at)
    torch.testing.assert_close(result.o[0], o, rtol=1e-9, atol=1e-9)


def test_what_the_mask_hides_is_negligible() -> None:
    at = case()
    classes = run(variant(), at).taps["indices"][0]
    hidden = ~torch.tensor(visible(at))
    assert bool((classes[:, hidden] == -1).all())
    assert bool((classes[:, ~hidden] >= 0).all())


# -- forced blocks -----------------------------------------------------------------------------------

FORCED: dict[str, Any] = {
    "sink(2)": lambda a, c, at: c < 2,
    "first_column": lambda a, c, at: c == 0,
    "local(2)": lambda a, c, at: (last := _end(a, at) // 3) - 2 < c <= last,
    "diagonal": lambda a, c, at: any(j // 3 == c for j in range(_end(a, at) + 1) if j >= _begin(a, at)),
    "rows(i >= 9)": lambda a, c, at: _end(a, at) >= 9,
    "columns(j % 5 == 4)": lambda a, c, at: any(j % 5 == 4 for j in range(c * 3, min(c * 3 + 3, at["k"].shape[2]))),
}


def _begin(a: int, at: dict[str, Tensor]) -> int:
    return a * 4 + at["k"].shape[2] - at["q"].shape[2]


def _end(a: int, at: dict[str, Tensor]) -> int:
    return min(a * 4 + 4, at["q"].shape[2]) - 1 + at["k"].shape[2] - at["q"].shape[2]


@pytest.mark.parametrize("shape", [(13, 13), (6, 14), (1, 9)], ids=str)
@pytest.mark.parametrize("word", FORCED)
@pytest.mark.parametrize("charge", [True, False])
def test_forced(shape: tuple[int, int], word: str, charge: bool) -> None:
    at = case(*shape)

    def choose(h: int, a: int, s: list[float], row: list[int]) -> set[int]:
        must = {c for c in row if FORCED[word](a, c, at)}
        if charge:
            return must | set(order(s, row, must)[:2])
        return must | set(order(s, [c for c in row if c not in must])[:2])

    check(run(variant(force=[word], charge=charge), at), at, each(at, choose))


def test_charged_blocks_take_their_mass_first() -> None:
    at = case(seed=5)
    attn = variant(rule="mass(0.6)", normalize="softmax", force=["first_column", "diagonal"])

    def choose(h: int, a: int, s: list[float], row: list[int]) -> set[int]:
        must = {c for c in row if c == 0 or FORCED["diagonal"](a, c, at)}
        return must | _mass(_softmax(s, row), order(s, row, must), 0.6, True, 1)

    check(run(attn, at), at, each(at, choose))


def test_blocks_beside_the_budget_leave_the_competition() -> None:
    at = case(seed=5)
    attn = variant(rule="mass(0.6)", normalize="softmax", force=["sink(1)"], charge=False)

    def choose(h: int, a: int, s: list[float], row: list[int]) -> set[int]:
        rest = [c for c in row if c]
        return {0} | (_mass(_softmax(s, rest), order(s, rest), 0.6, True, 1) if rest else set())

    check(run(attn, at), at, each(at, choose))


def test_nothing_but_forced_is_a_sink_and_a_window() -> None:
    at = case(12, 12, 3, 3)
    result = run(variant(rule="any_above(1e9)", force=["sink(1)", "local(1)"], q=3), at)
    o, _ = attend(at, lambda h, r, j: j < 3 or j // 3 == r // 3)
    torch.testing.assert_close(result.o[0], o, rtol=1e-9, atol=1e-9)


def test_local_follows_the_phase_of_its_segment() -> None:
    """SALE's kernel: 4 local blocks in segments of 4 are 4, 5, 6 or 7, by the phase of the query block."""
    at = case(40, 40, 1, 1)
    sets = selected(run(variant(rule="any_above(1e9)", force=["local(4, segment=4)"], q=1, k=1), at))[0]
    assert [len(row) for row in sets[:12]] == [1, 2, 3, 4, 4, 5, 6, 7, 4, 5, 6, 7]
    assert [len(row) for row in sets[12:]] == [4, 5, 6, 7] * 7
    assert all(row == set(range(i + 1 - len(row), i + 1)) for i, row in enumerate(sets))


def test_an_infinite_score_is_beyond_competition() -> None:
    at = case(seed=6)
    at["s"][:, :, 1] = math.inf
    at["s"][1:, 2, 0] = -math.inf
    result = run(variant(normalize="softmax"), at)

    def choose(h: int, a: int, s: list[float], row: list[int]) -> set[int]:
        rest = [c for c in row if math.isfinite(s[c])]
        return {c for c in row if s[c] == math.inf} | set(order(s, rest)[:2])

    check(result, at, each(at, choose))


# -- heads -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", ["group_sum", "max", "soft_vote"])
@pytest.mark.parametrize("normalize", ["softmax", "none"])
def test_heads(heads: str, normalize: str) -> None:
    at = case(seed=9)
    result = run(variant(heads=heads, normalize=normalize), at)

    def choose(h: int, a: int, s: list[float], row: list[int]) -> set[int]:
        rows = [at["s"][g, a].tolist() for g in range(H)]
        votes = [_softmax(x, row) if normalize == "softmax" else dict(enumerate(x)) for x in rows]
        group = votes[h // 2 * 2 : h // 2 * 2 + 2] if heads == "group_sum" else votes
        merged = {c: (max if heads == "max" else sum)(v[c] for v in group) for c in row}
        return set(sorted(row, key=lambda c: (-round(merged[c], 12), c))[:2])

    check(result, at, each(at, choose))


def test_heads_vote_on_what_they_see() -> None:
    """A block that one head alone sees has that head's score for all, and those who do not see it go without."""
    at = case(seed=2)
    at["s"] = -at["s"].abs() - 1
    sees = lambda h, i, j: j <= i or h == 3
    result = run(variant(heads="max", mask="causal | (h == 3)"), at)
    for a in range(4):
        seen = [[c for c in range(5) if h == 3 or 3 * c <= min(12, a * 4 + 3)] for h in range(H)]
        worth = [max(float(at["s"][h, a, c]) for h in range(H) if c in seen[h]) for c in range(5)]
        best = set(order(worth, list(range(5)))[:2])
        assert [row[a] for row in selected(result)] == [best & set(seen[h]) for h in range(H)]
    chosen = selected(result)
    for h in (0, 3):
        o, _ = attend(at, lambda _, r, j, h=h: j // 3 in chosen[h][r // 4], lambda i, j, h=h: sees(h, i, j))
        torch.testing.assert_close(result.o[0, h], o[h], rtol=1e-9, atol=1e-9)


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


# -- what is refused, and edges ----------------------------------------------------------------------


def test_clusters_of_given_scores_are_refused() -> None:
    attn = variant()
    assert attn.part.select is not None
    select = replace(attn.part.select, block=(4, "cluster"))
    with pytest.raises(Unsupported, match="clusters of centroid_dot only"):
        run(replace(attn, parts=(replace(attn.part, select=select),)), case())


def test_no_queries() -> None:
    at = case(1, 9)
    at["q"], at["s"] = at["q"][:, :, :0], at["s"][:, :0]
    result = run(variant(), at)
    assert result.o.shape == (1, H, 0, 8)
    assert result.taps["indices"].shape == (1, H, 0, 3)


def test_a_selection_has_no_gradient_of_its_own() -> None:
    """Gradients are those of attention over the chosen blocks."""
    at = case()
    for n in ("q", "k", "v", "s"):
        at[n].requires_grad_()
    result = run(variant(), at)
    chosen = selected(result)
    o, _ = attend(at, lambda h, r, j: j // 3 in chosen[h][r // 4])
    weight = normal(H, 13, 8)
    leaves = [at[n] for n in "qkv"]
    expected = torch.autograd.grad((o * weight).sum(), leaves)
    got = torch.autograd.grad((result.o[0] * weight).sum(), [*leaves, at["s"]], allow_unused=True)
    assert got[3] is None or not bool(got[3].any())
    for x, y in zip(got[:3], expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)
