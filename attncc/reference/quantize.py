"""Operands as few bits hold them: what a quantizer stores, read back."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from attncc.errors import Unsupported
from attncc.ir.attention import Attention
from attncc.reference.operands import Sequence


@dataclass(frozen=True, slots=True)
class Quantized:
    """A sequence read back from its bits, and what smoothing took off: terms of the products.

    q k^T = (q' + qm) (k' + km)^T: `row_term` is q km^T [Hq, Sq], `key_term` is qm k'^T [Hq, Sk].
    """

    sequence: Sequence
    row_term: Tensor | None = None
    key_term: Tensor | None = None


def quantized(attn: Attention, sequence: Sequence) -> Quantized:
    """The operands as their quantizers leave them."""
    if attn.quantize:
        raise Unsupported("the oracle does not evaluate 'quantize'", key="quantize")
    return Quantized(sequence)


def quantized_weights(attn: Attention, p: Tensor) -> Tensor:
    """The weights [H, R, K], relative to the greatest of their row, as quantize.p holds them."""
    return p
