"""Fetching weights: what is asked of the hub, where it lands, and what goes wrong; the hub here is a made-up one."""

from __future__ import annotations

import errno
import fnmatch
import hashlib
import inspect
import io
import urllib.error
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

from vdm_env import download as module
from vdm_env.checksums import MANIFEST, check_file, read_manifest
from vdm_env.download import describe, destination, download, main, plan
from vdm_env.errors import CorruptWeightsError, DownloadError, MissingWeightsError
from vdm_env.models import MODELS
from vdm_env.models.local_weights import find_file
from vdm_env.models.t2v_turbo import _RELEASED
from vdm_env.models.unet3d import PUBLISHED
from vdm_env.registry import list_models, list_rewards
from vdm_env.rewards import REWARDS, RewardContext, loading
from vdm_env.rewards.published import PUBLISHED as REWARD_FILES

HUB = {
    "VideoCrafter/VideoCrafter2": ["model.ckpt", "README.md", "samples/a.gif"],
    "jiachenli-ucsb/T2V-Turbo-VC2": ["unet_lora.pt", "README.md"],
    "ali-vilab/text-to-video-ms-1.7b": [
        f"{part}/{file}"
        for part in ("unet", "vae", "text_encoder")
        for file in ("config.json", "weights.safetensors", "weights.fp16.safetensors", "weights.bin")
    ]
    + ["text2video_pytorch_model.pth"],
    "DeepFloyd/t5-v1_1-xxl": ["config.json", "pytorch_model-00001-of-00002.bin", "tf_model.h5", "spiece.model"],
    "hpcai-tech/OpenSora-STDiT-v3": ["config.json", "model.safetensors", "README.md"],
    "hpcai-tech/OpenSora-VAE-v1.2": ["config.json", "model.safetensors"],
    "xswu/HPSv2": ["HPS_v2.1_compressed.pt", "HPS_v2_compressed.pt"],
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """A hub that writes what is asked of it; the returned list holds repositories in the order asked for."""
    asked: list[str] = []

    def snapshot_download(repository: str, *, allow_patterns: Any, ignore_patterns: Any, local_dir: Any) -> str:
        asked.append(repository)
        place = Path(local_dir or tmp_path / "cache" / repository)
        place.mkdir(parents=True, exist_ok=True)
        for file in HUB[repository]:
            wanted = any(fnmatch.fnmatch(file, p) for p in allow_patterns)
            if wanted and not any(fnmatch.fnmatch(file, p) for p in ignore_patterns or ()):
                (place / file).parent.mkdir(parents=True, exist_ok=True)
                (place / file).write_text(file)
        return str(place)

    assert set(inspect.signature(snapshot_download).parameters) - {"repository"} <= set(
        inspect.signature(huggingface_hub.snapshot_download).parameters
    )
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr("urllib.request.urlopen", Mock(side_effect=AssertionError("the network was used")))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("VDM_WEIGHTS", raising=False)
    return asked


def failing(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", Mock(side_effect=error))


def files_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


# ----------------------------------------------------------------------------------------------------------- plans


@pytest.mark.parametrize("name", [name for name in list_models() if name in MODELS])
def test_every_model_says_what_it_needs(name: str) -> None:
    fetches = plan(name)
    assert bool(fetches) == (MODELS[name].world is None), "a model's module states its repository in a `Published`"
    for fetch in fetches:
        assert fetch.repository.count("/") == 1 and fetch.files and fetch.size and fetch.licence


@pytest.mark.parametrize("name", [name for name in list_rewards() if name in REWARDS])
def test_every_reward_looks_for_what_is_listed(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The builders' own list of files, one missing file after the other, is the one of the table."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("VDM_WEIGHTS", raising=False)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    if name not in REWARD_FILES:
        REWARDS[name].build(RewardContext())  # needs no file; one that does is listed in rewards/published.py
        assert plan(name) == []
        return
    listed = {(entry.repository, file) for entry in REWARD_FILES[name] for file in entry.files}
    with pytest.raises(MissingWeightsError) as error:
        REWARDS[name].build(RewardContext())
    first = [(repository, file) for repository, file in listed if f"{repository!r}" in str(error.value)]
    assert first and all(file in str(error.value) for _, file in first)
    command = str(error.value).split("`vdm-env download ")[1].split("`")[0]
    assert {f.repository for f in plan(command)} <= {f.repository for f in plan(name)}
    for piece in (REWARD_FILES[name][0].size, REWARD_FILES[name][0].licence, "MovingShapes-HPS", "VDM_WEIGHTS"):
        assert piece in str(error.value)


def test_files_named_in_reward_modules_are_listed() -> None:
    from torchvision.models.optical_flow import Raft_Large_Weights

    from vdm_env.rewards import aesthetic, clip_loading, image_reward, vader_heads, viclip, vjepa

    listed = {name: {file for entry in entries for file in entry.files} for name, entries in REWARD_FILES.items()}
    assert clip_loading.HPS_FILES["HPS"] in listed["HPS"] & listed["HPSv2.1"]
    assert clip_loading.HPS_FILES["HPSv2"] in listed["HPSv2"]
    assert aesthetic.HEAD_FILE in listed["Aesthetic"] & listed["OmniScore"]
    assert {image_reward.FILE, image_reward.VOCABULARY_FILE} == listed["ImageReward"]
    assert all(file in listed[name] for name, file in vader_heads.FILES.items())
    assert viclip.FILE in listed["ViCLIP"] and vjepa.FILE in listed["VJEPA"]
    assert [entry.address for entry in REWARD_FILES["Motion"]] == [Raft_Large_Weights.C_T_V2.url]


def test_plans_follow_what_belongs_together() -> None:
    assert [f.repository for f in plan("T2VTurbo")] == ["jiachenli-ucsb/T2V-Turbo-VC2", "VideoCrafter/VideoCrafter2"]
    assert plan("T2VTurbo")[0].files == ("unet_lora.pt",)
    assert {f.repository for f in plan("OpenSora1.2")} == {r for r in HUB if "OpenSora" in r or "t5" in r}
    assert len(plan("AnimateDiff")) == 2 and plan("AnimateDiff")[1:] == plan("StableDiffusion1.5")
    assert plan("MovingShapes") == [] and plan("Brightness") == []
    with pytest.raises(ValueError, match="'VideoCrafter3' is no model and no reward; models: .*VideoCrafter2.*HPS"):
        plan("VideoCrafter3")


# ------------------------------------------------------------------------------------------------------- downloads


def test_exactly_what_is_read_is_fetched(hub: list[str], tmp_path: Path) -> None:
    lines: list[str] = []
    (place,) = download("ModelScope", say=lines.append)
    assert place == tmp_path / "cache" / "ali-vilab/text-to-video-ms-1.7b"
    files = ("config.json", "weights.safetensors")
    assert files_below(place) == {f"{part}/{file}" for part in ("unet", "vae", "text_encoder") for file in files}
    said = "\n".join(lines)
    assert PUBLISHED["ModelScope"].size in said and PUBLISHED["ModelScope"].licence in said and "local cache" in said
    text = download("OpenSora1.2", say=lines.append)[-1]  # this release has its weights in .bin files
    assert files_below(text) == {"config.json", "pytorch_model-00001-of-00002.bin", "spiece.model"}


def test_what_is_fetched_is_found(hub: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VDM_WEIGHTS", str(tmp_path / "weights"))  # not there yet
    places = download("T2VTurbo", say=lambda _: None)
    assert hub == ["jiachenli-ucsb/T2V-Turbo-VC2", "VideoCrafter/VideoCrafter2"]
    assert find_file(_RELEASED["T2VTurbo"], "unet_lora.pt") == places[0] / "unet_lora.pt"
    assert find_file(PUBLISHED["VideoCrafter2"], "model.ckpt") == places[1] / "model.ckpt"
    assert files_below(places[1]) == {"model.ckpt", MANIFEST}
    (reward,) = download("HPS", say=lambda _: None)
    assert files_below(reward) == {"HPS_v2.1_compressed.pt", MANIFEST}
    found = loading.find_files(RewardContext(), "HPS", "xswu/HPSv2", ["HPS_v2.1_compressed.pt"])
    assert found == [reward / "HPS_v2.1_compressed.pt"]
    assert download("HPS", folder=tmp_path / "other", say=lambda _: None) == [tmp_path / "other" / "xswu/HPSv2"]


def test_a_dry_run_only_talks(
    hub: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert main(["SVD", "Aesthetic", "MovingShapes", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert hub == [] and not (tmp_path / "cache").exists() and not (tmp_path / "home").exists()
    for piece in ("stabilityai/stable-video-diffusion-img2vid", "unet/*", "GB", "gated", "linearMSE.pth", "github.com"):
        assert piece in said
    assert "MovingShapes: nothing to fetch" in said
    checkpoint = tmp_path / "model.ckpt"
    checkpoint.touch()
    monkeypatch.setenv("VDM_WEIGHTS", str(checkpoint))  # a single file is no place for downloads
    assert all(destination(fetch) is None for fetch in plan("VideoCrafter2"))
    assert len(list(describe("VideoCrafter2", plan("VideoCrafter2")))) == 5


def response(status: int) -> Any:
    return Mock(status_code=status, headers={}, request=Mock())


@pytest.mark.parametrize(
    ("error", "mentions"),
    [
        (GatedRepoError("403", response=response(403)), ["gated", "hf auth login", "vdm-env download SVD"]),
        (RepositoryNotFoundError("401", response=response(401)), ["no repository", "hf auth login"]),
        (
            LocalEntryNotFoundError("no address for the host"),
            ["could not be reached", "VDM_WEIGHTS", "MovingShapes-HPS"],
        ),
        (ConnectionError("refused"), ["could not be reached (refused)", "--folder"]),
        (OSError(errno.ENOSPC, "No space left on device"), ["No space left", "--folder", "goes on where it stopped"]),
    ],
)
def test_errors_say_what_to_do(
    error: Exception, mentions: list[str], hub: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    failing(monkeypatch, error)
    with pytest.raises(DownloadError) as caught:
        download("SVD", say=lambda _: None)
    assert all(piece in str(caught.value) for piece in [*mentions, "stabilityai"])
    assert main(["SVD"]) == 1 and mentions[0] in capsys.readouterr().err
    assert main(["Nothing"]) == 2 and "no model and no reward" in capsys.readouterr().err


def test_a_changed_repository_is_noticed(hub: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(HUB, "VideoCrafter/VideoCrafter2", ["model.safetensors"])
    with pytest.raises(DownloadError, match="has no model.ckpt"):
        download("VideoCrafter2", say=lambda _: None)


# ------------------------------------------------------------------------------------------------------- checksums


def test_a_flipped_bit_of_a_download_is_found(hub: list[str], tmp_path: Path) -> None:
    (place,) = download("ModelScope", folder=tmp_path, say=lambda _: None)
    assert set(read_manifest(place)) == files_below(place) - {MANIFEST}
    file = place / "unet" / "weights.safetensors"
    good = file.read_bytes()
    (place / "mine.txt").write_text("a file of one's own is none of the release")
    file.write_bytes(bytes([good[0] ^ 1]) + good[1:])
    with pytest.raises(CorruptWeightsError, match=r"weights\.safetensors .*sha256"):
        check_file(file)
    assert download("ModelScope", folder=tmp_path, say=lambda _: None) == [place]  # this hub writes it anew
    assert file.read_bytes() == good and "mine.txt" not in read_manifest(place)
    for _ in range(2):  # one of its repositories is fetched whole, where the checksums lie by then
        places = download("OpenSora1.2", folder=tmp_path, say=lambda _: None)
    assert all(MANIFEST not in read_manifest(place) for place in places)


def test_damage_on_the_way_is_found(hub: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By the checksum that the hub's client noted, and by the manifest where it noted none."""
    place = tmp_path / "ali-vilab" / "text-to-video-ms-1.7b"
    notes = place / ".cache" / "huggingface" / "download"

    def note(file: str, checksum: str) -> None:
        (notes / file).parent.mkdir(parents=True, exist_ok=True)
        (notes / f"{file}.metadata").write_text(f"commit\n{checksum}\n0.0\n")

    content = b"vae/config.json"
    note("unet/weights.safetensors", hashlib.sha256(b"unet/weights.safetensors").hexdigest())
    note("vae/config.json", hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest())
    note("text_encoder/config.json", '"weak-tag"')
    download("ModelScope", folder=tmp_path, say=lambda _: None)
    assert "vae/config.json" in read_manifest(place) and not any(name.startswith(".") for name in read_manifest(place))
    for file in ("unet/weights.safetensors", "vae/config.json"):
        kept = (notes / f"{file}.metadata").read_text()
        note(file, "0" * (64 if "weights" in file else 40))
        with pytest.raises(DownloadError, match=f"{file} is damaged.*the hub gives.*again"):
            download("ModelScope", folder=tmp_path, say=lambda _: None)
        assert not (place / file).exists()
        (notes / f"{file}.metadata").write_text(kept)
    download("ModelScope", folder=tmp_path, say=lambda _: None)

    def nothing(*_: Any, local_dir: Any, **__: Any) -> str:
        return str(local_dir)  # everything is there already

    monkeypatch.setattr(huggingface_hub, "snapshot_download", nothing)
    (place / "text_encoder" / "config.json").write_text("changed")
    with pytest.raises(DownloadError, match="config.json is damaged.*it was fetched with"):
        download("ModelScope", folder=tmp_path, say=lambda _: None)


# ------------------------------------------------------------------------------------------------ files from elsewhere


class Server:
    """Answers like a web server that knows ranges, but breaks off after `cut` bytes if that is given."""

    def __init__(self, content: bytes, cut: int | None = None) -> None:
        self.content, self.cut, self.ranges = content, cut, []

    def __call__(self, request: Any) -> Any:
        start = int((request.get_header("Range") or "bytes=0-")[6:-1])
        self.ranges.append(start)
        if start and start >= len(self.content):
            raise urllib.error.HTTPError(request.full_url, 416, "Range Not Satisfiable", Mock(), None)
        answer = Mock(wraps=io.BytesIO(self.content[start : self.cut]), status=206 if start else 200)
        answer.headers = {"Content-Length": str(len(self.content) - start)}
        answer.__enter__ = lambda _: answer
        answer.__exit__ = lambda *_: None
        return answer


@pytest.fixture
def heads(hub: list[str], monkeypatch: pytest.MonkeyPatch) -> bytes:
    """The content of the aesthetic head's file, whose checksum is the one expected."""
    content = bytes(range(256)) * 4
    clip, head = plan("Aesthetic")
    known = module.Fetch(
        **{n: getattr(head, n) for n in ("repository", "files", "size", "licence", "address")},
        sha256=hashlib.sha256(content).hexdigest(),
    )
    monkeypatch.setattr(module, "plan", lambda name: [known])
    return content


def test_files_from_an_address_go_on_where_they_stopped(
    heads: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    server = Server(heads, cut=300)
    monkeypatch.setattr("urllib.request.urlopen", server)
    with pytest.raises(DownloadError, match="broke off after 300 of 1024 bytes"):
        download("Aesthetic", say=lambda _: None)
    server.cut = None
    (place,) = download("Aesthetic", say=lambda _: None)
    file, manifest = sorted(place.iterdir(), key=lambda path: path.name == MANIFEST)
    assert manifest.read_text() == f"{hashlib.sha256(heads).hexdigest()}  {file.name}\n"
    assert file.read_bytes() == heads and server.ranges == [0, 300]
    assert tmp_path / "home" in file.parents
    found = loading.find_files(RewardContext(), "Aesthetic", f"{place.parent.name}/{place.name}", [file.name])
    assert found == [file]
    assert download("Aesthetic", say=lambda _: None) == [place] and server.ranges == [0, 300]  # there already


def test_other_content_is_refused(heads: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("urllib.request.urlopen", Server(b"<html>not found</html>"))
    with pytest.raises(DownloadError, match="damaged or another file"):
        download("Aesthetic", say=lambda _: None)
    assert files_below(tmp_path / "home") == set()
    monkeypatch.setattr("urllib.request.urlopen", Mock(side_effect=urllib.error.URLError("no route")))
    with pytest.raises(DownloadError, match="no route.*VDM_WEIGHTS"):
        download("Aesthetic", say=lambda _: None)
