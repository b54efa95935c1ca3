"""Triton's interpreter without habits that cost it most of its time and change no result.

It computes every integer operation again in 64 bits to see whether it overflowed, and then, as nobody debugs, does not
look; it patches Triton's language anew for each call of a device function, though the kernel around it had it done:
only what Triton's own functions know the language by, another module, is missing then; and for each value it works out
anew what its type says, though a program knows some dozens of types.
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
            extents[id(self.shape)] = core.tuple([core.constexpr(s) for s in key[1:]]), core.constexpr(self.numel)
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
    """What NumPy calls a dtype, in which dtype two of them meet, and that values of one type need no such talk."""
    from triton.language import core
    from triton.language.semantic import TritonSemantic

    named: Any = interpreter._get_np_dtype
    met: Any = TritonSemantic.computation_type_impl
    checked: Any = TritonSemantic.binary_op_type_checking_impl
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

    def check(self: Any, a: Any, b: Any, *flags: bool, **more: bool) -> Any:
        alike = type(a) is type(b) is core.tensor and a.dtype is b.dtype and a.shape is b.shape
        if alike and not (more or flags[3:] or a.dtype.is_ptr()):  # a quotient may be of another type
            return a, b
        return checked(self, a, b, *flags, **more)

    interpreter._get_np_dtype = name
    TritonSemantic.computation_type_impl = meet
    TritonSemantic.binary_op_type_checking_impl = check
    core.dtype.__eq__ = lambda self, other: self is other or equal(self, other)
