"""Steps of keys and values join the store that writes a cache, where a variant has one.

Other steps pass as they stand: `lower` makes kernels of them, one before attention and one behind it.
"""

from __future__ import annotations

from attncc.ir.attention import Attention
from attncc.ir.keeping import keep


def fuse(attn: Attention) -> Attention:
    """The variant as attention over its cache sees it; `kept` is what new tokens go through on their way into that."""
    return keep(attn)
