"""One variant and one program in which every node and every field is in use, and random formulas."""

from __future__ import annotations

from hypothesis import strategies as st

from attncc.ir.attention import (
    Align,
    Attention,
    Call,
    Dims,
    Heads,
    Input,
    KeyRange,
    KeyTiles,
    Normalizer,
    Numerics,
    Part,
    Quantizer,
    Select,
    Size,
    State,
    Storage,
)
from attncc.ir.expr import OPS, Expr, bucket, const, ew, load, name

i, j, h, b, row = (name(n) for n in ("i", "j", "h", "b", "row"))
qk, scale = name("qk", "f32"), name("scale", "f32")
one = const(1)

PLAIN = Attention("plain", Heads(4, 2, 2), Dims(16, 16), (Part(qk * scale, j <= i),), ew("rsqrt", name("Dqk")))

FULL = Attention(
    name="full",
    heads=Heads(8, 4, 2, "tile"),
    dims=Dims(64, 32),
    parts=(
        Part(
            score=ew("tanh", qk * scale) * 50.0 + load("bias", h, i - j),
            mask=(j <= i) & (bucket("cuts", i) > 2),
            normalizer=Normalizer("linear", sink=load("sinks", h), eps=1e-6),
            select=Select(
                (128, "page"),
                Call("antidiagonal", kwargs=(("stride", const(16)),)),
                "softmax",
                "none",
                Call("mass", (const(0.9),), (("crossing", "in"),)),
                (Call("sink", (one,)), Call("diagonal")),
                Call("every_call"),
            ),
            state=State("elu1", Call("scalar", words=("g",)), Call("add"), True, 64, "s0"),
            dropout=0.1,
            kv=Storage("paged", page_size=16, rope=64, index="picks"),
            name="near",
            key_tiles=KeyTiles(
                (KeyRange(const(0), name("i1") + 1, const(0), name("i0")),), name("j1") <= name("i1"), True, (64, 32)
            ),
        ),
        Part(qk * scale, name="far"),
    ),
    scale=ew("rsqrt", name("Dqk")),
    doc="Everything, at once.",
    dtype="fp16",
    layout="varlen",
    inputs=(
        Input("bias", ("Hq", 2048), "bf16", grad=True),
        Input("sinks", ("Hq",)),
        Input("cuts", ("N",), "int32", sorted=True),
    ),
    sizes=(Size("Sk", max=4096, multiple=8), Size("Sq", fixed=1)),
    align=Align("input", "starts"),
    combine=Call("lerp", (load("mix", h),)),
    quantize=(Quantizer("k", "int8", Call("block", (const(64),)), False, "mean", ((128, "bf16"), (None, "int4"))),),
    prologue=(Call("rope"), Call("temperature", (const(0.5),))),
    epilogue=(Call("gate", (load("mix", h),)),),
    outputs=(Call("o"), Call("lse"), Call("column_mass", (one,))),
    modes=("prefill",),
    numerics=Numerics("batch", "exact"),
    schedule=Call("split_kv", (const(4),)),
    tune=((("B", 4), ("Sq", 8192), ("sparsity", 0.05)),),
)


def formulas() -> st.SearchStrategy[Expr]:
    """Well-formed formulas of any type, made by the constructors."""
    floats = st.one_of(
        st.sampled_from([qk, scale, load("bias", h, i)]),
        st.floats(allow_nan=False, width=32).map(lambda x: const(float(x))),
    )
    ints = st.one_of(st.sampled_from([i, j, h, row, bucket("cuts", i)]), st.integers(-9, 2**33).map(const))
    bools = st.sampled_from([const(True), const(False), load("on", i, dtype="bool")])
    return st.recursive(st.one_of(floats, ints, bools), _grown, max_leaves=12)


def _grown(inner: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
    def apply(op: str) -> st.SearchStrategy[Expr]:
        return st.tuples(*[inner] * OPS[op].arity).map(lambda args: Expr(op, args, None, OPS[op].dtype(_dtypes(args))))

    return st.sampled_from(sorted(OPS)).flatmap(apply)


def _dtypes(args: tuple[Expr, ...]) -> tuple[str, ...]:
    return tuple(a.dtype for a in args)
