"""Stable Video Diffusion: against diffusers' pipeline on the same random weights, and by hand."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLTemporalDecoder,
    EulerDiscreteScheduler,
    StableVideoDiffusionPipeline,
    UNetSpatioTemporalConditionModel,
)
from diffusers.pipelines.stable_video_diffusion.pipeline_stable_video_diffusion import _resize_with_antialiasing
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from tests.svd import pictures, svd_env, tiny_svd
from vdm_env import MissingWeightsError, check_env_spec, check_model, make, mdp, noise
from vdm_env.errors import CorruptWeightsError
from vdm_env.models import svd, svd_weights
from vdm_env.models.base import frozen

SCHEDULER = dict(
    num_train_timesteps=1000,
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    prediction_type="v_prediction",
    use_karras_sigmas=True,
    sigma_min=0.002,
    sigma_max=700.0,
    timestep_spacing="leading",
    timestep_type="continuous",
    steps_offset=1,
)


@pytest.fixture(scope="module")
def model():
    return tiny_svd()


def large_eyed(model):
    """The same with an image encoder of 224 pixels, the side that the pipeline has built in."""
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, projection_dim=16)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes, image_size=224, patch_size=32))
    return replace(model, image_encoder=frozen(encoder))


# ---------------------------------------------------------------------------------------------- against the pipeline


def test_a_deterministic_rollout_is_that_of_diffusers_pipeline(model, monkeypatch):
    model = large_eyed(model)
    pipeline = StableVideoDiffusionPipeline(
        vae=model.vae,
        image_encoder=model.image_encoder,
        unet=model.denoiser,
        scheduler=EulerDiscreteScheduler(**SCHEDULER),
        feature_extractor=CLIPImageProcessor(),
    )
    pipeline.set_progress_bar_config(disable=True)
    images = [Image.fromarray((p.permute(1, 2, 0) * 255).numpy().astype(np.uint8)) for p in pictures(2)]
    initial = torch.randn(2, 4, 4, 8, 8, generator=torch.Generator().manual_seed(1))  # B F C h w
    theirs = pipeline(
        images,
        height=64,
        width=64,
        num_frames=4,
        num_inference_steps=5,
        latents=initial,
        generator=torch.Generator().manual_seed(2),
        output_type="latent",
    ).frames

    drawn = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    env = svd_env(model, images=images, sampler="euler", num_steps=5)
    start = initial.transpose(1, 2) * pipeline.scheduler.init_noise_sigma
    obs, _ = env.reset(seed=[0, 1], options={"prompt_ids": [0, 1], "latents": start})
    monkeypatch.setattr(mdp.noise, "normal", lambda seeds, step, shape: drawn[list(seeds)])
    policy = env.make_policy(lora_rank=2)  # a new LoRA changes nothing
    assert policy.guidance_scale == 3.0
    with torch.no_grad():
        for _ in range(5):
            obs, *_ = env.step(policy.mean(obs))
    ours = obs["latents"].transpose(1, 2)
    assert float(ours.std()) > 0.1
    assert float((ours - theirs).abs().max()) < 1e-4 * float(theirs.abs().max())
    with torch.no_grad():
        decoded = (
            pipeline.decode_latents(theirs, num_frames=4, decode_chunk_size=4).transpose(1, 2) / 2 + 0.5
        )  # B F 3 H W
        video = env.mdp.decode(theirs.transpose(1, 2))
    torch.testing.assert_close(video, decoded.clamp(0, 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(64, 64), (100, 300), (225, 224), (500, 700)])
def test_images_are_shrunk_for_the_encoder_as_in_the_pipeline(size):
    image = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = _resize_with_antialiasing(image, (224, 224))
    torch.testing.assert_close(svd.blur_resize(image, 224), expected, rtol=0, atol=1e-5)


def test_the_grid_is_that_of_diffusers_scheduler(model):
    scheduler = EulerDiscreteScheduler(**SCHEDULER)
    scheduler.set_timesteps(25)
    table = model.schedule.table(25, "euler")
    torch.testing.assert_close(table.timesteps.float(), scheduler.timesteps.float(), rtol=1e-5, atol=1e-5)
    assert model.schedule.init_sigma == pytest.approx(float(scheduler.init_noise_sigma), rel=1e-5)


def test_training_noise_is_log_normal_around_two(model):
    t = model.schedule.sample_timesteps(20000, torch.Generator().manual_seed(0))
    assert (4 * t).mean().item() == pytest.approx(0.7, abs=0.04)
    assert (4 * t).std().item() == pytest.approx(1.6, abs=0.04)


# ------------------------------------------------------------------------------------------------------------- by hand


def test_guidance_grows_over_the_frames(model):
    torch.testing.assert_close(model.guidance(3.0, 5), torch.tensor([1.0, 1.5, 2.0, 2.5, 3.0]))
    torch.testing.assert_close(replace(model, min_guidance=2.0).guidance(3.0, 3), torch.tensor([2.0, 2.5, 3.0]))
    assert replace(model, min_guidance=2.0).guidance(1.0, 3).tolist() == [1, 1, 1]
    env = svd_env(model)
    obs, _ = env.reset(seed=0)
    with torch.no_grad():
        mean = env.make_policy(lora_rank=2, guidance_scale=4.0).mean(obs)
        before = env.mdp.counters.denoiser_forwards
        alone = env.make_policy(lora_rank=2, guidance_scale=1.0).mean(obs)
        assert env.mdp.counters.denoiser_forwards == before + 2  # no unconditional branch
        x = obs["latents"] / (700.0**2 + 1) ** 0.5
        condition = env.mdp.condition(obs["prompt_id"], obs["video_seed"])
        c = model.predict(x, obs["timestep"], condition)
        blank = {"image": torch.zeros(2, 1, 16), "image_latents": torch.zeros(2, 4, 8, 8)}
        u = model.predict(x, obs["timestep"], condition | blank)
    torch.testing.assert_close(alone, c)
    assert not torch.allclose(u, c, atol=1e-3)
    for frame, w in enumerate([1.0, 2.0, 3.0, 4.0]):
        expected = u[:, :, frame] + w * (c - u)[:, :, frame]
        torch.testing.assert_close(mean[:, :, frame], expected, rtol=1e-4, atol=1e-5)


def test_what_the_network_is_told(model):
    images = pictures(2)
    drawn = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        condition = model.encode_images(images, drawn)
        plain = model.encode_images(images)
        posterior = model.vae.encode(torch.stack(images) * 2 - 1 + 0.02 * drawn).latent_dist
    expected = torch.tensor([[6.0, 127.0, 0.02]]).expand(2, -1)  # 7 frames a second less one
    torch.testing.assert_close(condition["time_ids"], expected)
    torch.testing.assert_close(condition["image_latents"], posterior.mean, rtol=1e-4, atol=1e-5)  # no 0.18215
    assert not torch.allclose(plain["image_latents"], condition["image_latents"])
    torch.testing.assert_close(plain["image"], condition["image"])  # the embedding is of the clean image
    empty = model.encode_prompts(["", ""])
    assert {k: v.shape for k, v in empty.items()} == {k: v.shape for k, v in condition.items()}
    blank = model.unconditional(condition)
    assert all(torch.equal(blank[name], empty[name]) for name in blank)
    with pytest.raises(ValueError, match="animates images and reads no text"):
        model.encode_prompts(["a dog"])


def test_noise_on_the_image_is_keyed_by_the_videos_seed(model, monkeypatch):
    env = svd_env(model)
    a = env.mdp.condition([0, 0], [5, 6])["image_latents"]
    b = env.mdp.condition([1, 0], [5, 6])["image_latents"]
    assert torch.equal(a[1], b[1]) and not torch.equal(a[0], a[1]) and not torch.equal(a[0], b[0])
    drawn = noise.normal([5], noise.CONDITIONING, (3, 64, 64))
    with torch.no_grad():
        expected = model.encode_images([env.prompts.image(0)], drawn)["image_latents"]
    torch.testing.assert_close(a[:1], expected, rtol=1e-4, atol=1e-5)
    fixed = env.mdp.condition([0, 0])["image_latents"]
    assert torch.equal(fixed[0], fixed[1])
    monkeypatch.setattr(mdp, "MAX_IMAGE_CONDITIONS", 3)
    env.mdp.condition([0, 0], [5, 7])  # 5 is used again and kept, the longest unused go
    kept = [key[:2] for key in env.mdp._conditions if isinstance(key, tuple)]
    assert len(kept) == 3 and {(0, 5), (0, 7)} <= set(kept)
    assert torch.equal(env.mdp.condition([0], [6])["image_latents"][0], a[1])  # made anew, the same


def test_frames_are_decoded_in_chunks_and_chosen(model):
    latents = torch.randn(2, 4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = model.decode(latents)
        chosen = model.decode(latents, torch.tensor([[3, 0], [1, 1]]))
        halves = replace(model, decode_chunk=2)
        last = halves.decode(latents, torch.tensor([[3], [2]]))
        second = model.vae.decode(latents[:, :, 2:].transpose(1, 2).flatten(0, 1) / 0.18215, num_frames=2).sample
    assert torch.equal(chosen, torch.stack([whole[0, [3, 0]], whole[1, [1, 1]]]))
    second = (second.unflatten(0, (2, 2)) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(last[:, 0], torch.stack([second[0, 1], second[1, 0]]), rtol=1e-4, atol=1e-5)
    assert torch.equal(model.encode(whole)[:, :, 1:2], model.encode(whole[:, 1:2]))


def test_images_of_any_size_and_videos_of_another(model):
    with torch.no_grad():
        condition = model.with_size(2, 64, 128).encode_images([torch.rand(3, 50, 90), torch.rand(3, 64, 128)])
    assert condition["image_latents"].shape == (2, 4, 8, 16)
    assert model.with_size(2, 64, 128).latent_shape(2, 64, 128) == (4, 2, 8, 16)
    with pytest.raises(ValueError, match="height=72 is not a positive multiple of 64"):
        model.with_size(4, 72, 64)


# ----------------------------------------------------------------------------------------------------------- contracts


def test_the_contracts_hold(model):
    check_model(tiny_svd())
    env = svd_env(model)
    check_env_spec(env)
    check_env_spec(env.to_torchrl())


@pytest.mark.filterwarnings("ignore:.*random weights")
def test_made_by_name_it_runs_and_learns():
    env = make("SVD-HPS", weights="random", scale="tiny", num_envs=2)
    assert env.num_steps == 4 and env.mdp.table.stochastic.tolist() == [True] * 3 + [False]
    env = env.derive(num_steps=3)
    policy = env.make_policy(lora_rank=2)
    obs, _ = env.reset(seed=0)
    for _ in range(env.num_steps):
        obs, reward, *_ = env.step(policy(obs))
    reward.mean().backward()
    gradients = [p.grad for p in policy.trainable_parameters()]
    assert all(g is not None and bool(torch.isfinite(g).all()) for g in gradients)
    assert any(bool(g.any()) for g in gradients)


def test_checkpointing_changes_no_gradient(model):
    env = svd_env(model, num_steps=2)
    found = []
    for checkpointing in (False, True):
        policy = env.make_policy(lora_rank=2, gradient_checkpointing=checkpointing, seed=1)
        obs, _ = env.reset(seed=0)
        for _ in range(2):
            obs, reward, *_ = env.step(policy(obs))
        reward.sum().backward()
        found.append([p.grad for p in policy.trainable_parameters()])
    assert any(bool(g.any()) for g in found[0])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_any_t_prediction_has_the_fixed_draw(model):
    env = svd_env(model)
    policy = env.make_policy(lora_rank=2)
    x0 = torch.randn(2, 4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t = env.mdp.schedule.sample_timesteps(2, torch.Generator().manual_seed(0))
    x_t = env.mdp.add_noise(x0, torch.ones_like(x0), t)
    with torch.no_grad():
        output = policy.predict(x_t, t, [2, 0])
        scaled = x_t / ((8 * t).exp() + 1).sqrt().view(-1, 1, 1, 1, 1)
        expected = model.predict(scaled, t, env.mdp.condition([2, 0]))
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------- weights


def test_the_full_networks_have_the_releases_sizes():
    with torch.device("meta"):
        unet = UNetSpatioTemporalConditionModel(**svd_weights.unet_config(14))
        vae = AutoencoderKLTemporalDecoder(**svd_weights.vae_config())
        eye = CLIPVisionModelWithProjection(svd_weights.image_encoder_config())
    count = {
        name: sum(p.numel() for p in net.parameters()) for name, net in (("unet", unet), ("vae", vae), ("eye", eye))
    }
    assert round(count["unet"] / 1e6) == 1525 and round(count["vae"] / 1e6, 1) == 97.7
    assert round(count["eye"] / 1e6) == 632
    assert unet.conv_in.weight.shape == (320, 8, 3, 3)
    assert unet.add_embedding.linear_1.in_features == 768 and eye.visual_projection.weight.shape == (1024, 1280)
    assert svd.SVD.num_frames == 14 and svd.SVD_XT.num_frames == 25
    assert svd.SVD_XT.height * 1024 == svd.SVD_XT.width * 576


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    model, folder = tiny_svd(), tmp_path_factory.mktemp("weights") / "SVD"
    model.denoiser.save_pretrained(folder / "unet")
    model.vae.save_pretrained(folder / "vae")
    model.image_encoder.save_pretrained(folder / "image_encoder")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER | {"sigma_max": 80.0}))
    (folder / "feature_extractor").mkdir()
    settings = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}
    (folder / "feature_extractor" / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


PLACE = {"weights": "pretrained", "scale": "full", "device": "cpu", "dtype": torch.float32}


def test_a_release_folder_is_read(release, monkeypatch):
    monkeypatch.setenv("VDM_WEIGHTS", str(release.parent))
    read = svd.load(svd.SVD, **PLACE)
    assert read.schedule.init_sigma == 80.0 and read.pixel_mean == (0.5, 0.5, 0.5) and read.pixel_std[0] == 0.25
    assert read.spec == svd.SVD
    same = zip(read.denoiser.parameters(), tiny_svd().denoiser.parameters(), strict=True)
    assert all(torch.equal(a, b) and not a.requires_grad for a, b in same)
    half = svd.load(svd.SVD, **(PLACE | {"dtype": torch.float16}))
    assert half.vae.dtype == torch.float32 and half.denoiser.dtype == torch.float16
    # The 25-frame release has a UNet of its own.
    with pytest.raises(MissingWeightsError, match="stable-video-diffusion-img2vid-xt"):
        svd.load(svd.SVD_XT, **PLACE)


def test_wrong_files_are_named(release, monkeypatch, tmp_path):
    monkeypatch.setenv("VDM_WEIGHTS", str(tmp_path))
    with pytest.raises(MissingWeightsError, match=r"stabilityai/stable-video-diffusion-img2vid'.*make\(\"SVD-"):
        make("SVD-HPS")
    for settings in ({"prediction_type": "epsilon"}, {"use_karras_sigmas": False}, {"timestep_type": "discrete"}):
        with pytest.raises(CorruptWeightsError, match="are not Stable Video Diffusion's"):
            svd.schedule_of(SCHEDULER | settings)
    for settings in ({"sigma_min": "low"}, {"sigma_max": -1.0}, {"sigma_max": [700]}):
        with pytest.raises(CorruptWeightsError, match="give no noise levels"):
            svd.schedule_of(SCHEDULER | settings)
    assert svd.schedule_of({}).sigma_max == svd.schedule_of(SCHEDULER).sigma_max == 700.0
    copied = tmp_path / "copy"
    copied.mkdir()
    for part in ("vae", "image_encoder", "scheduler", "feature_extractor"):
        (copied / part).symlink_to(release / part, target_is_directory=True)
    (copied / "unet").mkdir()
    (copied / "unet" / "config.json").write_text((release / "unet" / "config.json").read_text())
    data = next((release / "unet").glob("*.safetensors")).read_bytes()
    (copied / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(data[: len(data) // 2])
    monkeypatch.setenv("VDM_WEIGHTS", str(copied))
    with pytest.raises(CorruptWeightsError, match="unet.*truncated"):
        svd.load(svd.SVD, **PLACE)
