"""Scores at a few bits: the integers of SALE, what smoothing brings back, and the anchor of each row."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from selecting import SCALE, call, cells, close, rows_for, scored, selecting
from torch import Tensor

from attncc.reference.select.blocks import cut
from attncc.reference.select.lowbit import GROUPS, anchored, estimate, integers


def quantised(x: Tensor, group: list[int]) -> Tensor:
    """x [N, D] as int4 with one scale a group reads back."""
    result = torch.zeros_like(x)
    for n in range(len(x)):
        most = max(float(x[m].abs().max()) for m in range(len(x)) if group[m] == group[n])
        for d in range(x.shape[1]):
            result[n, d] = max(-7, min(7, round(float(x[n, d]) / (most / 7)))) * (most / 7)
    return result


def thread_groups(Sq: int, Sk: int) -> tuple[list[int], list[int]]:
    """Card 1: rows r and r + 8 of each 16; inside each 32 keys those with (j mod 8) // 2 alike."""
    return [r // 16 * 100 + r % 16 % 8 for r in range(Sq)], [c // 32 * 100 + c % 8 // 2 for c in range(Sk)]


GROUPINGS = {
    "thread": thread_groups,
    "token": lambda Sq, Sk: (list(range(Sq)), list(range(Sk))),
    "tensor": lambda Sq, Sk: ([0] * Sq, [0] * Sk),
    "block": lambda Sq, Sk: ([r // 16 for r in range(Sq)], [c // 8 for c in range(Sk)]),
}


@pytest.mark.parametrize("per", GROUPINGS)
@pytest.mark.parametrize("smooth", [True, False])
def test_lowbit_qk(per: str, smooth: bool) -> None:
    Sq, Sk = 21, 37
    options = {"smooth": "mean"} if smooth else {}
    s, rows, _ = scored(selecting(call("lowbit_qk", per=per, **options), (16, 8)), Sq, Sk, 16, 8)
    q_group, k_group = GROUPINGS[per](Sq, Sk)
    for h in range(4):
        q, k = rows.q[h], rows.k[h]
        qm, km = (q.mean(0), k.mean(0)) if smooth else (torch.zeros(8).double(),) * 2
        product = quantised(q - qm, q_group) @ quantised(k - km, k_group).T
        product = product + ((k - km) @ qm)[None] + (q @ km)[:, None]
        for a, c, of_q, of_k in cells(Sq, Sk, 16, 8):
            seen = [float(product[x, y]) * SCALE for x in of_q for y in of_k if y <= x + Sk - Sq]
            close(s[h, a, c], max(seen, default=-math.inf))


def test_the_integers_are_those_of_the_kernel() -> None:
    x = torch.tensor([[7.0, 2.5, -3.5], [1.0, -7.0, 0.5], [0.0, 0.0, 0.0]])[None]
    ints, size = integers(x, torch.tensor([[0, 0, 1]]), 7)
    assert ints[0].tolist() == [[7, 2, -4], [1, -7, 0], [0, 0, 0]]  # half to even
    assert size[0].tolist() == [1, 1, 1]
    block = torch.zeros(1, 40, dtype=torch.int64)
    q, k = GROUPS["thread"](block, "q")[0].tolist(), GROUPS["thread"](block, "k")[0].tolist()
    assert q[3] == q[11] != q[4]
    assert q[19] == q[27] != q[3]
    assert k[2] == k[3] == k[10] == k[27] != k[4]
    assert k[34] == k[35] != k[2]


def test_smoothing_is_exact_but_for_the_integers() -> None:
    """With as many bits as it takes, the estimate is the score: the means come back whole."""
    attn = selecting(call("lowbit_qk", bits=30, smooth="mean"), (4, 4))
    rows = rows_for(attn, 9, 9)
    rows = replace(rows, k=rows.k + 5.0, q=rows.q - 3.0)
    blocks = cut(attn.part, rows, 4, 4)
    made = estimate(attn.part.select.score, attn.part, rows, blocks)  # type: ignore[union-attr]
    exact = torch.where(blocks.seen, rows.q @ rows.k.transpose(1, 2) * SCALE, -math.inf)
    torch.testing.assert_close(made, exact, rtol=0, atol=1e-6)


def test_the_anchor_is_each_rows_own() -> None:
    """SALE: S > ln(tau * l) + m; the paper's ln(tau * l + m) decides otherwise."""
    attn = selecting(call("lowbit_qk"), (4, 4))
    rows = rows_for(attn, 14, 14)
    blocks = cut(attn.part, rows, 4, 4)
    forced = torch.zeros(4, 4, 4, dtype=torch.bool)
    forced[:, :, 0] = True
    forced[:, range(4), range(4)] = True
    score = attn.part.select.score  # type: ignore[union-attr]
    made, element = anchored(score, attn.part, rows, blocks, forced), estimate(score, attn.part, rows, blocks)
    printed = 0
    tau = 0.02
    for h in range(4):
        for a, c, of_q, of_k in cells(14, 14, 4, 4):
            kept = as_printed = False
            for x in of_q:
                near = [y for y in range(x + 1) if y // 4 in (0, x // 4)]
                exact = [float(rows.q[h, x] @ rows.k[h, y]) * SCALE for y in near]
                m = max(exact)
                total = sum(math.exp(value - m) for value in exact)
                for y in of_k:
                    if y <= x:
                        kept |= float(element[h, x, y]) > math.log(tau * total) + m
                        as_printed |= tau * total + m > 0 and float(element[h, x, y]) > math.log(tau * total + m)
            assert bool(made[h, a, c] > math.log(tau)) == kept
            printed += kept != as_printed
    assert printed
