"""Programs over codes in words, run by the interpreter of tile IR in the dtype they are for, against the oracle."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from attncc import passes, reference, spec
from attncc.check.cases import Case, Trait
from attncc.check.operands import draw
from attncc.ir import interp
from attncc.ir.attention import Attention
from attncc.ir.expr import WORD
from attncc.ir.tile import Program
from attncc.ir.verify import verify_program
from attncc.passes.lower.select import select

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
FORMATS = [
    *("int8(per=token)", "int8(per=head, symmetric=false)", "int4(per=token, symmetric=false)", "int4(per=head)"),
    "fp8_e4m3(per=head)",
]
CALLS: list[tuple[Case, dict[str, int]]] = [
    (Case(2, 5, 37), {"BM": 16, "BN": 16}),
    (Case(2, 2, 70, "large_logits"), {"BM": 8, "BN": 16, "SPLIT": 2, "FILL": 12}),
]


def lowered(form: str, dtype: str, more: str = "") -> tuple[Attention, Program]:
    head = f"attncc: 1\nname: coded\nheads: {{q: 4, kv: 2}}\ndims: 64\ndtype: {dtype}\nmask: causal\n{more}"
    attn = passes.run(spec.loads(f"{head}quantize: {{cache: '{form}'}}\n").attention)
    program = select(attn)
    verify_program(program)
    return attn, program


def agree(attn: Attention, program: Program, case: Case, knobs: dict[str, int], seed: int = 0) -> reference.Agreement:
    dtype = DTYPES[attn.dtype]
    x = draw(attn, case, dtype, torch.Generator().manual_seed(seed))
    o, lse = torch.full(x.q.shape, torch.nan), torch.full(x.q.shape[:3], torch.nan)
    codes = {name.upper(): x.cache[name].view(torch.int16) for name in "kv"}
    beside = {f"{name}_ptr": t for name, t in x.keywords.items()}
    tensors = {n: t.numpy() for n, t in {"Q": x.q.float(), "O": o, "LSE": lse, **codes, **beside}.items()}
    config = {k.name: k.choices[0] for k in program.knobs} | knobs
    scalars: dict[str, float] = {"B": case.B, "Sq": case.Sq, "Sk": case.Sk, "scale": 0.125}
    interp.run(program, tensors, scalars, config)
    return reference.acceptance((o.to(dtype), lse), replace(attn, quantize=()), x.q, x.k, x.v)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMATS)
def test_words(form: str, dtype: str) -> None:
    attn, program = lowered(form, dtype)
    assert {p.name for k in program.kernels for p in k.params if p.dtype == WORD} == {"K", "V"}
    for case, knobs in CALLS:
        agreement = agree(attn, program, case, knobs)
        assert agreement.ok, (str(case), str(agreement))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["int4(per=token)", "int8(per=token, symmetric=false)", "fp8_e4m3(per=head)"])
def test_a_value_alone_is_as_near_as_a_number_of_16_bits(form: str, dtype: str) -> None:
    """Its weight is 1, so that a weight and a scale that are rounded once, together, would be too far off."""
    attn, program = lowered(form, dtype)
    for seed in range(12):
        for case in (Case(1, 1, 1), Case(1, 2, 33, "one_hot")):
            agreement = agree(attn, program, case, CALLS[1][1], seed)
            assert agreement.ok, (seed, str(case), str(agreement))


@pytest.mark.parametrize("size", [1e-4, 1e4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_of_values_may_be_of_any_size(dtype: str, size: float) -> None:
    """Weights times scales need not lie among the numbers of fp16."""
    attn, program = lowered("int8(per=token)", dtype)
    case = Case(1, 2, 70, "uniform")
    x = draw(attn, case, DTYPES[dtype], torch.Generator().manual_seed(0))
    o, lse = torch.full(x.q.shape, torch.nan), torch.full(x.q.shape[:3], torch.nan)
    codes = {name.upper(): x.cache[name].view(torch.int16).numpy() for name in "kv"}
    beside = {f"{name}_ptr": t for name, t in x.keywords.items()}
    beside["v_scales_ptr"] = beside["v_scales_ptr"] * size
    tensors = {n: t.numpy() for n, t in {"Q": x.q.float(), "O": o, "LSE": lse, **beside}.items()} | codes
    knobs = {k.name: k.choices[0] for k in program.knobs} | CALLS[1][1]
    interp.run(program, tensors, {"B": 1, "Sq": 2, "Sk": 70, "scale": 0.125}, knobs)
    assert x.v is not None
    wanted = reference.attention(replace(attn, quantize=()), x.q.double(), x.k.double(), x.v.double())[0] * size
    error = (o.double() - wanted).abs().max() / wanted.abs().max()
    assert error < 2**-7


@pytest.mark.parametrize("trait", ["uniform", "one_hot", "nan_keys"])
def test_traits(trait: Trait) -> None:
    attn, program = lowered("int4(per=token, symmetric=false)", "bf16")
    agreement = agree(attn, program, Case(2, 3, 41, trait), CALLS[1][1])
    assert agreement.ok, str(agreement)


@pytest.mark.parametrize(
    "more",
    ["dims: 80\n", "dims: {qk: 64, v: 32}\n", "dtype: fp32\n", "kv: latent(rope=16)\n"],
)
def test_what_is_read_by_bytes(more: str) -> None:
    """Heads whose words fill no tile, fp32, and values that are a part of the keys."""
    form = "fp8_e4m3(per=token)" if "latent" in more else "int4(per=token)" if "v: 32" in more else "int8(per=token)"
    base = {"heads": "{q: 4, kv: 1}", "dims": "64", "dtype": "bf16"} | (
        {"dims": "{qk: 80, v: 64}"} if "latent" in more else {}
    )
    given = {line.partition(": ")[0]: line.partition(": ")[2] for line in more.splitlines()}
    text = "".join(f"{key}: {value}\n" for key, value in (base | given).items())
    attn = passes.run(spec.loads(f"attncc: 1\nname: odd\n{text}quantize: {{cache: '{form}'}}\n").attention)
    program = select(attn)
    verify_program(program)
    assert not [p for k in program.kernels for p in k.params if p.dtype == WORD]


def test_words_hold_what_bytes_do() -> None:
    """The interpreter's words are two bytes in the order of memory."""
    codes = torch.arange(256, dtype=torch.uint8).view(2, 128)
    words = codes.view(torch.int16).numpy().view(np.uint16)
    assert (words & 255 == codes[:, ::2].numpy()).all()
    assert (words >> 8 == codes[:, 1::2].numpy()).all()
