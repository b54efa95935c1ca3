"""Values that are the first columns of the keys, run by Triton's interpreter; and compiled."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
from codegen.emitted import normal, package, passes

from attncc import driver, spec
from attncc.check.cases import Case
from attncc.codegen.aot import Failed, build_all
from attncc.codegen.offline import jobs
from attncc.device import find
from attncc.errors import Unsupported
from attncc.ir.rewrite import walk
from attncc.ir.tile import reads as tile_reads
from attncc.passes.lower.defaults import default_configs

MLA = "heads: {q: 6, kv: 1}\ndims: {qk: 48, v: 32}\ndtype: fp32\nkv: latent(rope=16)\n"
FEATURES = {
    "no mask": MLA,
    "causal": f"{MLA}mask: causal",
    "values of other pieces": "heads: {q: 4, kv: 2}\ndims: {qk: 80, v: 40}\ndtype: fp16\n"
    "kv: latent(rope=40)\nmask: causal",
    "all columns": "heads: {q: 4, kv: 1}\ndims: 16\ndtype: fp32\nkv: latent(rope=4)\nmask: causal",
    "bshd, a window": f"{MLA}layout: bshd\nmask: causal & window(20)",
    "listed tiles": f"{MLA}inputs: {{ids: {{shape: [B, Sk], dtype: int32}}}}\nmask: causal & document(ids)",
    "stream-K": f"{MLA}mask: causal\nschedule: stream_k",
    "a score without qk": f"{MLA}score: 0.1 * (h + 1)\nmask: causal",
}


@pytest.mark.parametrize("feature", FEATURES)
def test_features(feature: str) -> None:
    p = package(FEATURES[feature])
    passes(p.tiles(16, 16), Case(2, 21, 37), Case(1, 21, 37, "nan_keys"))
    passes(
        p.tiles(16, 32, one_pass=1, split=0 if "listed" in feature else 1), Case(2, 1, 70), Case(1, 2, 41, "nan_keys")
    )


def test_packed_sequences() -> None:
    passes(package(f"{MLA}mask: causal\nlayout: varlen").tiles(16, 16), Case(3, 21, 37))


@pytest.mark.parametrize("trait", ["nan_around", "nan_neighbour", "unaligned", "one_hot", "expanded"])
def test_operands(trait: str) -> None:
    passes(package(FEATURES["causal"]).tiles(16, 16), Case(2, 5, 41, trait))


def test_a_call_has_no_values() -> None:
    p = package(FEATURES["causal"]).tiles(16, 16)
    assert list(inspect.signature(p.module.attention).parameters) == ["q", "k", "scale", "return_lse"]
    q, k = normal(1, 6, 3, 48), normal(1, 1, 20, 48, seed=1)
    s = (q @ k.mT) * 48**-0.5
    s = s.masked_fill(torch.ones(3, 20, dtype=torch.bool).tril(17).logical_not(), -torch.inf)
    torch.testing.assert_close(p(q, k), s.softmax(-1) @ k[..., :32], rtol=1e-4, atol=1e-5)
    with pytest.raises(TypeError, match="takes 2 positional arguments"):
        p(q, k, k[..., :32])


def test_the_latent_is_loaded_once() -> None:
    """Where the values' pieces are pieces of the keys."""

    def loads(feature: str) -> list[str]:
        _, program = driver.lower(package(FEATURES[feature]).attn)
        (step,) = program.kernel(f"{program.name}_forward").functions
        reads = [e for s in step.body for r in tile_reads(s) for e in walk(r) if e.op == "tile"]
        return [f"{e.attr}{list(e.shape)}" for e in reads]

    assert loads("causal") == ["K['BN', 32]", "K['BN', 16]"]
    assert loads("values of other pieces") == ["K['BN', 64]", "K['BN', 16]", "K['BN', 32]", "K['BN', 16]"]


TURNED = 'prologue: ["rope(on=k)"]'


@pytest.mark.parametrize(("more", "key"), [("quantize: {k: int8}", "quantize"), (TURNED, "prologue")])
def test_what_is_not_carried(more: str, key: str) -> None:
    with pytest.raises(Unsupported) as error:
        driver.lower(spec.loads(f"attncc: 1\nname: odd\n{MLA}\n{more}\n").attention)
    assert error.value.key == key


@pytest.mark.newest
def test_the_widths_of_deepseek_compile(tmp_path: Path) -> None:
    text = "attncc: 1\nname: mla\nheads: {q: 128, kv: 1}\ndims: {qk: 576, v: 512}\nkv: latent(rope=64)\nmask: causal\n"
    loaded = spec.loads(text)
    attn, program = driver.lower(loaded.attention)
    kernels = driver.compile(loaded, tmp_path, ["sm_90"]) / "kernels.py"
    rows = [dict(c) for _, c in default_configs(attn, find("sm_90"))[0]]
    due = {"_split PASS=0": next(c for c in rows if c["SPLIT"] and not c.get("ENGINE")), "_forward PASS=0": rows[-1]}
    found = {end: jobs(program, str(kernels), find("sm_90"), config) for end, config in due.items()}
    wanted = {name: job for end, named in found.items() for name, job in named.items() if name.endswith(end)}
    assert len(wanted) == 2
    for name, outcome in zip(wanted, build_all(list(wanted.values())), strict=True):
        assert not isinstance(outcome, Failed), (name, outcome.reason)
        assert outcome.shared_bytes <= find("sm_90").shared_bytes_per_block, name
        assert outcome.spill_bytes <= 256, name  # kilobytes with one stage
