"""Real trials, in Triton's interpreter: what a child measures, certifies and refuses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from attncc import driver, spec
from attncc.autotune import trials as trials_module
from attncc.autotune.child import Child
from attncc.autotune.trials import Trials, opened
from attncc.autotune.verify import verify
from attncc.device import INTERPRETER
from attncc.errors import SpecError, TuneError

BODY = "attncc: 1\nname: tried\nheads: 1\ndims: 16\ndtype: fp16\nmask: causal\n"
HURRIED = Path(__file__).with_name("hurried.py")
SHAPE = {"B": 1, "Sq": 48, "Sk": 48}
CONFIG = {
    "BM": 64, "BN": 64, "GROUP": 8, "ONE_PASS": 0, "TMA": 0, "SPLIT": 0, "FILL": 4, "num_warps": 4, "num_stages": 1,
    "maxnreg": 0,
}  # fmt: skip


@contextmanager
def hurried() -> Iterator[None]:
    """Children made meanwhile interpret as this process does, without what costs most of the time."""

    def child(module: str, arguments: Sequence[str], environment: Mapping[str, str]) -> Child:
        made = Child(module, arguments, environment)
        made.command[1:2] = [str(HURRIED)]
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trials_module, "Child", child)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return driver.compile(spec.loads(BODY), tmp_path_factory.mktemp("trials"), ["interpreter"])


@pytest.fixture(scope="module")
def trials(folder: Path) -> Iterator[Trials]:
    with ExitStack() as stack:
        with hurried():
            made = opened(folder, INTERPRETER, folder.parent / "cache", 2, seed=0, seconds=0.01, cold=True)
            found = stack.enter_context(made)
        yield found


def test_a_causal_mask_keeps_half(trials: Trials) -> None:
    found = trials.describe(SHAPE)
    assert found.share == pytest.approx((48 + 1) / 2 / 48)
    assert (found.sparsity.tiles, found.sparsity.full, found.sparsity.variance) == (1.0, 0.0, 0.0)


def test_a_right_config_is_timed(trials: Trials) -> None:
    found = trials.measure(SHAPE, {**CONFIG, "BM": 16}, CONFIG)
    assert found.status == "measured"
    assert found.ms is not None
    assert found.spread is not None
    assert found.spread[0] <= found.ms <= found.spread[1]


def test_what_cannot_run_fails_and_the_next_trial_runs(trials: Trials) -> None:
    found = trials.measure(SHAPE, {"BM": 16}, CONFIG)
    assert found.status == "failed"
    assert "KeyError" in found.why
    assert trials.measure(SHAPE, CONFIG, CONFIG).status == "measured"


def test_a_comparison_has_as_many_rounds_for_each(trials: Trials) -> None:
    first, second = trials.compare(SHAPE, [CONFIG, {**CONFIG, "BN": 32}])
    assert len(first) == len(second) == 6
    assert min(first + second) > 0


def test_a_shape_that_cannot_be_drawn_is_an_error(trials: Trials) -> None:
    with pytest.raises(TuneError, match="cannot be tuned on"):
        trials.describe({"B": 1, "Sq": -1, "Sk": 4})


def test_what_is_interpreted_is_legal(trials: Trials) -> None:
    assert trials.legality({"BM": 1}).result().reasons == ()


def spoil(folder: Path, old: str, new: str) -> None:
    """Makes the package's kernels wrong."""
    kernels = folder / "kernels.py"
    text = kernels.read_text()
    assert text.count(old) >= 1
    kernels.write_text(text.replace(old, new))


def test_a_package_is_verified_and_a_spoilt_one_is_not(tmp_path: Path) -> None:
    folder = driver.compile(spec.loads(BODY.replace("tried", "spoilt")), tmp_path, ["interpreter"])
    with hurried():
        good = verify(folder, INTERPRETER)
    assert good.passed
    assert {tried.certificate.cases for _, tried in good.outcomes if tried.certificate} == {17}
    assert len(good.outcomes) == len({tuple(c.items()) for c, _ in good.outcomes}) >= 3
    spoil(folder, "tl.exp2(", "1.01 * tl.exp2(")
    with hurried():
        bad = verify(folder, INTERPRETER)
    assert not bad.passed
    assert all(tried.status == "wrong" and ">" in tried.why for _, tried in bad.outcomes)


def test_what_is_no_package_is_not_verified(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="no package of Triton kernels"):
        verify(tmp_path, INTERPRETER)


def test_a_package_that_does_not_import_is_said(tmp_path: Path) -> None:
    folder = driver.compile(spec.loads(BODY.replace("tried", "broken")), tmp_path, ["interpreter"])
    (folder / "_runtime.py").write_text("raise RuntimeError('torn')\n")
    with pytest.raises(TuneError, match="torn"):
        verify(folder, INTERPRETER)
