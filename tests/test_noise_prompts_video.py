"""Small parts with sharp contracts: keyed noise, prompt books, video files."""

from __future__ import annotations

import av
import numpy as np
import pytest
import torch
from PIL import Image

from vdm_env import noise, video
from vdm_env.prompts import PromptBook


def test_noise_depends_on_seed_and_step_only():
    batch = noise.normal([5, 9, 5], 3, (2, 4))
    assert torch.equal(batch[0], batch[2]) and not torch.equal(batch[0], batch[1])
    assert torch.equal(noise.normal([9], 3, (2, 4))[0], batch[1])
    assert torch.equal(noise.normal(torch.tensor([5, 9]), torch.tensor([4, 3]), (2, 4))[1], batch[1])
    assert not torch.equal(noise.normal([5], 4, (2, 4))[0], batch[0])


def test_noise_is_standard_normal_and_uncorrelated_between_neighbours():
    drawn = noise.normal(range(400), 0, (256,))
    assert abs(drawn.mean()) < 0.02 and abs(drawn.std() - 1) < 0.02
    steps = torch.cat([noise.normal([7], k, (4096,)) for k in range(8)])
    correlation = torch.corrcoef(steps) - torch.eye(8)
    assert correlation.abs().max() < 0.08


def test_noise_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    noise.normal([1, 2], 0, (3,))
    assert torch.equal(torch.rand(3), expected)


def test_mix_separates_and_fits_a_generator():
    values = {noise.mix(seed, step) for seed in range(-3, 60) for step in range(-3, 30)}
    assert len(values) == 63 * 33
    assert all(0 <= v < 2**63 for v in values)
    assert noise.mix(1, 2) != noise.mix(2, 1)


def test_prompt_book_numbers_texts_and_keeps_splits():
    book = PromptBook({"train": ["a", "b"], "test": ["c"]})
    assert list(book) == ["a", "b", "c"] and book.ids("train") == [0, 1] and book.ids("test") == [2]
    assert book.add(["d", "a"]) == [3, 0] and book[3] == "d" and len(book) == 4
    assert book.ids("train") == [0, 1]
    assert book.sha256("train") != book.sha256("test")
    plain = PromptBook(["x", "y"])
    assert plain.ids("train") == plain.ids("validation") == plain.ids("test") == [0, 1]


@pytest.mark.parametrize(
    "prompts, message",
    [
        ([], "non-empty list"),
        ("one text", "list of texts"),
        (["a", " "], "non-empty text"),
        ([3], "non-empty text"),
        ({"train": ["a"], "test": ["a"]}, "another split"),
        ({"dev": ["a"]}, "unknown prompt splits"),
    ],
)
def test_prompt_book_refuses(prompts, message):
    with pytest.raises(ValueError, match=message):
        PromptBook(prompts)


def test_prompt_book_names_the_splits_it_has():
    with pytest.raises(ValueError, match=r"no prompt split 'test'; this set has \['train'\]"):
        PromptBook({"train": ["a"]}).ids("test")


def test_frame_row_and_files(tmp_path):
    clip = torch.linspace(0, 1, 5 * 3 * 16 * 20).reshape(5, 3, 16, 20)
    row = video.frame_row(clip)
    assert row.dtype == np.uint8 and row.shape == (96, 5 * 120, 3)
    path = video.save_mp4(tmp_path / "deep" / "a.mp4", clip, fps=4)
    with av.open(str(path)) as container:
        frames = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    assert len(frames) == 5 and frames[0].shape == (96, 120, 3)
    assert abs(float(frames[-1].mean()) - float(row[:, -120:].mean())) < 6  # the codec is lossy
    gif = Image.open(video.save_gif(tmp_path / "a.gif", clip))
    assert gif.n_frames == 5
