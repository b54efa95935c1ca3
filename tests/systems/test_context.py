"""Vision papers that read beside themselves: a whole video, words, means of regions, points sampled in views."""

from __future__ import annotations

import pytest
import torch
from agree import agree
from smaller import example, normal
from torch import Tensor
from torch.nn.functional import grid_sample
from torch.nn.functional import scaled_dot_product_attention as sdpa

from attncc import reference


def test_patchvsr() -> None:
    """Two videos in three patches each, patch by patch."""

    def define(q: Tensor, k: Tensor, v: Tensor, global_k: Tensor, global_v: Tensor) -> Tensor:
        found: list[Tensor] = []
        for patch in range(6):
            own = sdpa(q[patch], k[patch], v[patch])
            found.append(own + sdpa(q[patch], global_k[patch], global_v[patch]))
        return torch.stack(found)

    attn = example("patchvsr", ("heads: 16", "heads: 2"), ("dims: 64", "dims: 8"))
    lengths = {"q": 12, "k": 12, "v": 12, "global_k": 5, "global_v": 5}
    agree(attn, define, {name: normal(6, 2, n, 8, seed=s) for s, (name, n) in enumerate(lengths.items())})


def test_lsms_does_not_read_padding() -> None:
    """Descriptions of 3, 0 and 6 words of 6; what pads them may be anything."""
    attn, counts = example("lsms"), (3, 0, 6)

    def define(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = [sdpa(q[b], k[b, :, :n], v[b, :, :n]) if n else 0 * q[b] for b, n in enumerate(counts)]
        return torch.stack(rows)

    words = torch.tensor(counts, dtype=torch.int32)
    q, k, v = normal(3, 8, 10, 32), normal(3, 8, 6, 32), normal(3, 8, 6, 32, seed=1)
    agree(attn, define, {"q": q, "k": k, "v": v}, {"words": words})
    for b, n in enumerate(counts):
        k[b, :, n:] = v[b, :, n:] = torch.nan
    assert not bool(reference.attention(attn, q, k, v, inputs={"words": words}).isnan().any())


@pytest.mark.parametrize("tokens", [24, 21, 5])
def test_a_sdm(tokens: int) -> None:
    """Regions of 8 tokens, the last one ragged: it has fewer, and its mean is over those."""
    attn = example(
        "a_sdm", ("heads: 8", "heads: 2"), ("dims: 40", "dims: 8"), ("chunked(64)", "chunked(8)"),
        ("pooled(64)", "pooled(8)"),
    )  # fmt: skip

    def define(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        regions = [slice(a, min(a + 8, tokens)) for a in range(0, tokens, 8)]
        regional = torch.cat([sdpa(q[:, :, r], k[:, :, r], v[:, :, r]) for r in regions], 2)
        mean_k, mean_v = (torch.stack([x[:, :, r].mean(2) for r in regions], 2) for x in (k, v))
        return regional + sdpa(q, mean_k, mean_v)

    agree(attn, define, {n: normal(2, 2, tokens, 8, seed=s) for s, n in enumerate("qkv")})


def test_egoposeformer() -> None:
    """Joints [5] in two views: features are sampled around the joint's place in each, a view that misses it gives 0."""
    maps, places, offsets = normal(2, 128, 6, 7), 0.4 * normal(5, 2, 2), 0.2 * normal(5, 4, 16, 2)
    query, weight = normal(5, 128), normal(4 * 16, 128) / 11
    shown = torch.tensor([[1, 1], [1, 0], [0, 0], [0, 1], [1, 1]], dtype=torch.bool)
    logits = (query @ weight.T).unflatten(1, (4, 16))

    def sampled(joint: int, view: int) -> Tensor:
        """[heads, points, channels of a head]"""
        at = places[joint, view] + offsets[joint]
        found = grid_sample(maps[view].unflatten(0, (4, 32)), at[:, None], align_corners=False)
        return found[:, :, 0].mT

    def define(q: Tensor, k: Tensor, v: Tensor, logits: Tensor) -> Tensor:
        o = torch.zeros(10, 4, 1, 32, dtype=v.dtype)
        for joint in range(5):
            for view in range(2):
                n = 2 * joint + view
                if shown[joint, view]:
                    o[n, :, 0] = (torch.softmax(logits[n], -1)[..., None] * v[n]).sum(1)
        return o

    values = torch.stack([sampled(joint, view) for joint in range(5) for view in range(2)])
    unread = {"q": normal(10, 4, 1, 1), "k": normal(10, 4, 16, 1)}
    tensors = {**unread, "v": values, "logits": logits.repeat_interleave(2, 0)}
    agree(example("egoposeformer"), define, tensors, {"shown": shown.flatten()})
