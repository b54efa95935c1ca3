"""Threads and processes of those who call CPU packages: one pool of threads, torch's, and forks as torch bears them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from built import built
from codegen.emitted import Package
from codegen.test_packages import PLAIN

COMMON = """
import os, signal, sys, time
sys.path.insert(0, "{folder}")
import torch
import {name} as package

q, k = torch.randn(1, 4, 300, 16), torch.randn(1, 2, 300, 16)

def theirs():
    return torch.nn.functional.scaled_dot_product_attention(q, k, k, enable_gqa=True)

def ours():
    return package.attention(q, k, k)
"""
THREADS = """
def count():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(1)
theirs(), ours()
alone = count()
for _ in range(5):
    ours()
assert count() == alone, "a call on one thread made others"
torch.set_num_threads(4)
ours()
assert count() == alone + 3, (alone, count())
theirs(), torch.randn(1000, 1000).exp()
assert count() == alone + 3, "torch did not use the same threads"
torch.set_num_threads(2)
want = ours()
torch.set_num_threads(1)
assert torch.equal(ours(), want)
"""
BUSY = """
def seconds(thread):
    fields = open(f"/proc/self/task/{thread}/stat").read().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])

def busy(threads):
    torch.set_num_threads(threads)
    ours()
    before = {t: seconds(t) for t in os.listdir("/proc/self/task")}
    until = time.monotonic() + 0.5
    while time.monotonic() < until:
        ours()
    return sum(seconds(t) > n + 5 for t, n in before.items())  # more than a twentieth of a second

found = [busy(1), busy(2), busy(1)]
assert found == [1, 2, 1], found
"""
FORKS = """
def child(threads, f):
    pid = os.fork()
    if not pid:
        if threads:
            torch.set_num_threads(threads)
        f()
        os._exit(0)
    until = time.monotonic() + 2
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status == 0
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return False

torch.set_num_threads(2)
print("unused", child(0, theirs), child(0, ours))
theirs(), ours()
print("used", child(0, theirs), child(0, ours))
print("used, then one thread", child(1, theirs), child(1, ours))
"""


@pytest.fixture(scope="module")
def causal() -> Package:
    return built(f"{PLAIN}mask: causal")


def output(p: Package, script: str) -> list[str]:
    """What a process prints whose threads are not limited by this one's environment."""
    kept = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "PYTHONPATH")}
    text = COMMON.format(folder=p.path.parent, name=p.path.name) + script
    done = subprocess.run([sys.executable, "-c", text], env=kept, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_threads_are_those_of_torch_and_as_many_as_it_says(causal: Package) -> None:
    output(causal, THREADS)


def test_only_so_many_threads_work(causal: Package) -> None:
    output(causal, BUSY)


def test_forks_are_no_worse_than_those_of_torch(causal: Package) -> None:
    """OpenMP's threads do not outlive a fork: a child may hang where torch's own would, and nowhere else."""
    for line in output(causal, FORKS):
        when, theirs, ours = line.rsplit(maxsplit=2)
        assert ours == "True" or theirs == "False", when
