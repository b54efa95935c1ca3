"""On a CUDA GPU: codes and scales that `append` writes are the oracle's bit for bit; its divisions are its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from codegen.appended import empty, expected, given, same
from codegen.emitted import Package
from gpu.compiled import package
from torch import Tensor

from attncc import spec
from attncc.check.pages import lay_out

pytestmark = pytest.mark.gpu

CUDA = "cuda"
BODY = "heads: {q: 4, kv: 2}\ndims: 128\nkv: paged(64)\n"
FORMS = [f"{dtype}(per=token{more})" for dtype in ("int8", "int4") for more in ("", ", symmetric=false")]
TOKENS = 500


def drawn(seed: int) -> Tensor:
    """Tokens of many sizes [S, H, D]: of none, below the least normal number, with ties, and with what is no number."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(TOKENS, 2, 128, generator=g)
    halves = torch.randint(-127, 128, x.shape, generator=g) / 2
    x = torch.where(torch.rand(TOKENS, 2, 1, generator=g) < 0.3, halves, x)
    x *= 2.0 ** torch.randint(-135, 120, (TOKENS, 2, 1), generator=g)
    x *= torch.rand(x.shape, generator=g) < 0.8
    x[::50] = 0
    for at, value in enumerate((torch.nan, torch.inf, -torch.inf)):
        x[at::40, at % 2, 5 * at] = value
    return x.bfloat16()


@pytest.mark.parametrize("form", FORMS)
def test_bits(form: str, folder: Path) -> None:
    name = f"bits_{FORMS.index(form)}"
    body = f"{BODY}quantize: {{cache: '{form}'}}\n"
    p = Package(spec.loads(f"attncc: 1\nname: {name}\n{body}").attention, package(folder, name, body), folder)
    rows = [{"k": drawn(0), "v": drawn(1)}]
    pages = lay_out([TOKENS], 8, 64, torch.Generator().manual_seed(0))
    wanted = expected(p, rows, pages)
    got = {text: t.to(CUDA) for text, t in empty(wanted, p).items()}
    call = given(p, rows, [torch.arange(TOKENS, dtype=torch.int32)], [TOKENS], pages)
    p.module.append(**{text: t.to(CUDA) for text, t in call.items()}, **got)
    same({text: t.cpu() for text, t in got.items()}, wanted)
