"""Triton's interpreter without two habits that cost it half of its time and change no result.

It computes every integer operation again in 64 bits to see whether it overflowed, and then, as nobody debugs, does not
look; and it patches Triton's language anew for each call of a device function, though the kernel around it had it done:
only what Triton's own functions know the language by, another module, is missing then.
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
