"""On a CUDA GPU: rows whose scores rise, fall, jump or wander along their keys; engines keep peaks of tiles before."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from gpu import compiled
from torch import Tensor

from attncc import spec
from attncc.reference import acceptance

pytestmark = pytest.mark.gpu

CUDA = "cuda"
HEADS, KEYS = 4, 2048
BODIES = {
    "D 64": "dims: 64\n",
    "D 64, causal": "dims: 64\nmask: causal\n",
    "D 96, fp16": "dims: 96\ndtype: fp16\nmask: causal\n",
    "D 128, fp16": "dims: 128\ndtype: fp16\n",
    "D 128, window": "dims: 128\nmask: causal & window(700)\n",
    "D 256": "dims: 256\nmask: causal\n",
    "a slope": "dims: 128\nscore: qk * scale + (j - i) / 64\nmask: causal\n",
    "a sink": "dims: 128\ninputs: {sinks: {shape: [Hq]}}\nnormalizer: softmax(sink=sinks[h])\nmask: causal\n",
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def package(folder: Path, body: str) -> ModuleType:
    return compiled.package(folder, f"peaks_{[*BODIES].index(body)}", f"heads: {HEADS}\n{BODIES[body]}")


def along_keys(path: str, g: torch.Generator) -> Tensor:
    """[KEYS] what is added to the scores of a key, as an exponent of 2."""
    j = torch.arange(KEYS)
    match path:
        case "rises slowly":
            return j * (3 / 128)
        case "falls":
            return -j / 16.0
        case "jumps":
            return (torch.rand(KEYS // 128, generator=g) * 300 - 150).repeat_interleave(128)
        case "wanders":
            return (torch.randn(KEYS, generator=g) * 6).cumsum(0)
        case "keys that outweigh all before":
            late = torch.zeros(KEYS)
            late[200::300] = torch.arange(len(late[200::300])) * 11.0 + 12
            return late
        case _:
            raise AssertionError(path)


PATHS = ("rises slowly", "falls", "jumps", "wanders", "keys that outweigh all before")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("body", BODIES)
def test_scores_along_keys(folder: Path, body: str, path: str) -> None:
    module = package(folder, body)
    attn = spec.loads(f"attncc: 1\nname: t\nheads: {HEADS}\n{BODIES[body]}").attention
    g = torch.Generator().manual_seed(PATHS.index(path))
    q, k, v = (torch.randn(2, HEADS, KEYS, attn.dims.qk, generator=g) for _ in "qkv")
    q[..., 0] = 8
    k[..., 0] = along_keys(path, g) * (0.6931 * attn.dims.qk**0.5 / 8)
    q, k, v = (x.to(CUDA, DTYPES[attn.dtype]) for x in (q, k, v))
    inputs = {"sinks": torch.linspace(-3, 60, HEADS, device=CUDA)} if attn.inputs else {}
    agreement = acceptance(module.attention(q, k, v, **inputs, return_lse=True), attn, q, k, v, inputs=inputs)
    assert agreement.ok, str(agreement)


def test_the_same_bits_again_and_beside_other_rows(folder: Path) -> None:
    """What a row has does not depend on whether its neighbours' peaks moved."""
    module = package(folder, "D 64")
    g = torch.Generator().manual_seed(9)
    q, k, v = (torch.randn(1, HEADS, KEYS, 64, generator=g).to(CUDA, torch.bfloat16) for _ in "qkv")
    k[:, :, 1000:, 0] = 60
    calm, wild = q.clone(), q.clone()
    calm[..., 0], wild[..., 0] = 0, 0
    wild[:, :, 1::2, 0] = 8
    once, again = module.attention(calm, k, v), module.attention(calm, k, v)
    assert torch.equal(once, again)
    assert torch.equal(module.attention(wild, k, v)[:, :, ::2], once[:, :, ::2])
