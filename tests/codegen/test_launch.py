"""Launches below Triton's own Python: the kernel is given what Triton would have given it."""

from __future__ import annotations

import inspect
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from triton.backends.nvidia import driver

from attncc.codegen import _launch

pytestmark = pytest.mark.newest
GIVEN = ["pointer", SimpleNamespace(name="Q"), 64, SimpleNamespace(name="K"), (1, 2)]


def encoded(descriptor: Any, meta: Any) -> list[Any]:
    return [f"map of {descriptor.name} as {meta}", 5, 6, 7, 8]


def fake(launch: Any, scratch: int = 0) -> SimpleNamespace:
    """A compiled kernel as Triton 3.6 has it."""

    def run(x: int, y: int, z: int, stream: int, function: Any, *others: Any) -> None:
        launch(x, y, z, stream, function, False, True, None, None, *others)

    attributes = {"launch": launch, "launch_cooperative_grid": False, "launch_pdl": True}
    run.__dict__.update(attributes | {"global_scratch_size": scratch, "profile_scratch_size": 0})
    return SimpleNamespace(run=run, function="f", packed_metadata="packed")


def make_tensordesc_arg(descriptor: Any, meta: Any) -> list[Any]:
    """Under the name by which Triton's own stands beside its wrapper."""
    calls.append(descriptor.name)
    return encoded(descriptor, meta)


calls: list[str] = []


def wrapped(launcher: Any, tensordesc_meta: list[str]) -> Any:
    """Triton 3.6's wrapper in short: descriptors are encoded in every call."""

    def inner(*given: Any) -> None:
        flat: list[Any] = []
        metas = iter(tensordesc_meta)
        for value in given:
            flat += make_tensordesc_arg(value, next(metas)) if isinstance(value, SimpleNamespace) else [value]
        launcher(*flat)

    return inner


def test_the_wrapper_is_triton_s() -> None:
    """Where it is another one, what stands here is what calls go through."""
    text = inspect.getsource(driver)
    names = ("def wrap_handle_tensordesc(launcher,", "tensordesc_meta", "def make_tensordesc_arg(arg, metadata)")
    assert all(name in text for name in names) or not _launch.TRITON.startswith("3.6.")


def test_maps_are_encoded_once_and_arguments_are_those_of_triton() -> None:
    seen: list[tuple[Any, ...]] = []
    calls.clear()
    launch = wrapped(lambda *given: seen.append(given), ["meta 1", "meta 3"])
    compiled = fake(launch)
    compiled.run(7, 1, 1, 99, "f", "packed", None, None, None, *GIVEN)
    assert calls == ["Q", "K"]
    start, encode = _launch.entry(compiled, 7, [3, 1])
    bound = _launch.Bound([*GIVEN], tiles=[(1, 0, "bhsd", []), (3, 1, "bhsd", [])], at={"args": 4})
    direct = bound.unfolded({at: encode(at, GIVEN[at]) for at in (1, 3)})
    assert calls == ["Q", "K", "Q", "K"]
    assert [direct.arguments[at] for at, *_ in direct.tiles] == ["map of Q as meta 1", "map of K as meta 3"]
    assert direct.arguments[direct.at["args"]] == (1, 2)
    start(99, direct.arguments)
    start(99, direct.arguments)
    assert calls == ["Q", "K", "Q", "K"]
    assert seen[0] == seen[1] == seen[2]


@pytest.mark.parametrize("scratch", [0, 128])
def test_other_launchers_are_called_as_they_are(scratch: int) -> None:
    """Without descriptors, and where a kernel needs memory that Triton allocates."""
    seen: list[tuple[Any, ...]] = []
    start, encode = _launch.entry(fake(lambda *given: seen.append(given), scratch), 7, [])
    start(99, ["pointer", 64])
    assert encode(0, "descriptor") == ["descriptor"]
    assert seen == [(7, 1, 1, 99, "f", False, True, None, None, "packed", None, None, None, "pointer", 64)]


def test_maps_are_kept_by_address_and_the_tensor_is_not() -> None:
    made: list[int] = []

    def encode(descriptor: Any) -> list[Any]:
        made.append(descriptor.base.data_ptr())
        return [len(made), "shape", "strides"]

    launch = _launch.Launch(None, 1, {}, encode={2: encode})
    bound = _launch.Bound(["a", "b", None, "shape", "strides"], tiles=[(2, 0, "bhsd", [1, 1, 64, 64])])
    x, y = (torch.zeros(1, 1, 64, 64, dtype=torch.float16) for _ in range(2))
    for t, number in ((x, 1), (x, 1), (y, 2), (x, 1)):
        assert launch.prepared(bound, [t], 1.0, launch.kept_map) == ["a", "b", number, "shape", "strides"]
    assert made == [x.data_ptr(), y.data_ptr()]
    for n in range(_launch.ADDRESSES_KEPT + 1):
        launch.kept_map(2, torch.zeros(n + 1, 1, 64, 64, dtype=torch.float16), "bhsd", [1, 1, 64, 64])
    assert len(launch.kept) <= _launch.ADDRESSES_KEPT


def test_a_thread_enters_its_context_once(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[int] = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: entered.append(device))
    here, there = SimpleNamespace(is_cuda=False), SimpleNamespace(is_cuda=True, device=0)

    def call() -> None:
        for t in (here, there, there, here):
            _launch.enter_context(t)  # type: ignore[arg-type]

    for _ in range(2):
        thread = Thread(target=call)
        thread.start()
        thread.join()
    assert entered == [0, 0]
