"""The examples: each loads, is short, says what it is, and its canonical text is the same variant."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scalar_numpy import Scope, evaluate

from attncc.spec import document, load, loads
from attncc.spec.source import read

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))


FAMILY = (
    *("dense", "causal_gqa", "gemma2_local", "softcap", "alibi", "relative_bias", "sliding_window"),
    *("sink_window", "attention_sinks", "prefix_lm", "chunked_local", "dilated", "packed_documents"),
    *("document_ids", "varlen_causal", "block_mask", "global_local", "tree_speculation", "d72"),
    *("d192_128", "t5_bias", "natten_2d"),
)


FAMILIES = (
    *("everyday", "pattern", "sparse selection", "quantised", "linear and recurrent", "decode and schedule"),
    *("compressed latent", "composition"),
)


def test_the_dense_softmax_family_is_here() -> None:
    assert set(FAMILY) <= {p.stem for p in EXAMPLES}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_example(path: Path) -> None:
    spec = load(path)
    assert spec.attention.name == path.stem
    assert spec.attention.doc
    assert 4 <= len(spec.text.splitlines()) <= 40
    assert spec.text == path.read_text()
    assert spec.attention.family in FAMILIES
    assert spec.attention.source or spec.attention.family in ("everyday", "pattern")
    canonical = document(spec.attention)
    assert loads(canonical).attention == spec.attention
    own, order = (list(read(text).data()) for text in (spec.text, canonical))
    assert [key for key in own if key in order] == [key for key in order if key in own]


def example_mask(stem: str, sq: int, sk: int, **buffers: np.ndarray) -> np.ndarray:
    mask = load(next(p for p in EXAMPLES if p.stem == stem)).attention.part.mask
    row, j = np.arange(sq)[:, None], np.arange(sk)[None, :]
    names = {"b": 0, "h": 0, "hk": 0, "i": row + sk - sq, "j": j, "row": row, "Sq": sq, "Sk": sk}
    return np.broadcast_to(evaluate(mask, Scope(names, buffers)), (sq, sk))


def test_packed_documents_by_two_spellings() -> None:
    lengths = [3, 1, 70, 26]
    ids = np.repeat(np.arange(4), lengths)[None]
    offsets = np.cumsum([0, *lengths])[None, :]
    by_offsets = example_mask("packed_documents", 100, 100, offsets=offsets)
    np.testing.assert_array_equal(by_offsets, example_mask("document_ids", 100, 100, ids=ids))
    assert by_offsets.sum() == sum(n * (n + 1) // 2 for n in lengths)


def test_sink_window_keeps_four_tokens_and_the_window() -> None:
    seen = example_mask("sink_window", 1, 3000)
    assert np.flatnonzero(seen[0]).tolist() == [0, 1, 2, 3, *range(3000 - 1024, 3000)]


def test_natten_sees_its_kernel_at_every_place() -> None:
    seen = example_mask("natten_2d", 4096, 4096)
    assert (seen.sum(1) == 169).all()
    corner = seen[0].reshape(64, 64)
    assert corner[:13, :13].all()


def test_longformer_is_symmetric() -> None:
    seen = example_mask("global_local", 600, 600)
    np.testing.assert_array_equal(seen, seen.T)
    assert seen[300].sum() == 2 * 256 + 1 + 44


def test_relative_bias_never_reads_outside_its_table() -> None:
    score = load(next(p for p in EXAMPLES if p.stem == "relative_bias")).attention.part.score
    table = np.arange(16 * 9, dtype=np.float32).reshape(16, 9)
    i, j = np.arange(40)[:, None], np.arange(40)[None, :]
    names = {"qk": np.float32(0), "scale": 1.0, "h": 3, "i": i, "j": j, "W": 9}
    found = evaluate(score, Scope(names, {"bias": table}))
    expected = np.array([[table[3, min(max(q - k, -4), 4) + 4] for k in range(40)] for q in range(40)])
    np.testing.assert_array_equal(found, expected)


def test_t5_buckets() -> None:
    """The edges of T5's bidirectional buckets give the buckets of its own formula."""

    def bucket(distance: int, buckets: int = 32, most: int = 128) -> int:
        half = buckets // 2
        base, n = (half if distance > 0 else 0), abs(distance)
        exact = half // 2
        if n < exact:
            return base + n
        log = exact + int(np.log(n / exact) / np.log(most / exact) * (half - exact))
        return base + min(log, half - 1)

    distances = np.arange(-400, 401)
    wanted = np.array([bucket(int(d)) for d in distances])
    steps = np.flatnonzero(np.diff(wanted)) + 1
    order = [int(wanted[0]), *(int(wanted[s]) for s in steps)]
    bias = np.zeros((8, len(order)), np.float32)
    bias[:] = order  # the table in the order of the edges
    score = load(next(p for p in EXAMPLES if p.stem == "t5_bias")).attention.part.score
    names = {"qk": np.float32(0), "scale": 1.0, "h": 0, "i": np.zeros_like(distances), "j": distances}
    found = evaluate(score, Scope(names, {"edges": distances[steps], "bias": bias}))
    np.testing.assert_array_equal(found, wanted)
