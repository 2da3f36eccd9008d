"""Freed memory stays with the process, and is not fetched anew page by page."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from vdm_env.allocator import keep_freed_memory

FAULTS = """
import resource, sys
import torch
from vdm_env.allocator import keep_freed_memory
print(keep_freed_memory() if sys.argv[1] == "keep" else None)
torch.set_num_threads(1)
def work():
    parts = [torch.ones(1_500_000) for _ in range(4)]  # 6 MB each
    return float(sum(part[0] for part in parts))
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str, **variables: str) -> tuple[str, int]:
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True, env=own | variables
    )
    said, count = done.stdout.split()
    return said, int(count)


def test_pages_are_not_fetched_again() -> None:
    said, kept = faults("keep")
    if said != "True":
        pytest.skip("this C library has no mallopt")
    _, given_back = faults("leave")
    assert kept < 5_000 < 50_000 < given_back  # 20 times 24 MB are 120,000 pages of 4 kB


def test_a_variable_of_the_user_wins() -> None:
    assert faults("keep", MALLOC_TRIM_THRESHOLD_="131072")[0] == "False"


def test_a_negative_number_is_refused() -> None:
    with pytest.raises(ValueError, match="kept=-1: expected a number of bytes"):
        keep_freed_memory(-1)
