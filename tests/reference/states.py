"""States without a state: sums over pairs of queries and keys, written out key by key, and variants to try them on."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import elu

from attncc.ir.attention import Attention
from attncc.spec import loads

B, H, D, DV = 2, 4, 3, 5
HEAD = "attncc: 1\nname: t\nheads: {q: 4, kv: 2, v: 1}\ndims: {qk: 3, v: 5}\n"
INPUTS = {
    "g": "[B, Hq, Sk]",
    "gk": "[B, Hk, Sk, Dqk]",
    "beta": "[B, Hk, Sk]",
    "s0": "[1, Hk, F, Dv]",
    "z0": "[B, Hq, F]",
}
DRAWN: dict[str, Callable[[Tensor], Tensor]] = {
    "g": lambda x: -2 * torch.sigmoid(x),
    "gk": lambda x: -2 * torch.sigmoid(x),
    "beta": lambda x: 2 * torch.sigmoid(x),
    "z0": torch.exp,
}
"""log decays in [-2, 0], beta in [0, 2], a positive mass"""
FEATURES: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": lambda x: torch.where(x > 0, x, 0.0),
    "elu1": lambda x: elu(x) + 1,
    "softmax": lambda x: torch.exp(x) / torch.exp(x).sum(),
    "exp": torch.exp,
    "taylor2": lambda x: torch.stack(
        [torch.ones_like(x[0]), *x, *(a * b / math.sqrt(2) for a in x for b in x)],
    ),
}


def spec(body: str) -> Attention:
    """A variant whose body may speak of the inputs; those it does not name are not declared."""
    spoken = [name for name in INPUTS if re.search(rf"[( ]{name}[),}}]", body)]
    inputs = [f"  {name}: {{shape: {INPUTS[name]}}}\n" for name in spoken]
    return loads(HEAD + "".join(["inputs:\n", *inputs] if inputs else []) + body).attention


def draw(attn: Attention, Sq: int, Sk: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """q, k, v [B, H, S, D] and the inputs."""
    make = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(shape, dtype=torch.float64, generator=make)
    sizes = {"B": B, "Hq": H, "Hk": 2, "Sk": Sk, "Dqk": D, "Dv": DV, "F": feature_count(attn)}
    drawn = {x.name: normal(*(sizes.get(str(n), n) for n in x.shape)) for x in attn.inputs}
    inputs = {name: DRAWN[name](x) if name in DRAWN else x for name, x in drawn.items()}
    return normal(B, H, Sq, D), normal(B, 2, Sk, D), normal(B, 1, Sk, DV), inputs


def feature_count(attn: Attention) -> int:
    return 1 + D + D * D if any(p.state and p.state.feature == "taylor2" for p in attn.parts) else D


def pairs(
    attn: Attention, q: Tensor, k: Tensor, v: Tensor, x: Mapping[str, Tensor], offset: int, chosen: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """o [B, H, Sq, Dv], the sums of weights [B, H, Sq], and the state behind all keys [B, H, F, Dv]."""
    state = attn.part.state
    assert state is not None
    phi, Sq, Sk = FEATURES[state.feature], q.shape[2], k.shape[2]
    linear = attn.part.normalizer.kind == "linear"
    o: list[Tensor] = []
    mass: list[Tensor] = []
    final: list[Tensor] = []
    for b in range(B):
        for h in range(H):
            keys, values = k[b, h // 2], v[b, 0]
            F = phi(keys[0] if Sk else q[b, h, 0]).shape[0]
            first = x["s0"][0, h // 2] if "s0" in x else keys.new_zeros(F, DV)
            z = x["z0"][b, h] if "z0" in x else keys.new_zeros(F)
            unit = torch.eye(F, dtype=torch.float64)
            reads = [unit] * (Sk + 1)  # what becomes of the initial state behind n keys
            enters: list[list[Tensor]] = [[] for _ in range(Sk + 1)]  # and of each key's row of features
            for t in range(Sk):
                log = log_decay(attn, x, b, h, t)
                step = torch.diag(torch.exp(log).expand(F))
                f = phi(keys[t])
                if state.update.name == "delta":
                    beta = x["beta"][b, h // 2, t]
                    step = (unit - beta * torch.outer(f, f)) @ step
                    f = beta * f
                reads[t + 1] = step @ reads[t]
                enters[t + 1] = [step @ e for e in enters[t]] + [f]
            for r in range(Sq):
                n = min(max(r + offset + 1, 0), Sk) if state.causal else Sk
                some = [j for j in range(n) if chosen is None or bool(chosen[h, r, j])]
                query = phi(q[b, h, r]) / math.sqrt(D)
                w = [query @ enters[n][j] for j in some]
                total = query @ reads[n] @ z + sum(w, keys.new_zeros(()))
                row = query @ reads[n] @ first
                for a, j in zip(w, some, strict=True):
                    row = row + a * values[j]
                o.append(row / (total + attn.part.normalizer.eps) if linear else row)
                mass.append(total)
            outer = [torch.outer(e, value) for e, value in zip(enters[Sk], values, strict=True)]
            final.append(reads[Sk] @ first + sum(outer, keys.new_zeros(F, DV)))
    return (
        torch.stack(o).unflatten(0, (B, H, Sq)),
        torch.stack(mass).unflatten(0, (B, H, Sq)),
        torch.stack(final).unflatten(0, (B, H)),
    )


def log_decay(attn: Attention, x: Mapping[str, Tensor], b: int, h: int, t: int) -> Tensor:
    state = attn.part.state
    assert state is not None
    match state.decay.name:
        case "const":
            return torch.tensor(math.log(1 - 2.0 ** (-1 - h)), dtype=torch.float64)
        case "scalar":
            return x["g"][b, h, t]
        case "vector":
            return x["gk"][b, h // 2, t]
    return torch.zeros((), dtype=torch.float64)


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


TAPS = "outputs: [o, final_state]\n"
FADING = "const(log(1 - exp2(-1 - h)))"
BODIES = {
    "identity": "state: {}\n",
    "relu": "state: {feature: relu, initial: s0}\nnormalizer: linear(1e-3)\n",
    "elu1": "state: {feature: elu1, initial: s0, initial_mass: z0}\nnormalizer: linear(0)\n",
    "softmax": "state: {feature: softmax, decay: scalar(g)}\nnormalizer: linear(0)\n",
    "exp": f"state: {{feature: exp, decay: {FADING}, initial: s0, initial_mass: z0}}\nnormalizer: linear(0)\n",
    "taylor2": "state: {feature: taylor2, decay: scalar(g), initial: s0}\nnormalizer: linear(0.5)\n",
    "const decay": f"state: {{decay: {FADING}}}\n",
    "scalar decay": "state: {decay: scalar(g), initial: s0}\n",
    "vector decay": "state: {decay: vector(gk), initial: s0}\n",
    "vector decay, normalised": (
        "state: {feature: elu1, decay: vector(gk), initial: s0, initial_mass: z0}\nnormalizer: linear(0)\n"
    ),
    "delta": "state: {update: delta(beta)}\n",
    "gated delta": "state: {decay: scalar(g), update: delta(beta), initial: s0}\n",
    "vector gated delta": "state: {decay: vector(gk), update: delta(beta), initial: s0}\n",
    "totals": "state: {feature: relu, causal: false, initial: s0, initial_mass: z0}\nnormalizer: linear(1e-6)\n",
}
