"""The Open-Sora 1.2 adapter on tiny random networks: an environment end to end, sizes, guidance, refused files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vdm_env import make
from vdm_env.errors import CorruptWeightsError, MissingWeightsError
from vdm_env.models import opensora
from vdm_env.models.base import VideoModel
from vdm_env.models.opensora import OPENSORA12, OpenSoraModel, call_stdit3
from vdm_env.models.opensora_weights import (
    PUBLISHED,
    byte_tokenizer,
    find_release,
    read_stdit3,
    read_vae,
    release_prompt,
)
from vdm_env.models.stdit3 import STDiT3Config
from vdm_env.schedule import opensora_shift

PROMPTS = ["a dog riding a bike", "a cat playing chess"]


def tiny(dtype: torch.dtype = torch.float32, seed: int = 0) -> OpenSoraModel:
    with pytest.warns(UserWarning, match="random weights"):
        return opensora.load(OPENSORA12, weights="random", scale="tiny", device="cpu", dtype=dtype, seed=seed)


@pytest.fixture(scope="module")
def model() -> OpenSoraModel:
    return tiny()


def latents(model: OpenSoraModel, batch: int = 2, seed: int = 0) -> Tensor:
    spec = model.spec
    shape = model.latent_shape(spec.num_frames, spec.height, spec.width)
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed))


def brightness(video: Tensor, prompts: list[str]) -> Tensor:
    return video.mean((1, 2, 3, 4))


# ---------------------------------------------------------------------------------------------------- as an environment


def test_rollout_reward_and_backward(model: OpenSoraModel) -> None:
    env = make(model=model, reward=brightness, prompts=PROMPTS, num_envs=2, num_steps=3)
    policy = env.make_policy(lora_rank=2)
    assert policy.guidance_scale == 7.0 and env.mdp.table.name == "flow_grpo"
    obs, _ = env.reset(seed=0)
    assert obs["latents"].shape == (2, 4, 5, 6, 8) and obs["stochastic"].all()
    for _ in range(env.num_steps):
        obs, reward, terminated, _, info = env.step(policy(obs))
    assert terminated.all() and torch.isfinite(reward).all()
    video = info["video"]
    assert video.shape == (2, 17, 3, 48, 64) and video.min() >= 0 and video.max() <= 1
    reward.sum().backward()
    gradients = {n: p.grad for n, p in model.denoiser.named_parameters() if p.requires_grad}
    targets = ("attn.qkv", "attn.proj", "cross_attn.q_linear", "cross_attn.kv_linear", "cross_attn.proj")
    for target in targets:
        ours = [g for n, g in gradients.items() if f".{target}.lora_B" in n]
        assert len(ours) == 2 * model.denoiser.config.depth and all(g is not None and g.abs().sum() > 0 for g in ours)
    assert all(".lora_" in name for name in gradients)


def test_it_is_a_video_model(model: OpenSoraModel) -> None:
    assert isinstance(model, VideoModel)
    same, other = tiny(), tiny(seed=1)
    assert all(torch.equal(a, b) for a, b in zip(same.vae.parameters(), model.vae.parameters(), strict=True))
    assert not torch.equal(other.vae.temporal_vae.quant_conv.conv.weight, same.vae.temporal_vae.quant_conv.conv.weight)
    assert not any(m.training for m in (same.denoiser, same.vae, same.text.encoder))
    assert not any(p.requires_grad for m in (same.denoiser, same.vae, same.text.encoder) for p in m.parameters())


def test_actions_point_to_the_noise_and_every_video_has_its_own_time() -> None:
    model = tiny()
    x, condition, t = latents(model), model.encode_prompts(PROMPTS), torch.tensor([900.0, 250.5])
    with torch.no_grad():
        a = model.predict(x, t, condition)
        velocity = model.denoiser(x, t, condition["text"], condition["mask"], fps=24, height=48, width=64)
        torch.testing.assert_close(a, -velocity[:, :4], atol=1e-6, rtol=0)
        for i in range(2):
            alone = model.predict(x[i : i + 1], t[i : i + 1], {k: v[i : i + 1] for k, v in condition.items()})
            torch.testing.assert_close(a[i : i + 1], alone, atol=1e-5, rtol=0)


# --------------------------------------------------------------------------------------------------------------- sizes


def test_size_sets_grid_and_positions() -> None:
    model = tiny()
    assert model.schedule.shift == pytest.approx(opensora_shift(48, 64, 17))
    wide = model.with_size(17, 24, 128)  # as many latents, another shape
    still = model.with_size(1, 48, 64)
    assert still.schedule.shift == pytest.approx(opensora_shift(48, 64, 1)) and still.schedule.shift < 0.2
    assert (wide.spec.height, wide.spec.width) == (24, 128) and (model.spec.height, model.spec.width) == (48, 64)
    x, condition, t = latents(model, 1), model.encode_prompts(PROMPTS[:1]), torch.tensor([500.0])
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"17 frames of 24x128.*with_size"):
            wide.predict(x, t, condition)
        small = call_stdit3(model.denoiser, x, t, condition, fps=24, height=48, width=64)
        large = call_stdit3(model.denoiser, x, t, condition, fps=24, height=480, width=640)
        assert (small - large).abs().max() > 1e-4  # what counts is the size in pixels
        slow = call_stdit3(model.denoiser, x[:, :, :1], t, condition, fps=24, height=48, width=64)
        image = still.predict(x[:, :, :1], t, condition)
        assert (slow - image).abs().max() > 1e-6  # single frames are conditioned on their own rate


def test_latent_sizes(model: OpenSoraModel) -> None:
    assert model.latent_shape(51, 240, 426) == (4, 15, 30, 53)
    assert model.latent_shape(1, 720, 1280) == (4, 1, 90, 160)
    assert model.latent_shape(34, 424, 240) == (4, 10, 53, 30)
    assert OPENSORA12.num_frames == 51 and (OPENSORA12.height, OPENSORA12.width) == (240, 426)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((51, 241, 426), "height=241 .* try height=240"),
        ((51, 240, 427), "width=427 .* try width=424"),
        ((51, 0, 64), "height=0 "),
        ((16, 48, 64), "num_frames=16; .* try num_frames=17"),
        ((0, 48, 64), "num_frames=0; "),
        ((409, 48, 64), "num_frames=409 is more than the 408 .* try num_frames=408"),
    ],
)
def test_wrong_sizes(model: OpenSoraModel, size: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.with_size(*size)
    frames, height, width = size
    with pytest.raises(ValueError, match=message):
        make(model=model, reward=brightness, prompts=PROMPTS, num_frames=frames, height=height, width=width)


def test_decode_of_chosen_frames(model: OpenSoraModel) -> None:
    two = model.with_size(22, 16, 24)  # a chunk of 17 and a rest of 5
    video = torch.rand(2, 22, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    z = two.encode(video)
    assert z.shape == (2, *two.latent_shape(22, 16, 24)) and torch.isfinite(z).all()
    whole = two.decode(z)
    assert whole.shape == video.shape
    chosen = torch.tensor([[3, 20], [18, 21]])
    got = two.decode(z.requires_grad_(True), chosen)
    want = torch.stack([whole[i, row] for i, row in enumerate(chosen)])
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    got.sum().backward()
    assert z.grad is not None and z.grad[0].abs().sum() > 0
    with pytest.raises(ValueError, match="22 frames has 7 latent frames, got 5"):
        two.decode(z[:, :, :5])


def test_wrong_shapes_are_refused_by_the_network(model: OpenSoraModel) -> None:
    x, condition, t = latents(model), model.encode_prompts(PROMPTS), torch.tensor([500.0, 500.0])
    with pytest.raises(ValueError, match=r"need t \[2\]"):
        model.predict(x, t[:1], condition)
    with pytest.raises(ValueError, match="x_mask must be"):
        model.predict(x, t, condition | {"x_mask": torch.ones(2, 3, dtype=torch.bool)})
    with pytest.raises(ValueError, match="mask has 2 rows, which do not divide the 3 videos"):
        model.predict(
            latents(model, 3), torch.full((3,), 500.0), condition | {"text": condition["text"][:1].expand(3, -1, -1)}
        )
    with pytest.raises(ValueError, match="even width"):
        STDiT3Config(hidden_size=36, num_heads=4)


# ------------------------------------------------------------------------------------------------------------- prompts


def test_null_caption_takes_the_prompts_mask(model: OpenSoraModel) -> None:
    prompts, null = ["a dog", "", "a much longer text"], model.denoiser.y_embedder.y_embedding
    condition = model.encode_prompts(prompts)
    assert torch.equal(condition["text"][1], null) and condition["mask"][1].all()
    lengths = condition["mask"].sum(1).tolist()
    assert lengths[0] < lengths[2] <= lengths[1]
    empty = model.unconditional(condition)
    assert all(torch.equal(row, null) for row in empty["text"]) and torch.equal(empty["mask"], condition["mask"])


def test_prompts_are_cleaned_as_the_release_does() -> None:
    assert release_prompt("A Dog (riding) a bike.") == "a dog riding a bike. aesthetic score: 6.5."
    assert release_prompt("fish &amp;amp; <b>chips</b> https://a.b/c") == "fish chips aesthetic score: 6.5."
    ids, mask = byte_tokenizer(6)(["ab", "abcdefgh"])
    assert ids.tolist() == [[100, 101, 1, 0, 0, 0], [100, 101, 102, 103, 104, 1]]
    assert mask.tolist() == [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]]


def test_types() -> None:
    single, half, double = (tiny(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float64))
    assert half.denoiser.rope.freqs.dtype == torch.float32 and half.vae.dtype == torch.bfloat16
    double.denoiser.load_state_dict(single.denoiser.state_dict())
    half.denoiser.load_state_dict(single.denoiser.state_dict())
    x, t, condition = latents(single), torch.tensor([700.0, 30.0]), single.encode_prompts(PROMPTS)
    with torch.no_grad():
        want = double.predict(x.double(), t, {"text": condition["text"].double(), "mask": condition["mask"]})
        got, rough = single.predict(x, t, condition), half.predict(x, t, condition)
    assert want.dtype == torch.float64 and got.dtype == rough.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=0)
    torch.testing.assert_close(rough.double(), want, atol=0.1, rtol=0)


# --------------------------------------------------------------------------------------------------------------- files


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """Folders as the release has them, of tiny networks."""
    model = tiny()
    configs = {
        "network": dataclasses.asdict(model.denoiser.config) | {"drop_path": 0.0},
        "vae": {"micro_frame_size": 17},
    }
    for part, network in (("network", model.denoiser), ("vae", model.vae)):
        folder = tmp_path / PUBLISHED[part].repository.split("/")[-1]
        folder.mkdir()
        save_file(network.state_dict(), folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(configs[part]))
    return tmp_path


def test_release_folders_load(release: Path) -> None:
    model = tiny(seed=1)
    network = read_stdit3(release / "OpenSora-STDiT-v3").eval()
    autoencoder = read_vae(release / "OpenSora-VAE-v1.2", model.vae.config).eval()
    first = tiny()
    x, condition, t = latents(first, 1), first.encode_prompts(PROMPTS[:1]), torch.tensor([400.0])
    read = dataclasses.replace(model, denoiser=network, vae=autoencoder)
    with torch.no_grad():
        torch.testing.assert_close(read.predict(x, t, condition), first.predict(x, t, condition), atol=1e-6, rtol=0)
        torch.testing.assert_close(read.decode(x), first.decode(x), atol=1e-5, rtol=0)


def test_wrong_tensors_are_listed(release: Path) -> None:
    folder = release / "OpenSora-STDiT-v3"
    file = folder / "model.safetensors"
    good = load_file(file)
    bad = dict(good, extra=torch.zeros(1)) | {"t_block.1.bias": torch.zeros(3)}
    del bad["rope.freqs"], bad["spatial_blocks.0.attn.qkv.bias"]
    save_file(bad, file)
    with pytest.raises(CorruptWeightsError) as error:
        read_stdit3(folder)
    text = str(error.value)
    assert "2 missing: rope.freqs, spatial_blocks.0.attn.qkv.bias" in text and "1 unexpected: extra" in text
    assert "1 mis-shaped: t_block.1.bias [3] instead of [192]" in text
    with pytest.raises(CorruptWeightsError, match="missing: .*unexpected: "):
        read_vae(folder, tiny().vae.config)  # the other repository's file


def test_damaged_and_absent_files(release: Path) -> None:
    folder = release / "OpenSora-VAE-v1.2"
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CorruptWeightsError, match="damaged or truncated"):
        read_vae(folder)
    file.unlink()
    with pytest.raises(MissingWeightsError, match="no model.safetensors in .*OpenSora-VAE"):
        read_vae(folder)
    config = release / "OpenSora-STDiT-v3" / "config.json"
    config.write_text("{")
    with pytest.raises(CorruptWeightsError, match="no JSON"):
        read_stdit3(config.parent)
    for text in ("[]", '{"hidden_size": "wide"}', '{"num_heads": 0}', '{"patch_size": 3}', '{"depth": -1}'):
        config.write_text(text)
        with pytest.raises(CorruptWeightsError, match="config.json (holds a list|does not describe a network)"):
            read_stdit3(config.parent)


def test_finding_the_release(release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VDM_WEIGHTS", str(release))
    monkeypatch.setattr("vdm_env.models.local_weights.try_to_load_from_cache", lambda *_: None)
    with pytest.raises(MissingWeightsError) as error:
        opensora.load(OPENSORA12, weights="pretrained", scale="full", device="cpu", dtype=torch.float32)
    assert "DeepFloyd/t5-v1_1-xxl" in str(error.value) and "STDiT" not in str(error.value)
    text = release / "t5-v1_1-xxl"
    text.mkdir()
    (text / "config.json").write_text('{"d_model": 4096}')
    found = find_release()
    assert {part: folder.name for part, folder in found.items()} == {
        "network": "OpenSora-STDiT-v3",
        "vae": "OpenSora-VAE-v1.2",
        "text": "t5-v1_1-xxl",
    }
    monkeypatch.setenv("VDM_WEIGHTS", str(release / "nothing"))
    with pytest.raises(MissingWeightsError) as error:
        find_release()
    assert all(p.repository in str(error.value) and p.size in str(error.value) for p in PUBLISHED.values())
    assert "MovingShapes-HPS" in str(error.value)


def test_every_size_has_a_grid() -> None:
    """Shifts are arbitrary numbers; the grid must begin at 1 exactly for each of them."""
    for frames in (1, 17, 34, 51, 102, 204, 408):
        for height, width in ((48, 64), (144, 256), (240, 426), (360, 640), (480, 854), (720, 1280)):
            table = opensora.release_schedule(frames, height, width).table(30, "flow_grpo")
            assert float(table.timesteps[0]) == 1000.0
