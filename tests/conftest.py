"""What every test file shares: the folder of reference vectors and the marks that skip by themselves."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def golden_root() -> Path:
    """Folder of the reference vectors: VDM_GOLDEN, else ../shared/golden beside the repository."""
    return Path(os.environ.get("VDM_GOLDEN") or ROOT.parent / "shared" / "golden")


@pytest.fixture(scope="session")
def golden_folder() -> Callable[[str], Path]:
    """`golden_folder("videocrafter2_ddim")` is the folder of that set; the test is skipped where the set is absent."""

    def find(name: str) -> Path:
        folder = golden_root() / name
        if not folder.is_dir():
            pytest.skip(f"no reference vectors '{name}' in {golden_root()}; set VDM_GOLDEN to their folder")
        return folder

    return find


@pytest.fixture
def only_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without weights but those put into the returned folder."""
    from vdm_env.models import local_weights

    root = tmp_path / "weights"
    root.mkdir()
    monkeypatch.setenv(local_weights.VARIABLE, str(root))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(local_weights, "try_to_load_from_cache", lambda *_: None)
    return root


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with a reason, what this machine cannot run."""
    marked_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if marked_gpu:
        import torch

        if not torch.cuda.is_available():
            for item in marked_gpu:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    if not golden_root().is_dir():
        reason = f"no folder {golden_root()}; set VDM_GOLDEN to the folder of reference vectors"
        for item in items:
            if item.get_closest_marker("golden"):
                item.add_marker(pytest.mark.skip(reason=reason))
