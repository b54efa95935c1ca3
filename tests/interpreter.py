"""Triton's interpreter without habits that cost it most of its time and change no result.

It computes every integer operation again in 64 bits to see whether it overflowed, and then, as nobody debugs, does not
look; it patches Triton's language anew for each call of a device function, though the kernel around it had it done:
only what Triton's own functions know the language by, another module, is missing then; for each value it works out
anew what its type says, though a program knows some dozens of types; and before it hands two operands to NumPy it makes
both as large as their result, which NumPy does without copies.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any


def hurry() -> None:
    """For this process. Where an interpreter is made otherwise, it is left as it is."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder: Any = getattr(interpreter, "interpreter_builder", None)
    patch: Any = getattr(interpreter, "_patch_lang", None)
    if patch is None or getattr(getattr(builder, "options", None), "debug", True):
        return
    builder.options = replace(builder.options, sanitize_overflow=False)
    patched: list[Any] = []

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not patched and any(x is tl.core for x in self.fn.__globals__.values()):
            patched.append(patch(self.fn))  # for good, as by the interpreter itself
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter.InterpretedFunction.__call__ = call
    _know_blocks()
    _know_dtypes(interpreter)
    _meet_in_numpy()
    _call_at_once(interpreter)


def _know_blocks() -> None:
    """The type of a block is made once, and so are the numbers that a value of it has as its shape."""
    from triton.language import core
    from triton.language.semantic import TritonSemantic

    make: Any = core.block_type.__init__
    broadcast: Any = TritonSemantic.broadcast_impl_value
    known: dict[tuple[Any, ...], dict[str, Any]] = {}
    shapes: dict[tuple[int, ...], Any] = {}
    extents: dict[int, tuple[Any, Any]] = {}  # by the address of a shape, which `shapes` keeps
    scalar = core.tuple([]), core.constexpr(1)

    def block(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = shape.values if isinstance(shape, core.tuple) else shape
        key = (element_ty.name, *(s.value if isinstance(s, core.constexpr) else s for s in sizes))
        if key not in known:
            make(self, element_ty, shape)
            self.shape = shapes.setdefault(key[1:], self.shape)
            extent = core.tuple([core.constexpr(s) for s in key[1:]]), core.constexpr(self.numel)
            extents.setdefault(id(self.shape), extent)
            known[key] = dict(self.__dict__)
        self.__dict__.update(known[key])

    def tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = extents[id(type.shape)] if type.is_block() else scalar

    def alike(self: Any, lhs: Any, rhs: Any) -> Any:
        left, right = getattr(lhs.type, "shape", None), getattr(rhs.type, "shape", None)
        return (lhs, rhs) if left is right else broadcast(self, lhs, rhs)

    core.block_type.__init__ = block
    core.tensor.__init__ = tensor
    TritonSemantic.broadcast_impl_value = alike


def _know_dtypes(interpreter: Any) -> None:
    """What NumPy calls a dtype, and in which dtype two of them meet."""
    from triton.language import core
    from triton.language.semantic import TritonSemantic

    named: Any = interpreter._get_np_dtype
    met: Any = TritonSemantic.computation_type_impl
    equal: Any = core.dtype.__eq__
    names: dict[str, Any] = {}
    meetings: dict[tuple[Any, ...], Any] = {}

    def name(dtype: Any) -> Any:
        scalar = dtype.scalar.name
        if scalar not in names:
            names[scalar] = named(dtype)
        return names[scalar]

    def meet(self: Any, a: Any, a_is_scalar: bool, b: Any, b_is_scalar: bool, div_or_mod: bool) -> Any:
        key = a.name, a_is_scalar, b.name, b_is_scalar, div_or_mod
        if key not in meetings:
            meetings[key] = met(self, a, a_is_scalar, b, b_is_scalar, div_or_mod)
        return meetings[key]

    interpreter._get_np_dtype = name
    TritonSemantic.computation_type_impl = meet
    core.dtype.__eq__ = lambda self, other: self is other or equal(self, other)


def _meet_in_numpy() -> None:
    """Operands of one dtype, offsets of pointers and numbers beside tensors get the type of their result and no more.

    NumPy makes both as large as the result, which is all that operators do with what they are given here.
    """
    from triton.language import core
    from triton.language.semantic import TritonSemantic

    checked: Any = TritonSemantic.binary_op_type_checking_impl
    joint: dict[tuple[int, int], Any] = {}  # by the addresses of shapes, which it keeps
    numbers: dict[tuple[Any, ...], Any] = {}
    divisible = core.int32, core.int64, core.float32  # quotients of others are of another type

    def check(
        self: Any, a: Any, b: Any, a_may_point: bool = False, b_may_point: bool = False, *flags: bool, **more: bool
    ) -> Any:
        left, right = type(a) is core.tensor, type(b) is core.tensor
        if more or not (left or right) or (flags[1:] and (a if left else b).dtype not in divisible):
            return checked(self, a, b, a_may_point, b_may_point, *flags, **more)
        if left and right:
            alike = a.dtype is b.dtype and not a.dtype.is_ptr()
            alike = alike or (a_may_point and a.dtype.is_ptr() and b.dtype.is_int())
            made = met(a, b) if alike else None
        elif left:
            number = constant(self, a, b, *flags)
            made = number and met(a, number)
        else:
            number = constant(self, b, a, *flags)
            made = number and met(number, b)
        return made or checked(self, a, b, a_may_point, b_may_point, *flags)

    def constant(self: Any, beside: Any, number: Any, *flags: bool) -> Any:
        """The number as a scalar of the tensor's dtype, or None if the two meet in another one."""
        key = beside.dtype.name, type(number), number, *flags
        if key not in numbers:
            known = type(number) in (int, float) and not beside.dtype.is_ptr()
            nothing = self.scalar_constant(0, beside.dtype) if known else None
            left, right = checked(self, nothing, number, False, False, *flags) if known else (None, None)
            numbers[key] = right if known and left.dtype is right.dtype is beside.dtype else None
        return numbers[key]

    def met(a: Any, b: Any) -> Any:
        """Both with the shape of their result, or None where there is none."""
        if a.shape is b.shape:
            return a, b
        key = id(a.shape), id(b.shape)
        if key not in joint:
            joint[key] = a.shape, b.shape, common(*([s.value for s in x.shape] for x in (a, b)))
        shape = joint[key][2]
        return shape and tuple(core.tensor(x.handle, core.block_type(x.dtype, shape)) for x in (a, b))

    def common(a: list[int], b: list[int]) -> list[int] | None:
        longer, shorter = sorted((a, b), key=len, reverse=True)
        shorter = [1] * (len(longer) - len(shorter)) + shorter
        pairs = [*zip(longer, shorter, strict=True)]
        return [max(p) for p in pairs] if all(x == y or 1 in (x, y) for x, y in pairs) else None

    TritonSemantic.binary_op_type_checking_impl = check


def _call_at_once(interpreter: Any) -> None:
    """Calls of the language without what looks at each of their arguments, and at the bytes of each result."""
    from triton.language import core

    unwrap: Any = core._unwrap_if_constexpr
    made: Any = interpreter.TritonSemantic.to_tensor
    converted: Any = interpreter.TritonSemantic.cast
    plain = {core.tensor, core.dtype, core.block_type, core.pointer_type, int, float, bool, str, type(None)}
    semantics: dict[int, Any] = {}

    def bare(x: Any) -> Any:
        return x if type(x) in plain else unwrap(x)

    def name(obj: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
        if id(builder) not in semantics:
            semantics[id(builder)] = interpreter.TritonSemantic(builder)
        semantic = semantics[id(builder)]

        def called(*args: Any, **kwargs: Any) -> Any:
            kwargs["_semantic"] = semantic
            return member(*args, **kwargs)

        scope.set_attr(obj, name, called)

    def tensor(self: Any, x: Any, *check_type: Any, **more: Any) -> Any:
        return x if type(x) is core.tensor else made(self, x, *check_type, **more)

    def cast(self: Any, x: Any, dtype: Any, *rounding: Any, **more: Any) -> Any:
        return x if x.dtype is dtype and not more else converted(self, x, dtype, *rounding, **more)

    core._unwrap_if_constexpr = bare
    interpreter.TritonSemantic.to_tensor = tensor
    interpreter.TritonSemantic.cast = cast
    interpreter._patch_attr = name
    interpreter.TensorHandle.__post_init__ = lambda self: None
