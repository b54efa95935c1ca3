"""Prologues whose convolutions are one: their kernels in tile IR's interpreter, and what keeps others from them."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from lower.test_programs import agree, lowered
from torch import Tensor

from attncc import spec
from attncc.ir import interp
from attncc.ir.attention import Attention
from attncc.passes.lower import folded, lines

HEADS = "attncc: 1\nname: t\nheads: {q: 4, kv: 2}\ndims: WIDTH\nmask: causal\nmodes: [prefill]\n"
INPUTS = {
    "a": "6, WIDTH, 2",
    "u": "6, WIDTH",
    "c": "6, WIDTH, WIDTH, 2",
    "s": "6, WIDTH",
    "of_q": "4, WIDTH, WIDTH, 2",
    "of_k": "2, WIDTH, WIDTH, 2",
    "long": "6, WIDTH, WIDTH, 4",
    "t": "Hk",
    "w": "WIDTH",
}
BOTH = "causal_conv(a, bias=u)", "causal_conv(c, groups=heads, bias=s)"
FOLDED = {
    "as in CCA": (
        *BOTH,
        "mean_residual(scale=0.5)",
        "value_shift(fraction=0.5)",
        "l2_norm(to=8.0)",
        "temperature(t[hk], on=k)",
        "rope",
    ),
    "a bias of the first alone": ("causal_conv(a, bias=u)", "causal_conv(c, groups=heads)", "rms_norm(weight=w)"),
    "a bias of the last alone": ("causal_conv(a)", BOTH[1], "silu(on=k)"),
    "no bias": ("causal_conv(a)", "causal_conv(c, groups=heads)", "rms_norm", "temperature(t[hk], on=k)"),
    "one convolution": (BOTH[1], "mean_residual(scale=0.25)", "silu(on=v)"),
}


def variant(steps: tuple[str, ...], more: str = "", width: int = 64) -> Attention:
    """The steps on heads of so many columns, with those of `INPUTS` that they name."""
    given = ", ".join(f"{x}: {{shape: [{shape}]}}" for x, shape in INPUTS.items() if any(_reads(s, x) for s in steps))
    listed = ", ".join(f"'{step}'" for step in steps)
    text = f"{HEADS}inputs: {{{given}}}\nprologue: [{listed}]\n{more}"
    return spec.loads(text.replace("WIDTH", str(width))).attention


def _reads(step: str, name: str) -> bool:
    return bool(re.search(rf"\b{name}\b(?!=)", step))


def interpreted(attn: Attention, batch: int, tokens: int) -> tuple[Tensor, Tensor, list[Tensor], dict[str, Tensor]]:
    """o and lse of the portable kernels behind those that fold, on random operands; these; and the inputs."""
    generator = torch.Generator().manual_seed(tokens)
    q, k, v = (
        torch.randn(batch, n, tokens, 64, generator=generator).bfloat16() for n in (attn.heads.q, *[attn.heads.kv] * 2)
    )
    sizes = {"Hk": attn.heads.kv}
    given = {
        x.name: torch.randn([sizes.get(str(n)) or int(n) for n in x.shape], generator=generator) * 0.3
        for x in attn.inputs
    }
    program = lowered(attn)
    assert program.engine is not None
    assert not program.engine_gap
    replaced = {"t_prologue", "t_prologue_matrices"}
    assert replaced <= {*program.engine.replaces}
    launches = (*program.engine.before, *(x for x in program.launches if x.kernel not in replaced))
    assert [x.kernel for x in launches[:2]] == ["t_prologue_ahead", "t_prologue_folded"]
    program = replace(program, launches=launches, scratch=(*program.scratch, program.engine.scratch[0]))
    o, lse = torch.full_like(q, torch.nan).float(), torch.full(q.shape[:3], torch.nan)
    tensors = {"Q": q.float(), "K": k.float(), "V": v.float(), "O": o, "LSE": lse}
    tensors |= {f"{name}_ptr": x for name, x in given.items()}
    scalars = {"B": batch, "Sq": tokens, "Sk": tokens, "scale": 64**-0.5}
    config = {knob.name: knob.choices[0] for knob in program.knobs} | {"BM": 16, "BN": 16, "ENGINE": 0}
    interp.run(program, {name: x.numpy() for name, x in tensors.items()}, scalars, config)
    return o, lse, [q, k, v], given


@pytest.mark.parametrize("steps", FOLDED)
def test_folded(steps: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines of three tokens, the last one shorter, and of one."""
    attn = variant(FOLDED[steps])
    assert not folded.gap(attn)
    monkeypatch.setattr(lines, "PROGRAMS", 1)
    o, lse, operands, given = interpreted(attn, 2, 130)
    agree(attn, o, lse, *operands, inputs=given)


def test_lines_are_as_long_as_lets_all_programs_run_at_once() -> None:
    attn = variant(FOLDED["as in CCA"])
    o, lse, operands, given = interpreted(attn, 1, 20)
    agree(attn, o, lse, *operands, inputs=given)


NORMED = (*BOTH, "l2_norm")
APART = "causal_conv(of_q, groups=heads, on=q)", "l2_norm(on=q)", "causal_conv(of_k, groups=heads, on=k)"
GAPS = {
    "no convolution by matrices": variant(("l2_norm", "rope")),
    "operands other than bf16": variant(NORMED, "dtype: fp16"),
    "packed sequences": variant(NORMED, "layout: varlen"),
    "operands of few bits behind the steps": variant(NORMED, "quantize: {k: int8(per=token)}"),
    "an absorbed matrix, or a Hadamard transform": variant((*BOTH, "hadamard")),
    "other steps before a convolution by matrices than one of each column": variant(("silu(on=k)", BOTH[1])),
    "operands behind different convolutions": variant(APART),
    "heads of other than 64 or 128 columns": variant(BOTH, width=32),
    "more than 3 tokens of a product": variant(("causal_conv(long, groups=heads)",)),
    "steps behind a product that look at earlier tokens": variant((*BOTH, "silu", "causal_conv(a)")),
    "ropes by tables, of neighbours, or of other than 64 or 128 columns": variant((*BOTH, "rope(dims=32)")),
}


@pytest.mark.parametrize("why", GAPS)
def test_gaps(why: str) -> None:
    assert folded.gap(GAPS[why]) == why
    program = lowered(GAPS[why])
    assert "t_prologue_folded" not in {k.name for k in program.kernels}


def test_every_gap_is_tested() -> None:
    assert [g.why for g in folded.GAPS] == [*GAPS]
