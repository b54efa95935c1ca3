"""Sparse-linear attention in its three published forms, against block sums written out, with gradients."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from golden import TESTS
from systems.smaller import close, dense, normal
from torch import Tensor

from attncc import reference
from attncc.ir.attention import Attention
from attncc.spec import loads

B, H, D, BLOCK = 2, 3, 8, 4
SMALL = (("heads: 12", f"heads: {H}"), ("dims: 128", f"dims: {D}"), ("{q: 64, k: 64}", f"{{q: {BLOCK}, k: {BLOCK}}}"))
NAMES = ("sla_paper", "sla_complement", "sla_all_keys")


def small(name: str, *changes: tuple[str, str]) -> Attention:
    text = (TESTS.parent / "examples" / f"{name}.yaml").read_text()
    for old, new in (*SMALL, *changes):
        assert old in text
        text = text.replace(old, new)
    return loads(text).attention


def classes(q: Tensor, k: Tensor, hi: int, lo: int) -> list[list[int]]:
    """1, 0 or -1 for each pair of blocks of one head, by their mean vectors."""
    found: list[list[int]] = []
    for rows in q.detach().split(BLOCK):
        logits = [float(rows.mean(0) @ keys.mean(0)) for keys in k.detach().split(BLOCK)]
        order = sorted(range(len(logits)), key=lambda n: -logits[n])
        rank = {n: at for at, n in enumerate(order)}
        found.append([1 if rank[n] < hi else -1 if rank[n] >= len(order) - lo else 0 for n in range(len(order))])
    return found


def critical(q: Tensor, k: Tensor, v: Tensor, cls: list[list[int]]) -> Tensor:
    """Softmax over the critical blocks of one head; 0 where there are none."""
    ks, vs = k.split(BLOCK), v.split(BLOCK)
    o: list[Tensor] = []
    for rows, kinds in zip(q.split(BLOCK), cls, strict=True):
        some = [n for n, kind in enumerate(kinds) if kind == 1]
        if not some:
            o.append(torch.zeros_like(rows))
            continue
        e = torch.exp(rows @ torch.cat([ks[n] for n in some]).mT / math.sqrt(D))
        o.append(e @ torch.cat([vs[n] for n in some]) / e.sum(-1, keepdim=True))
    return torch.cat(o)


def _phi(x: Tensor) -> Tensor:
    e = torch.exp(x)
    return e / e.sum(-1, keepdim=True)


def linear(q: Tensor, k: Tensor, v: Tensor, counts: Callable[[int, int], bool], eps: float, subtract: bool) -> Tensor:
    """phi(Q_i) H_i / (phi(Q_i) · Z_i + eps), H and Z sums over the blocks that count for block i.

    With `subtract`, totals less the blocks that do not count, as SLA-1 has it; 0 where no block counts.
    """
    h = [_phi(keys).mT @ values for keys, values in zip(k.split(BLOCK), v.split(BLOCK), strict=True)]
    z = [_phi(keys).sum(0) for keys in k.split(BLOCK)]
    o: list[Tensor] = []
    for i, rows in enumerate(q.split(BLOCK)):
        some = [n for n in range(len(h)) if counts(i, n)]
        if not some:
            o.append(torch.zeros_like(rows))
            continue
        state, mass = sum(h[n] for n in some), sum(z[n] for n in some)
        if subtract:
            others = [n for n in range(len(h)) if n not in some]
            state = sum(h) - sum((h[n] for n in others), torch.zeros_like(h[0]))
            mass = sum(z) - sum((z[n] for n in others), torch.zeros_like(z[0]))
        f = _phi(rows)
        o.append(f @ state / ((f @ mass)[:, None] + eps))
    return torch.cat(o)


def definition(name: str, q: Tensor, k: Tensor, v: Tensor, proj: Tensor) -> Tensor:
    n = -(-k.shape[2] // BLOCK)
    hi, lo = (max(1, int(0.05 * n)), int(0.10 * n)) if name == "sla_paper" else (int(0.2 * n), 0)
    heads: list[Tensor] = []
    for b in range(B):
        for h in range(H):
            one = q[b, h], k[b, h], v[b, h]
            cls = classes(one[0], one[1], hi, lo)
            counts: dict[str, Callable[[int, int], bool]] = {
                "sla_paper": lambda i, j, cls=cls: cls[i][j] == 0,
                "sla_complement": lambda i, j, cls=cls: cls[i][j] != 1,
                "sla_all_keys": lambda i, j: True,
            }
            eps = 1e-5 if name == "sla_all_keys" else 0.0
            heads.append(critical(*one, cls) + linear(*one, counts[name], eps, name == "sla_complement") @ proj.mT)
    return torch.stack(heads).unflatten(0, (B, H))


def draw(length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v = (normal(B, H, length, D, seed=s).requires_grad_() for s in range(3))
    return q, k, v, normal(D, D, seed=3).requires_grad_()


@pytest.mark.parametrize("length", [80, 78, 7], ids=["whole blocks", "a ragged block", "two blocks"])
@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_gradients(name: str, length: int) -> None:
    q, k, v, proj = draw(length)
    got = reference.attention(small(name), q, k, v, inputs={"proj": proj})
    want = definition(name, q, k, v, proj)
    close(got, want)
    weight = normal(*want.shape, seed=4)
    ours, theirs = (torch.autograd.grad((o * weight).sum(), (q, k, v, proj)) for o in (got, want))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_training_starts_at_the_critical_blocks_alone(name: str) -> None:
    """proj is 0 then; its gradient is not."""
    q, k, v, proj = draw(80)
    proj = torch.zeros_like(proj).requires_grad_()
    got = reference.attention(small(name), q, k, v, inputs={"proj": proj})
    hi = max(1, int(0.05 * 20)) if name == "sla_paper" else int(0.2 * 20)
    for b in range(B):
        for h in range(H):
            close(got[b, h], critical(q[b, h], k[b, h], v[b, h], classes(q[b, h], k[b, h], hi, 0)))
    (gradient,) = torch.autograd.grad(got.square().sum(), proj)
    assert bool(gradient.any())


def test_where_all_is_critical_it_is_dense() -> None:
    q, k, v, proj = draw(20)
    got = reference.attention(small("sla_complement", ("0.2", "1")), q, k, v, inputs={"proj": proj})
    close(got, dense(q, k, v)[0])
    assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(got.sum(), (q, k, v, proj)))


def test_a_short_sequence_may_have_no_critical_block() -> None:
    """int(0.2 * 4) = 0: the code does not clamp it, and all is linear."""
    q, k, v, proj = draw(16)
    got = reference.attention(small("sla_all_keys"), q, k, v, inputs={"proj": proj})
    f, w = torch.softmax(q, -1), torch.softmax(k, -1)
    a = f @ w.mT
    close(got, a @ v / (a.sum(-1, keepdim=True) + 1e-5) @ proj.mT)


def test_the_three_forms_differ() -> None:
    q, k, v, proj = draw(80)
    made = [reference.attention(small(name), q, k, v, inputs={"proj": proj}).detach() for name in NAMES]
    assert all(float((made[a] - made[b]).abs().max()) > 1e-3 for a, b in ((0, 1), (0, 2), (1, 2)))
