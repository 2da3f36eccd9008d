"""InstructVideo: frames, coefficients and gradients by hand, where it ends, what it starts from and refuses."""

from __future__ import annotations

import math

import pytest
import torch
from gaussian import Recorder, full_policy, gaussian_env
from models import tiny_env
from reward_gradient import (
    coefficients,
    exact_env,
    given_videos_on,
    grey_videos,
    into_weight,
    levels,
    means_of,
    own_videos_on,
)

from algos.instructvideo import InstructVideo, InstructVideoConfig, choose_frames, score_frames
from algos.losses import attenuated_one_minus, temporal_attenuation
from algos.video_set import order
from vdm_env.rewards.base import as_reward
from vdm_env.worlds.gaussian import PIXEL_RANGE

# ------------------------------------------------------------------------------------------- frames and coefficients


def test_coefficients_by_hand():
    frames = torch.tensor([[2, 8, 15], [7, 8, 9]])
    found = temporal_attenuation(frames, 16, 0.5)
    expected = torch.tensor([[math.exp(-3), 1.0, math.exp(-3.5)], [math.exp(-0.5), 1.0, math.exp(-0.5)]])
    torch.testing.assert_close(found, expected)
    normal = temporal_attenuation(frames, 16, 0.5, normalised=True)
    torch.testing.assert_close(normal, expected / expected.mean(1, keepdim=True))
    assert torch.equal(temporal_attenuation(frames, 16, 0.0), torch.ones(2, 3))
    far = temporal_attenuation(torch.tensor([[0, 1]]), 4000, 1.0, normalised=True)  # exp(-2000) is 0 in any float
    torch.testing.assert_close(far.sum(1), torch.tensor([2.0]))


def test_loss_by_hand():
    score = torch.tensor([[0.2, 0.4], [0.6, -0.2]], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[1.0, 0.5], [0.25, 1.0]], dtype=torch.float64, requires_grad=True)
    loss = attenuated_one_minus(score, weight)
    assert loss.item() == pytest.approx(((1 - (0.2 + 0.2) / 2) + (1 - (0.15 - 0.2) / 2)) / 2)
    loss.backward()
    assert score.grad.flatten().tolist() == pytest.approx([-0.25, -0.125, -0.0625, -0.25])
    assert weight.grad is None


@pytest.mark.parametrize(
    ("frames", "rate", "error", "message"),
    [
        (torch.tensor([[0.5]]), 1.0, TypeError, "torch.float32, expected an integer tensor"),
        (torch.tensor([1, 2]), 1.0, ValueError, r"shape \(2,\), expected \[B,n\]"),
        (torch.tensor([[3, 8]]), 1.0, ValueError, r"has 3\.\.8, expected 0\.\.7"),
        (torch.tensor([[3]]), -1.0, ValueError, "rate is -1.0, expected a number >= 0"),
    ],
)
def test_coefficients_refuse(frames, rate, error, message):
    with pytest.raises(error, match=message):
        temporal_attenuation(frames, 8, rate)


def test_a_loss_of_two_shapes_is_refused():
    with pytest.raises(ValueError, match="coefficient has shape"):
        attenuated_one_minus(torch.zeros(2, 3), torch.zeros(2, 1))


def test_each_segment_gives_one_frame_at_random():
    seeds = torch.arange(600)
    frames = choose_frames(seeds, 16, 4)
    assert frames.shape == (600, 4) and torch.equal(frames // 4, torch.arange(4).expand(600, 4))
    for column in frames.T:
        counts = (column % 4).bincount(minlength=4)
        assert counts.min() > 100 and counts.max() < 200  # 150 +- 11
    assert torch.equal(frames, choose_frames(seeds, 16, 4))
    uneven = choose_frames(seeds, 7, 3)  # segments of 7/3 frames: the last frame is reached too
    assert uneven.max() == 6 and bool((uneven.diff(dim=1) >= 0).all())
    assert choose_frames(seeds[:2], 7, 3, "first").tolist() == [[0, 2, 4]] * 2
    assert choose_frames(seeds[:1], 16, 4, "first").tolist() == [[0, 4, 8, 12]]


def test_frames_are_scored_one_by_one_with_their_videos_prompt():
    def of_text(video, prompts):
        assert video.shape[1] == 1
        return video.mean((1, 2, 3, 4)) * torch.tensor([float(text) for text in prompts])

    video = torch.rand(2, 3, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    scores = score_frames(as_reward(of_text), video, ["1", "10"])
    torch.testing.assert_close(scores, video.mean((2, 3, 4)) * torch.tensor([[1.0], [10.0]]))


# -------------------------------------------------------------------------------------------------------- by hand


def plain_chain(env, policy, x, prompt_ids, start):
    """The sampler without noise, from step `start`, and d x_S / d mean of its last step alone."""
    mean = means_of(env, policy, prompt_ids)
    for k in range(start, env.num_steps):
        A, B, p, q = coefficients(env, k)
        x = A * x + B * (p * x + q * mean)
    return x, B * q


@pytest.mark.parametrize("schedule", ["flow", "epsilon"])
@pytest.mark.parametrize("normalise", [False, True])
def test_gradient_is_the_chain_rule_by_hand(schedule, normalise):
    env = exact_env(schedule, noise_level=0.0, num_frames=6)
    policy = full_policy(env)
    videos = grey_videos(env, 5)
    config = InstructVideoConfig(
        videos_per_update=4,
        segments=3,
        attenuation=0.7,
        normalise=normalise,
        offset_noise=0.3,
        seed=4,
        max_grad_norm=1e9,
    )
    algorithm = InstructVideo(env, policy, config, videos)
    assert algorithm.start_step == 2  # the last 60 % of 5 steps
    stream = env.state_dict()
    recorder = Recorder(algorithm)
    metrics = algorithm.update()

    env.load_state_dict(stream)
    seeds = env.reset()[0]["video_seed"]
    picked = order(5, 4, 0, 4)
    prompt_ids = torch.tensor([env.prompts.index(videos.prompts[i]) for i in picked])
    clean = ((videos.videos[picked] - 0.5) * 2 * PIXEL_RANGE).transpose(1, 2).double()
    generator = torch.Generator().manual_seed(4)
    eps, shared = (torch.randn(clean.shape, generator=generator).double() for _ in range(2))
    signal, level = levels(env, 2)
    x = signal * clean + level * (eps + 0.3 * shared[:, :, :, :1, :1])
    x, slope = plain_chain(env, policy, x, prompt_ids, 2)
    frames = choose_frames(seeds, 6, 3)
    weight = (-0.7 * (frames - 3).abs().double()).exp()
    weight = weight / weight.mean(1, keepdim=True) if normalise else weight
    seen = x.transpose(1, 2)[torch.arange(4)[:, None], frames]  # [B,n,3,H,W]
    score = -(seen - 1).square().mean((2, 3, 4))
    assert metrics["loss"] == pytest.approx(float((1 - (weight * score).mean(1)).mean()), rel=1e-6)
    assert metrics["attenuated_reward_mean"] == pytest.approx(float((weight * score).mean()), rel=1e-6)
    assert metrics["reward_mean"] == pytest.approx(float(score.mean()), rel=1e-9)
    each = 2 * slope * (seen - 1).sum((3, 4)) / seen[0, 0].numel()  # [B,n,3], d -score / d mean
    per_video = (weight[..., None] * each).mean(1) / 4
    expected = into_weight(per_video, prompt_ids, policy)
    torch.testing.assert_close(recorder.gradients[0][0], expected, rtol=1e-5, atol=1e-9)
    assert expected.abs().max() > 1e-4
    counters = env.mdp.counters
    assert counters.denoiser_forwards == 4 * 3 and counters.denoiser_backwards == 4
    assert counters.reward_queries == counters.reward_backward_queries == counters.videos_sampled == 4


def test_the_published_start_is_step_8_of_20_at_t_551():
    env = gaussian_env("epsilon", num_steps=20, noise_level=0.0)
    algorithm = own_videos_on(env, full_policy(env))
    assert algorithm.start_step == 8 and float(env.mdp.table.timesteps[8]) == 551
    config = InstructVideoConfig()
    assert (config.start_fraction, config.segments, config.attenuation, config.backprop_steps) == (0.6, 4, 1.0, 1)


@pytest.mark.parametrize("schedule", ["flow", "epsilon"])
def test_it_ends_where_the_edited_videos_meet_the_target(schedule):
    env = gaussian_env(schedule, noise_level=0.0, num_envs=32, num_frames=4)
    policy = full_policy(env)
    videos = grey_videos(env, 2, level=0.55)
    options = {"learning_rate": 0.05, "videos_per_update": 32, "segments": 4, "attenuation": 0.2}
    algorithm = InstructVideo(env, policy, InstructVideoConfig(**options), videos)
    history = [policy.trainable_parameters()[0].detach().clone() for _ in range(80) if algorithm.update()]
    given = 0.05 * 2 * PIXEL_RANGE
    of_video, of_mean = levels(env, 2)[0] * given, 0.0
    for k in range(2, env.num_steps):
        A, B, p, q = coefficients(env, k)
        of_video, of_mean = (A + B * p) * of_video, (A + B * p) * of_mean + B * q
    best = (1 - of_video) / of_mean
    found = torch.stack(history[-40:]).mean(0)
    assert torch.allclose(found, torch.full_like(found, best), atol=0.06), (found, best)


# ------------------------------------------------------------------------------------------------ what it starts from


def test_own_videos_are_the_untrained_models():
    env = gaussian_env(num_envs=8)
    algorithm = own_videos_on(env, full_policy(env), learning_rate=0.3, videos_per_update=8)
    stream = env.state_dict()
    with torch.no_grad():
        before, prompts = algorithm._own()
    queries = env.mdp.counters.reward_queries
    algorithm.update()
    env.load_state_dict(stream)
    with torch.no_grad():
        after, again = algorithm._own()
    assert torch.equal(before, after) and prompts == again
    assert queries == 0 and env.mdp.counters.reward_queries == 8


def test_given_videos_are_all_taken_before_any_comes_again_and_groups_share_one():
    env = gaussian_env(num_envs=16, group_size=4)
    algorithm = given_videos_on(env, full_policy(env), offset_noise=0.0)
    videos = algorithm.videos
    taken = []
    for _ in range(5):
        with torch.no_grad():
            latents, option = algorithm._given(videos)
        groups = latents.unflatten(0, (4, 4))
        assert torch.equal(groups, groups[:, :1].expand_as(groups))
        level = (groups[:, 0].mean((1, 2, 3, 4)) / (2 * PIXEL_RANGE) + 0.5).tolist()
        taken += [round((value - 0.4) / 0.05) for value in level]
        assert option["prompts"] == [videos.prompts[i] for i in taken[-4:]]
    assert [sorted(taken[i : i + 5]) for i in range(0, 20, 5)] == [[0, 1, 2, 3, 4]] * 4
    assert taken[:5] != taken[5:10] or taken[5:10] != taken[10:15]
    obs = algorithm._start()
    assert obs["step"].tolist() == [2] * 16
    within = obs["latents"].unflatten(0, (4, 4))
    assert not torch.equal(within[:, 0], within[:, 1])  # one video, different noise


@pytest.mark.parametrize("kind", ["flow", "unet"])
def test_a_network_learns(kind):
    env = tiny_env(kind, num_envs=2, guidance_scale=2.0)
    policy = env.make_policy(lora_rank=2)
    before = [p.detach().clone() for p in policy.trainable_parameters()]
    metrics = own_videos_on(env, policy, videos_per_update=4, backprop_steps=2).update()
    assert metrics["grad_norm"] > 0 and all(math.isfinite(value) for value in metrics.values())
    assert any(not torch.equal(a, b) for a, b in zip(before, policy.trainable_parameters(), strict=True))
    assert env.mdp.counters.denoiser_backwards == 4 * 2 * 2  # two videos in two batches, two steps, two branches


# --------------------------------------------------------------------------------------------------------- refusals


def test_what_it_refuses():
    def blind(video, prompts):
        return video.mean((1, 2, 3, 4)).detach()

    blind.differentiable = False
    env = gaussian_env(reward=blind)
    with pytest.raises(ValueError, match="InstructVideo needs gradients.*differentiable=False"):
        own_videos_on(env, full_policy(env))
    blind.differentiable = True
    env = gaussian_env(reward=blind)
    with pytest.raises(ValueError, match="no graph"):
        own_videos_on(env, full_policy(env)).update()
    env = gaussian_env()
    for options, message in (
        ({"start_fraction": 0.05}, "start_fraction=0.05 of 5 denoising steps is less than one step.*at least 0.2"),
        ({"backprop_steps": 4}, "backprop_steps is 4, but only the last 3 of 5"),
        ({"segments": 3}, "segments is 3, but the videos have 2 frames"),
        ({"videos_per_update": 24}, "videos_per_update is 24.*num_envs=16"),
    ):
        with pytest.raises(ValueError, match=message):
            own_videos_on(env, full_policy(env), **options)

    def motion(video, prompts):
        if video.shape[1] < 2:
            raise ValueError(f"reward 'motion' looks at 2 frames, got {video.shape[1]}")
        return (video[:, 1] - video[:, 0]).abs().mean((1, 2, 3))

    moving = gaussian_env(reward=motion)
    with pytest.raises(ValueError, match=r"scores single frames, and the reward 'motion' cannot \(.*2 frames.*VADER"):
        own_videos_on(moving, full_policy(moving))
    assert moving.mdp.counters.reward_queries == 0
    env.mdp.on_images = True
    with pytest.raises(ValueError, match="animates images.*leave videos out"):
        given_videos_on(env, full_policy(env))
    env.mdp.on_images, env.mdp.clips = False, 3
    with pytest.raises(ValueError, match="InstructVideo learns from one clip, but.* makes 3"):
        own_videos_on(env, full_policy(env))
    env = gaussian_env()
    larger = grey_videos(gaussian_env(num_frames=3), 2)
    with pytest.raises(ValueError, match=r"\(3, 3, 2, 2\) .*the env's \(2, 3, 2, 2\).*from_folder"):
        InstructVideo(env, full_policy(env), InstructVideoConfig(videos_per_update=16, segments=2), larger)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start_fraction": 1.2}, "start_fraction is 1.2, expected at most 1"),
        ({"start_fraction": 0}, "start_fraction is 0"),
        ({"selection": "last"}, "selection is 'last', expected one of tsn, first"),
        ({"attenuation": -1}, "attenuation is -1"),
        ({"segments": 0}, "segments is 0"),
    ],
)
def test_configs_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        InstructVideoConfig(**options)


def test_presets():
    assert InstructVideoConfig.preset("MovingShapes").videos_per_update == 64
    with pytest.raises(ValueError, match="only for MovingShapes"):
        InstructVideoConfig.preset("Sora")
