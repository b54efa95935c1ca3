"""What is measured: cases, each with its spec, its size and its FLOPs; and those of the prefill table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

SCALE: Final = 0.088

BODIES: Final[Mapping[str, str]] = {
    "none": "",
    "causal": "mask: causal",
    "softcap": "score: softcap(qk * scale, 30)\nmask: causal",
    "alibi": "inputs: {slopes: {shape: [Hq]}}\nscore: qk * scale + slopes[h] * (j - i)\nmask: causal",
    "relative_bias": "inputs: {bias: {shape: [Hq, N], dtype: bf16}}\n"
    "score: qk * scale + bias[h, i - j + N // 2]\nmask: causal",
    "bias": "inputs: {bias: {shape: [Hq, Sq, Sk]}}\nscore: qk * scale + bias[h, row, j]",
    "mask_tensor": "inputs: {keep: {shape: [Sq, Sk], dtype: bool}}\nmask: keep[row, j]",
    "sink": "inputs: {sinks: {shape: [Hq]}}\nmask: causal\nnormalizer: softmax(sink=sinks[h])",
    "window": "mask: causal & window(WINDOW)",
    "documents": "inputs: {starts: {shape: [N], dtype: int32, sorted: true}}\nmask: causal & segments(starts)",
    "blocks": "inputs: {blocks: {shape: [M, N], dtype: bool}}\nmask: blocks[i // BLOCK, j // BLOCK]",
}
"""WINDOW and BLOCK stand for a pattern's numbers."""
PLAIN_MASKS: Final = ("none", "causal")
"""What every peer can do."""
SAME_MASK: Final = {"softcap": "causal", "alibi": "causal", "relative_bias": "causal", "sink": "causal", "bias": "none"}


@dataclass(frozen=True, slots=True)
class Pattern:
    """How far a window reaches; how large the blocks of a data-dependent mask are, and which share of them it keeps,
    besides the first of each row."""

    window: int = 1024
    block: int = 128
    density: float = 0.05


@dataclass(frozen=True, slots=True)
class Case:
    """One row of a table."""

    variant: str
    b: int
    hq: int
    hk: int
    s: int
    dqk: int
    dv: int
    dtype: str = "bf16"
    queries: int = 0
    """Rows of q; 0: as many as keys."""
    pattern: Pattern = Pattern()

    @property
    def sq(self) -> int:
        return self.queries or self.s

    @property
    def name(self) -> str:
        """Such as fwd/B4Hq16Hk16S8192D128c; variants but none and causal, and dtypes but bf16, are spelt out."""
        return f"{'decode' if self.sq == 1 else 'fwd'}/{self.shape}"

    @property
    def shape(self) -> str:
        dims = f"D{self.dqk}" if self.dqk == self.dv else f"D{self.dqk}-{self.dv}"
        kind = {"none": "", "causal": "c"}.get(self.variant, f"/{self.variant}")
        dtype = "" if self.dtype == "bf16" else f"/{self.dtype}"
        return f"B{self.b}Hq{self.hq}Hk{self.hk}S{self.s}{dims}{kind}{dtype}"

    @property
    def package(self) -> str:
        return f"{self.variant}_{self.hq}_{self.hk}_{self.dqk}_{self.dv}_{self.dtype}"

    @property
    def packages(self) -> tuple[str, ...]:
        """All that the case is measured with."""
        return (self.package,)

    @property
    def spec(self) -> str:
        head = f"attncc: 1\nname: {self.package}\nheads: {{q: {self.hq}, kv: {self.hk}}}\n"
        head += f"dims: {{qk: {self.dqk}, v: {self.dv}}}\ndtype: {self.dtype}\nscale: {SCALE}\n"
        sizes = {"WINDOW": self.pattern.window, "BLOCK": self.pattern.block}
        body = BODIES[self.variant]
        for name, size in sizes.items():
            body = body.replace(name, str(size))
        return f"{head}{body}\n"

    @property
    def mask(self) -> tuple[str, int]:
        """What a table of the mask depends on: cases alike in it share one."""
        return SAME_MASK.get(self.variant, self.variant), self.s

    def flops(self, pairs: int) -> float:
        """Of the unmasked work: two products over the visible pairs of a head."""
        return 2.0 * self.b * self.hq * pairs * (self.dqk + self.dv)


def _rows() -> tuple[Case, ...]:
    dense = ((4, 16, 16, 8192, 128), (4, 32, 32, 8192, 64), (2, 32, 8, 16384, 128), (16, 16, 16, 1024, 128))
    out = [Case(v, *shape, shape[-1]) for shape in (*dense, (2, 16, 16, 8192, 256)) for v in PLAIN_MASKS]
    scores = ("causal", "softcap", "alibi", "relative_bias", "sink", "window", "documents")
    out += [Case(v, 4, 16, 16, 16384, 128, 128) for v in scores]
    out.append(Case("blocks", 1, 16, 16, 65536, 128, 128))
    odd = ((72, 72), (80, 80), (96, 96), (160, 160), (192, 192), (192, 128))
    return (*out, *(Case(v, 4, 16, 16, 8192, *d) for d in odd for v in PLAIN_MASKS))


CASES: Final = _rows()
TINY: Final = Case("none", 1, 4, 4, 128, 64, 64)
"""For the host's time of a call."""


def mask_cases() -> tuple[Case, ...]:
    """One case for each mask that FlexAttention makes a table of; the slow ones to compile come first."""
    first = {case.mask: case for case in reversed(CASES) if case.variant != "none"}
    return tuple(sorted(first.values(), key=lambda case: -case.s))
