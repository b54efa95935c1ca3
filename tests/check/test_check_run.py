"""The check itself is checked: a right package passes, and every classic kernel bug is caught by some case."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from attncc.check.cases import Case
from attncc.check.run import Report, check_package, imported
from attncc.device import find
from attncc.ir.attention import Attention, Dims, Heads, Normalizer, Part
from attncc.ir.expr import name

QK, SCALE = name("qk", "f32"), name("scale", "f32")
CAUSAL = name("j") <= name("i")
ATTENTION = Attention(
    "plain", Heads(4, 2, 2), Dims(16, 16), (Part(QK * SCALE, CAUSAL),), scale=name("Dqk") ** -0.5, dtype="fp16"
)

PACKAGE = """
import math
import torch

SCALE = 0.25

def attention(q, k, v, *, return_lse=False):
    {before}
    if q.stride(-1) != 1:
        raise ValueError("q must be dense along its last axis")
    sq, sk = q.shape[2], k.shape[2]
    k, v = ({repeat} for x in (k, v))
    s = (q.float() @ k.float().transpose(-1, -2)) * SCALE
    i = torch.arange(sq)[:, None] + {offset}
    s = s.masked_fill(torch.arange(sk) > i, -math.inf)
    m = {maximum}
    p = torch.exp(s - m)
    l = p.sum(-1, keepdim=True)
    o = ({weights} @ {values}).to(q.dtype)
    lse = ({lse}).squeeze(-1)
    {after}
    return (o, lse) if return_lse else o
"""
RIGHT = {
    "before": "",
    "repeat": "x.repeat_interleave(2, 1)",
    "offset": "sk - sq",
    "maximum": "s.amax(-1, keepdim=True).clamp(min=-1e30) if sk else s.new_zeros(*s.shape[:-1], 1)",
    "weights": "torch.where(l == 0, 0, p / l)",
    "values": "v.float().nan_to_num(0)",
    "lse": "torch.log(l) + m",
    "after": "",
}
LEAK = "o = o + 0 * v[-1:].float().sum().to(q.dtype) if len(q) else o"
BEHIND = """room = k.untyped_storage().nbytes() // k.element_size() > k.numel()
    k = torch.as_strided(k, k.shape, k.stride(), k.storage_offset() + room)"""


def checked(folder: Path, attn: Attention = ATTENTION, **changes: str) -> Report:
    (folder / "__init__.py").write_text(PACKAGE.format(**RIGHT | changes))
    return check_package(attn, folder, find("interpreter"))


def test_a_right_package_passes(tmp_path: Path) -> None:
    report = checked(tmp_path)
    assert report.passed, [o for o in report.outcomes if not o.passed]
    assert {o.case.trait for o in report.outcomes if o.verdict == "refused"} == {"last_axis_strided"}
    assert (
        report.summary
        == f"plain: {len(report.outcomes)} of {len(report.outcomes)} cases agree with the oracle on interpreter in fp16"
    )


@pytest.mark.parametrize(
    ("bug", "caught_by"),
    [
        ({"maximum": "0"}, "large_logits"),
        ({"offset": "0"}, "random"),
        ({"offset": "sk - sq + 1"}, "random"),
        ({"repeat": "x.repeat(1, 2, 1, 1)"}, "one_hot"),
        ({"weights": "p / l"}, "random"),
        ({"lse": "torch.log2(l) + m"}, "uniform"),
        ({"after": LEAK}, "nan_neighbour"),
        ({"values": "v.float()"}, "nan_keys"),
        ({"before": BEHIND}, "nan_around"),
        ({"before": "q = q.contiguous().roll(1, 0)"}, "random"),
        ({"before": "v = v * 1.01"}, "uniform"),
        ({"before": "assert k.shape[2]"}, "random"),
        ({"before": "assert q.stride(0)"}, "expanded"),
        ({"after": "o = o[..., :8]"}, "random"),
        ({"after": "o = o.float()[..., :] * (1 + 2e-3)"}, "one_hot"),
    ],
)
def test_a_bug_is_caught(tmp_path: Path, bug: dict[str, str], caught_by: str) -> None:
    report = checked(tmp_path, **bug)
    assert not report.passed
    assert caught_by in {o.case.trait for o in report.outcomes if not o.passed}


def test_only_some_traits_may_be_refused(tmp_path: Path) -> None:
    report = checked(tmp_path, before="raise ValueError('no')")
    by_trait = {o.case.trait: o.verdict for o in report.outcomes}
    assert {t for t, verdict in by_trait.items() if verdict == "refused"} == {
        "expanded",
        "unaligned",
        "last_axis_strided",
    }
    assert by_trait["random"] == "raised"


def test_a_normalizer_without_lse_is_not_asked_for_one(tmp_path: Path) -> None:
    relu = replace(ATTENTION, parts=(Part(QK * SCALE, CAUSAL, Normalizer("relu")),))
    report = checked(tmp_path, relu, weights="s.clamp(min=0)", before="assert not return_lse")
    assert report.passed, [o for o in report.outcomes if not o.passed]


def test_data_for_scripts(tmp_path: Path) -> None:
    data = json.loads(json.dumps(checked(tmp_path, offset="0").as_data()))
    assert (data["name"], data["passed"], data["dtype"]) == ("plain", False, "fp16")
    wrong = next(c for c in data["cases"] if c["verdict"] == "WRONG")
    assert wrong["deviations"]["o"]["error"] > wrong["deviations"]["o"]["limit"]


def test_shapes_and_progress(tmp_path: Path) -> None:
    (tmp_path / "__init__.py").write_text(PACKAGE.format(**RIGHT))
    seen: list[tuple[str, int, int]] = []
    report = check_package(
        ATTENTION,
        tmp_path,
        find("interpreter"),
        shapes=[{"B": 1, "Sq": 4, "Sk": 9}],
        progress=lambda *step: seen.append(step),
    )
    assert report.outcomes[0].case == Case(1, 4, 9)
    assert [done for _, done, _ in seen] == list(range(len(report.outcomes) + 1))


def test_an_imported_package_leaves_no_trace(tmp_path: Path) -> None:
    (tmp_path / "__init__.py").write_text("from . import kernels\nattention = kernels.attention\n")
    (tmp_path / "kernels.py").write_text("def attention(): return 7\n")
    before = set(sys.modules)
    with imported(tmp_path) as module:
        assert module.attention() == 7
        with imported(tmp_path) as other:
            assert other is not module
    assert set(sys.modules) == before
