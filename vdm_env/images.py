"""Image prompts: sets of images with disjoint train, validation and test splits, for models that animate an image.

An `ImageBook` is a `PromptBook` whose prompts are images; the text that belongs to each (for rewards that read the
prompt, and for people) is its caption or the name of its file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from vdm_env.prompts import SPLITS, PromptBook

ImageLike = Tensor | np.ndarray | Image.Image | str | Path
"""A file, a PIL image, a float tensor [3,H,W] in [0,1], or a uint8 array [H,W,3]."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
"""Files of a folder that count as images."""


class ImageBook(PromptBook):
    """Images by number, the text of each, and which numbers belong to which split.

    Files are read when they are needed, not before.

    Args:
        splits: images of each split, from "train", "validation" and "test"; a plain list serves as all three at once.
        captions: texts in the same form as `splits`; without them the text of a file is that of a `.txt` file of the
            same stem beside it, or its stem with blanks for underscores, and that of any other image is "image <n>".

    Raises:
        ValueError: no images, something that is no image, captions that do not fit, an unknown split, or the same
            image (by content) in two splits.
    """

    def __init__(
        self,
        splits: Mapping[str, Sequence[ImageLike]] | Sequence[ImageLike],
        captions: Mapping[str, Sequence[str]] | Sequence[str] | None = None,
    ) -> None:
        super().__init__({})
        self._images: list[Tensor | Path] = []
        self._digests: list[str] = []
        self._by_content: dict[str, dict[str, int]] = {}
        if not isinstance(splits, Mapping):
            if isinstance(captions, Mapping):
                raise ValueError("images are one list and captions a mapping; give both in the same form")
            self._splits = dict.fromkeys(SPLITS, list(dict.fromkeys(self.add_images(splits, captions))))
            return
        unknown = sorted(set(splits) - set(SPLITS))
        if unknown or (captions is not None and (not isinstance(captions, Mapping) or set(captions) - set(splits))):
            raise ValueError(
                f"image splits {sorted(splits)}{'' if captions is None else ' with captions'}: expected some of "
                f"{list(SPLITS)}, and captions as a mapping of the same splits"
            )
        for name, images in splits.items():
            before = set(self._digests)
            texts = captions.get(name) if isinstance(captions, Mapping) else None
            self._splits[name] = list(dict.fromkeys(self.add_images(images, texts))) if len(images) else []
            again = [i for i in self._splits[name] if self._digests[i] in before]
            if again:
                raise ValueError(
                    f"image {self[again[0]]!r} of split {name!r} is in another split too; splits are disjoint"
                )
        if not self._texts:
            raise ValueError("these splits hold no image at all; give at least one")

    def add(self, texts: Sequence[str]) -> list[int]:
        """Refused: texts are no prompts of a model that animates images."""
        raise ValueError(
            f"got the text prompts {list(texts)[:3]}, but this model animates images: give images=[...] "
            "(files, PIL images or tensors [3,H,W] in [0,1]); texts may go with them as captions"
        )

    def add_images(self, images: Sequence[ImageLike] | Tensor, captions: Sequence[str] | None = None) -> list[int]:
        """Numbers of the images; new ones are appended. Without captions a known image keeps its text.

        Raises:
            ValueError: an empty list, a text in it that is no file, something that is no image, or captions of another
                number.
        """
        if isinstance(images, str | Path) or len(images) == 0:
            raise ValueError(f"expected a non-empty list of images, got {images!r}; give at least one in a list")
        if isinstance(captions, str) or (captions is not None and len(captions) != len(images)):
            given = "one text" if isinstance(captions, str) else f"{len(captions)} captions"
            raise ValueError(f"got {given} for {len(images)} images; give a list with one caption for each")
        prepared = [_prepare(image) for image in images]  # all of them, before the book changes
        ids = []
        for place, (image, digest) in enumerate(prepared):
            known = self._by_content.setdefault(digest, {})
            if captions is None and known:
                ids.append(next(iter(known.values())))
                continue
            text = _text_of(image, len(self._texts)) if captions is None else captions[place]
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"every caption must be a non-empty text, got {text!r}")
            if text not in known:
                known[text] = len(self._texts)
                self._texts.append(text)
                self._images.append(image)
                self._digests.append(digest)
            ids.append(known[text])
        return ids

    def image(self, number: int) -> Tensor:
        """An image, float32 [3,H,W] in [0,1], in its own size.

        Raises:
            FileNotFoundError, ValueError: its file has gone, or is no image any more.
        """
        return load_image(self._images[number])

    def ids(self, split: str) -> list[int]:
        """Numbers of a split's images.

        Raises:
            ValueError: the book has no such split, or no image in it.
        """
        found = super().ids(split)
        if not found:
            raise ValueError(
                f"no image of this set is in split {split!r} (they are divided by a hash of their content, 80:10:10, "
                f"and there are {len(self)}): give more images, subfolders train, validation and test, or "
                'images={"train": [...], "validation": [...], "test": [...]}'
            )
        return found

    def sha256(self, split: str) -> str:
        """Hash of a split's images and texts in order."""
        lines = [f"{self._digests[i]} {self[i]}" for i in self.ids(split)]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def read_folder(folder: str | Path) -> ImageBook:
    """The images of a folder.

    Subfolders named train, validation and test are the splits, if there are any. Otherwise each image's split follows
    from a hash of its file's content (8 in 10 train, 1 validation, 1 test), so that it stays where it is whatever else
    comes into the folder, and under whatever name.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no images in it, or images both beside and in the splits' folders.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"images={str(folder)!r} is no folder; give a folder of images, or a list of them")
    files = _image_files(folder)
    inside = {name: _image_files(folder / name) for name in SPLITS if (folder / name).is_dir()}
    if any(inside.values()):
        if files:
            raise ValueError(f"{folder} has images beside its folders {sorted(inside)}; move them into one of these")
        return ImageBook(inside)
    if not files:
        raise ValueError(f"{folder} holds no image; expected files ending with {', '.join(SUFFIXES)}")
    splits: dict[str, list[Path]] = {name: [] for name in SPLITS}
    for file in files:
        splits[split_of(_digest(file.read_bytes()))].append(file)
    return ImageBook(splits)


def split_of(digest: str) -> str:
    """The split that a hexadecimal hash belongs to: 8 in 10 "train", 1 "validation", 1 "test"."""
    return {0: "validation", 1: "test"}.get(int(digest[:12], 16) % 10, "train")


def as_image_book(images: Any, captions: Any = None) -> ImageBook:
    """An `ImageBook` from one, from a folder, or from images as `ImageBook` takes them."""
    if isinstance(images, ImageBook):
        if captions is not None:
            raise ValueError("this set of images has its texts already; leave prompts out")
        return images
    if isinstance(images, str | Path):
        if captions is not None:
            raise ValueError(
                "captions of a folder's images are text files beside them (dog.png, dog.txt); leave prompts out"
            )
        return read_folder(images)
    return ImageBook(images, captions)


def default_images(side: int = 128) -> ImageBook:
    """First frames of MovingShapes scenes with their captions: what there is until you give images of your own."""
    from vdm_env.worlds.moving_shapes import prompt_splits
    from vdm_env.worlds.moving_shapes.render import parse_caption, render, sample_scenes

    splits = prompt_splits()
    generator = torch.Generator().manual_seed(0)
    images = {
        name: list(render(sample_scenes([parse_caption(t) for t in texts], generator), 1)[:, 0])
        for name, texts in splits.items()
    }
    factor = max(1, side // 32)
    larger = {
        name: [frame.repeat_interleave(factor, 1).repeat_interleave(factor, 2) for frame in frames]
        for name, frames in images.items()
    }
    return ImageBook(larger, splits)


def load_image(image: ImageLike) -> Tensor:
    """Float32 [3,H,W] in [0,1] of anything `ImageLike`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no image, or a tensor of another shape, type or range.
    """
    if isinstance(image, str | Path):
        path = Path(image).expanduser()
        try:
            with Image.open(path) as opened:
                image = ImageOps.exif_transpose(opened).convert("RGB")
        except FileNotFoundError:
            raise FileNotFoundError(
                f"no image file {str(path)!r}; expected a file, a PIL image, or a tensor [3,H,W] in [0,1]"
            ) from None
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"{path} cannot be read as an image ({error})") from error
    if isinstance(image, Image.Image):
        image = np.array(image.convert("RGB"))
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3:
        return torch.from_numpy(image.copy()).permute(2, 0, 1).float() / 255
    if not isinstance(image, Tensor) or not image.is_floating_point() or image.ndim != 3 or image.shape[0] != 3:
        what = f"{image.dtype} {tuple(image.shape)}" if isinstance(image, Tensor | np.ndarray) else repr(image)
        raise ValueError(
            f"an image is a file, a PIL image, a float tensor [3,H,W] in [0,1] or a uint8 array [H,W,3]; got {what}"
        )
    image = image.detach().cpu().float()
    if 0 in image.shape or not bool(torch.isfinite(image).all()) or float(image.min()) < 0 or float(image.max()) > 1:
        raise ValueError(f"an image tensor must be finite and in [0,1], got {tuple(image.shape)} with other values")
    return image


def _prepare(image: ImageLike) -> tuple[Tensor | Path, str]:
    """What the book keeps of an image, and the hash of its content."""
    if isinstance(image, str | Path):
        path = Path(image).expanduser()
        if not path.is_file():
            load_image(path)  # says what is wrong
        return path, _digest(path.read_bytes())
    pixels = load_image(image).clone()
    return pixels, _digest(str(tuple(pixels.shape)).encode() + pixels.contiguous().numpy().tobytes())


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _text_of(image: Tensor | Path, number: int) -> str:
    if isinstance(image, Tensor):
        return f"image {number}"
    caption = image.with_suffix(".txt")
    text = caption.read_text().strip() if caption.is_file() else ""
    return text or image.stem.replace("_", " ").strip() or f"image {number}"


def _image_files(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.is_file() and f.suffix.lower() in SUFFIXES)
