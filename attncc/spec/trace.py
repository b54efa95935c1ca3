"""FlexAttention-style callables in, expressions out: the user's function is run once on stand-ins for its arguments.

Tensors that the function reads become inputs, named after the variable that holds them.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, NoReturn

from attncc.errors import SpecError, nearest
from attncc.ir.attention import Input
from attncc.ir.expr import TRUE, Expr, const, name
from attncc.ir.rewrite import names
from attncc.spec import usercode
from attncc.spec.budget import Budget
from attncc.spec.declarations import why_not
from attncc.spec.macros import read
from attncc.spec.operators import Fault, apply, as_bool, as_float, as_int, integer
from attncc.spec.torch_names import CASTS, MEANINGS

INDICES: Final = ("b", "h", "i", "j")
DTYPES: Final[dict[str, tuple[str, str]]] = {
    "float32": ("fp32", ""),
    "float64": ("fp32", "float"),
    "float16": ("fp16", ""),
    "bfloat16": ("bf16", ""),
    "int32": ("int32", ""),
    "int64": ("int64", ""),
    "int16": ("int32", "int"),
    "int8": ("int8", ""),
    "uint8": ("uint8", ""),
    "bool": ("bool", ""),
}
"""torch's dtype: how an input is declared, and the method that converts what is captured."""

CONTROL: Final = "Python cannot branch on a traced value: one kernel serves all positions"


class Tracer:
    """Traces callables into expressions over one common set of captured tensors."""

    def __init__(self, declared: Mapping[str, Mapping[str, Any]]) -> None:
        self.declared = declared
        self.captured: dict[str, Any] = {}
        self.inputs: dict[str, Input] = {}
        self.budget = Budget()
        self._names: dict[Any, str] = {}
        self._kept: list[Any] = []

    def score(self, function: Callable[..., Any]) -> tuple[Expr, Expr]:
        """The score of `score_mod(score, b, h, q_idx, kv_idx)`, and the mask it holds as -inf."""
        e = self._run(function, name("qk", "f32") * name("scale", "f32"), *map(name, INDICES))
        return split(self._result(function, e, as_float, "a score"))

    def mask(self, function: Callable[..., Any]) -> Expr:
        """The mask of `mask_mod(b, h, q_idx, kv_idx)`."""
        e = self._run(function, *map(name, INDICES))
        return self._result(function, e, as_bool, "a mask")

    def _run(self, function: Callable[..., Any], *args: Expr) -> Any:
        stand_ins = [Traced(e, self) for e in args]
        try:
            inspect.signature(function).bind(*stand_ins)
        except (TypeError, ValueError) as e:
            hint = "score_mod(score, b, h, q_idx, kv_idx) or mask_mod(b, h, q_idx, kv_idx)"
            raise SpecError(f"the callable does not take {len(args)} arguments: {e}", _home(function), hint) from e
        try:
            return function(*stand_ins)
        except SpecError as e:
            raise e.at(_home(function)) from None
        except Exception as e:
            place = usercode.raised_at(e.__traceback__) or _home(function)
            raise SpecError(f"the callable cannot be traced: {type(e).__name__}: {e}", place) from e

    def _result(self, function: Callable[..., Any], value: Any, want: Callable[[Expr, str], Expr], what: str) -> Expr:
        try:
            return want(self.lift(value), what)
        except Fault as fault:
            raise SpecError(f"{fault} (what the callable returns)", _home(function), fault.hint) from None

    # -- values --------------------------------------------------------------------------------------

    def lift(self, value: Any) -> Expr:
        """The expression of a value the user's code computes with."""
        match value:
            case Traced():
                return value.expr
            case TracedTensor():
                left = len(value.input.shape) - len(value.index)
                raise Fault(f"'{value.input.name}' is a tensor here", f"index its {left} further axes")
            case bool() | float():
                return const(value)
            case int():
                return integer(value)
        if _is_tensor(value):
            return self._whole(value)
        if hasattr(value, "item") and not getattr(value, "shape", (1,)):
            return self.lift(value.item())
        raise Fault(f"{type(value).__name__} is not a value that can be traced")

    def _whole(self, tensor: Any) -> Expr:
        """A tensor used without an index: an input of no axes, or the number that code made on the spot."""
        if tensor.ndim:
            raise Fault("a whole tensor has no meaning for one query and key", "index it by b, h, q_idx, kv_idx")
        if _variable(tensor) is None:
            return self.lift(tensor.item())
        return read(self.input(tensor))

    def apply(self, meaning: Callable[..., Expr], args: Any, kwargs: Mapping[str, Any]) -> Traced:
        """A row of the torch table on the user's values; faults point at the user's expression."""
        try:
            exprs = [self.lift(a) for a in args]
            named = {key: self.lift(v) for key, v in kwargs.items() if v is not None}
            return Traced(self.budget.check(meaning(*exprs, **named)), self)
        except Fault as fault:
            raise SpecError(str(fault), usercode.here(), fault.hint) from None
        except TypeError as e:
            raise SpecError(f"cannot be traced: {e}", usercode.here()) from None

    def index(self, source: Any, index: Any) -> Traced | TracedTensor:
        """A captured tensor, or a part of one, read at the given index."""
        at = index if isinstance(index, tuple) else (index,)
        try:
            if isinstance(source, TracedTensor):
                x, before = source.input, source.index
            else:
                x, before = self.input(source), ()
            full = (*before, *(self._axis(x, len(before) + k, a) for k, a in enumerate(at)))
            if len(full) < len(x.shape):
                return TracedTensor(x, full, self)
            return Traced(self.budget.check(read(x, *full)), self)
        except Fault as fault:
            raise SpecError(str(fault), usercode.here(), fault.hint) from None

    def _axis(self, x: Input, axis: int, value: Any) -> Expr:
        if isinstance(value, slice) or value is None or value is Ellipsis:
            raise Fault("a slice has no meaning for one query and key", "give one index per axis")
        if axis >= len(x.shape):
            raise Fault(f"'{x.name}' has {len(x.shape)} axes")
        e, size = as_int(self.lift(value), "an index"), x.shape[axis]
        if not isinstance(e.value, int) or not isinstance(size, int):
            return e
        if not -size <= e.value < size:
            raise Fault(f"index {e.value} is outside axis {axis} of '{x.name}' ({size})")
        return const(e.value % size)

    # -- captured tensors ----------------------------------------------------------------------------

    def input(self, tensor: Any) -> Input:
        """The input that stands for a captured tensor; the same tensor is the same input."""
        key = _identity(tensor)
        if key not in self._names:
            word = self._new_name(_variable(tensor) or "table")
            dtype, convert = DTYPES.get(_dtype_name(tensor.dtype), ("", ""))
            if not dtype:
                raise Fault(f"a captured tensor of {tensor.dtype}", f"dtypes: {', '.join(DTYPES)}")
            if 0 in tensor.shape:
                raise Fault(f"the captured tensor '{word}' is empty")
            self._kept.append(tensor)
            self._names[key] = word
            self.captured[word] = getattr(tensor, convert)() if convert else tensor
            self.inputs[word] = Input(word, self._shape(word, tensor), dtype)
        return self.inputs[self._names[key]]

    def _new_name(self, word: str) -> str:
        word = re.sub(r"\W", "_", word).strip("_")[:48] or "table"
        if why_not(word):
            word = f"{word}_input"
        candidates = (word if n == 1 else f"{word}_{n}" for n in range(1, len(self.inputs) + 2))
        return next(c for c in candidates if c not in self.inputs)

    def _shape(self, word: str, tensor: Any) -> tuple[int | str, ...]:
        """The declared shape of the input, if the user gave one, else the tensor's own."""
        declared = self.declared.get(word, {}).get("shape")
        if declared is None:
            return tuple(int(n) for n in tensor.shape)
        if len(declared) != tensor.ndim:
            raise Fault(f"input '{word}' is declared with {len(declared)} axes, the tensor has {tensor.ndim}")
        return tuple(declared)


def split(score: Expr) -> tuple[Expr, Expr]:
    """A score that is -inf where a condition fails, as the bare score and that condition."""
    mask, lowest = TRUE, const(float("-inf"))
    while score.op == "where" and lowest in score.args[1:]:
        condition, a, b = score.args
        if names(condition) & {"qk", "scale"} or a == b:
            break
        mask = apply("and", mask, condition if b == lowest else apply("not", condition))
        score = a if b == lowest else b
    return score, mask


def _is_tensor(value: Any) -> bool:
    return hasattr(type(value), "__torch_function__") and hasattr(value, "ndim") and hasattr(value, "dtype")


def _dtype_name(dtype: Any) -> str:
    return str(dtype).rpartition(".")[2]


def _identity(tensor: Any) -> Any:
    """What two views of the same values have in common."""
    address = tensor.data_ptr() if tensor.device.type != "meta" else 0
    return (address, tuple(tensor.shape), tensor.stride(), tensor.dtype) if address else id(tensor)


def _home(function: Callable[..., Any]) -> Any:
    """Where the callable is defined."""
    inner = inspect.unwrap(getattr(function, "func", function))
    code = getattr(getattr(inner, "__func__", inner), "__code__", None)
    return usercode.defined_at(code) if code else None


def _variable(tensor: Any) -> str | None:
    """The variable, or the attribute of one, by which the user's code reaches a tensor."""
    for frame in usercode.frames():
        for scope in (frame.f_locals, frame.f_globals):
            for word, value in _reachable(scope):
                if value is tensor or (getattr(tensor, "_base", None) is value and value is not None):
                    return word
        if frame.f_code.co_name == "<module>":
            break
    return None


def _reachable(scope: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    yield from scope.items()
    for owner in list(scope.values()):
        inner = getattr(owner, "__dict__", None)
        if isinstance(inner, dict) and not inspect.ismodule(owner) and not inspect.isclass(owner):
            yield from inner.items()
            yield from inner.get("_buffers", {}).items()
            yield from inner.get("_parameters", {}).items()


class TracedTensor:
    """A captured tensor of which some axes are indexed."""

    def __init__(self, source: Input, index: tuple[Expr, ...], tracer: Tracer) -> None:
        self.input = source
        self.index = index
        self.tracer = tracer

    def __getitem__(self, index: Any) -> Traced | TracedTensor:
        return self.tracer.index(self, index)

    def __iter__(self) -> NoReturn:
        raise SpecError("a traced tensor cannot be iterated over", usercode.here())

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})


class Traced:
    """A stand-in for a number that depends on the position: operators on it build an expression."""

    __slots__ = ("expr", "tracer")
    __hash__ = object.__hash__

    def __init__(self, expr: Expr, tracer: Tracer) -> None:
        self.expr = expr
        self.tracer = tracer

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        if attribute not in MEANINGS and attribute != "to":
            raise SpecError(f"'{attribute}' of a traced value has no meaning in a kernel", usercode.here())
        return lambda *args, **kwargs: _call(self.tracer, attribute, (self, *args), kwargs)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})

    def __bool__(self) -> NoReturn:
        hint = "use torch.where for if, & | ~ for and or not, and (a <= x) & (x < b) for a chain"
        raise SpecError(CONTROL, usercode.here(), hint)

    def __index__(self) -> NoReturn:
        raise SpecError(
            "a traced value is no Python int", usercode.here(), "index a torch tensor, not a list or an array"
        )

    def __int__(self) -> NoReturn:
        raise SpecError("a traced value cannot become a Python int", usercode.here(), "compute in tensors")

    def __float__(self) -> NoReturn:
        raise SpecError("a traced value cannot become a Python float", usercode.here(), "use torch's functions")

    def __iter__(self) -> NoReturn:
        raise SpecError("a traced value cannot be iterated over", usercode.here())

    def __len__(self) -> NoReturn:
        raise SpecError("a traced value has no length", usercode.here())

    def __getitem__(self, index: Any) -> NoReturn:
        raise SpecError("a traced value is a number, it has no axes", usercode.here())


def _operator(meaning: str, reverse: bool = False) -> Callable[..., Traced]:
    def method(self: Traced, *others: Any) -> Traced:
        args = (*others, self) if reverse else (self, *others)
        return self.tracer.apply(MEANINGS[meaning], args, {})

    return method


OPERATORS: Final[dict[str, str]] = {
    **{word: word for word in ("add", "sub", "mul", "mod", "pow", "floordiv", "neg", "abs")},
    **{word: word for word in ("lt", "le", "gt", "ge", "eq", "ne")},
    "truediv": "div",
    "and": "bitwise_and",
    "or": "bitwise_or",
    "xor": "bitwise_xor",
    "invert": "bitwise_not",
}
for _word, _meaning in OPERATORS.items():
    setattr(Traced, f"__{_word}__", _operator(_meaning))
    if hasattr(int, f"__r{_word}__"):
        setattr(Traced, f"__r{_word}__", _operator(_meaning, reverse=True))


def _dispatch(func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
    """A torch function that got a stand-in among its arguments."""
    word = getattr(func, "__name__", str(func))
    flat = [a for arg in args for a in (arg if isinstance(arg, tuple | list) else (arg,))]
    tracer = next(a.tracer for a in (*flat, *kwargs.values()) if isinstance(a, Traced | TracedTensor))
    if word == "__getitem__":
        return tracer.index(*args)
    return _call(tracer, word, args, kwargs)


def _call(tracer: Tracer, word: str, args: Any, kwargs: Mapping[str, Any]) -> Traced:
    if word == "to":
        return _cast(tracer, args, kwargs)
    if word in ("div", "divide") and kwargs.get("rounding_mode") == "floor":
        word, kwargs = "floor_divide", {}
    if word not in MEANINGS:
        raise SpecError(f"torch's '{word}' has no meaning in a kernel", usercode.here(), _known(word))
    if word in ("min", "max") and len(args) != 2:
        raise SpecError(f"'{word}' over an axis has no meaning for one query and key", usercode.here())
    return tracer.apply(MEANINGS[word], args, kwargs)


def _cast(tracer: Tracer, args: Any, kwargs: Mapping[str, Any]) -> Traced:
    wanted = _dtype_name(kwargs.get("dtype", args[1] if len(args) > 1 else ""))
    if wanted not in CASTS:
        raise SpecError(f"a traced value cannot be cast to '{wanted}'", usercode.here(), f"casts: {', '.join(CASTS)}")
    return tracer.apply(CASTS[wanted], args[:1], {})


def _known(word: str) -> str:
    return nearest(word, MEANINGS)
