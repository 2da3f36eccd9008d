"""Image prompts: sets of images, their splits and texts, and how environments take them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from tests.models import brightness, tiny_env
from tests.svd import pictures, svd_env, tiny_svd
from vdm_env import make
from vdm_env.images import ImageBook, as_image_book, default_images, load_image, read_folder, split_of
from vdm_env.models.base import ModelSpec
from vdm_env.single import DenoisingEnv


@pytest.fixture(scope="module")
def model():
    return tiny_svd()


def draw(number: int) -> Image.Image:
    pixels = np.zeros((6, 8, 3), np.uint8)
    pixels[..., 0], pixels[0, 0] = number, 255
    return Image.fromarray(pixels)


@pytest.fixture
def folder(tmp_path):
    for number in range(40):
        draw(number).save(tmp_path / f"a_picture_{number:02}.png")
    (tmp_path / "a_picture_07.txt").write_text("seven red squares\n")
    (tmp_path / "notes.md").write_text("no image")
    return tmp_path


# ----------------------------------------------------------------------------------------------------------------- sets


def test_a_folder_is_split_by_content(folder, tmp_path_factory):
    book = read_folder(folder)
    splits = {name: book.ids(name) for name in ("train", "validation", "test")}
    assert len(book) == 40 == len(set().union(*splits.values())) == sum(map(len, splits.values()))
    assert len(splits["train"]) > 20
    texts = {name: {book[i] for i in ids} for name, ids in splits.items()}
    # Another folder with other names: every image stays in its split, and none crosses over.
    other = tmp_path_factory.mktemp("renamed")
    for file in sorted(folder.glob("*.png"))[::2]:
        (other / f"renamed_{file.name}").write_bytes(file.read_bytes())
    again = read_folder(other)
    for name in splits:
        for i in again._splits[name]:
            original = again[i].removeprefix("renamed ")
            assert ("seven red squares" if original == "a picture 07" else original) in texts[name]
    assert [split_of(f"{n:012x}") for n in range(4)] == ["validation", "test", "train", "train"]


def test_texts_of_images(folder):
    book = read_folder(folder)
    assert "a picture 03" in book and "seven red squares" in book and "a picture 07" not in book
    number = list(book).index("a picture 03")
    image = book.image(number)
    assert image.shape == (3, 6, 8) and image.dtype == torch.float32
    assert image[0, 3, 3].item() == pytest.approx(3 / 255) and image[:, 0, 0].tolist() == [1, 1, 1]
    drawn = ImageBook(pictures(2))
    assert list(drawn) == ["image 0", "image 1"] and drawn.ids("train") == drawn.ids("test") == [0, 1]
    named = ImageBook({"train": pictures(2), "test": pictures(3)[2:]}, {"train": ["x", "y"], "test": ["z"]})
    assert list(named) == ["x", "y", "z"] and named.ids("test") == [2]


def test_images_of_a_book_are_numbered_once():
    a, b = pictures(2)
    book = ImageBook([a, b])
    assert book.add_images([b, a.clone(), torch.flip(a, (1,))]) == [1, 0, 2]
    assert book.add_images([a], ["with a text"]) == [3] and book.add_images([a]) == [0]
    assert len(book) == 4 and book.ids("train") == [0, 1]
    a.zero_()
    assert book.image(0).any()  # the book has its own copy
    assert ImageBook(pictures(2)).sha256("train") == ImageBook(pictures(2)).sha256("test")
    assert ImageBook(pictures(2)).sha256("train") != ImageBook(pictures(2), ["x", "y"]).sha256("train")
    assert ImageBook(pictures(2)).sha256("train") != ImageBook(pictures(3)[1:]).sha256("train")


def test_folders_of_splits(tmp_path):
    for place, number in (("train", 1), ("train", 2), ("test", 3)):
        (tmp_path / place).mkdir(exist_ok=True)
        draw(number).save(tmp_path / place / f"{number}.png")
    book = as_image_book(str(tmp_path))
    assert [book[i] for i in book.ids("train")] == ["1", "2"] and [book[i] for i in book.ids("test")] == ["3"]
    with pytest.raises(ValueError, match="no prompt split 'validation'"):
        book.ids("validation")
    draw(9).save(tmp_path / "9.png")
    with pytest.raises(ValueError, match="images beside its folders"):
        read_folder(tmp_path)
    (tmp_path / "9.png").unlink()
    draw(1).save(tmp_path / "test" / "same.png")
    with pytest.raises(ValueError, match="image '1' of split 'test' is in another split too"):
        read_folder(tmp_path)


def test_what_is_no_image_is_refused(tmp_path):
    (tmp_path / "bad.png").write_text("no image")
    for given, error, message in (
        ([torch.zeros(4, 8, 8)], ValueError, r"float32 \(4, 8, 8\)"),
        ([torch.full((3, 8, 8), 2.0)], ValueError, r"in \[0,1\]"),
        ([torch.full((3, 8, 8), torch.nan)], ValueError, "finite"),
        ([torch.zeros(3, 8, 8, dtype=torch.uint8)], ValueError, "uint8"),
        ([tmp_path / "absent.png"], FileNotFoundError, "absent.png"),
        ([], ValueError, "non-empty list"),
        ([3], ValueError, "an image is a file"),
        ({"dev": pictures(1)}, ValueError, "expected some of"),
        ({"train": []}, ValueError, "no image at all"),
    ):
        with pytest.raises(error, match=message):
            ImageBook(given)
    with pytest.raises(ValueError, match=r"bad.png cannot be read as an image"):
        load_image(tmp_path / "bad.png")
    with pytest.raises(ValueError, match="1 captions for 2 images"):
        ImageBook(pictures(2), ["one"])
    with pytest.raises(ValueError, match="holds no image"):
        read_folder(tmp_path.joinpath("bad.png").rename(tmp_path / "bad.txt").parent)
    with pytest.raises(FileNotFoundError, match="is no folder"):
        read_folder(tmp_path / "nowhere")
    one = tmp_path / "one"
    one.mkdir()
    draw(0).save(one / "0.png")
    book = read_folder(one)
    empty = next(name for name in ("train", "validation", "test") if not book._splits[name])
    with pytest.raises(ValueError, match=f"no image of this set is in split '{empty}'"):
        book.ids(empty)


def test_there_are_images_to_begin_with():
    book = default_images()
    assert len(book.ids("train")) == 80 and not set(book.ids("train")) & set(book.ids("test"))
    number = list(book).index("a red circle moving left")
    image = book.image(number)
    assert image.shape == (3, 128, 128)
    strongest = (image[0] - image[1:].amax(0)).amax()
    assert float(strongest) > 0.3  # something red


# ------------------------------------------------------------------------------------------------------- environments


def test_an_environment_draws_from_a_folders_split(folder, model):
    env = svd_env(model, images=folder, split="test", num_envs=4)
    test = set(read_folder(folder).ids("test"))
    seen = set()
    for _ in range(3):
        obs, _ = env.reset()
        seen |= set(obs["prompt_id"].tolist())
    assert seen <= test and seen
    assert env.derive(split="train").prompt_ids() == env.prompts.ids("train")


def test_reset_takes_images(model):
    env = svd_env(model, num_envs=4, group_size=2)
    new = [torch.rand(3, 20, 30, generator=torch.Generator().manual_seed(n)) for n in range(2)]
    obs, _ = env.reset(seed=0, options={"images": new, "prompts": ["first", "second"]})
    assert obs["prompt_id"].tolist() == [4, 4, 5, 5] and list(env.prompts)[4:] == ["first", "second"]
    again, _ = env.reset(seed=0, options={"images": [new[1], new[1], new[0], new[0]]})
    assert again["prompt_id"].tolist() == [5, 5, 4, 4]
    alone, _ = env.reset(seed=0, options={"image": new[0]})
    assert alone["prompt_id"].tolist() == [4] * 4
    assert set(env.reset(seed=1)[0]["prompt_id"].tolist()) <= {0, 1, 2, 3}  # given images are in no split
    # What the network sees is the image that was given.
    condition = env.mdp.condition_of(obs)
    with torch.no_grad():
        expected = model.encode_images(new)["image"]
    torch.testing.assert_close(condition["image"][::2], expected, rtol=1e-4, atol=1e-5)
    for options, message in (
        ({"images": new, "prompt_ids": [0, 1]}, "not both"),
        ({"images": new, "image": new[0]}, "not both"),
        ({"images": new[:1]}, "got 1 prompts; expected 2"),
        ({"images": [new[0], new[1], new[0], new[1]]}, "must share their prompt"),
        ({"images": new, "prompts": ["one"]}, "1 captions for 2 images"),
        ({"images": [new[0], torch.zeros(1)]}, "an image is a file"),
        ({"prompts": ["a dog", "a cat"]}, "this model animates images"),
    ):
        with pytest.raises(ValueError, match=message):
            env.reset(options=options)
    assert len(env.prompts) == 6  # refused resets leave nothing behind


def test_the_single_environment_takes_an_image(model):
    env = DenoisingEnv(svd_env(model))
    obs, _ = env.reset(seed=0, options={"image": pictures(6)[5]})
    assert obs["prompt_id"].tolist() == [4]
    assert obs["image_latents"].shape == (4, 8, 8) and env.observation_space.contains(obs)


def test_texts_and_images_are_not_mixed_up(model):
    with pytest.raises(ValueError, match="SVD animates images, but was given text prompts; give images="):
        make(model=model, reward=brightness, prompts=["a dog"])
    for options in ({"images": pictures()}, {"prompts": ImageBook(pictures())}):
        with pytest.raises(ValueError, match="Tinyflow is conditioned on text alone, but was given images"):
            tiny_env(**({"prompts": None} | options))
    with pytest.raises(ValueError, match="option 'images' was given, but this model is conditioned on text alone"):
        tiny_env().reset(options={"images": pictures(2)})
    with pytest.raises(ValueError, match="has its texts already"):
        make(model=model, reward=brightness, images=ImageBook(pictures()), prompts=["x"] * 4)
    with pytest.raises(ValueError, match="captions of a folder's images are text files"):
        as_image_book("somewhere", ["x"])
    with pytest.raises(ValueError, match="expected 'text' or 'image'"):
        ModelSpec(name="X", height=8, width=8, num_frames=1, spatial_stride=8, conditioned_on="audio")
