"""VideoScore: the network against transformers' own forward pass, the text, the sizes, and the released layout."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Idefics2ImageProcessor

from vdm_env.errors import CorruptWeightsError, MissingWeightsError
from vdm_env.registry import make_reward
from vdm_env.rewards import REWARDS, RewardContext, score_parts
from vdm_env.rewards.videoscore import DIMENSIONS, VideoScoreReward, fit, thinned
from vdm_env.rewards.vlm_files import encode, letter_tokenizer

PROMPTS = ["a dog", "a cat playing chess"]
QUERY = 'Rate "{text_prompt}" with {no other} slot:\n'


def build(**changes: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        context = RewardContext(**({"weights": "random", "scale": "tiny", "seed": 5} | changes))
        return REWARDS["VideoScore"].build(context)


@pytest.fixture(scope="module")
def reward() -> VideoScoreReward:
    return build()


def videos(count: int = 2, frames: int = 3) -> Tensor:
    return torch.rand(count, frames, 3, 20, 28, generator=torch.Generator().manual_seed(1))


def test_scores_equal_transformers_forward_pass(reward: VideoScoreReward) -> None:
    """Pictures by transformers' processor, the whole model by its own forward, the head on the last token by hand."""
    low, high = reward.edges
    processor = Idefics2ImageProcessor(size={"shortest_edge": low, "longest_edge": high})
    for video, prompt, scored in zip(videos(), PROMPTS, reward.scores(videos(), PROMPTS), strict=True):
        pixels = processor(list(video), do_rescale=False, return_tensors="pt")
        tokens, mask = encode(reward.tokenizer, [reward._text(prompt, 3)], torch.device("cpu"))
        model: Any = reward.network.model
        model.config.image_token_id = reward.network.image_token
        state = model(input_ids=tokens, attention_mask=mask, **pixels).last_hidden_state[0, -1]
        expected = reward.network.score.weight @ state + reward.network.score.bias
        torch.testing.assert_close(scored, expected, rtol=1e-4, atol=1e-5)


def test_grey_frames_are_no_padding(reward: VideoScoreReward) -> None:
    grey = torch.full((1, 2, 3, 20, 28), 0.5)
    assert torch.isfinite(reward(grey, ["a dog"])).all()


def test_mean_parts_and_single_dimensions(reward: VideoScoreReward) -> None:
    total, parts = score_parts(reward, videos(), PROMPTS)
    assert list(parts) == [f"VideoScore:{d}" for d in DIMENSIONS]
    torch.testing.assert_close(total, torch.stack(list(parts.values())).mean(0))
    for dimension in ("visual", "temporal", "factual"):
        one = build(dimension=dimension)
        assert one.name == f"VideoScore:{dimension}"
        torch.testing.assert_close(one(videos(), PROMPTS), parts[one.name])
    assert float(torch.stack(list(parts.values())).std(0).min()) > 1e-3, "five outputs, five scores"
    with pytest.raises(ValueError, match="dimension='beauty'.*temporal"):
        build(dimension="beauty")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_dimension_by_name() -> None:
    named = make_reward("MovingShapes-0.5*VideoScore:temporal+VideoScore", weights="random", scale="tiny", seed=5)
    scores, parts = score_parts(named, videos(), PROMPTS)
    torch.testing.assert_close(scores, 0.5 * parts["VideoScore:temporal"] + parts["VideoScore"])
    with pytest.raises(ValueError, match="no score called 'beauty': VideoScore:visual"):
        make_reward("VideoScore:beauty")
    with pytest.raises(ValueError, match="one score only"):
        make_reward("HPS:temporal")


def test_padding_and_chunks_change_nothing(reward: VideoScoreReward) -> None:
    together = reward(videos(), PROMPTS)
    alone = torch.cat([reward(videos()[i : i + 1], PROMPTS[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    chunked = build()
    chunked.chunk_size = 1
    torch.testing.assert_close(chunked(videos(), PROMPTS), together, rtol=1e-4, atol=1e-5)


def test_text_and_frames(reward: VideoScoreReward) -> None:
    picture = "<fake_token_around_image><image><image><fake_token_around_image>"
    asked = VideoScoreReward(reward.network, reward.tokenizer, query=QUERY, max_frames=4)
    assert asked._text("a {dog}", 2) == f'Rate "a {{dog}}" with {{no other}} slot:\n{picture} {picture} '
    assert picture not in asked._text("x", 0) and "<image>" not in asked._text("an <image>", 0)
    assert thinned(10, 4) == [0, 2, 5, 7]
    long = videos(1, 10)
    torch.testing.assert_close(asked(long, ["a"]), asked(long[:, [0, 2, 5, 7]], ["a"]))
    assert build(num_frames=32).frames == list(range(0, 32, 2)) and build(num_frames=16).frames == "all"


@pytest.mark.parametrize(
    ("size", "expected"),
    [((320, 512), (378, 512)), ((720, 1280), (551, 980)), ((1280, 720), (980, 551)), ((980, 980), (980, 980))],
)
def test_sizes(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert fit(*size, (378, 980)) == expected


# ---- the released layout -----------------------------------------------------------------------------------------


@pytest.fixture
def release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two shards and an index, config, tokenizer and a README with the query in it, as the hub has them."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "no_cache"))
    folder = tmp_path / "TIGER-Lab" / "VideoScore"
    folder.mkdir(parents=True)
    network = build().network
    tokenizer = letter_tokenizer(["<fake_token_around_image>", "<image>"])
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    config = network.model.config.to_dict() | {"image_token_id": tokenizer.get_vocab()["<image>"]}
    config |= {"architectures": ["Idefics2ForSequenceClassification"], "num_labels": 5}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "README.md").write_text(
        "# VideoScore\n```bash\npip install x\n```\n```python\nimport os\nos.abort()\n"
        f'regression_query_prompt = """{QUERY}"""\n```\n'
    )
    state = {k: v.contiguous() for k, v in network.state_dict().items()}
    names = sorted(state)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, kept in shards.items():
        save_file({k: state[k] for k in kept}, folder / file)
    places = {name: file for file, kept in shards.items() for name in kept}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def load(release: Path, **changes: Any) -> Any:
    return REWARDS["VideoScore"].build(RewardContext(folder=release.parents[1], **changes))


def rewrite(release: Path, change: Any) -> None:
    path = release / "model-00001-of-00002.safetensors"
    tensors = load_file(path)
    change(tensors, sorted(tensors))
    save_file(tensors, path)


def test_released_layout_loads(release: Path) -> None:
    loaded = load(release, dimension="temporal")
    assert loaded.query == QUERY and loaded.edges == (378, 980)
    random = build(dimension="temporal")
    random.query = QUERY
    loaded.edges = random.edges
    assert torch.equal(loaded(videos(), PROMPTS), random(videos(), PROMPTS))
    half = load(release, dtype=torch.bfloat16)
    assert {p.dtype for p in half.network.parameters()} == {torch.bfloat16}
    rotary = [b for n, b in half.network.named_buffers() if "inv_freq" in n]
    assert rotary and all(b.dtype == torch.float32 for b in rotary)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, names: t.update(extra=torch.zeros(1)), "unexpected: extra"),
        (lambda t, names: t.update({names[0]: torch.zeros(3, 3, 3)}), r"of another shape: .* \[3, 3, 3\] instead"),
        (lambda t, names: t.pop(names[0]), "names tensors that its files do not hold"),
    ],
)
def test_wrong_tensors_are_refused(release: Path, change: Any, message: str) -> None:
    rewrite(release, change)
    with pytest.raises(CorruptWeightsError, match=message):
        load(release)


def test_damaged_and_missing_files_are_refused(release: Path) -> None:
    index = release / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    for bad in ("../model.safetensors", "/etc/passwd"):
        index.write_text(json.dumps({"weight_map": {k: bad for k in whole["weight_map"]}}))
        with pytest.raises(CorruptWeightsError, match="files beside it"):
            load(release)
    gone = release / sorted(whole["weight_map"].values())[0]
    index.write_text(json.dumps(whole))
    (release / "README.md").write_text("# nothing here")
    with pytest.raises(CorruptWeightsError, match=r"regression_query_prompt with a place \{text_prompt\}"):
        load(release)
    gone.unlink()
    with pytest.raises(MissingWeightsError, match=r"TIGER-Lab/VideoScore"):
        load(release)
    index.unlink()
    with pytest.raises(MissingWeightsError, match=r"model\.safetensors\.index\.json.*MovingShapes-HPS"):
        load(release)
