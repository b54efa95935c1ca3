"""Emitted kernels to be read, one a skeleton and feature, compiled for every target without a GPU."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path

import pytest
from golden import Golden

from attncc import driver
from attncc.codegen.aot import Failed, build_all
from attncc.codegen.offline import jobs
from attncc.device import find
from attncc.passes.lower.defaults import default_configs

EXAMPLES = Path(__file__).parents[2] / "examples"
VARIANTS = (
    "dense",  # no mask
    "causal_gqa",  # one key range
    "gemma2_local",  # a window, and a score that is not linear
    "sink_window",  # two disjoint ranges
    "document_ids",  # a mask that reads data: classified, then listed
    "varlen_causal",  # packed sequences
    "relative_bias",  # a table by distance, skewed first
    "d192_128",  # a head dim in two pieces, and another one for values
    "paged_decode",  # keys in pages, and one line of all key tiles for few queries
    "fp8_heads",  # operands and weights in fp8: peaks, then stored bits and scales, then the products
)
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
OWN = dict(zip(VARIANTS, cycle(TARGETS), strict=False))
"""The target that a variant is compiled for beside sm_90; its careful launches, which take longest, for that alone."""


@pytest.mark.parametrize("variant", VARIANTS)
def test_kernels(variant: str, golden: Golden, tmp_path: Path) -> None:
    spec = driver.load(EXAMPLES / f"{variant}.yaml")
    package = driver.compile(spec, tmp_path, TARGETS)
    kernels = package / "kernels.py"
    golden.check(kernels.read_text(), ".py")
    if (package / "hopper.py").exists():
        golden.check((package / "hopper.py").read_text(), ".hopper.py")
    attn, program = driver.lower(spec.attention)
    wanted = {}
    for device in map(find, dict.fromkeys(("sm_90", OWN[variant]))):
        general = dict(default_configs(attn, device, with_engine=False)[0][-1][1])
        found = jobs(program, str(kernels), device, general)
        left_out = {name for name in found if _is_careful(name) and device.name != OWN[variant]}
        left_out |= set(filter(_is_of_few_queries, found))
        wanted |= {f"{device.name}/{name}": job for name, job in found.items() if name not in left_out}
    built = dict(zip(wanted, build_all(list(wanted.values())), strict=True))
    failed = {name: outcome.reason for name, outcome in built.items() if isinstance(outcome, Failed)}
    assert not failed
    golden.check_resources({name: outcome for name, outcome in built.items() if not isinstance(outcome, Failed)})
    for name, outcome in built.items():
        assert not isinstance(outcome, Failed)
        assert outcome.shared_bytes <= find(outcome.target).shared_bytes_per_block, name
        assert _is_careful(name) or not outcome.notes, (name, outcome.notes)


def _is_of_few_queries(name: str) -> bool:
    """Launches that have configs of their own: the tests of split-KV and of stream-K compile them."""
    return name.split()[0].endswith(("_split", "_plan", "_stream", "_merge"))


def _is_careful(name: str) -> bool:
    """The launches that redo tiles lost to NaN, or serve small calls, may be slow."""
    return name.endswith(("PASS=1", "PASS=2"))
