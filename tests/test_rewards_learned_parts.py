"""Parts of the learned rewards against independent formulas: masks, leaks, detectors, ImageReward's network."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vdm_env.rewards import REWARDS, RewardContext
from vdm_env.rewards.block_masks import TRAINING_BLOCKS, BlockSpec, block_masks, check_masks
from vdm_env.rewards.grounding_dino import GroundingDinoDetector
from vdm_env.rewards.jepa import JepaReward
from vdm_env.rewards.object_removal import ObjectRemovalReward, YolosDetector, resize_keeping_aspect
from vdm_env.rewards.vader_heads import ClipHeadReward, CompressionHead
from vdm_env.rewards.viclip import PRESETS, ViClipConfig, ViClipReward, plain_squash, short_side_crop
from vdm_env.rewards.vjepa import VJepaConfig, sincos_positions
from vdm_env.rewards.vjepa2 import VJepa2


def random_reward(name: str, **changes: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return REWARDS[name].build(RewardContext(**({"weights": "random", "scale": "tiny", "seed": 1} | changes)))


# ---- masks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(8, 14, 14), (2, 4, 4), (3, 5, 6)])
def test_blocks_run_through_time_and_split_all_tokens(grid: tuple[int, int, int]) -> None:
    for seed in range(20):
        for (seen, hidden), spec in zip(block_masks(grid, seed=seed), TRAINING_BLOCKS, strict=True):
            assert sorted([*seen.tolist(), *hidden.tolist()]) == list(range(math.prod(grid)))
            assert len(seen) and len(hidden)
            frame = torch.zeros(math.prod(grid), dtype=torch.bool)
            frame[hidden] = True
            frame = frame.view(grid)
            assert bool((frame == frame[:1]).all()), "the same place in every frame"
            area = spec.scale * grid[1] * grid[2]
            assert int(frame[0].sum()) >= area / 2 - 1
    assert all(
        torch.equal(a, b)
        for x, y in zip(block_masks(grid), block_masks(grid), strict=True)
        for a, b in zip(x, y, strict=True)
    )


def test_one_block_has_the_asked_size() -> None:
    for seed in range(10):
        ((_, hidden),) = block_masks((1, 20, 20), [BlockSpec(num_blocks=1, scale=0.25, aspect=(1.0, 1.0))], seed)
        rows, columns = hidden // 20, hidden % 20
        assert len(hidden) == 100 and int(rows.max() - rows.min()) == int(columns.max() - columns.min()) == 9


def test_bad_masks_are_refused() -> None:
    with pytest.raises(ValueError, match="leave nothing to see of 1 x 1"):
        block_masks((4, 1, 1))
    with pytest.raises(ValueError, match=r"scale in \(0, 1\)"):
        BlockSpec(num_blocks=1, scale=1.5)
    good = (torch.tensor([0, 1]), torch.tensor([2]))
    check_masks([good], 3)
    for bad in ((good[0], torch.tensor([1])), (good[0], torch.tensor([3])), (good[0][:0], good[1])):
        with pytest.raises(ValueError, match="mask 1 is not usable.*0..2"):
            check_masks([good, bad], 3)


# ---- V-JEPA ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["VJEPA", "VJEPA2"])
def test_the_context_knows_nothing_of_what_is_hidden(name: str) -> None:
    """The prediction does not move with hidden pixels; the score does, by way of the target."""
    reward = random_reward(name, num_frames=4)
    network = reward.network
    depth, rows, columns = network.grid
    pixels = torch.randn(
        1, network.num_frames, 3, network.side, network.side, generator=torch.Generator().manual_seed(0)
    )
    for i, (seen, hidden) in enumerate(reward.masks):
        area = torch.zeros(depth * rows * columns)
        area[hidden] = 1
        area = area.view(depth, rows, columns).repeat_interleave(network.num_frames // depth, 0)
        area = area.repeat_interleave(network.side // rows, 1).repeat_interleave(network.side // columns, 2)
        other = pixels + area[None, :, None]
        first, second = (network.predict(p, seen[None], hidden[None], i) for p in (pixels, other))
        assert torch.equal(first, second)
        assert not torch.allclose(reward.errors(pixels, [(seen, hidden)]), reward.errors(other, [(seen, hidden)]))


def test_jepa_options_are_checked() -> None:
    network = random_reward("VJEPA").network
    with pytest.raises(ValueError, match="exponent=0.5"):
        JepaReward(network, name="VJEPA", exponent=0.5)
    with pytest.raises(ValueError, match="mask 0 is not usable"):
        JepaReward(network, name="VJEPA", masks=[(torch.tensor([0]), torch.tensor([10**6]))])
    with pytest.raises(ValueError, match="looks at 4 frames, got 1.*middle4"):
        random_reward("VJEPA")(torch.rand(1, 1, 3, 8, 8), [""])
    with pytest.raises(ValueError, match="embed_dim=30 is no multiple of num_heads=16"):
        VJepaConfig(embed_dim=30)
    with pytest.raises(ValueError, match="num_frames=3"):
        VJepa2(random_reward("VJEPA2").network.model, num_frames=3)
    assert random_reward("VJEPA2", num_frames=7).frames == "middle6"


def test_position_table_of_one_token() -> None:
    """Token (1, 0, 2) of width 12: sines before cosines of place times 1 and 0.01, for time, row and column."""
    table = sincos_positions(12, (2, 2, 3))[0, 1 * 6 + 0 * 3 + 2]
    angles = [[p, p * 0.01] for p in (1.0, 0.0, 2.0)]
    expected = [f(a) for pair in angles for f in (math.sin, math.cos) for a in pair]
    torch.testing.assert_close(table, torch.tensor(expected))


# ---- detectors ---------------------------------------------------------------------------------------------------


class Fixed(torch.nn.Module):
    """A detector that has seen it all: p(object) by image and query."""

    def __init__(self, probability: list[list[float]], best: list[list[bool]]) -> None:
        super().__init__()
        self.output = torch.tensor(probability), torch.tensor(best)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return self.output


def test_object_removal_by_hand() -> None:
    detector = Fixed(
        [[0.3, 0.5, 0.9], [0.1, 0.15, 0.2], [0.4, 0.1, 0.1]], [[True, True, False], [True] * 3, [True] * 3]
    )
    video = torch.rand(1, 3, 3, 4, 6)

    def score(**options: Any) -> float:
        return float(ObjectRemovalReward(detector, **options)(video, [""]))

    assert score() == pytest.approx(1 - (0.9 + 0.2 + 0.4) / 3)
    assert score(mode="hard") == pytest.approx(1 - ((0.3 + 0.5) / 2 + 0 + 0.4) / 3)
    assert score(mode="hard", forget_on_miss=True) == pytest.approx(1 - 0.4 / 3)
    assert score(mode="hard", threshold=0.45) == pytest.approx(1 - 0.5 / 3)
    for options, message in (
        ({"mode": "firm"}, "mode='firm'"),
        ({"threshold": 2.0}, "threshold=2.0"),
        ({"forget_on_miss": True}, "only mode='hard'"),
    ):
        with pytest.raises(ValueError, match=message):
            score(**options)


def test_detectors_get_whole_pictures() -> None:
    assert resize_keeping_aspect(torch.rand(1, 3, 20, 31), 32).shape == (1, 3, 32, 49)
    with pytest.raises(ValueError, match="no class 'unicorn'; it has .*book"):
        YolosDetector(random_reward("ObjectRemoval").detector.model, "unicorn")


def test_grounding_dino_logits_are_the_models_own() -> None:
    detector = random_reward("ObjectRemovalDINO").detector
    pixels = torch.randn(2, 3, 32, 40, generator=torch.Generator().manual_seed(0))
    tokens = detector.tokens.expand(2, -1)
    output = detector.model(pixel_values=pixels, input_ids=tokens).logits
    assert tokens.shape[1] == 7  # [CLS] b o o k . [SEP]
    torch.testing.assert_close(detector.logits(pixels), output[..., :7], rtol=1e-4, atol=1e-5)
    assert bool(torch.isinf(output[..., 7:]).all())
    probability, best = detector(pixels)
    torch.testing.assert_close(probability, output.sigmoid().amax(-1), rtol=1e-4, atol=1e-6)
    assert bool(best.all())
    for target in ("", " . ", "a cat. a dog"):
        with pytest.raises(ValueError, match="expected one phrase"):
            GroundingDinoDetector(detector.model, None, target)


# ---- heads and pre-processing ------------------------------------------------------------------------------------


def test_compression_head_has_its_activations() -> None:
    head = CompressionHead(6, (5, 4, 3, 2)).eval()
    x = torch.randn(7, 6, generator=torch.Generator().manual_seed(0))
    expected = x
    for i in (0, 3, 6, 9):
        expected = (expected @ head.layers[i].weight.T + head.layers[i].bias).clamp(min=0)  # type: ignore[union-attr, operator]
    expected = expected @ head.layers[12].weight.T + head.layers[12].bias  # type: ignore[union-attr, operator]
    torch.testing.assert_close(head(x), expected[:, 0])
    with pytest.raises(ValueError, match="sign=0"):
        ClipHeadReward(random_reward("Compression").backbone, head, name="Compression", sign=0)


def test_viclip_preprocessing() -> None:
    frames = torch.arange(8.0).expand(1, 3, 4, 8)
    assert torch.equal(short_side_crop(frames, 4), frames[..., 2:6])
    torch.testing.assert_close(plain_squash(frames, 4)[0, 0, 0], torch.tensor([0.5, 2.5, 4.5, 6.5]))
    assert {k: v.mean[0] for k, v in PRESETS.items()} == {"vbench": 0.48145466, "internvid": 0.485}
    model = random_reward("ViCLIP").model
    with pytest.raises(ValueError, match="preset='clip'.*internvid"):
        ViClipReward(model, lambda texts: torch.zeros(1), preset="clip")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="image_size=225"):
        ViClipConfig(image_size=225)


# ---- ImageReward -------------------------------------------------------------------------------------------------


def _blip(t: dict[str, Tensor], heads: int, pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """BLIP's image encoder, its text encoder with cross attention, and the head, written out."""

    def linear(x: Tensor, key: str) -> Tensor:
        return x @ t[f"{key}.weight"].T + t[f"{key}.bias"]

    def norm(x: Tensor, key: str, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], t[f"{key}.weight"], t[f"{key}.bias"], eps)

    def attend(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None = None) -> Tensor:
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        scores = scores if keep is None else scores.masked_fill(keep[:, None, None] == 0, -1e9)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

    weight = t["vision.embeddings.patch_embedding.weight"]
    x = F.conv2d(pixels, weight, t["vision.embeddings.patch_embedding.bias"], stride=weight.shape[-1])
    x = torch.cat([t["vision.embeddings.class_embedding"].expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1)
    x = x + t["vision.embeddings.position_embedding"]
    for i in range(2):
        p = f"vision.encoder.layers.{i}"
        q, k, v = linear(norm(x, f"{p}.layer_norm1", 1e-6), f"{p}.self_attn.qkv").chunk(3, -1)
        x = x + linear(attend(q, k, v), f"{p}.self_attn.projection")
        x = x + linear(F.gelu(linear(norm(x, f"{p}.layer_norm2", 1e-6), f"{p}.mlp.fc1")), f"{p}.mlp.fc2")
    image = norm(x, "vision.post_layernorm", 1e-6)
    y = t["text.embeddings.word_embeddings.weight"][tokens]
    y = norm(y + t["text.embeddings.position_embeddings.weight"][: tokens.shape[1]], "text.embeddings.LayerNorm", 1e-12)
    for i in range(2):
        p = f"text.encoder.layer.{i}"
        for part, source, keep in (("attention", None, mask), ("crossattention", image, None)):
            other = y if source is None else source
            s = f"{p}.{part}.self"
            seen = attend(linear(y, f"{s}.query"), linear(other, f"{s}.key"), linear(other, f"{s}.value"), keep)
            y = norm(linear(seen, f"{p}.{part}.output.dense") + y, f"{p}.{part}.output.LayerNorm", 1e-12)
        hidden = F.gelu(linear(y, f"{p}.intermediate.dense"))
        y = norm(linear(hidden, f"{p}.output.dense") + y, f"{p}.output.LayerNorm", 1e-12)
    score = y[:, 0]
    for i in (0, 2, 4, 6, 7):
        score = linear(score, f"head.layers.{i}")
    return (score[:, 0] - 0.16717362830052426) / 1.0333394966054072


def test_image_reward_is_blip_with_a_head() -> None:
    reward = random_reward("ImageReward", dtype=torch.float64)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    prompts = ["a dog", "two cats on a long table, again and again and again"]
    inputs = reward.tokenizer(prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    tokens, mask = inputs["input_ids"], inputs["attention_mask"]
    assert tokens.shape == (2, 35) and mask.sum(1).tolist() == [6, 35]  # [CLS] a d o g [SEP], and one that is cut
    expected = _blip(reward.network.state_dict(), 2, pixels, tokens, mask)
    torch.testing.assert_close(reward.network(pixels, tokens, mask), expected, rtol=1e-6, atol=1e-8)
    mean, std = (
        torch.tensor(v, dtype=torch.float64).view(3, 1, 1)
        for v in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    )
    torch.testing.assert_close(reward((pixels * std + mean)[:, None], prompts), expected, rtol=1e-6, atol=1e-8)
