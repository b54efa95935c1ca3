"""What CPU libraries hold, known without TVM."""

from __future__ import annotations

from attncc.ir.attention import Attention


def decodes(attn: Attention) -> bool:
    """Whether there is a kernel for few queries beside the general one."""
    part = attn.part
    listed = part.key_tiles is not None and part.key_tiles.listed
    packed = attn.layout == "varlen"
    return part.normalizer.kind == "softmax" and attn.heads.v == attn.heads.kv and not packed and not listed
