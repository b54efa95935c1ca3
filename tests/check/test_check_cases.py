"""Which calls are checked: within the spec's bounds, every trait, no doubles."""

from __future__ import annotations

import pytest

from attncc.check.cases import TRAITS, Case, cases
from attncc.errors import SpecError
from attncc.ir.attention import Attention, Dims, Heads, Part, Size
from attncc.ir.expr import const, name

QK = name("qk", "f32")


def variant(*sizes: Size) -> Attention:
    return Attention("dense", Heads(4, 2, 2), Dims(16, 16), (Part(QK),), scale=const(1.0), sizes=sizes)


def test_every_trait_and_every_hard_shape() -> None:
    found = cases(variant())
    assert {c.trait for c in found} == set(TRAITS)
    assert len(set(found)) == len(found)
    assert any(c.Sq > c.Sk > 0 for c in found)
    assert any(0 < c.Sq < c.Sk for c in found)
    assert {0} < {c.B for c in found}
    assert any(c.Sq == 0 for c in found)
    assert any(c.Sk == 0 for c in found)


def test_large_is_more() -> None:
    small, large = cases(variant()), cases(variant(), large=True)
    assert {c for c in small if c.trait == "random"} < set(large)
    assert max(c.Sk for c in large) > 4096


def test_a_fixed_size_holds_everywhere() -> None:
    assert {c.Sk for c in cases(variant(Size("Sk", fixed=256)))} == {256}


def test_multiples_and_maxima_hold() -> None:
    found = cases(variant(Size("Sk", max=100, multiple=8), Size("B", max=2)), large=True)
    assert all(c.Sk % 8 == 0 and c.Sk <= 96 and c.B <= 2 for c in found)


def test_shapes_of_the_user() -> None:
    found = cases(variant(), [{"Sk": 40}, {"B": 2, "Sq": 3, "Sk": 5}])
    assert {(c.B, c.Sq, c.Sk) for c in found} == {(1, 40, 40), (2, 3, 5)}
    assert {c.trait for c in found if c.Sk == 40} == set(TRAITS)


@pytest.mark.parametrize(("wrong", "hint"), [("S", "Sq"), ("heads", "valid: B, Sk, Sq"), ("sk", "Sk"), ("Hq", "Sq")])
def test_unknown_sizes_are_refused(wrong: str, hint: str) -> None:
    with pytest.raises(SpecError) as error:
        cases(variant(), [{wrong: 4}])
    assert f"'{wrong}'" in str(error.value)
    assert hint in str(error.value)


def test_packed_sequences_are_ragged() -> None:
    lengths = Case(4, 100, 80).lengths
    assert lengths[0] == (100, 80)
    assert lengths[1] == (0, 0)
    assert len({q for q, _ in lengths}) == 4
    assert Case(0, 5, 5).lengths == ()
