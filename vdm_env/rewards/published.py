"""Which published files each reward needs, by its name in environment ids: for downloads and for error messages.

Rewards that are not in `PUBLISHED` need no file; files that only metrics need are there under the names `METRICS`.
Sizes follow from the numbers of parameters; licences are those of the repositories' pages, from memory, not confirmed.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatch

CHECK = "by its page, not confirmed here; read it before anything but research"


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardFiles:
    """Files of one repository."""

    repository: str
    """on the hub, or, with an address, the git repository that the file belongs to"""
    files: tuple[str, ...]
    """names, or patterns of names"""
    size: str
    licence: str
    address: str | None = None
    """where the one file is fetched from when the repository is not on the hub"""
    sha256: str | None = None
    """of the file behind the address, where it is known"""

    def has(self, file: str) -> bool:
        """Whether a file is one of these."""
        return any(fnmatch(file, pattern) for pattern in self.files)


def _files(repository: str, size: str, licence: str, *files: str) -> RewardFiles:
    files = files or ("config.json", "model.safetensors")
    return RewardFiles(repository=repository, files=files, size=size, licence=f"{licence} {CHECK}")


def _elsewhere(repository: str, address: str, size: str, licence: str, sha256: str | None = None) -> RewardFiles:
    return RewardFiles(
        repository=repository,
        files=(address.rsplit("/", 1)[-1],),
        size=size,
        licence=f"{licence} {CHECK}",
        address=address,
        sha256=sha256,
    )


def _vader(file: str) -> RewardFiles:
    return _elsewhere(
        "mihirp1998/VADER", f"https://github.com/mihirp1998/VADER/raw/main/assets/{file}", "about 2 MB", "MIT"
    )


HPS_V21 = _files("xswu/HPSv2", "about 2 GB", "Apache-2.0", "HPS_v2.1_compressed.pt")
HPS_V2 = _files("xswu/HPSv2", "about 2 GB", "Apache-2.0", "HPS_v2_compressed.pt")
CLIP_L = _files("openai/clip-vit-large-patch14", "about 1.7 GB", "MIT")
AESTHETIC = _elsewhere(
    "christophschuhmann/improved-aesthetic-predictor",
    "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/sac+logos+ava1-l14-linearMSE.pth",
    "about 4 MB",
    "Apache-2.0",
    "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
)
_EITHER = ("config.json", "*model.[sb]*")  # model.safetensors, or pytorch_model.bin where the repository is older
AESTHETIC_V1 = _elsewhere(
    "LAION-AI/aesthetic-predictor",
    "https://github.com/LAION-AI/aesthetic-predictor/raw/main/sa_0_4_vit_l_14_linear.pth",
    "below 1 MB",
    "MIT",
)
RAFT = _elsewhere(
    "pytorch/vision",
    "https://download.pytorch.org/models/raft_large_C_T_V2-1bb1363a.pth",
    "about 20 MB",
    "BSD-3-Clause",
)
VICLIP = _files("OpenGVLab/ViCLIP", "about 1.7 GB", "Apache-2.0", "ViClip-InternVid-10M-FLT.pth")
CLIP_B32 = _files("openai/clip-vit-base-patch32", "about 0.6 GB a form", "MIT", *_EITHER)
DINO = _files("facebook/dino-vitb16", "about 0.35 GB a form", "Apache-2.0", *_EITHER)
DINO_S = _files("facebook/dino-vits16", "about 0.09 GB a form", "Apache-2.0", *_EITHER)
DINOV2 = _files("facebook/dinov2-large", "about 1.2 GB a form", "Apache-2.0", *_EITHER)
MUSIQ = _elsewhere(
    "chaofengc/IQA-PyTorch",
    "https://github.com/chaofengc/IQA-PyTorch/releases/download/v0.1-weights/musiq_spaq_ckpt-358bb6af.pth",
    "about 0.1 GB",
    "non-commercial",
)
METRICS = ("VBench", "DEVIL", "MUSIQ")
"""names in `PUBLISHED` that are no rewards"""
PUBLISHED: dict[str, tuple[RewardFiles, ...]] = {
    "HPS": (HPS_V21,),
    "HPSv2": (HPS_V2,),
    "HPSv2.1": (HPS_V21,),
    "PickScore": (_files("yuvalkirstain/PickScore_v1", "about 4 GB", "MIT"),),
    "CLIP": (CLIP_L,),
    "Aesthetic": (CLIP_L, AESTHETIC),
    "AestheticV1": (CLIP_L, AESTHETIC_V1),
    "Action": (_files("MCG-NJU/videomae-base-finetuned-kinetics", "about 0.35 GB", "CC-BY-NC-4.0"),),
    "OmniScore": (CLIP_L, AESTHETIC),
    "Compression": (CLIP_L, _vader("compression_reward.pt")),
    "Rainy": (CLIP_L, _vader("rainy_reward.pt")),
    "Snowy": (CLIP_L, _vader("snowy_reward.pt")),
    "ObjectRemoval": (_files("hustvl/yolos-base", "about 0.5 GB", "Apache-2.0"),),
    "ObjectRemovalDINO": (
        _files(
            "IDEA-Research/grounding-dino-base",
            "about 0.9 GB",
            "Apache-2.0",
            "config.json",
            "model.safetensors",
            "vocab.txt",
        ),
    ),
    "VJEPA": (
        _elsewhere(
            "facebookresearch/jepa",
            "https://dl.fbaipublicfiles.com/jepa/vitl16/vitl16.pth.tar",
            "several GB (a training checkpoint: two encoders of 0.3 billion parameters and the optimiser's state)",
            "CC-BY-NC-4.0",
        ),
    ),
    "VJEPA2": (_files("facebook/vjepa2-vitl-fpc64-256", "about 1.3 GB", "MIT"),),
    "ViCLIP": (VICLIP,),
    "Motion": (RAFT,),
    "VideoScore": (
        _files(
            "TIGER-Lab/VideoScore",
            "about 17 GB",
            "MIT",
            "config.json",
            "tokenizer.json",
            "README.md",
            "model.safetensors.index.json",
            "*.safetensors",
        ),
    ),
    "VideoAlign": (
        _files(
            "KwaiVGI/VideoReward",
            "about 5 GB",
            "Apache-2.0",
            "model_config.json",
            "checkpoint-11352/model.pth",
        ),
        _files("Qwen/Qwen2-VL-2B-Instruct", "about 10 MB of its 4.4 GB", "Apache-2.0", "config.json", "tokenizer.json"),
        _elsewhere(
            "KwaiVGI/VideoAlign",
            "https://github.com/KwaiVGI/VideoAlign/raw/main/prompt_template.py",
            "below 1 MB, read as text and never executed",
            "MIT",
        ),
    ),
    "ImageReward": (
        _files("THUDM/ImageReward", "about 1.8 GB", "Apache-2.0", "ImageReward.pt"),
        _files("google-bert/bert-base-uncased", "below 1 MB", "Apache-2.0", "vocab.txt"),
    ),
    "MUSIQ": (MUSIQ,),
    "DEVIL": (RAFT, DINO_S, DINOV2, VICLIP),
    "VBench": (CLIP_L, AESTHETIC_V1, CLIP_B32, DINO, RAFT, VICLIP),
}


def files_of(repository: str, file: str) -> RewardFiles | None:
    """What is known of a file."""
    known = (entry for entries in PUBLISHED.values() for entry in entries)
    return next((entry for entry in known if entry.repository == repository and entry.has(file)), None)
