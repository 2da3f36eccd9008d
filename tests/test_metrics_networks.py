"""The published networks of the metrics: which download brings them, where they are looked for, and MUSIQ by pyiqa."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from vdm_env.download import destination, plan
from vdm_env.errors import CorruptWeightsError, MissingWeightsError
from vdm_env.metrics import vbench
from vdm_env.metrics.devil_measure import load_patches
from vdm_env.metrics.flow import load_raft
from vdm_env.metrics.vbench_networks import load_aesthetic_v1, load_clip_b32, load_dino, load_musiq, load_vbench
from vdm_env.rewards.loading import RewardContext
from vdm_env.rewards.motion import tiny_raft


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def nothing_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("VDM_WEIGHTS", raising=False)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *a, **k: None)


@pytest.mark.usefixtures("nothing_here")
@pytest.mark.parametrize(
    ("load", "repository", "command"),
    [
        (load_dino, "facebook/dino-vitb16", "VBench"),
        (load_clip_b32, "openai/clip-vit-base-patch32", "VBench"),
        (load_aesthetic_v1, "openai/clip-vit-large-patch14", "AestheticV1"),
        (load_raft, "pytorch/vision", "Motion"),
        (load_patches, "facebook/dinov2-large", "DEVIL"),
        (load_vbench, "pytorch/vision", "Motion"),
    ],
)
def test_absent_weights_name_the_download_that_brings_them(
    load: Callable[[RewardContext], object], repository: str, command: str, tmp_path: Path
) -> None:
    with pytest.raises(MissingWeightsError, match=rf"'{repository}'.*`vdm-env download {command}`"):
        load(RewardContext(folder=tmp_path))
    assert repository in {fetch.repository for fetch in plan(command)}
    kind = "metric" if command in ("VBench", "DEVIL") else "reward"
    with pytest.raises(MissingWeightsError, match=f"{kind} '{command}' needs"):
        load(RewardContext(folder=tmp_path))


@pytest.mark.usefixtures("nothing_here")
def test_flow_is_loaded_from_where_the_download_puts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchvision.models.optical_flow.raft_large", lambda weights, progress=True: tiny_raft())
    (fetch,) = plan("Motion")
    for folder in (None, tmp_path / "mine"):
        if folder is not None:
            monkeypatch.setenv("VDM_WEIGHTS", str(folder))
            folder.mkdir()
        place = destination(fetch)
        assert place is not None
        place.mkdir(parents=True)
        torch.manual_seed(4)
        state = tiny_raft().state_dict()
        with pytest.raises(MissingWeightsError):
            load_raft(RewardContext())
        torch.save(state, place / fetch.files[0])
        loaded = load_raft(RewardContext()).model.state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
        (place / fetch.files[0]).unlink()


@pytest.fixture
def pyiqa(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of that name whose MUSIQ is small, and which may neither fetch nor read weights itself."""

    class Musiq(nn.Module):
        def __init__(self, pretrained: bool = True) -> None:
            super().__init__()
            assert not pretrained
            self.head = nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x.mean((2, 3)))

    arch = types.ModuleType("pyiqa.archs.musiq_arch")
    arch.MUSIQ = Musiq  # type: ignore[attr-defined]
    for name in ("pyiqa", "pyiqa.archs"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "pyiqa.archs.musiq_arch", arch)


@pytest.mark.usefixtures("nothing_here", "pyiqa")
def test_musiq_where_pyiqa_is_installed(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="random weights"):
        musiq = load_musiq(RewardContext(weights="random"))
    video = noise(2, 3, 3, 12, 16)
    scores = vbench.measure(video, ["a", "b"], vbench.VBenchNetworks(imaging=musiq))
    assert scores.raw["imaging quality"].shape == (2,) and not scores.surrogates
    with pytest.raises(MissingWeightsError, match=r"metric 'MUSIQ' needs musiq_spaq.*vdm-env download MUSIQ`.*curl"):
        load_musiq(RewardContext(folder=tmp_path))
    state = {"module.head.weight": torch.ones(1, 3), "module.head.bias": torch.zeros(1)}
    torch.save(state, tmp_path / "musiq_spaq_ckpt-358bb6af.pth")
    loaded = load_musiq(RewardContext(folder=tmp_path))
    torch.testing.assert_close(loaded(video[0]), video[0].mean((2, 3)).sum(1))
    torch.save({"module.head.weight": torch.ones(1, 3)}, tmp_path / "musiq_spaq_ckpt-358bb6af.pth")
    with pytest.raises(CorruptWeightsError, match="missing: head.bias"):
        load_musiq(RewardContext(folder=tmp_path))


def test_musiq_without_pyiqa_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyiqa", None)
    with pytest.raises(ImportError, match=r"pip install pyiqa.*SharpnessAndNoise"):
        load_musiq(RewardContext(weights="random"))
    with pytest.warns(UserWarning, match="random weights"):
        networks = load_vbench(RewardContext(weights="random", scale="tiny"))
    assert isinstance(networks.imaging, vbench.SharpnessAndNoise)
