"""A child that hangs, crashes or talks costs one question, whoever asks."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from golden import TESTS

from attncc.autotune.child import Child, ChildDied


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch) -> Iterator[Child]:
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    with Child("autotune.naughty", ["a", "b"], {"SET": "yes"}) as made:
        yield made


def test_a_child_answers_with_its_arguments_and_environment(child: Child) -> None:
    first, second = child.ask({"do": "tell"}, 60), child.ask({"do": "tell"}, 60)
    assert first["arguments"] == ["a", "b"]
    assert first["set"] == "yes"
    assert first["pid"] == second["pid"] != os.getpid()


def test_what_it_prints_is_no_answer(child: Child) -> None:
    assert child.ask({"do": "print"}, 60)["set"] == "yes"


@pytest.mark.parametrize(
    ("do", "status", "words"),
    [
        ("hang", "hung", "no answer within 1 s"),
        ("crash", "crashed", "signal SIGSEGV"),
        ("raise", "crashed", "no more registers"),
        ("exit", "crashed", "exit code 3"),
    ],
)
def test_a_death_costs_one_question(child: Child, do: str, status: str, words: str) -> None:
    before = child.ask({"do": "tell"}, 60)["pid"]
    with pytest.raises(ChildDied, match=words) as died:
        child.ask({"do": do}, 1 if do == "hang" else 60)
    assert died.value.status == status
    assert child.ask({"do": "tell"}, 60)["pid"] != before


def test_a_killed_child_leaves_no_temporary_files(child: Child) -> None:
    folder = Path(child.scratch.name)
    child.ask({"do": "tell"}, 60)
    with pytest.raises(ChildDied, match="no answer"):
        child.ask({"do": "leave"}, 1)
    assert [*folder.iterdir()]
    child.__exit__()
    assert not folder.exists()


def test_last_words_are_those_of_the_child_that_died(child: Child) -> None:
    with pytest.raises(ChildDied, match="no more registers"):
        child.ask({"do": "raise"}, 60)
    with pytest.raises(ChildDied) as died:
        child.ask({"do": "exit"}, 60)
    assert "registers" not in str(died.value)


def test_another_thread_can_end_a_question(child: Child) -> None:
    pid = child.ask({"do": "tell"}, 60)["pid"]
    timer = threading.Timer(0.2, child.kill)
    timer.start()
    begun = time.monotonic()
    with pytest.raises(ChildDied) as died:
        child.ask({"do": "hang"}, 30)
    assert died.value.status == "crashed"
    assert time.monotonic() - begun < 20
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
