"""Rules over the selection of a part: its blocks, inputs, rule and forced blocks must fit each other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from attncc.ir.attention import Attention, Part, Select
from attncc.spec.findings import Finding, float_input, input_axes, number

SELECTOR_BLOCKS: Final = {"token_dot": "token", "relu_indexer": "token", "centroid_dot": "cluster"}
AXES: Final = {
    "centroid_dot": {"k": ("B", "H", "clusters", "D"), "q": ("B", "H", "clusters", "D")},
    "exact_mass": {"lse": ("B", "Hq", "Sq")},
    "relu_indexer": {"q": ("B", "heads", "Sq", "d"), "k": ("B", "Sk", "d"), "w": ("B", "Sq", "heads")},
}
"""Of the inputs that a score reads, by its argument."""
IN_ORDER: Final = ("sink", "local", "first_column", "last_pages")
"""Forced blocks that are counted along the keys."""


def block(attn: Attention, part: Part) -> Iterator[Finding]:
    """What the selector scores must be what the blocks are."""
    if part.select is None:
        return
    (q, k), score = part.select.block, part.select.score.name
    if q == "page":
        yield ("select", "block", "q"), "queries are not kept in pages", ""
    if k == "page" and part.kv.page_size is None:
        yield ("select", "block", "k"), "pages are those of paged storage", "kv: paged(64)"
    wanted = SELECTOR_BLOCKS.get(score)
    if wanted and k != wanted:
        yield ("select", "score"), f"'{score}' scores a {wanted}, the blocks are {k}", f"block: {{k: {wanted}}}"
    if k == "cluster" and score != "centroid_dot":
        yield ("select", "score"), f"'{score}' makes no clusters", "score: centroid_dot(NAME)"
    if (q == "cluster") != (dict(part.select.score.kwargs).get("q") is not None and score == "centroid_dot"):
        hint = "block: {q: cluster, …} beside score: centroid_dot(NAME, q=NAME)"
        yield ("select", "block", "q"), "clusters of queries and their centroids come together", hint
    if score == "antidiagonal":
        yield from _antidiagonal(part.select, number(dict(part.select.score.kwargs)["stride"]))
    if score == "minmax_bound" and k in ("token", "cluster"):
        yield ("select", "score"), "'minmax_bound' bounds a block or page", ""


def _antidiagonal(select: Select, stride: float) -> Iterator[Finding]:
    for key, size in zip(("q", "k"), select.block, strict=True):
        if not isinstance(size, int) or size % stride:
            yield ("select", "score"), f"a stride of {stride:g} does not divide the {key} block of {size}", ""


def inputs(attn: Attention, part: Part) -> Iterator[Finding]:
    """What a score reads must be floats with the axes that it reads."""
    if part.select is None:
        return
    path, score = ("select", "score"), part.select.score
    options = {key: str(word) for key, word in score.kwargs if key in AXES.get(score.name, ())}
    if score.name == "given":
        yield from float_input(attn, path, score.words[0], score.name)
        if not 2 <= len(attn.input(score.words[0]).shape) <= 4:
            yield path, "a given selection has an axis of queries and one of keys, and may have B and H before", ""
    if score.name == "centroid_dot":
        options["k"] = score.words[0]
    if score.name == "relu_indexer" and ("q" in options) != ("k" in options):
        yield path, "'relu_indexer' takes q and k together", "relu_indexer(q=NAME, k=NAME, w=NAME)"
    for key, word in options.items():
        yield from input_axes(attn, path, word, score.name, *AXES[score.name][key])


def rule(attn: Attention, part: Part) -> Iterator[Finding]:
    """What the rule counts must be what the normalisation makes."""
    select = part.select
    if select is None:
        return
    name, shares = select.rule.name, sum(map(number, select.rule.args))
    if select.normalize == "weighted_softmax" and select.block[1] != "cluster":
        yield ("select", "normalize"), "weights are the sizes of clusters", "normalize: softmax"
    if select.take == "marginal" and name != "ternary":
        yield ("select", "take"), f"'{name}' has no middle class", "rule: ternary(0.05, 0.10)"
    if name == "lines" and select.score.name != "exact_mass":
        yield ("select", "rule"), "lines are sums of exact masses", "score: exact_mass(last=64)"
    if name == "ternary" and shares > 1:
        yield ("select", "rule"), "the shares of ternary(hi, lo) exceed the whole", ""
    if name == "mass" and select.normalize == "none":
        yield ("select", "rule"), "a mass is a share of normalised scores", "normalize: softmax"
    if select.heads == "group_sum" and attn.heads.q == attn.heads.kv:
        yield ("select", "heads"), "every key head serves one query head: there is no group", "heads: none"


def forced(attn: Attention, part: Part) -> Iterator[Finding]:
    """Forced blocks must be ones there are, and those that `anchor` measures by must be forced."""
    select = part.select
    if select is None:
        return
    if select.normalize == "anchor" and not {f.name for f in select.force} & {"sink", "local"}:
        yield ("select", "normalize"), "'anchor' is the mass of what is forced by sink or local", "force: [sink(1)]"
    for n, call in enumerate(select.force):
        if call.name == "last_pages" and part.kv.page_size is None:
            yield ("select", "force", n), "pages are those of paged storage", "kv: paged(64)"
        if call.name in IN_ORDER and select.block[1] == "cluster":
            yield ("select", "force", n), f"clusters have no order that '{call.name}' could count in", "diagonal"
