"""Random valid specs over the whole language, as the documents that their YAML holds.

What the language refuses (`spec.checks`) is not drawn: each choice is made among what the choices before it leave.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from hypothesis import strategies as st

T = TypeVar("T")
POSITIVE = ("relu", "elu1", "softmax", "exp")
LATENT_PAGES = "latent(rope=2, page_size=4)"


@st.composite
def documents(draw: st.DrawFn) -> dict[str, Any]:
    """A valid spec."""
    return Author(draw).document()


class Author:
    """Writes one spec; declares an input wherever a choice needs one."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
        self.inputs: dict[str, Any] = {}
        self.sizes = 0
        self.q = self.one([1, 2, 4])
        self.hk = self.one([n for n in (1, 2, 4) if self.q % n == 0])
        self.qk = self.one([4, 8])
        self.storage = self.one(["dense", "dense", "dense", "cache", "paged(4)", "latent(rope=2)", LATENT_PAGES])
        latent = self.storage.startswith("latent")
        self.dv = self.one([2, 4] if latent else [4, 6])
        self.hv = self.hk if latent else self.one([n for n in (1, 2, 4) if self.q % n == 0])

    # -- choices ---------------------------------------------------------------------------------

    def one(self, options: Sequence[T]) -> T:
        return self.draw(st.sampled_from(options))

    def some(self, options: Sequence[T], most: int = 2) -> list[T]:
        return self.draw(st.lists(st.sampled_from(options), max_size=most, unique_by=str)) if options else []

    def chance(self, n: int = 2) -> bool:
        """True once in n."""
        return self.draw(st.integers(1, n)) == n

    def input(self, *shape: int | str, dtype: str = "fp32", **more: Any) -> str:
        name = f"x{len(self.inputs)}"
        flags = {} if dtype == "fp32" else {"dtype": dtype}
        self.inputs[name] = {"shape": list(shape), **flags, **more}
        return name

    def size(self) -> str:
        """A size of the spec's own."""
        self.sizes += 1
        return f"n{self.sizes}"

    # -- the whole -------------------------------------------------------------------------------

    def document(self) -> dict[str, Any]:
        parts = [self.part() for _ in range(self.one([1, 1, 2, 3]))]
        several = len(parts) > 1 or self.chance(4)
        body: dict[str, Any] = {"parts": parts} if several else parts[0]
        pairs = [p for p in parts if "state" not in p]
        combine = self.combine(parts) if len(parts) > 1 else ""
        rest = {
            "align": self.one(["", "", "top_left", "starts"]),
            "quantize": self.quantize(parts),
            "combine": combine,
            "prologue": self.prologue(parts),
            "epilogue": self.epilogue(),
            "modes": self.one([None, ["prefill"], ["decode", "prefill"]]),
            "numerics": self.one([None, {"exp": "exact"}, {"reproducible": "batch"}]),
            "schedule": self.one(["", "auto", "tile", "persistent", *["split_kv(2)", "stream_k"] * bool(pairs)]),
            "tune": self.one([None, [{"B": 2, "Sq": 64, "sparsity": 0.5}]]),
            "scale": self.one(["", "0.3", "1 / sqrt(Dv)", "log(Sk + 1) * rsqrt(Dqk)"]),
            "sizes": self.one([None, {"Sk": {"max": 4096}}, {"B": {"max": 64, "multiple": 1}}]),
        }
        rest["outputs"] = self.outputs(parts, combine)
        if rest["align"] == "starts":
            self.inputs["starts"] = {"shape": ["B"], "dtype": "int32"}
        head: dict[str, Any] = {"attncc": 1, "name": "random", "doc": self.one(["", "One: of 'many', # really"])}
        head |= {"family": self.one(["", "everyday"]), "source": self.one(["", "arXiv 1706.03762"])}
        head["heads"] = {"q": self.q, "kv": self.hk, "v": self.hv, "map": self.one(["interleave", "tile"])}
        head |= {"dims": {"qk": self.qk, "v": self.dv}, "dtype": self.one(["bf16", "fp16", "fp32"])}
        head["layout"] = self.one(["bhsd", "bshd", "varlen"])
        if several and self.storage != "dense":
            head["kv"] = self.storage
        used = set(re.findall(r"\bx\d+\b", repr((body, rest))))
        head["inputs"] = {name: x for name, x in self.inputs.items() if name in used or not name.startswith("x")}
        return {k: v for k, v in (head | body | rest).items() if v not in ("", None, [], {})}

    def combine(self, parts: list[dict[str, Any]]) -> str:
        n = len(parts)
        proj = self.one([(self.dv, self.dv), (self.q, self.dv, self.dv)])
        ways = ["add", f"gate({', '.join(self.gate() for _ in range(n - self.one([0, 1])))})"]
        ways += [f"lerp({self.gate()})"] if n == 2 else []
        ways += ["lse"] * 3 if all(map(has_lse, parts)) else [f"add({self.input(*proj)})"]
        return self.one(ways)

    def gate(self) -> str:
        """A number a row."""
        match self.one(["constant", "head", "token", "formula"]):
            case "constant":
                return "0.25"
            case "head":
                return f"{self.input('Hq')}[h]"
            case "token":
                return f"sigmoid({self.input('B', 'Hq', 'Sq', 2)}[b, h, row, 1])"
            case _:
                return "1 / (1 + row)"

    def outputs(self, parts: list[dict[str, Any]], combine: str) -> list[str]:
        lse = all(map(has_lse, parts)) and combine in ("", "lse")
        found = ["lse"] if lse and self.chance() else []
        pairs = [p for p in parts if "state" not in p]
        options = ["max_score"] if pairs else []
        options += ["final_state"] if len(pairs) < len(parts) else []
        linear = [p for p in parts if "state" in p and p.get("normalizer", "").startswith("linear")]
        options += ["final_mass"] if linear else []
        options += ["indices"] if any("select" in p for p in parts) else []
        if any(p.get("normalizer", "softmax").startswith("softmax") for p in pairs) and not combine.startswith("add("):
            options += ["column_mass", "column_mass(i < 3)", "row_mass", "row_mass(1 / (1 + j))"]
            options += ["block_mass", "block_mass(2, 3)"]
            options += [f"pair_value({self.input('B', 'Sq', 'Sk', self.size())})"] if self.chance(3) else []
        return ["o", *found, *self.some(options, 3)]

    # -- parts -----------------------------------------------------------------------------------

    def part(self) -> dict[str, Any]:
        columns = self.one([None, None, None, [0, 2], [1, self.qk]])
        width = columns[1] - columns[0] if columns else self.qk
        if self.storage != "cache" and not in_pages(self.storage) and self.chance(4):
            part: dict[str, Any] = self.state(width)
        else:
            part = self.pairs(width)
        return part | ({"columns": columns} if columns else {})

    def kv(self, width: int, kinds: Sequence[str]) -> str:
        match self.one(kinds):
            case "given":
                n = self.size()
                shape = (self.one([1, "B"]), self.one([1, "Hk"]), n)
                return f"given({self.input(*shape, width)}, {self.input(*shape, 'Dv')})"
            case "gathered":
                return f"gathered({self.input('B', 'Hk', 'Sq', self.size(), dtype='int32')})"
            case "pooled":
                return self.one(["pooled(2)", "pooled(3, weighted=true)"])
            case kind:
                return kind

    def pairs(self, width: int) -> dict[str, Any]:
        kv = self.kv(width, [self.storage] * 4 + ["given", "pooled"] + ["gathered"] * (self.storage == "dense"))
        kinds = ["softmax"] * 6 + ["sink", "sigmoid", "relu", "none", "linear(0.5)", "column_softmax"]
        kind = self.one(kinds)
        part: dict[str, Any] = {
            "score": self.score(),
            "mask": self.mask(),
            "normalizer": f"softmax(sink={self.input('Hq')}[h])" if kind == "sink" else kind,
            "dropout": self.one([0.0, 0.0, 0.0, 0.25]),
            "kv": kv,
        }
        if kind != "column_softmax" and not kv.startswith("gathered") and self.chance():
            part["select"] = self.select(kv, width)
            if kv.startswith("pooled") and self.chance():
                part["kv"] = self.one(["pooled", "pooled(weighted=true)"])
        return {k: v for k, v in part.items() if v not in ("", 0.0)}

    def score(self) -> str:
        match self.one(["plain", "plain", "softcap", "alibi", "bias", "table", "query", "scaled"]):
            case "softcap":
                return "softcap(qk * scale, 3.0)"
            case "alibi":
                return "qk * scale - exp2(-h) * abs(i - j)"
            case "bias":
                return f"qk * scale + {self.input('Hq', 'Sk', dtype=self.one(['fp32', 'bf16']), grad=True)}[h, j]"
            case "table":
                n = self.size()
                return f"qk * scale + {self.input('Hq', n)}[h, clamp(i - j, 0, {n} - 1)]"
            case "query":
                return f"qk * scale + qdot({self.input('Hq', 'Sk', 'Dqk')}[h, j])"
            case "scaled":
                return f"where(qk > 0, qk, 0.5 * qk) * {self.input('Hk')}[hk]"
            case _:
                return ""

    def mask(self) -> str:
        match self.one(["", "causal", "causal", "window", "either", "document", "segments", "heads"]):
            case "window":
                return "window(3, 1)"
            case "either":
                return "causal & (window(3) | sink(2)) | dilated(3)"
            case "document":
                return f"document({self.input('B', 'Sk', dtype='int32')})"
            case "segments":
                return f"segments({self.input('B', self.size(), dtype='int32', sorted=True)}) & causal"
            case "heads":
                return "~(i < 2) | (h % 2 == 0) & (j <= row)"
            case mask:
                return mask

    def state(self, width: int) -> dict[str, Any]:
        feature = self.one(["identity", "relu", "elu1", "softmax", "exp", "taylor2"])
        linear, causal = self.chance(), self.chance(3) is False
        features = 1 + width + width**2 if feature == "taylor2" else width
        initial = self.input(self.one([1, "B"]), self.one(["Hq", "Hk"]), features, "Dv") if self.chance() else ""
        updates = ["add"] * 3 + ["delta"] * (causal and not linear) + ["none"] * bool(initial)
        update = self.one(updates)
        decays = ["none"] + ["const", "scalar", "vector"] * (causal and update != "none")
        state = {
            "feature": feature,
            "decay": self.decay(self.one([d for d in decays if (d, feature) != ("vector", "taylor2")])),
            "update": f"delta({self.input('B', self.one(['Hq', 'Hk']), 'Sk')})" if update == "delta" else update,
            "causal": causal,
            "chunk": self.one([2, 64]),
            "initial": initial,
            "initial_mass": self.input(1, "Hq", features) if initial and linear and self.chance() else "",
            "scale": self.one(["", "1.0", "0.5 + h"]),
            "prescale": self.one(["", "0.5"]),
        }
        part: dict[str, Any] = {"state": {k: v for k, v in state.items() if v != ""}}
        kv = self.kv(width, [self.storage] * 3 + ["given"] * (state["decay"] == "none" and update != "delta"))
        part |= {"normalizer": self.one(["linear(0.001)", "linear(1)"])} if linear else {}
        part |= {"kv": kv} if kv != "dense" else {}
        if not causal and update == "add" and not kv.startswith("given") and self.chance():
            part["select"] = self.select(kv, width)
        return part

    def decay(self, kind: str) -> str:
        match kind:
            case "const":
                return "const(-0.125 * (h + 1))"
            case "scalar":
                return f"scalar({self.input('B', self.one(['Hq', 'Hk']), 'Sk')})"
            case "vector":
                return f"vector({self.input('B', self.one(['Hq', 'Hk']), 'Sk', 'Dqk')})"
            case _:
                return kind

    # -- selections ------------------------------------------------------------------------------

    def select(self, kv: str, width: int) -> dict[str, Any]:
        paged = in_pages(kv)
        k = self.one([1, 2, 4, "token", "token", "cluster", *(["page"] * paged)])
        q = self.one([1, 2, 4, "token"])
        score, q = self.selector(q, k, kv, width)
        force = self.some(list(self.forced(k, paged)), 3)
        counts = {f.partition("(")[0] for f in force} & {"sink", "local"}
        normalize = self.one(
            ["softmax"] * 4 + ["none"] + ["weighted_softmax"] * (k == "cluster") + ["anchor"] * bool(counts)
        )
        rule = self.rule(score, normalize)
        select = {
            "block": {"q": q, "k": k},
            "score": score,
            "normalize": normalize,
            "heads": self.one(["none", "max", "soft_vote", *(["group_sum"] * (self.q > self.hk))]),
            "rule": rule,
            "force": force,
            "charge": self.chance(3) is False,
            "take": self.one(["selected", "selected", "rest", *(["marginal"] * rule.startswith("ternary"))]),
            "reuse": self.one(["", "every_call", "every(2)", "cosine(0.5)", "given", "across_layers"]),
        }
        return {key: value for key, value in select.items() if value not in ("", [])}

    def selector(self, q: int | str, k: int | str, kv: str, width: int) -> tuple[str, int | str]:
        """A score for blocks of q queries and k keys; clusters may change the query side."""
        if k == "cluster":
            start = self.input(self.one([1, "B"]), self.one([1, "Hk"]), self.size(), width)
            options = self.some(["iters=2", "metric=dot"])
            if self.chance():
                q = "cluster"
                options.append(f"q={self.input(1, 'Hq', self.size(), width)}")
            return call("centroid_dot", start, *options), q
        scores = [
            call("pooled_dot", *self.some(["pool=max", "pool=mean", "gate=0.1"], 1)),
            call("lowbit_qk", *self.some(["bits=4", "per=token", "smooth=mean"])),
            call("exact_mass", *self.some(["last=2", "lse"])),
            call("random", *self.some(["seed=7"])),
            call("given", self.input("B", self.one([1, "Hk", "Hq"]), self.size(), self.size())),
        ]
        if k == "token":
            scores += ["token_dot", "relu_indexer" if kv.startswith(("given", "pooled(")) else self.indexer()]
        else:
            scores += ["minmax_bound", "minmax_bound(sub=2)"]
        if isinstance(q, int) and isinstance(k, int):
            scores.append(f"antidiagonal(stride={self.one([n for n in (1, 2, 4) if q % n == k % n == 0])})")
        return self.one(scores).replace("lse", f"lse={self.input('B', 'Hq', 'Sq')}"), q

    def indexer(self) -> str:
        heads, width = self.size(), self.size()
        names = (self.input("B", heads, "Sq", width), self.input("B", "Sk", width), self.input("B", "Sq", heads))
        return "relu_indexer(q={}, k={}, w={})".format(*names)

    def forced(self, k: int | str, paged: bool) -> Iterator[str]:
        yield from ("diagonal", "rows(i < 2)", "columns((j == 1) | (h == 1))")
        if k != "cluster":
            yield from ("sink(1)", "local(2)", "local(1, segment=2)", "first_column")
            yield from ["last_pages(1)"] * paged

    def rule(self, score: str, normalize: str) -> str:
        rules = ["topk(2)", "topk(1 + h)", "any_above(0.1)", "any_above(0.05 * (1 + h))", "ternary(0.3, 0.4)"]
        rules += ["topk_ratio(0.5)", "topk_ratio(0.4, round=nearest, least=2)", "bernoulli(0.8 / (1 + abs(i - j)))"]
        rules += ["mass(0.8)", "mass(0.5, crossing=out, least=0.25)"] if normalize != "none" else []
        rules += ["lines(2, 1)"] * 3 if score.startswith("exact_mass") else []
        return self.one(rules)

    # -- steps and formats -----------------------------------------------------------------------

    def prologue(self, parts: list[dict[str, Any]]) -> list[str]:
        on = self.one(["", "on=q", "on=k", "on=qk"])
        both = {"on=q": [self.q], "on=k": [self.hk]}.get(on, [self.q, self.hk])
        packed = not any("select" in p for p in parts)
        steps = [
            call("rope", *self.some(["base=100", "dims=2", "pairs=interleaved", "positions=logical", on], 3)),
            call("rms_norm", *self.some(["eps=0.1", f"weight={self.input(self.qk)}", on])),
            call("l2_norm", *self.some(["eps=0.1", "to=2.0", on])),
            call("temperature", "0.5 + h", on),
            call("causal_conv", self.input(sum(both), self.qk, 2), on),
            call("causal_conv", self.input(sum(both), self.qk, self.qk, 2), "kernel=2", "groups=heads", on),
            *(
                "silu",
                "silu(on=v)",
                "smooth(on=k)",
                "hadamard",
                *["hadamard(on=v)"] * (self.dv != 6),
                "value_shift(fraction=0.5)",
                "value_shift",
            ),
            "l2_norm(on=v)",
            call("lerp", self.input(1, "Hq", "Sq", "Dqk"), "0.25", "on=q"),
            *["rope(positions=packed)"] * packed,
        ]
        if self.chance(5):
            steps.append(f"rope(cos={self.input(self.size(), self.qk // 2)}, sin={self.input('Sk', self.qk // 2)})")
        found = self.some(steps, 3)
        if self.chance(6):
            return ["mean_residual(scale=0.5)", *found]
        heads, letter = self.one([("Hq", "q"), *[("Hk", "k"), ("Hv", "v")] * (not self.storage.startswith("latent"))])
        return [call("absorb", self.input(heads, 3, 2), f"on={letter}"), *found] if self.chance(6) else found

    def epilogue(self) -> list[str]:
        steps = [f"{name}({self.gate()})" for name in self.some(["lerp_v", "gate", "skip"])]
        return [*steps, f"absorb({self.input('Hq', 'Dv', 3)})"] if self.chance(5) else steps

    def quantize(self, parts: list[dict[str, Any]]) -> dict[str, str]:
        if not self.chance(3):
            return {}
        whole = not any(
            "state" in p or "columns" in p or p.get("kv", "").startswith(("given", "pooled")) for p in parts
        )
        soft = all(p.get("normalizer", "softmax").startswith("softmax") and "state" not in p for p in parts)
        values = ["v"] * (not self.storage.startswith("latent"))
        held = ["k", *values] if self.chance() else ["cache"]
        operands = self.some(["q", *held, *["p"] * soft], 4)
        return {operand: self.format(operand, whole) for operand in operands}

    def format(self, operand: str, whole: bool) -> str:
        dtype = self.one(
            ["int8", "int4", "int2", "fp8_e4m3", "fp8_e5m2", "nvfp4", *["staircase"] * (operand == "cache")]
        )
        grains = ["token", "group(2)"]
        grains += ["tensor", "head", "block", "block(3)", "channel"] if operand != "p" else []
        grains += ["thread"] if operand in "qk" else []
        options = [f"per={self.one(grains)}"] if dtype != "nvfp4" and self.chance() else []
        options += ["symmetric=false"] if dtype.startswith("int") and self.chance() else []
        options += ["smooth=mean"] if operand in "qk" and whole and self.chance() else []
        return call(dtype, *["[(2, bf16), (4, int8), (inf, int4)]"] * (dtype == "staircase"), *options)


def in_pages(kv: str) -> bool:
    return kv.startswith("paged") or kv == LATENT_PAGES


def call(name: str, *args: str) -> str:
    given = [a for a in args if a]
    return f"{name}({', '.join(given)})" if given else name


def has_lse(part: dict[str, Any]) -> bool:
    kind = part.get("normalizer", "none" if "state" in part else "softmax")
    if "state" in part:
        return kind.startswith("linear") and part["state"]["feature"] in POSITIVE
    return kind.startswith("softmax")
