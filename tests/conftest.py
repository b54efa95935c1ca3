"""What all tests share: the `golden` fixture, and GPU tests only where a GPU is."""

from __future__ import annotations

import gc
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from autotune.postgres import pg_ctl
from golden import TESTS, Golden
from hypothesis import HealthCheck, settings
from interpreter import hurry

from attncc.codegen.gate import Findings, examine

PATIENT = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}  # of machines that others use, too
settings.register_profile("here", **PATIENT)
settings.register_profile("ci", derandomize=True, **PATIENT)  # a change lands or not by what it does, not by luck
settings.load_profile("ci" if os.environ.get("CI") else "here")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="take what the tests produce as the new goldens")


SCRATCH: list[tempfile.TemporaryDirectory[str]] = []
"""Of this process: removed when pytest ends, also with what processes left that a test killed."""


def pytest_configure() -> None:
    """Without a GPU kernels are interpreted, which Triton wants to know before anything imports it.

    Temporary files of the session, of its workers and of all that they start lie in one folder. pytest's own stay where
    they are, to be looked at. Nobody's tuning records are read: the store of the session is an empty one.
    """
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
    SCRATCH.append(tempfile.TemporaryDirectory(prefix="attncc-tests-", ignore_cleanup_errors=True))
    Path(SCRATCH[-1].name).chmod(0o711)  # PostgreSQL's server is another user
    os.environ["TMPDIR"] = tempfile.tempdir = SCRATCH[-1].name
    os.environ["ATTNCC_STORE"] = tempfile.mkdtemp(prefix="store-")
    if not _has_gpu():
        os.environ.setdefault("TRITON_INTERPRET", "1")
        hurry()


def pytest_collection() -> None:
    gc.disable()  # what is imported and collected stays


def pytest_collection_finish() -> None:
    """The garbage collector forgets what is there before any test: to go through all of it takes half a second."""
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    while SCRATCH:
        SCRATCH.pop().cleanup()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked `gpu` or `postgres` are run where there is one, and are not counted elsewhere."""
    for mark, is_here in (("gpu", _has_gpu()), ("postgres", pg_ctl() is not None)):
        marked = {item for item in items if item.get_closest_marker(mark)}
        if marked and not is_here:
            config.hook.pytest_deselected(items=[*marked])
            items[:] = [item for item in items if item not in marked]


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(autouse=True, scope="session")
def engines_pass() -> Iterator[None]:
    """Compiling every engine takes seconds each: tests that are about that say so by the mark `gate`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("attncc.driver.examine", lambda *where: Findings(()))
        yield


@pytest.fixture(autouse=True)
def engines_are_examined(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a test is marked so."""
    if request.node.get_closest_marker("gate"):
        monkeypatch.setattr("attncc.driver.examine", examine)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """codegen/test_triton.py::test_dense[causal] has its goldens at goldens/codegen/triton/dense-causal.*"""
    test = request.node.path.relative_to(TESTS)
    name = re.sub(r"[^\w]+", "-", request.node.name.removeprefix("test_")).strip("-")
    stem = TESTS / "goldens" / test.parent / test.stem.removeprefix("test_") / name
    return Golden(stem, request.config.getoption("--update-golden"))
