"""Pure rewrites of an attention variant, then the one step that lowers it to tiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from attncc.errors import CompilerBug
from attncc.ir.attention import Attention
from attncc.ir.verify import verify_attention
from attncc.passes.canonicalize import canonicalize
from attncc.passes.fuse import fuse
from attncc.passes.legalize import legalize
from attncc.passes.sparsify import sparsify

Pass = Callable[[Attention], Attention]

PIPELINE: Final[tuple[tuple[str, Pass], ...]] = (
    ("canonicalize", canonicalize),  # first: the others know one form of every formula, with known sizes as numbers
    ("sparsify", sparsify),  # after it: `window(Dv)` has a width, and a flipped comparison is already flipped
    ("fuse", fuse),  # it moves steps into the store that writes a cache; formulas of those are canonical by now
    ("legalize", legalize),  # last: formulas no longer change, so what it proves of their integers holds
)


def run(attn: Attention, on_pass: Callable[[str, Attention], None] | None = None) -> Attention:
    """The variant after all passes, each result verified; `on_pass` sees every pass's name and result."""
    for name, rewrite in PIPELINE:
        try:
            attn = rewrite(attn)
            verify_attention(attn)
        except CompilerBug as bug:
            raise CompilerBug(f"pass '{name}': {bug}") from bug
        if on_pass is not None:
            on_pass(name, attn)
    return attn
