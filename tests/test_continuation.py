"""Long videos, clip after clip: the transition, what each clip starts from, gradients, and what is refused."""

from __future__ import annotations

import pytest
import torch

from tests.models import brightness, tiny_env
from tests.svd import svd_env, tiny_svd
from vdm_env import check_env_spec, make, noise, transition
from vdm_env.continuation import ContinuationVectorEnv
from vdm_env.rewards import select_frames
from vdm_env.single import DenoisingEnv

CLIPS, STEPS, FRAMES = 3, 2, 4
CONDITION = ("image", "image_latents", "time_ids", "clip")


@pytest.fixture(scope="module")
def model():
    return tiny_svd()


def long_env(model, keep_graph=False, clips=CLIPS, **options):
    return ContinuationVectorEnv(svd_env(model, num_steps=STEPS, **options), clips, keep_graph=keep_graph)


def run(env, act, seed=0, steps=None):
    """Observations of an episode from its start, and the last reward and info."""
    obs, _ = env.reset(seed=seed)
    seen, reward, info = [obs], None, {}
    for _ in range(env.num_steps if steps is None else steps):
        obs, reward, *_, info = env.step(act(obs))
        seen.append(obs)
    return seen, reward, info


@pytest.fixture(scope="module")
def episode(model):
    """An ordinary rollout without gradients."""
    env = long_env(model)
    policy = env.make_policy(lora_rank=2)
    with torch.no_grad():
        seen, reward, info = run(env, policy)
    return env, policy, seen, reward, info


@pytest.mark.parametrize("keep_graph", [False, True])
def test_the_contract_of_environments_holds(model, keep_graph):
    check_env_spec(long_env(model, keep_graph, clips=2))


def test_steps_times_and_clips(episode):
    env, _, seen, reward, info = episode
    single = env.single.mdp.table
    assert env.num_steps == CLIPS * STEPS and env.mdp.latent_shape == (4, CLIPS * FRAMES, 8, 8)
    assert [obs["step"].tolist() for obs in seen] == [[k, k] for k in range(7)]
    assert [obs["clip"].tolist() for obs in seen] == [[c, c] for c in (0, 0, 1, 1, 2, 2, 2)]
    for k, obs in enumerate(seen[:-1]):
        assert obs["timestep"][0].item() == pytest.approx(single.timesteps[k % STEPS].item())
        assert obs["action_std"][0].item() == pytest.approx(single.action_std[k % STEPS].item())
        assert obs["stochastic"].tolist() == [k % STEPS == 0] * 2  # the last step of a clip has no noise
    assert info["video"].shape == (2, CLIPS * FRAMES, 3, 64, 64)
    torch.testing.assert_close(reward, brightness(info["video"], []))


def test_only_the_clip_in_the_making_moves(episode):
    env, _, seen, *_ = episode
    for k in range(6):
        before, after = seen[k]["latents"], seen[k + 1]["latents"]
        clips = [slice(c * FRAMES, (c + 1) * FRAMES) for c in range(CLIPS)]
        for c, frames in enumerate(clips):
            assert torch.equal(before[:, :, frames], after[:, :, frames]) == (c != k // STEPS)
    whole = seen[-1]["latents"]
    with torch.no_grad():
        parts = [env.single.mdp.decode(whole[:, :, c * FRAMES : (c + 1) * FRAMES]) for c in range(CLIPS)]
        chosen = env.mdp.decode(whole, torch.tensor([[11, 1], [8, 2]]))
    joined = torch.cat(parts, dim=1)
    torch.testing.assert_close(env.mdp.decode(whole).detach(), joined)
    torch.testing.assert_close(chosen, torch.stack([joined[0, [11, 1]], joined[1, [8, 2]]]))


def test_a_clip_starts_from_the_last_frame_before(episode, model):
    env, _, seen, *_ = episode
    for clip in (1, 2):
        obs = seen[clip * STEPS]
        before = obs["latents"][:, :, (clip - 1) * FRAMES : clip * FRAMES]
        with torch.no_grad():
            frame = model.decode(before)[:, -1]
            drawn = noise.normal(obs["video_seed"], noise.of_clip(noise.CONDITIONING, clip), (3, 64, 64))
            expected = model.encode_images(list(frame), drawn)
        for name, value in expected.items():
            torch.testing.assert_close(obs[name], value, rtol=1e-4, atol=1e-4)
            assert torch.equal(obs[name], seen[clip * STEPS + 1][name])
        assert not torch.equal(obs["image_latents"], seen[0]["image_latents"])
    first = env.single.mdp.condition(seen[0]["prompt_id"], seen[0]["video_seed"])
    assert all(torch.equal(seen[0][name], first[name]) for name in first)


def test_noise_of_every_clip_is_its_own(episode):
    env, policy, seen, *_ = episode
    start = seen[0]["latents"].chunk(CLIPS, dim=2)
    single, _ = env.single.reset(seed=0)
    assert torch.equal(start[0], single["latents"])
    assert not any(torch.equal(start[a], start[b]) for a, b in ((0, 1), (0, 2), (1, 2)))
    with torch.no_grad():
        explored = [policy(seen[k]) - policy.mean(seen[k]) for k in (0, 2, 4)]
    parts = [e.chunk(CLIPS, dim=2) for e in explored]
    for c, part in enumerate(parts):
        assert [bool(p.abs().max() > 0) for p in part] == [c == other for other in range(CLIPS)]
    assert not torch.allclose(parts[0][0], parts[1][1]) and not torch.allclose(parts[1][1], parts[2][2])
    other, _ = env.reset(seed=1)
    assert not torch.equal(other["latents"], seen[0]["latents"])


def test_the_first_clip_is_the_single_video(model):
    """With a deterministic sampler, where exploration draws nothing."""
    long = long_env(model, sampler="euler", num_envs=1)
    with torch.no_grad():
        seen, *_ = run(long, long.make_policy(lora_rank=2), steps=STEPS)
        alone, *_ = run(long.single, long.single.make_policy(lora_rank=2))
    torch.testing.assert_close(seen[-1]["latents"][:, :, :FRAMES], alone[-1]["latents"], rtol=1e-4, atol=1e-4)


def test_probabilities_are_of_the_clip_in_the_making(episode, model):
    env, policy, seen, *_ = episode
    obs = seen[2]  # clip 1, with noise
    frames = slice(FRAMES, 2 * FRAMES)
    with torch.no_grad():
        dist, action = policy.dist(obs), policy(obs)
        with policy.reference():
            reference = policy.dist(obs)
        reference.loc = reference.loc + 0.1  # as if the policy had moved
        log_prob, nats = dist.log_prob(action), dist.log_prob_sum(action)
        kl, kl_mean = dist.kl(reference), dist.kl(reference, reduction="mean")
    std = obs["action_std"][0]
    z = (action - dist.mean)[:, :, frames] / std
    expected = (-0.5 * z.square() - std.log() - 0.5 * torch.log(torch.tensor(2 * torch.pi))).flatten(1)
    torch.testing.assert_close(log_prob, expected.mean(1))
    torch.testing.assert_close(nats, expected.double().sum(1))
    count = 4 * FRAMES * 64
    torch.testing.assert_close(kl_mean, torch.full((2,), 0.5 * (0.1 / std.item()) ** 2), rtol=1e-3, atol=0)
    torch.testing.assert_close(kl, kl_mean.double() * count, rtol=1e-4, atol=0)
    assert policy.dist(seen[3]).log_prob(action).tolist() == [0, 0]
    # The policy's mean is the model's own output on that clip, and nothing elsewhere.
    with torch.no_grad():
        condition = {name: obs[name] for name in CONDITION[:3]}
        x = env.mdp.schedule.input_scale(obs["timestep"]).view(-1, 1, 1, 1, 1) * obs["latents"][:, :, frames]
        c = model.predict(x, obs["timestep"], condition)
        u = model.predict(x, obs["timestep"], model.unconditional(condition))
    weight = torch.linspace(1, 3, FRAMES).view(-1, 1, 1)
    torch.testing.assert_close(dist.mean[:, :, frames], u + weight * (c - u), rtol=1e-4, atol=1e-4)
    assert not dist.mean[:, :, :FRAMES].any() and not dist.mean[:, :, 2 * FRAMES :].any()


def test_an_observation_without_its_condition_still_says_all(episode):
    env, policy, seen, *_ = episode
    for k in (0, 3, 5):
        bare = {name: value for name, value in seen[k].items() if name not in CONDITION}
        found = env.mdp.condition_of(bare)
        for name in CONDITION:
            torch.testing.assert_close(found[name], seen[k][name], rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            torch.testing.assert_close(policy.mean(bare), policy.mean(seen[k]), rtol=1e-3, atol=1e-3)
    env.set_state(bare)
    with torch.no_grad():
        after, reward, terminated, *_ = env.step(policy(seen[5]))
    assert bool(terminated.all()) and torch.equal(after["latents"], seen[6]["latents"])


def test_envs_may_stand_in_different_clips(model):
    env = long_env(model, clips=2)
    policy = env.make_policy(lora_rank=2)
    with torch.no_grad():
        _, _, _ = run(env, policy, seed=3, steps=STEPS)
        mixed, _ = env.reset(seed=4, options={"reset_mask": torch.tensor([True, False])})
        assert mixed["clip"].tolist() == [0, 1] and mixed["step"].tolist() == [0, STEPS]
        together = policy.mean(mixed)
        alone = torch.cat([policy.mean({n: v[i : i + 1] for n, v in mixed.items()}) for i in range(2)])
        torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-3)
        after, *_ = env.step(together)
    assert after["clip"].tolist() == [0, 1]
    kept = {name: mixed[name][1] for name in CONDITION}
    assert all(torch.equal(after[name][1], value) for name, value in kept.items())
    # Starting in the middle, with latents of one's own: the second clip follows from them, not from an older one.
    start = torch.randn(2, *env.mdp.latent_shape, generator=torch.Generator().manual_seed(0))
    for latents in (start, start.flip(0)):
        obs, _ = env.reset(seed=[7, 8], options={"latents": latents, "step": STEPS, "prompt_ids": [0, 1]})
        expected = env.mdp.work_out({n: v for n, v in obs.items() if n not in CONDITION})
        assert torch.equal(obs["image_latents"], expected["image_latents"])


@pytest.mark.parametrize("keep_graph", [False, True])
def test_gradients_reach_earlier_clips_on_request(model, keep_graph):
    """Through the condition of the next clip; the reward of the joined video always reaches every clip."""
    env = long_env(model, keep_graph, clips=2, num_envs=1)
    policy = env.make_policy(lora_rank=2)
    obs, _ = env.reset(seed=0)
    actions = []
    reward = torch.zeros(1)
    for _ in range(env.num_steps):
        with torch.set_grad_enabled(len(actions) >= STEPS):  # the first clip's own network calls apart
            action = policy(obs)
        if len(actions) < STEPS:
            action = action.detach().requires_grad_()
        actions.append(action)
        obs, reward, *_ = env.step(action)
    assert obs["image_latents"].requires_grad == obs["image"].requires_grad == keep_graph
    frames = env.mdp.decode(obs["latents"])[:, FRAMES:]
    (through,) = torch.autograd.grad(frames.mean(), actions[0], retain_graph=True, allow_unused=True)
    # Without the graph the second clip does not depend on the first's actions.
    assert (through is not None and bool(through[:, :, :FRAMES].any())) == keep_graph
    (direct,) = torch.autograd.grad(reward.sum(), actions[0], retain_graph=True)
    assert bool(direct[:, :, :FRAMES].any()) and not bool(direct[:, :, FRAMES:].any())
    reward.sum().backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in policy.trainable_parameters())


def test_all_weights_can_be_trained(model):
    env = long_env(model, clips=2, num_envs=1)
    policy = env.make_policy(lora_rank=0)
    obs, _ = env.reset(seed=0)
    with torch.no_grad():
        before = policy.mean(obs)
        for parameter in policy.trainable_parameters():
            parameter.mul_(1.05)
        after = policy.mean(obs)
        with policy.reference():
            assert torch.equal(policy.mean(obs), before)
    assert not torch.allclose(before, after)


def test_noise_levels_and_derived_environments(model):
    env = long_env(model, clips=2)
    env.reset(seed=0, options={"noise_levels": [0.0, 0.0, 1.0, 0.0]})
    assert env.mdp.table.stochastic.tolist() == [False, False, True, False]
    other = env.derive(num_steps=3, num_envs=4, group_size=2, noise_level=[0.5, 1.0, 1.0])
    assert other.num_steps == 6 and other.num_envs == 4 and other.clips == 2
    single = other.single.mdp.table
    assert torch.equal(other.mdp.table.sigma, torch.cat([single.sigma, single.sigma]))
    obs, _ = other.reset(seed=0)
    assert obs["latents"].shape == (4, 4, 8, 8, 8)
    assert len(env.render()) == 2
    alone = DenoisingEnv(env)
    flat, _ = alone.reset(seed=0)
    assert flat["latents"].shape == (4, 8, 8, 8) and alone.observation_space.contains(flat)


def test_the_clean_estimate_is_of_the_clip_in_the_making(episode):
    env, _, seen, *_ = episode
    x, step = seen[2]["latents"], seen[2]["step"]
    a = torch.ones_like(x)
    estimate = env.mdp.x0(x, a, step)
    expected = transition.predict_x0(env.mdp.table, x, a, step)
    middle = slice(FRAMES, 2 * FRAMES)
    assert torch.equal(estimate[:, :, middle], expected[:, :, middle])
    assert torch.equal(estimate[:, :, :FRAMES], x[:, :, :FRAMES])


@pytest.mark.filterwarnings("ignore:.*random weights")
@pytest.mark.parametrize("keep_graph", [False, True])
def test_vjepa_rewards_the_joined_video(keep_graph):
    """What VADER does with its image-to-video model: three clips, scored as one by V-JEPA, gradient into the policy."""
    single = make("SVD-VJEPA", weights="random", scale="tiny", num_steps=STEPS)
    env = ContinuationVectorEnv(single, CLIPS, keep_graph=keep_graph)
    policy = env.make_policy(lora_rank=2)
    seen, reward, info = run(env, policy)
    assert len(seen) == CLIPS * STEPS + 1 and torch.isfinite(reward).all()
    # The network takes as many frames as one clip has: evenly spread ones of all clips are what it sees.
    chosen = select_frames(single.config.reward.frames, CLIPS * FRAMES)
    assert len({int(frame) // FRAMES for frame in chosen}) == CLIPS and info["video"].shape[1] == len(chosen)
    with torch.no_grad():
        whole = env.mdp.decode(seen[-1]["latents"])
        torch.testing.assert_close(info["video"], whole[:, chosen], rtol=0, atol=1e-5)
        torch.testing.assert_close(reward, single.config.reward(whole[:, chosen], [""]), rtol=1e-4, atol=1e-5)
    reward.sum().backward()
    gradients = [p.grad for p in policy.trainable_parameters() if p.grad is not None]
    assert any(bool(g.any()) for g in gradients) and all(bool(torch.isfinite(g).all()) for g in gradients)


@pytest.mark.parametrize(
    ("policy", "seen"),
    [
        ("all", range(12)),
        ("alternate", range(0, 12, 2)),
        ("first", [0]),
        ("last", [11]),
        ("middle3", [2, 6, 10]),
        (2, [3, 9]),
        ([5, -1], [5, 11]),
        ("random2", None),
        ("tsn3", None),
    ],
)
def test_every_choice_of_frames_is_of_the_joined_video(episode, policy, seen):
    env, actor, *_ = episode
    chosen = env.derive(decode_frames=policy)
    with torch.no_grad():
        states, reward, info = run(chosen, actor)
        whole = chosen.mdp.decode(states[-1]["latents"])
    frames = chosen.mdp.frames_of(states[-1]["video_seed"])
    if frames is None:
        frames = torch.arange(CLIPS * FRAMES).expand(2, -1)
    if seen is not None:
        assert frames.tolist() == [list(seen)] * 2
    else:
        assert frames.max() < CLIPS * FRAMES and frames.shape[1] == int(policy[-1])
        assert policy != "tsn3" or (frames // FRAMES).tolist() == [[0, 1, 2]] * 2, "one frame of each third"
    expected = torch.stack([whole[row, frames[row]] for row in range(2)])
    torch.testing.assert_close(info["video"], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(reward, brightness(info["video"], []))


def test_what_cannot_be_is_refused(model, episode):
    env, policy, seen, *_ = episode
    with pytest.raises(ValueError, match="model animates an image"):
        ContinuationVectorEnv(tiny_env())
    with pytest.raises(ValueError, match="cannot be continued"):
        ContinuationVectorEnv(env)
    for clips in (0, 1.5, True):
        with pytest.raises(ValueError, match="clips="):
            ContinuationVectorEnv(env.single, clips)
    with pytest.raises(ValueError, match=r"use the environment of one clip, env\.single"):
        policy.predict(seen[0]["latents"], seen[0]["timestep"], [0, 1])
    with pytest.raises(ValueError, match=r"env\.single\.to_torchrl"):
        env.to_torchrl()
    with pytest.raises(ValueError, match="not a multiple of the 3 clips"):
        env.model.latent_shape(10, 64, 64)
