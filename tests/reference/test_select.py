"""Rules, forced blocks and heads of selections in loops: scores are given, so that only the choosing is tested."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from choosing import H, attend, begin, case, check, each, end, normal, order, run, selected, softmax, variant, visible

from attncc.errors import Unsupported

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


@pytest.mark.parametrize("crossing", ["in", "out"])
@pytest.mark.parametrize("least", [0.0, 0.41])
@pytest.mark.parametrize("tau", ["0.5", "0.9", "share[h]"])
def test_mass(crossing: str, least: float, tau: str) -> None:
    at = case(seed=3)
    result = run(variant(rule=f"mass({tau}, crossing={crossing}, least={least})", normalize="softmax"), at)
    taus = at["share"].tolist() if "share" in tau else [float(tau)] * H

    def choose(h: int, a: int, s: list[float], row: list[int]) -> set[int]:
        return _mass(softmax(s, row), order(s, row), taus[h], crossing == "in", max(1, int(least * 5)))

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
    "local(2)": lambda a, c, at: (last := end(a, at) // 3) - 2 < c <= last,
    "diagonal": lambda a, c, at: any(j // 3 == c for j in range(end(a, at) + 1) if j >= begin(a, at)),
    "rows(i >= 9)": lambda a, c, at: end(a, at) >= 9,
    "columns(j % 5 == 4)": lambda a, c, at: any(j % 5 == 4 for j in range(c * 3, min(c * 3 + 3, at["k"].shape[2]))),
}


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
        return must | _mass(softmax(s, row), order(s, row, must), 0.6, True, 1)

    check(run(attn, at), at, each(at, choose))


def test_blocks_beside_the_budget_leave_the_competition() -> None:
    at = case(seed=5)
    attn = variant(rule="mass(0.6)", normalize="softmax", force=["sink(1)"], charge=False)

    def choose(h: int, a: int, s: list[float], row: list[int]) -> set[int]:
        rest = [c for c in row if c]
        return {0} | (_mass(softmax(s, rest), order(s, rest), 0.6, True, 1) if rest else set())

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
        votes = [softmax(x, row) if normalize == "softmax" else dict(enumerate(x)) for x in rows]
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
