"""Checkpoints that are damaged, of the old format too: one clear error that names the file, and nothing is run."""

from __future__ import annotations

import ast
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from vdm_env.errors import CorruptWeightsError
from vdm_env.rewards.loading import read_checkpoint, read_tensors

ROOT = Path(__file__).resolve().parents[1]


def write(path: Path, *, old: bool) -> bytes:
    tensors = {f"layers.{i}.weight": torch.arange(40.0).view(8, 5) + i for i in range(3)}
    torch.save({"state_dict": tensors, "epoch": 3}, path, _use_new_zipfile_serialization=not old)
    return path.read_bytes()


@pytest.mark.parametrize("old", [True, False])
def test_whole_files_are_read(old: bool, tmp_path: Path) -> None:
    path = tmp_path / "head.pth"
    write(path, old=old)
    assert set(read_tensors(path)) == {f"layers.{i}.weight" for i in range(3)}
    assert read_checkpoint(path)["epoch"] == 3


@pytest.mark.parametrize("old", [True, False])
def test_truncated_files_give_one_clear_error(old: bool, tmp_path: Path) -> None:
    path = tmp_path / "head.pth"
    whole = write(path, old=old)
    for length in range(0, len(whole), max(1, len(whole) // 60)):
        path.write_bytes(whole[:length])
        with pytest.raises(CorruptWeightsError, match=r"head\.pth \(\d+ bytes\) is truncated.*delete it"):
            read_checkpoint(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("old", [True, False])
def test_flipped_bytes_are_read_or_refused_and_nothing_else(old: bool, tmp_path: Path) -> None:
    """The old format has no checksums: a changed number may pass, a changed structure may not raise anything raw."""
    path = tmp_path / "head.pth"
    whole = write(path, old=old)
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        for place in torch.randint(len(whole), (3,), generator=generator).tolist():
            damaged[place] = int(torch.randint(256, (), generator=generator))
        path.write_bytes(bytes(damaged))
        try:
            read_checkpoint(path)
        except CorruptWeightsError as error:
            assert "head.pth" in str(error)
            refused += 1
    assert refused > 30


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"\x80\x02}q\x00.", bytes(range(256)) * 4, b"\x80\x02c"])
def test_other_files_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "head.pth"
    path.write_bytes(content)
    with pytest.raises(CorruptWeightsError, match="head.pth"):
        read_tensors(path)


class _Runs:
    """Unpickling this would create a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("old", [True, False])
def test_nothing_in_a_file_is_run(old: bool, tmp_path: Path) -> None:
    path = tmp_path / "head.pth"
    torch.save({"state_dict": _Runs(tmp_path / "ran")}, path, _use_new_zipfile_serialization=not old)
    with pytest.raises(CorruptWeightsError, match="without running code"):
        read_checkpoint(path)
    assert not (tmp_path / "ran").exists()


def test_absent_and_unreadable_files_are_not_called_damaged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_checkpoint(tmp_path / "absent.pth")


def unsafe(source: str) -> list[int]:
    """Lines that load a pickle which may run code, or trust code of a repository."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] + [getattr(node, "module", None) or ""]
            found += [node.lineno] if {n.partition(".")[0] for n in names} & {"pickle", "dill", "joblib"} else []
        if not isinstance(node, ast.Call):
            continue
        given = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
        called = ast.unparse(node.func)
        if called.endswith("torch.load") and given.get("weights_only") is not True:
            found.append(node.lineno)
        if called.endswith(("np.load", "numpy.load")) and given.get("allow_pickle", False):
            found.append(node.lineno)
        if any(k.arg == "trust_remote_code" and given.get(k.arg) is not False for k in node.keywords):
            found.append(node.lineno)
    return found


def test_no_source_file_runs_code_of_weights_or_repositories() -> None:
    files = [path for folder in ("vdm_env", "algos", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 50
    assert {str(path): lines for path in files if (lines := unsafe(path.read_text(encoding="utf-8")))} == {}
    for bad in (
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "import pickle",
        "from joblib import load",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=yes)",
        "np.load(path, allow_pickle=True)",
    ):
        assert unsafe(bad) == [1], bad
