"""Shapes to tune on: what is allowed, what is filled in, and operands as sparse as declared."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attncc import driver, spec
from attncc.autotune.declared import FAMILY, as_declared, shapes_of
from attncc.autotune.sparsity import kept
from attncc.check.cases import Case
from attncc.check.operands import draw
from attncc.errors import SpecError, Unsupported
from attncc.ir.attention import Attention

PLAIN = "attncc: 1\nname: shaped\nheads: 2\ndims: 16\ndtype: fp32\n"


def attention(more: str = "") -> Attention:
    return spec.loads(PLAIN + more).attention


def test_the_caller_goes_before_the_spec_and_the_spec_before_the_family() -> None:
    tuned = attention("tune: [{B: 2, Sq: 64}]\n")
    assert shapes_of(tuned, [{"Sq": 8}], True) == ({"B": 1, "Sq": 8, "Sk": 8},)
    assert shapes_of(tuned, None, True) == ({"B": 2, "Sq": 64, "Sk": 64},)
    assert shapes_of(attention(), None, True) == FAMILY


def test_the_family_keeps_the_bounds_of_a_spec() -> None:
    bounded = attention("sizes: {Sq: 100, Sk: {max: 5000, multiple: 64}}\n")
    for shape in shapes_of(bounded, None, True):
        assert shape["Sq"] == 100
        assert shape["Sk"] % 64 == 0
        assert 0 < shape["Sk"] <= 5000


@pytest.mark.parametrize(
    "shape",
    [
        {"Sq": 0},
        {"Sq": -4},
        {"Sq": 4.5},
        {"Sq": "4"},
        {"Sq": True},
        {"B": 3},
        {},
        {"Sq": 4, "S": 4},
        {"Sq": 4, "sparsity": 1.0},
        {"Sq": 4, "sparsity": -0.1},
        {"Sq": 4, "documents": 0},
        {"Sq": 4, "weight": 0},
        {"Sq": 4, "weight": -1},
    ],
    ids=str,
)
def test_wrong_shapes_are_refused(shape: dict[str, Any]) -> None:
    with pytest.raises(SpecError):
        shapes_of(attention(), [shape], True)


@pytest.mark.parametrize(
    ("bounds", "shape"),
    [
        ("Sq: 64", {"Sq": 65, "Sk": 8}),
        ("Sk: {max: 100}", {"Sq": 8, "Sk": 101}),
        ("Sk: {multiple: 16}", {"Sq": 8, "Sk": 24}),
    ],
)
def test_shapes_keep_the_bounds_of_the_spec(bounds: str, shape: dict[str, int]) -> None:
    with pytest.raises(SpecError, match=r"fixed|not allowed"):
        shapes_of(attention(f"sizes: {{{bounds}}}\n"), [shape], True)


def test_sizes_of_a_specs_own_are_not_tuned_on() -> None:
    own = attention("inputs: {t: {shape: [N], dtype: fp32}}\nscore: qk * scale + t[j]\n")
    with pytest.raises(Unsupported, match="'N'"):
        shapes_of(own, [{"Sq": 8, "N": 4}], True)


def operands(attn: Attention, shape: dict[str, Any]) -> Any:
    chance = torch.Generator().manual_seed(0)
    x = draw(attn, Case(1, shape["Sq"], shape["Sk"]), torch.float32, chance)
    return as_declared(attn, x, shape, chance)


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.95])
def test_blocks_are_as_sparse_as_declared(sparsity: float) -> None:
    attn = driver.load(driver.EXAMPLES / "block_mask.yaml").attention
    found = kept(attn, operands(attn, {"Sq": 4096, "Sk": 4096, "sparsity": sparsity}))
    assert found.share == pytest.approx(1 - sparsity, abs=0.04)
    assert found.sparsity.tiles == pytest.approx(32 * (1 - sparsity), rel=0.25, abs=0.01)


def test_documents_are_as_many_as_declared_and_leave_less() -> None:
    attn = driver.load(driver.EXAMPLES / "document_ids.yaml").attention
    shares: list[float] = []
    for documents in (1, 4, 12):
        x = operands(attn, {"Sq": 2048, "Sk": 2048, "documents": documents})
        numbers = next(iter(x.inputs.values()))
        assert len(numbers.unique()) == documents
        assert bool((numbers.diff() >= 0).all())
        shares.append(kept(attn, x).share)
    assert shares == sorted(shares, reverse=True)
    assert shares[2] < 0.3 * shares[0]


def test_signatures_tell_masks_apart() -> None:
    shape = {"Sq": 1024, "Sk": 1024}
    found = {
        m: kept(a, operands(a, shape))
        for m in ("true", "causal", "causal & window(200)")
        for a in [attention(f"mask: {m}\n")]
    }
    full, causal, window = (found[m].sparsity for m in found)
    assert (full.tiles, full.full, full.variance, full.skew) == (8.0, 1.0, 0.0, 1.0)
    assert causal.tiles == 4.5
    assert causal.full == pytest.approx(28 / 36, abs=1e-3)
    assert window.tiles < causal.tiles
    assert window.variance < causal.variance
