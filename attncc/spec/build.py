"""The schema's model in, `ir.attention.Attention` out: texts are parsed, defaults filled, combinations checked."""

from __future__ import annotations

from typing import Any, Final

from attncc.errors import SpecError
from attncc.ir.attention import (
    Attention,
    Call,
    Dims,
    Normalizer,
    Numerics,
    Part,
    Quantizer,
    Select,
    State,
    Storage,
)
from attncc.ir.expr import Expr
from attncc.spec import calls, declarations, expression, vocabulary
from attncc.spec.calls import Bound, Vocabulary
from attncc.spec.checks import check, has_lse
from attncc.spec.expression import Context, Want
from attncc.spec.schema import BranchModel, SelectModel, SpecModel, StateModel
from attncc.spec.source import Path_, Snippet, Source

BRANCH_KEYS: Final = tuple(BranchModel.model_fields)


def build(model: SpecModel, source: Source) -> Attention:
    """The attention variant a valid document describes."""
    return _Builder(model, source).attention()


class _Builder:
    """Reads the texts of one document against its scope."""

    def __init__(self, model: SpecModel, source: Source) -> None:
        self.model = model
        self.source = source
        self.heads = declarations.heads(model, source)
        self.dims = Dims(model.dims.qk, model.dims.v or model.dims.qk)
        self.inputs = declarations.inputs(model, source)
        self.sizes = declarations.sizes(model, source, self.inputs)
        self.align = declarations.align(model, source, self.inputs)
        self.scope = declarations.scope(self.heads, self.dims, self.inputs, self.sizes, self.align)

    def attention(self) -> Attention:
        model = self.model
        parts = self.parts()
        combine = self.call(("combine",), model.combine, vocabulary.COMBINE, "way to combine")
        attention = Attention(
            name=model.name,
            heads=self.heads,
            dims=self.dims,
            parts=parts,
            scale=self.expression(("scale",), model.scale, "scale", "float", "the scale"),
            doc=model.doc,
            family=model.family,
            source=model.source,
            dtype=model.dtype,
            layout=model.layout,
            inputs=self.inputs,
            sizes=self.sizes,
            align=self.align,
            combine=combine,
            quantize=self.quantize(),
            prologue=self.calls(("prologue",), model.prologue, vocabulary.PROLOGUE, "prologue step"),
            epilogue=self.calls(("epilogue",), model.epilogue, vocabulary.EPILOGUE, "epilogue step"),
            outputs=self.outputs(parts, combine),
            modes=tuple(model.modes),
            numerics=Numerics(model.numerics.reproducible, model.numerics.exp, model.numerics.accumulate),
            schedule=self.call(("schedule",), model.schedule, vocabulary.SCHEDULE, "schedule"),
            tune=tuple(tuple(sorted(case.items())) for case in model.tune),
        )
        check(attention, self.source)
        return attention

    # -- texts ---------------------------------------------------------------------------------------

    def snippet(self, path: Path_, text: str) -> Snippet:
        """The text at `path` as the document has it, else the default `text`."""
        return self.source.snippet(path) or Snippet(text)

    def expression(self, path: Path_, text: str, context: Context, want: Want, what: str) -> Expr:
        return expression.parse(self.snippet(path, text), self.scope, context, want, what)

    def bound(self, path: Path_, text: str, table: Vocabulary, what: str) -> Bound:
        return calls.parse(self.snippet(path, text), table, self.scope, what)

    def call(self, path: Path_, text: str, table: Vocabulary, what: str) -> Call:
        return self.bound(path, text, table, what).call()

    def calls(self, path: Path_, texts: list[str], table: Vocabulary, what: str) -> tuple[Call, ...]:
        found: list[Call] = []
        for k, text in enumerate(texts):
            if text.count("(") != text.count(")"):
                hint = "inside [ ] a comma ends an item: put it in quotes, or each item on a line of its own"
                raise SpecError(f"unbalanced parentheses in '{text}'", self.source.locate((*path, k)), hint)
            found.append(self.call((*path, k), text, table, what))
        return tuple(found)

    # -- branches ------------------------------------------------------------------------------------

    def parts(self) -> tuple[Part, ...]:
        model = self.model
        if model.parts is None:
            if "combine" in model.model_fields_set:
                raise self.fault(("combine",), "there is nothing to combine: the spec has no parts")
            return (self.part(model, (), ""),)
        for key in BRANCH_KEYS:
            if key in model.model_fields_set and key != "kv":
                raise self.fault((key,), f"'{key}' stands beside 'parts'", "write it in the parts it is for")
        self.storage(("kv",), model.kv)  # read even where every part has its own
        if "combine" in model.model_fields_set and len(model.parts) == 1:
            raise self.fault(("combine",), "there is nothing to combine: the spec has one part")
        return tuple(self.part(p, ("parts", k), p.name or "") for k, p in enumerate(model.parts))

    def fault(self, path: Path_, message: str, hint: str = "") -> SpecError:
        return SpecError(message, self.source.locate_key(path), hint)

    def part(self, model: BranchModel, at: Path_, name: str) -> Part:
        state = self.state(model, at) if model.state else None
        given = model.model_fields_set
        default = "none" if state else "softmax"
        kv_at, kv = ((*at, "kv"), model.kv) if "kv" in given else (("kv",), self.model.kv)
        return Part(
            score=self.expression((*at, "score"), model.score, "score", "float", "a score"),
            mask=self.expression((*at, "mask"), model.mask, "mask", "bool", "a mask"),
            normalizer=self.normalizer((*at, "normalizer"), model.normalizer if "normalizer" in given else default),
            select=self.select(model.select, (*at, "select")) if model.select else None,
            state=state,
            dropout=model.dropout,
            kv=self.storage(kv_at, kv),
            name=name,
            columns=(model.columns[0], model.columns[1]) if model.columns else None,
        )

    def normalizer(self, path: Path_, text: str) -> Normalizer:
        bound = self.bound(path, text, vocabulary.NORMALIZER, "normalizer")
        return Normalizer(bound.name, bound.expr("sink"), float(bound.number("eps") or 0.0))  # type: ignore[arg-type]

    def storage(self, path: Path_, text: str) -> Storage:
        bound = self.bound(path, text, vocabulary.STORAGE, "storage")
        page, rope, block = (bound.number(word) for word in ("page_size", "rope", "block"))
        as_int = lambda n: None if n is None else int(n)
        index = bound.word("name") or bound.word("k")
        weighted = bool(bound.values.get("weighted", False))
        kind: Any = bound.name
        return Storage(kind, as_int(page), as_int(rope), index, bound.word("v"), as_int(block), weighted)

    def select(self, model: SelectModel, at: Path_) -> Select:
        return Select(
            block=(model.block.q, model.block.k),
            score=self.call((*at, "score"), model.score, vocabulary.SELECT_SCORE, "selector"),
            normalize=model.normalize,
            heads=model.heads,
            rule=self.call((*at, "rule"), model.rule, vocabulary.SELECT_RULE, "rule"),
            force=self.calls((*at, "force"), model.force, vocabulary.SELECT_FORCE, "forced set"),
            reuse=self.call((*at, "reuse"), model.reuse, vocabulary.SELECT_REUSE, "reuse"),
            charge=model.charge,
            take=model.take,
        )

    def state(self, branch: BranchModel, at: Path_) -> State:
        model: StateModel = branch.state  # type: ignore[assignment]
        for key in ("score", "mask", "dropout"):
            if key in branch.model_fields_set:
                raise self.fault((*at, key), f"'{key}' has no meaning beside 'state'")
        path = (*at, "state")
        return State(
            feature=model.feature,
            decay=self.call((*path, "decay"), model.decay, vocabulary.DECAY, "decay"),
            update=self.call((*path, "update"), model.update, vocabulary.UPDATE, "update"),
            causal=model.causal,
            chunk=model.chunk,
            initial=self.input(model.initial, (*path, "initial")),
            initial_mass=self.input(model.initial_mass, (*path, "initial_mass")),
            scale=self.factor((*path, "scale"), model.scale),
            prescale=self.factor((*path, "prescale"), model.prescale),
        )

    def input(self, word: str | None, path: Path_) -> str:
        return declarations.reference(word, path, self.source, self.inputs)

    def factor(self, path: Path_, text: str | None) -> Expr | None:
        return None if text is None else self.expression(path, text, "head", "float", "a factor")

    # -- the rest ------------------------------------------------------------------------------------

    def quantize(self) -> tuple[Quantizer, ...]:
        found: list[Quantizer] = []
        for operand in ("q", "k", "v", "p", "cache"):
            text = getattr(self.model.quantize, operand)
            if not text:
                continue
            table = vocabulary.CACHE_QUANTIZER if operand == "cache" else vocabulary.QUANTIZER
            bound = self.bound(("quantize", operand), text, table, "quantizer")
            per, steps = bound.values.get("per"), bound.values.get("steps")
            found.append(
                Quantizer(
                    operand=operand,
                    dtype=bound.name,
                    per=per.call() if isinstance(per, Bound) else None,
                    symmetric=bool(bound.values.get("symmetric", True)),
                    smooth=bound.word("smooth"),
                    staircase=steps if isinstance(steps, tuple) else (),
                )
            )
        return tuple(found)

    def outputs(self, parts: tuple[Part, ...], combine: Call) -> tuple[Call, ...]:
        if self.model.outputs is None:
            return (Call("o"), Call("lse")) if has_lse(parts, combine) else (Call("o"),)
        return self.calls(("outputs",), self.model.outputs, vocabulary.OUTPUTS, "output")
