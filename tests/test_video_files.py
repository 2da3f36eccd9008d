"""Videos as files: the same video gives the same bytes, whatever memory held before."""

from __future__ import annotations

import os
import subprocess
import sys

PROGRAM = """
import hashlib, sys
import torch
from benchmarks.clips import for_page, mp4
from vdm_env.video import save_mp4, to_uint8

generator = torch.Generator().manual_seed(0)
smooth = torch.nn.functional.interpolate(torch.rand(1, 3, 4, 4, generator=generator), size=(32, 32), mode="bilinear")
video = (smooth + 0.1 * torch.rand(8, 3, 32, 32, generator=generator)).clamp(0, 1)
parts = [save_mp4(sys.argv[1], video).read_bytes(), mp4(for_page(to_uint8(video)))]
print(*(hashlib.sha256(part).hexdigest() for part in parts))
"""


def test_an_mp4_does_not_depend_on_what_memory_held_before(tmp_path):
    said = set()
    for filled_with in ("1", "85", "165"):  # glibc fills memory that is given out and taken back with this
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(tmp_path / "video.mp4")],
            env={**os.environ, "MALLOC_PERTURB_": filled_with},
            capture_output=True,
            text=True,
            check=True,
        )
        said.add(done.stdout)
    assert len(said) == 1 and len(said.pop().split()) == 2
