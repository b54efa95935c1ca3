"""Selections and taps whose pieces do not fit each other are refused at the piece that is wrong."""

from __future__ import annotations

import pytest
from spec_samples import HEAD, refusal, underlined

INPUTS = """\
inputs:
  c4: {shape: [B, Hk, KC, 64]}
  c3: {shape: [Hk, KC, 64]}
  i4: {shape: [B, Hk, KC, 64], dtype: int32}
  sums: {shape: [B, Hq, Sq]}
  tau: {shape: [Hq]}
  s1: {shape: [N]}
  s5: {shape: [B, 1, 1, N, M]}
  qi: {shape: [B, Hi, Sq, D]}
  ki: {shape: [B, Sk, D]}
  proj: {shape: [Dv, Dv]}
  z3: {shape: [Sq, Sk, C]}
"""

IMPOSSIBLE = [
    # block q, block k, score, force, message, what is underlined
    ("token", "cluster", "random", "", "'random' makes no clusters", "random"),
    ("token", "cluster", "given(c4)", "", "'given' makes no clusters", "given(c4)"),
    ("token", "cluster", "centroid_dot(c3)", "", "reads [B, H, clusters, D]", "centroid_dot(c3)"),
    ("token", "cluster", "centroid_dot(i4)", "", "needs a float input", "centroid_dot(i4)"),
    ("cluster", "cluster", "centroid_dot(c4, q=c3)", "", "'c3' has other axes", "centroid_dot(c4, q=c3)"),
    ("cluster", "cluster", "centroid_dot(c4)", "", "clusters of queries and their centroids", "cluster"),
    ("token", "cluster", "centroid_dot(c4, q=c4)", "", "clusters of queries and their centroids", "token"),
    ("cluster", "8", "pooled_dot", "", "clusters of queries and their centroids", "cluster"),
    ("token", "cluster", "centroid_dot(c4)", "sink(1)", "no order that 'sink'", "sink(1)"),
    ("token", "cluster", "centroid_dot(c4)", "local(1)", "no order that 'local'", "local(1)"),
    ("8", "8", "exact_mass(lse=tau)", "", "reads [B, Hq, Sq]", "exact_mass(lse=tau)"),
    ("8", "8", "given(s1)", "", "an axis of queries and one of keys", "given(s1)"),
    ("8", "8", "given(s5)", "", "an axis of queries and one of keys", "given(s5)"),
    ("8", "8", "given(i4)", "", "needs a float input", "given(i4)"),
    ("8", "token", "relu_indexer(q=qi)", "", "takes q and k together", "relu_indexer(q=qi)"),
    ("8", "token", "relu_indexer(q=qi, k=qi)", "", "reads [B, Sk, d]", "relu_indexer(q=qi, k=qi)"),
]


@pytest.mark.parametrize(("q", "k", "score", "force", "message", "pointed"), IMPOSSIBLE, ids=lambda x: x)
def test_what_does_not_fit_is_refused(q: str, k: str, score: str, force: str, message: str, pointed: str) -> None:
    text = (
        f"{HEAD}{INPUTS}select:\n  block: {{q: {q}, k: {k}}}\n  score: {score}\n  rule: topk(2)\n  force: [{force}]\n"
    )
    error = refusal(text)
    assert message in error.message
    assert underlined(error) == pointed


PARTS = "parts:\n  - mask: causal\n  - mask: causal\ncombine: add(proj)\n"


@pytest.mark.parametrize(
    ("body", "message", "pointed"),
    [
        (f"{PARTS}outputs: [o, column_mass]\n", "no output 'column_mass'", "column_mass"),
        ("outputs: [o, pair_value(z3)]\n", "reads [B, Sq, Sk, C]", "pair_value(z3)"),
        ("outputs: [o, pair_value(i4)]\n", "needs a float input", "pair_value(i4)"),
    ],
)
def test_taps_that_cannot_be(body: str, message: str, pointed: str) -> None:
    error = refusal(HEAD + INPUTS + body)
    assert message in error.message
    assert underlined(error) == pointed
