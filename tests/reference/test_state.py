"""States against sums over pairs: every feature, decay and update, where rows stand, and how a scan may be cut."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from states import BODIES, DV, HEAD, TAPS, B, D, H, close, draw, pairs, spec
from torch.nn.functional import elu

from attncc import reference
from attncc.spec import loads

LENGTHS = {"as many": (7, 7), "one": (1, 1), "more keys": (3, 7), "more queries": (5, 3), "no keys": (2, 0)}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_states_are_sums_over_pairs(body: str, lengths: tuple[int, int]) -> None:
    attn = spec(body.replace("{}", "{chunk: 3}").replace("state: {f", "state: {chunk: 3, f") + TAPS)
    q, k, v, x = draw(attn, *lengths)
    got = reference.outputs(attn, q, k, v, inputs=x)
    o, mass, final = pairs(attn, q, k, v, x, k.shape[2] - q.shape[2])
    linear = attn.part.normalizer
    empty = (mass + linear.eps == 0) & (linear.kind == "linear")
    close(got.o, torch.where(empty[..., None], 0.0, o))
    close(got.taps["final_state"], final)
    if got.lse is not None:
        close(got.lse, torch.log(mass + linear.eps))


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_gradients_are_those_of_the_sums(body: str) -> None:
    attn = spec(body + TAPS)
    q, k, v, x = draw(attn, 4, 5)
    leaves = [t.requires_grad_() for t in (q, k, v, *x.values())]
    got = reference.outputs(attn, q, k, v, inputs=x)
    o, mass, final = pairs(attn, q, k, v, x, 1)
    make = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, dtype=t.dtype, generator=make) for t in (o, final, mass)]
    ours = (got.o * weights[0]).sum() + (got.taps["final_state"] * weights[1]).sum()
    theirs = (o * weights[0]).sum() + (final * weights[1]).sum()
    if got.lse is not None:
        ours = ours + (got.lse * weights[2]).sum()
        theirs = theirs + (torch.log(mass + attn.part.normalizer.eps) * weights[2]).sum()
    for mine, other in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves), strict=True):
        close(mine, other)


@pytest.mark.parametrize("align", ["top_left", "starts"])
def test_rows_stand_where_align_says(align: str) -> None:
    body = f"inputs: {{starts: {{shape: [B], dtype: int32}}}}\nstate: {{feature: elu1}}\nalign: {align}\n"
    attn = loads(HEAD + (body if align == "starts" else body.split("\n", 1)[1])).attention
    q, k, v, _ = draw(replace(attn, inputs=()), 6, 4)
    starts = torch.tensor([-3, 1])
    got = reference.attention(attn, q, k, v, inputs={"starts": starts} if align == "starts" else {})
    for b, offset in enumerate(starts.tolist() if align == "starts" else [0, 0]):
        close(got[b], pairs(attn, q, k, v, {}, offset)[0][b])


@pytest.mark.parametrize("layout", ["bshd", "varlen"])
def test_layouts(layout: str) -> None:
    body = "state: {feature: elu1, decay: scalar(g), initial: s0}\nnormalizer: linear(0)\n" + TAPS
    plain, attn = spec(body), spec(f"layout: {layout}\n" + body)
    q, k, v, x = draw(plain, 4, 6)
    if layout == "bshd":
        got = reference.outputs(attn, *(t.transpose(1, 2) for t in (q, k, v)), inputs=x)
        close(got.o.transpose(1, 2), reference.attention(plain, q, k, v, inputs=x))
        return
    lengths = ((4, 2), (6, 5))  # of queries and of keys in the two sequences; gates are padded to the longest
    rows, keys = ([0, *torch.tensor(n).cumsum(0).tolist()] for n in lengths)
    cuts = (q, lengths[0]), (k, lengths[1]), (v, lengths[1])
    packed = [torch.cat([t[b, :, :n].transpose(0, 1) for b, n in enumerate(ns)]) for t, ns in cuts]
    got = reference.outputs(attn, *packed, inputs=x, cu_seqlens_q=torch.tensor(rows), cu_seqlens_k=torch.tensor(keys))
    for b, (m, n) in enumerate(zip(*lengths, strict=True)):
        one = {"g": x["g"][..., :n], "s0": x["s0"]}
        o, mass, final = pairs(plain, q[:, :, :m], k[:, :, :n], v[:, :, :n], one, n - m)
        close(got.o[rows[b] : rows[b + 1]].transpose(0, 1), o[b])
        assert got.lse is not None
        close(got.lse[:, rows[b] : rows[b + 1]], torch.log(mass[b]))
        close(got.taps["final_state"][b], final[b])


def test_key_heads_may_be_tiled() -> None:
    attn = spec("state: {decay: vector(gk), initial: s0}\n")
    tiled = replace(attn, heads=replace(attn.heads, map="tile"))
    q, k, v, x = draw(attn, 5, 5)
    order = [0, 2, 1, 3]  # tiled head h reads key head h % 2, where interleaved heads 0, 1 read 0 and 2, 3 read 1
    got = reference.attention(tiled, q[:, order], k, v, inputs=x)
    close(got, reference.attention(attn, q, k, v, inputs=x)[:, order])


@pytest.mark.parametrize("name", [n for n in BODIES if n != "totals"])
def test_chunks_do_not_matter(name: str) -> None:
    attn = spec(BODIES[name] + TAPS)
    q, k, v, x = draw(attn, 9, 11)
    part = attn.part
    assert part.state is not None
    expected = reference.outputs(attn, q, k, v, inputs=x)
    for chunk in (1, 4, 11):
        other = replace(attn, parts=(replace(part, state=replace(part.state, chunk=chunk)),))
        got = reference.outputs(other, q, k, v, inputs=x)
        assert torch.equal(got.o, expected.o)
        assert torch.equal(got.taps["final_state"], expected.taps["final_state"])


@pytest.mark.parametrize("name", ["scalar decay", "vector decay, normalised", "gated delta", "vector gated delta"])
def test_prefill_is_a_shorter_one_and_steps(name: str) -> None:
    attn = spec(BODIES[name] + (TAPS.replace("]", ", final_mass]") if "normalised" in name else TAPS))
    shapes = {"s0": ("B", "Hq", "F", "Dv")}  # as the final state's
    attn = replace(attn, inputs=tuple(replace(i, shape=shapes.get(i.name, i.shape)) for i in attn.inputs))
    q, k, v, x = draw(attn, 9, 9)
    whole = reference.outputs(attn, q, k, v, inputs=x)
    at, got = 0, []
    for n in (5, 1, 1, 2):
        cut = slice(at, at + n)
        step = {key: t if key in ("s0", "z0") else t[:, :, cut] for key, t in x.items()}
        some = reference.outputs(attn, q[:, :, cut], k[:, :, cut], v[:, :, cut], inputs=step)
        x, at = {**x, "s0": some.taps["final_state"]}, at + n
        if "z0" in x:
            x["z0"] = some.taps["final_mass"]
        got.append(some.o)
    close(torch.cat(got, 2), whole.o)
    close(x["s0"], whole.taps["final_state"])


@pytest.mark.parametrize("name", ["scalar decay", "vector decay", "gated delta"])
def test_strong_decay_forgets_and_stays_finite(name: str) -> None:
    attn = spec(BODIES[name] + TAPS)
    q, k, v, x = draw(attn, 40, 40)
    x = {n: torch.full_like(t, -20.0) if n in ("g", "gk") else t for n, t in x.items()}
    leaves = [t.requires_grad_() for t in (q, k, v, *x.values())]
    o = reference.attention(attn, q, k, v, inputs=x)
    beta = x["beta"].repeat_interleave(2, 1)[..., None] if "beta" in x else 1.0
    alone = (q * k.repeat_interleave(2, 1)).sum(-1, keepdim=True) / math.sqrt(D) * beta * v
    torch.testing.assert_close(o[:, :, 1:], alone[:, :, 1:], rtol=0, atol=1e-5)
    assert all(bool(t.isfinite().all()) for t in torch.autograd.grad(o.sum(), leaves))


def test_a_delta_of_beta_1_overwrites() -> None:
    attn = spec(BODIES["delta"])
    q, k, v, x = draw(attn, 2, 2)
    k = (k / k.norm(dim=-1, keepdim=True))[:, :, [0, 0]]
    q = k.repeat_interleave(2, 1)
    got = reference.attention(attn, q, k, v, inputs={"beta": torch.ones_like(x["beta"])}, scale=1.0)
    close(got, v.expand_as(got))


def test_a_state_without_update_stays_what_it_is() -> None:
    state = "state: {feature: elu1, update: none, initial: s0, initial_mass: z0, scale: 2, prescale: 0.5}\n"
    attn = spec(state + "normalizer: linear(0)\n" + TAPS)
    q, k, v, x = draw(attn, 4, 6)
    got = reference.outputs(attn, q, k * math.nan, v * math.nan, inputs=x)
    f = 2 * (elu(q / 2) + 1)
    s0 = x["s0"].repeat_interleave(2, 1).expand(B, -1, -1, -1)
    mass = (f * x["z0"][:, :, None]).sum(-1)
    close(got.o, f @ s0 / mass[..., None])
    assert got.lse is not None
    close(got.lse, torch.log(mass))
    close(got.taps["final_state"], s0)


def test_the_runtime_scale_and_the_columns_of_a_part() -> None:
    attn = spec("state: {decay: vector(gk)}\ncolumns: [1, 3]\n")
    q, k, v, x = draw(attn, 5, 5)
    got = reference.attention(attn, q, k, v, inputs=x, scale=0.3)
    q, k = (torch.cat([torch.zeros_like(t[..., :1]), t[..., 1:]], -1) for t in (q, k))
    close(got, pairs(spec("state: {decay: vector(gk)}\n"), q, k, v, x, 0)[0] * 0.3 * math.sqrt(D))


# -- refusals ----------------------------------------------------------------------------------------


BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "a state of other features": (BODIES["scalar decay"], {"s0": torch.zeros(1, 2, 7, DV)}, "s0: expected"),
    "heads that do not divide": (BODIES["scalar decay"], {"s0": torch.zeros(1, 3, D, DV)}, "s0: expected"),
    "a mass of other features": (BODIES["elu1"], {"z0": torch.zeros(B, H, 7)}, "z0: expected"),
}


@pytest.mark.parametrize(("body", "wrong", "message"), BAD.values(), ids=BAD)
def test_inputs_that_do_not_fit(body: str, wrong: dict[str, Any], message: str) -> None:
    attn = spec(body)
    free = {"s0": (1, "A", "E", "Dv"), "z0": ("B", "Hq", "G")}
    attn = replace(attn, inputs=tuple(replace(i, shape=free.get(i.name, i.shape)) for i in attn.inputs))
    q, k, v, _ = draw(replace(attn, inputs=()), 3, 3)
    x = {**draw(spec(body), 3, 3)[3], **wrong}
    with pytest.raises(ValueError, match=message):
        reference.attention(attn, q, k, v, inputs=x)


@pytest.mark.parametrize("name", BODIES)
def test_the_operands_dtype_is_a_coarser_answer(name: str) -> None:
    """dtype None: products of bf16 factors, the state itself in float32."""
    attn = spec(BODIES[name] + TAPS)
    q, k, v, x = draw(attn, 6, 6)
    q, k, v = (t.bfloat16() for t in (q, k, v))
    coarse = reference.outputs(attn, q, k, v, inputs=x, dtype=None)
    fine = reference.outputs(attn, *(t.double() for t in (q, k, v)), inputs=x)
    assert (coarse.o.dtype, coarse.taps["final_state"].dtype) == (torch.bfloat16, torch.float32)
    assert not torch.equal(coarse.o.double(), fine.o)
    size = fine.o.abs().max()
    assert float((coarse.o.double() - fine.o).abs().max()) < 0.05 * float(size)
    torch.testing.assert_close(coarse.taps["final_state"].double(), fine.taps["final_state"], rtol=0.05, atol=0.05)
