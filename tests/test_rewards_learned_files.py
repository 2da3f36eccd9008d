"""Released layouts of the learned rewards: synthetic checkpoints load strictly, wrong and missing ones are refused."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vdm_env.errors import CorruptWeightsError, MissingWeightsError
from vdm_env.rewards import REWARDS, RewardContext, clip_loading, image_reward, viclip, vjepa
from vdm_env.rewards.bert_text import LETTERS_SIZE, letters

PROMPTS = ["a piano", "a book on a table"]
CLIP = "openai/clip-vit-large-patch14"
HPS = {"HPS": "HPS_v2.1_compressed.pt", "HPSv2": "HPS_v2_compressed.pt", "HPSv2.1": "HPS_v2.1_compressed.pt"}


@pytest.fixture(autouse=True)
def small_and_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty hub cache, and own architectures whose full size is the tiny one."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "no_cache"))
    monkeypatch.setattr("open_clip.get_model_config", lambda name: clip_loading._TINY_OPEN_CLIP)
    monkeypatch.setattr(vjepa, "FULL", vjepa.TINY)
    monkeypatch.setattr(viclip, "FULL", viclip.TINY)
    for name in ("VISION", "TEXT", "HEAD"):
        monkeypatch.setattr(image_reward, name, getattr(image_reward, f"TINY_{name}"))


def random_reward(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return REWARDS[name].build(RewardContext(weights="random", scale="tiny", seed=2, num_frames=4))


def load(name: str, folder: Path) -> Any:
    return REWARDS[name].build(RewardContext(folder=folder, num_frames=4))


def write_vocabulary(folder: Path) -> None:
    pieces = {number: piece for piece, number in letters().items()}
    lines = [pieces.get(i, f"[unused{i}]") for i in range(LETTERS_SIZE)]
    (folder / "vocab.txt").write_text("\n".join(lines), encoding="utf-8")


def clip_head(name: str) -> dict[str, Tensor]:
    return random_reward(name).head.state_dict()


def released_vjepa() -> dict[str, Any]:
    """As the training saves it: three wrapped networks beside the state of the optimiser."""
    model = random_reward("VJEPA").network
    parts = {
        part: {f"module.backbone.{k}": v for k, v in getattr(model, part).state_dict().items()}
        for part in ("encoder", "predictor", "target_encoder")
    }
    return parts | {"opt": {"state": {}, "param_groups": []}, "scaler": None, "epoch": 300, "loss": 0.5, "lr": 1e-6}


def released_viclip() -> dict[str, Any]:
    return {"model": random_reward("ViCLIP").model.state_dict()}


def released_image_reward() -> dict[str, Tensor]:
    """The names of BLIP's own code."""

    def rename(name: str) -> str:
        for new, old in (
            ("vision.embeddings.class_embedding", "blip.visual_encoder.cls_token"),
            ("vision.embeddings.position_embedding", "blip.visual_encoder.pos_embed"),
            ("vision.embeddings.patch_embedding", "blip.visual_encoder.patch_embed.proj"),
            ("vision.post_layernorm", "blip.visual_encoder.norm"),
            ("vision.encoder.layers", "blip.visual_encoder.blocks"),
            ("self_attn.projection", "attn.proj"),
            ("self_attn.qkv", "attn.qkv"),
            ("layer_norm", "norm"),
        ):
            name = name.replace(new, old)
        return re.sub("^head", "mlp", re.sub("^text", "blip.text_encoder", name))

    tensors = {rename(k): v for k, v in random_reward("ImageReward").network.state_dict().items()}
    unused = {"blip.vision_proj.weight": torch.zeros(4, 32), "blip.text_proj.bias": torch.zeros(4)}
    return tensors | unused | {"blip.text_encoder.embeddings.position_ids": torch.arange(512)[None]}


def write(name: str, folder: Path) -> Path:
    """The release of a reward in a folder, and the path of the file that is its own."""
    if name in ("Compression", "Rainy", "Snowy"):
        random_reward(name).backbone.model.save_pretrained(folder / CLIP)
        path, content = folder / f"{name.lower()}_reward.pt", clip_head(name)
    elif name == "AestheticV1":
        random_reward(name).backbone.model.save_pretrained(folder / CLIP)
        path, content = folder / "sa_0_4_vit_l_14_linear.pth", clip_head(name)
    elif name in HPS:
        path = folder / HPS[name]
        content = {"epoch": 1, "name": "run", "state_dict": random_reward(name).backbone.model.state_dict()}
    elif name == "VJEPA":
        path, content = folder / "vitl16.pth.tar", released_vjepa()
    elif name == "ViCLIP":
        path, content = folder / "ViClip-InternVid-10M-FLT.pth", released_viclip()
    elif name == "ImageReward":
        path, content = folder / "ImageReward.pt", released_image_reward()
        write_vocabulary(folder)
    else:
        reward = random_reward(name)
        network = reward.detector.model if "Removal" in name else reward.network.model
        network.save_pretrained(folder)
        write_vocabulary(folder)
        return folder / "model.safetensors"
    torch.save(content, path)
    return path


LEARNED = ["Compression", "Rainy", "Snowy", "ObjectRemoval", "ObjectRemovalDINO", "VJEPA", "VJEPA2", "ViCLIP"]
LEARNED += ["ImageReward", "AestheticV1", *HPS]


@pytest.mark.parametrize("name", LEARNED)
def test_released_layouts_load(name: str, tmp_path: Path) -> None:
    write(name, tmp_path)
    loaded, original = load(name, tmp_path), random_reward(name)
    if "Removal" in name:
        assert loaded.height == 512
        loaded.height = original.height
    generator = torch.Generator().manual_seed(0)
    video = torch.rand(2, 4, 3, 24, 24, generator=generator)
    assert loaded.name == name and loaded.frames == original.frames
    assert torch.equal(loaded(video, PROMPTS), original(video, PROMPTS))


OWN_FILES = ["Compression", "Rainy", "VJEPA", "ViCLIP", "ImageReward", "AestheticV1", "HPSv2", "HPSv2.1"]
INSIDE = {"VJEPA": "encoder", "ViCLIP": "model", "HPSv2": "state_dict", "HPSv2.1": "state_dict"}
"""where the tensors lie in a release that holds more"""


@pytest.mark.parametrize("name", OWN_FILES)
def test_wrong_tensors_are_listed(name: str, tmp_path: Path) -> None:
    path = write(name, tmp_path)
    whole = torch.load(path, weights_only=True)
    tensors = lambda content: content[INSIDE[name]] if name in INSIDE else content  # noqa: E731
    key = [k for k in tensors(whole) if k.endswith("weight") and "_proj" not in k][-1]
    for damage, message in (
        (lambda t: t.pop(key), "missing: "),
        (lambda t: t.update({"intruder.weight": torch.zeros(2)}), r"unexpected: .*intruder\.weight"),
        (lambda t: t.update({key: torch.zeros(1, 7)}), r"of another shape: .* \[1, 7\] instead of \["),
    ):
        content = torch.load(path, weights_only=True)
        damage(tensors(content))
        torch.save(content, path)
        with pytest.raises(CorruptWeightsError, match=f"does not fit .*{message}.*fetch it again"):
            load(name, tmp_path)
        torch.save(whole, path)


@pytest.mark.parametrize("name", ["ObjectRemoval", "ObjectRemovalDINO", "VJEPA2"])
def test_wrong_tensors_of_transformers_models_are_listed(name: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = write(name, tmp_path)
    whole = load_file(path)
    key = next(k for k in whole if k.endswith("proj.weight") or k.endswith("layers.0.weight"))
    for damage, message in (
        (lambda t: t.pop(key), "missing_keys"),
        (lambda t: t.update({"intruder.weight": torch.zeros(2)}), "unexpected_keys.*intruder"),
        (lambda t: t.update({key: torch.zeros(1, 7)}), "mismatched_keys"),
    ):
        content = dict(whole)
        damage(content)
        save_file(content, path, metadata={"format": "pt"})
        with pytest.raises(CorruptWeightsError, match=f"does not fit .*{message}"):
            load(name, tmp_path)


@pytest.mark.parametrize("name", OWN_FILES)
def test_truncated_and_dangerous_files_are_refused(name: str, tmp_path: Path) -> None:
    path = write(name, tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorruptWeightsError, match="truncated.*delete it"):
        load(name, tmp_path)
    torch.save({"model": print, "encoder": print, "state_dict": print, "layers.0.weight": print}, path)
    with pytest.raises(CorruptWeightsError, match="without running code"):
        load(name, tmp_path)


def test_incomplete_containers_are_refused(tmp_path: Path) -> None:
    path = write("VJEPA", tmp_path)
    content = torch.load(path, weights_only=True)
    del content["predictor"]
    torch.save(content, path)
    with pytest.raises(CorruptWeightsError, match=r"lacks \['predictor'\]"):
        load("VJEPA", tmp_path)
    path = write("ViCLIP", tmp_path)
    torch.save(torch.load(path, weights_only=True)["model"], path)
    with pytest.raises(CorruptWeightsError, match="no entry 'model'"):
        load("ViCLIP", tmp_path)
    write("ImageReward", tmp_path)
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    with pytest.raises(CorruptWeightsError, match=r"no vocabulary of BERT: it lacks \['\[CLS\]'"):
        load("ImageReward", tmp_path)


@pytest.mark.parametrize(
    ("name", "mentions"),
    [
        ("Compression", [CLIP, "vdm-env download"]),
        ("AestheticV1", [CLIP, "vdm-env download"]),
        ("HPSv2.1", ["xswu/HPSv2", "HPS_v2.1_compressed.pt"]),
        ("ObjectRemoval", ["hustvl/yolos-base", "config.json", "model.safetensors", "vdm-env download"]),
        ("ObjectRemovalDINO", ["IDEA-Research/grounding-dino-base", "vocab.txt", "vdm-env download"]),
        ("VJEPA", ["vitl16.pth.tar", "curl -L -O https://dl.fbaipublicfiles.com/jepa/vitl16/vitl16.pth.tar"]),
        ("VJEPA2", ["facebook/vjepa2-vitl-fpc64-256", "model.safetensors", "vdm-env download"]),
        ("ViCLIP", ["OpenGVLab/ViCLIP", "ViClip-InternVid-10M-FLT.pth", "vdm-env download"]),
        ("ImageReward", ["THUDM/ImageReward", "ImageReward.pt", "vdm-env download"]),
    ],
)
def test_missing_weights_say_what_to_fetch(name: str, mentions: list[str], tmp_path: Path) -> None:
    with pytest.raises(MissingWeightsError) as caught:
        load(name, tmp_path)
    for text in [
        *mentions,
        f"vdm-env download {name.removesuffix('v2.1')}",
        str(tmp_path),
        "MovingShapes-HPS",
        "weights='random'",
    ]:
        assert text in str(caught.value)


@pytest.mark.parametrize(
    ("name", "missing", "mentions"),
    [
        ("Snowy", "snowy_reward.pt", "raw/main/assets/snowy_reward.pt"),
        ("AestheticV1", "sa_0_4_vit_l_14_linear.pth", "download AestheticV1.*aesthetic-predictor/raw/main/sa_0_4"),
        ("ImageReward", "vocab.txt", "google-bert/bert-base-uncased"),
    ],
)
def test_a_missing_second_file_is_named(name: str, missing: str, mentions: str, tmp_path: Path) -> None:
    write(name, tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(MissingWeightsError, match=mentions):
        load(name, tmp_path)


def test_older_repositories_without_safetensors_load(tmp_path: Path) -> None:
    model = random_reward("CLIP").backbone.model
    (tmp_path / CLIP).mkdir(parents=True)
    model.config.save_pretrained(tmp_path / CLIP)
    torch.save(model.state_dict(), tmp_path / CLIP / "pytorch_model.bin")
    video = torch.rand(2, 4, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    assert torch.equal(load("CLIP", tmp_path)(video, PROMPTS), random_reward("CLIP")(video, PROMPTS))
