"""The algorithms on Gaussian data, where gradients and optima are known in closed form."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn

import vdm_env
from algos.checkpoint import load_checkpoint, save_checkpoint
from algos.ddpo import DDPO, DDPOConfig
from algos.rollout import collect
from algos.vader import VADER, VADERConfig
from vdm_env import noise
from vdm_env.schedule import VPSchedule
from vdm_env.worlds.gaussian import (
    FLOW_SCHEDULE,
    PIXEL_RANGE,
    VP_SCHEDULE,
    TargetReward,
    final_law,
    gaussian_model,
    optimal_means,
    to_latents,
)

SCHEDULES = {
    "flow": FLOW_SCHEDULE,
    "epsilon": VP_SCHEDULE,
    "v": VPSchedule(alphas_cumprod=VP_SCHEDULE.alphas_cumprod, prediction="v"),
    "x0": VPSchedule(alphas_cumprod=VP_SCHEDULE.alphas_cumprod, prediction="x0"),
}
START = torch.tensor([[0.0, 0.5, -0.5], [1.0, 0.0, 2.0]])


def gaussian_env(schedule="epsilon", *, means=START, reward=None, dtype=torch.float32, **options):
    model = gaussian_model(means.to(dtype), schedule=SCHEDULES[schedule])
    options = {"num_envs": 16, "group_size": 4, **options}
    return vdm_env.make(
        model=model, reward=reward or TargetReward(1.0), prompts=list(model.prompts), dtype=dtype, **options
    )


def full_policy(env):
    return env.make_policy(lora_rank=0)


class Recorder:
    """In an optimiser's place: keeps the gradients and leaves the parameters alone."""

    def __init__(self, algorithm):
        self.parameters, self.gradients = algorithm.parameters, []
        algorithm.optimizer = self

    def step(self):
        self.gradients.append([p.grad.clone() for p in self.parameters])

    def zero_grad(self, set_to_none=True):
        for parameter in self.parameters:
            parameter.grad = None


# --------------------------------------------------------------------------------------------- the test bed itself


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_denoiser_is_the_best_one(schedule):
    """No affine function of x_t predicts the training target better: it is the regression of target on x_t."""
    generator = torch.Generator().manual_seed(0)
    model = gaussian_model(torch.full((1, 3), 0.7, dtype=torch.float64), schedule=SCHEDULES[schedule])
    for t in (100.0, 500.0, 900.0):
        x0, eps = torch.randn(2, 1, 3, 1, 1, 400_000, generator=generator, dtype=torch.float64)
        x0, t = 0.7 + model.std * x0, torch.tensor([t])
        x_t, target = model.schedule.add_noise(x0, eps, t), model.schedule.target(x0, eps, t)
        found = model.predict(x_t, t, model.encode_prompts(["prompt 0"]))
        residual = target - found
        assert abs(float(residual.mean())) < 5e-3
        assert abs(float((residual * (x_t - x_t.mean())).mean())) < 5e-3
        assert float(residual.var()) < float(target.var())


@pytest.mark.parametrize(("schedule", "level"), [("flow", 0.7), ("flow", 0.3), ("epsilon", 1.0), ("epsilon", 0.0), ("v", 0.5)])
def test_the_final_law_is_that_of_sampled_videos(schedule, level):
    env = gaussian_env(schedule, num_envs=512, group_size=256, noise_level=level, means=START * 2)
    env.reset(seed=1, options={"prompt_ids": [0, 1]})
    obs = env._observation()
    for _ in range(env.num_steps):
        obs, *_ = env.step(full_policy(env)(obs))
    law = final_law(env.model, env.mdp.table)
    error = obs["latents"] - law.gain * 2 * START[obs["prompt_id"]][:, :, None, None, None]
    assert abs(float(error.mean())) < 4 * law.std / math.sqrt(error.numel())
    assert float(error.std()) == pytest.approx(law.std, rel=0.03)


def test_pixels_are_latents_in_other_units():
    model = gaussian_model(START)
    latents = torch.randn(2, *model.latent_shape(2, 2, 2), generator=torch.Generator().manual_seed(0))
    video = model.decode(latents)
    assert torch.allclose(model.encode(video), latents, atol=1e-5)
    assert torch.allclose(to_latents(video), latents.transpose(1, 2), atol=1e-5)
    assert torch.equal(model.decode(latents, torch.tensor([[1], [0]]))[:, 0], video[[0, 1], [1, 0]])


# --------------------------------------------------------------------------------------------- optima


VADER_CASES = {
    "one step": {"backprop_steps": 1},
    "three steps": {"backprop_steps": 3, "loss": "one_minus"},
    "whole chain": {"backprop_steps": 5, "loss": "target_l1", "loss_target": 0.0, "loss_scale": 1.0},
    "random cut": {"truncation": "random"},
    "from step 2": {"truncation": "step", "cutoff_step": 2},
}


@pytest.mark.parametrize("level", [0.0, 1.0])
@pytest.mark.parametrize("case", VADER_CASES)
def test_vader_finds_the_optimum(case, level):
    env = gaussian_env(noise_level=level, num_envs=32)
    policy = full_policy(env)
    options = {"loss": "negative", "learning_rate": 0.05, "weight_decay": 0.0, "videos_per_update": 32, **VADER_CASES[case]}
    vader = VADER(env, policy, VADERConfig(**options))
    history = [policy.trainable_parameters()[0].detach().clone() for _ in range(80) if vader.update()]
    best = optimal_means(final_law(env.model, env.mdp.table), 1.0)
    found = torch.stack(history[-20:]).mean(0)
    assert torch.allclose(found.double(), best[:, None].expand_as(found), atol=0.06), found
    assert (START.T - best[:, None]).abs().max() > 1


@pytest.mark.parametrize(("schedule", "advantage"), [("flow", "group"), ("epsilon", "per_prompt"), ("v", "batch")])
def test_ddpo_finds_the_optimum(schedule, advantage):
    env = gaussian_env(schedule, num_envs=64, group_size=8)
    policy = full_policy(env)
    config = DDPOConfig(
        videos_per_rollout=64, updates_per_rollout=1, learning_rate=0.05, weight_decay=0.0, advantage=advantage
    )
    ddpo = DDPO(env, policy, config)
    history = [policy.trainable_parameters()[0].detach().clone() for _ in range(80) if ddpo.update()]
    best = optimal_means(final_law(env.model, env.mdp.table), 1.0)
    found = torch.stack(history[-30:]).mean(0)
    assert torch.allclose(found.double(), best[:, None].expand_as(found), atol=0.15), found


def test_ddpo_penalty_brings_the_policy_back_to_the_reference():
    """With equal rewards every advantage is 0 and only the KL is left; its minimum is the untrained model."""
    env = gaussian_env(reward=lambda video, prompts: torch.ones(len(video)))
    policy = full_policy(env)
    (weight,) = policy.trainable_parameters()
    with torch.no_grad():
        weight += 0.3
    config = DDPOConfig(
        videos_per_rollout=16,
        updates_per_rollout=1,
        learning_rate=0.02,
        weight_decay=0.0,
        kl_coefficient=1.0,
        advantage="batch",
    )
    ddpo = DDPO(env, policy, config)
    for _ in range(80):
        ddpo.update()
    assert torch.allclose(weight.detach(), START.T, atol=0.02)


# --------------------------------------------------------------------------------------------- gradients


def linear(video, prompts):
    return video.mean((1, 2, 3, 4))


def linear_law(law, mean, elements):
    """d E[R] / d mean per channel, and the standard deviation of R, for `linear`."""
    slope = law.gain / (2 * PIXEL_RANGE) / 3
    return torch.full((3,), slope, dtype=torch.float64), law.std / (2 * PIXEL_RANGE) / math.sqrt(elements)


def quadratic_law(law, mean, elements):
    """The same for TargetReward(1): R = -mean (x - 1)^2 with x ~ N(gain mean, std^2)."""
    distance = law.gain * mean - 1.0
    spread = (2 * law.std**4 + 4 * law.std**2 * distance.square()).sum() * (elements / 3)
    return -2 * law.gain * distance / 3, float(spread.sqrt()) / elements


@pytest.mark.parametrize(
    ("schedule", "reward", "exact"),
    [("epsilon", linear, linear_law), ("flow", linear, linear_law), ("epsilon", TargetReward(1.0), quadratic_law)],
)
def test_ddpo_gradient_is_that_of_the_expected_reward(schedule, reward, exact):
    """At ratio 1: grad L = -grad E[R] / (std(R) D S), with D elements (mean log-prob) and S steps (mean loss)."""
    mean = torch.tensor([[0.2, -0.3, 0.6]], dtype=torch.float64)
    env = gaussian_env(schedule, means=mean, reward=reward, dtype=torch.float64, num_envs=512, group_size=1)
    config = DDPOConfig(videos_per_rollout=1024, updates_per_rollout=1, advantage="batch", adv_clip_max=1e9, max_grad_norm=1e9)
    ddpo = DDPO(env, full_policy(env), config)
    recorder = Recorder(ddpo)
    for _ in range(8):
        ddpo.update()
    gradients = torch.stack([g.squeeze(1) for (g,) in recorder.gradients])
    elements = math.prod(env.mdp.latent_shape)
    slope, spread = exact(final_law(env.model, env.mdp.table), mean[0], elements)
    expected = -slope / spread / elements / len(ddpo.steps)
    error = gradients.std(0) / math.sqrt(len(gradients))
    assert (error < 0.2 * expected.abs().max()).all(), "too few samples for the test to mean anything"
    assert ((gradients.mean(0) - expected).abs() < 4 * error).all(), (gradients.mean(0), expected, error)


class TinyNetwork(nn.Module):
    """Not affine, so that the gradient through the network's input counts."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer, self.text = nn.Conv3d(3, 6, 3, padding=1), nn.Conv3d(6, 3, 1), nn.Linear(2, 6)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))

    def forward(self, x, t, prompt):
        hidden = self.inner(x) + self.text(prompt)[:, :, None, None, None] + (t / 1000)[:, None, None, None, None]
        return self.outer(hidden.tanh())


def tiny_env(**options):
    model = dataclasses.replace(gaussian_model(START), denoiser=TinyNetwork().requires_grad_(False))
    model = dataclasses.replace(model, schedule=VP_SCHEDULE, spec=dataclasses.replace(model.spec, sampler="ddim", noise_level=1.0))
    options = {"num_envs": 4, "group_size": 1, **options}
    return vdm_env.make(model=model, reward=TargetReward(1.0), prompts=list(model.prompts), **options)


@pytest.mark.parametrize("steps", [1, 3, 5])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_vader_gradient_is_bit_for_bit_that_of_a_loop_written_by_hand(steps, eta):
    env = tiny_env(noise_level=eta)
    policy = full_policy(env)
    vader = VADER(env, policy, VADERConfig(backprop_steps=steps, videos_per_update=4, loss="negative", max_grad_norm=1e9))
    stream = env.state_dict()
    recorder = Recorder(vader)
    metrics = vader.update()

    env.load_state_dict(stream)
    obs, _ = env.reset()
    table, network = env.mdp.table, policy._model.denoiser
    seeds, prompt = obs["video_seed"], torch.eye(2)[obs["prompt_id"]]
    shape = env.mdp.latent_shape
    x = noise.normal(seeds, noise.INITIAL, shape)
    for k in range(5):
        with torch.set_grad_enabled(k >= 5 - steps):
            a = network(x, table.timesteps[k].float().expand(4), prompt)
            a = a + table.action_std[k].float() * noise.normal(seeds, k, shape)
            x = table.A[k].float() * x + table.B[k].float() * a
    loss = -env.mdp.reward(env.model.decode(x), [""] * 4).mean()
    gradients = torch.autograd.grad(loss, vader.parameters)

    assert metrics["loss"] == float(loss)
    assert metrics["backprop_steps"] == steps
    assert all(torch.equal(a, b) for a, b in zip(recorder.gradients[0], gradients, strict=True))
    assert all(float(g.abs().max()) > 0 for g in gradients)


def test_vader_accumulates_the_mean_over_batches():
    def gradient(num_envs):
        env = tiny_env(num_envs=num_envs)
        vader = VADER(env, full_policy(env), VADERConfig(backprop_steps=2, videos_per_update=8, max_grad_norm=1e9))
        recorder = Recorder(vader)
        vader.update()
        return torch.cat([g.flatten() for g in recorder.gradients[0]])

    assert torch.allclose(gradient(2), gradient(8), rtol=1e-4, atol=1e-6)


def test_ddpo_gradient_does_not_depend_on_how_the_batch_is_cut():
    def gradient(num_envs, micro_batch):
        env = tiny_env(num_envs=num_envs)
        config = DDPOConfig(
            videos_per_rollout=8, updates_per_rollout=1, micro_batch=micro_batch, advantage="batch", max_grad_norm=1e9
        )
        ddpo = DDPO(env, full_policy(env), config)
        recorder = Recorder(ddpo)
        ddpo.update()
        return torch.cat([g.flatten() for g in recorder.gradients[0]])

    whole = gradient(8, None)
    assert float(whole.abs().max()) > 1e-3
    for cut in ((8, 3), (4, None), (2, 1)):
        assert torch.allclose(gradient(*cut), whole, rtol=1e-3, atol=1e-6)


# --------------------------------------------------------------------------------------------- what must hold for any algorithm


def ddpo_on(env, policy, **options):
    options = {"videos_per_rollout": 32, "updates_per_rollout": 2, "learning_rate": 0.01, "tracker_min_count": 4, **options}
    return DDPO(env, policy, DDPOConfig(**options))


def vader_on(env, policy, **options):
    options = {"videos_per_update": 32, "learning_rate": 0.01, "truncation": "random", "loss": "negative", **options}
    return VADER(env, policy, VADERConfig(**options))


ALGORITHMS = {"ddpo": ddpo_on, "vader": vader_on}
each_algorithm = pytest.mark.parametrize("build", ALGORITHMS.values(), ids=ALGORITHMS)


@each_algorithm
@pytest.mark.parametrize("rank", [0, 2])
def test_only_trainable_parameters_get_gradients_and_the_reference_stays(build, rank):
    env = gaussian_env()
    policy = env.make_policy(lora_rank=rank)
    obs, _ = env.reset(seed=3)
    with torch.no_grad(), policy.reference():
        before = policy.mean(obs)
    original = {name: p.detach().clone() for name, p in env.model.denoiser.named_parameters() if "policy_" not in name}
    algorithm = build(env, policy)
    trainable = {id(p) for p in policy.trainable_parameters()}
    assert {id(p) for p in algorithm.parameters} == trainable
    touched = []
    for parameter in [*env.model.denoiser.parameters(), *policy._model.denoiser.parameters()]:
        if id(parameter) not in trainable:
            assert not parameter.requires_grad
        elif parameter.requires_grad:
            parameter.register_hook(lambda g, key=id(parameter): touched.append(key))
    for _ in range(2):
        algorithm.update()
    assert set(touched) == trainable
    with torch.no_grad(), policy.reference():
        assert torch.equal(policy.mean(obs), before)
    with torch.no_grad():
        assert not torch.equal(policy.mean(obs), before)
    for name, parameter in env.model.denoiser.named_parameters():
        if "policy_" not in name:
            assert torch.equal(parameter, original[name]), name


@each_algorithm
def test_the_same_seed_gives_the_same_run_and_another_one_another(build):
    def run(seed):
        env = gaussian_env()
        algorithm = build(env, full_policy(env), seed=seed)
        return [algorithm.update() for _ in range(3)]

    first = run(0)
    assert first == run(0)
    assert [row["reward_mean"] for row in first] != [row["reward_mean"] for row in run(1)]


@each_algorithm
def test_a_run_continues_bit_for_bit_from_a_checkpoint(build, tmp_path):
    env = gaussian_env()
    policy = env.make_policy(lora_rank=2)
    algorithm = build(env, policy)
    for _ in range(2):
        algorithm.update()
    save_checkpoint(tmp_path / "checkpoint", {"algorithm": algorithm.state_dict()}, policy)
    expected = [algorithm.update() for _ in range(3)]

    env = gaussian_env()
    restored_policy = env.make_policy(lora_rank=2, seed=5)
    restored = build(env, restored_policy, seed=99)
    restored_policy.load(tmp_path / "checkpoint" / "policy")
    restored.load_state_dict(load_checkpoint(tmp_path / "checkpoint")["algorithm"])
    assert [restored.update() for _ in range(3)] == expected
    for a, b in zip(policy.trainable_parameters(), restored_policy.trainable_parameters(), strict=True):
        assert torch.equal(a, b)


@each_algorithm
def test_metrics_are_plain_finite_numbers_and_the_costs_are_counted(build):
    env = gaussian_env()
    algorithm = build(env, full_policy(env))
    metrics = algorithm.update()
    assert all(type(value) is float and math.isfinite(value) for value in metrics.values())
    assert {"reward_mean", "reward_std", "zero_std_fraction", "loss", "grad_norm", "learning_rate"} <= set(metrics)
    counters = env.mdp.counters
    assert counters.videos_sampled == counters.reward_queries == 32
    if build is ddpo_on:
        assert counters.denoiser_forwards == 2 * 32 * 5 and counters.denoiser_backwards == 32 * 5
        assert counters.reward_backward_queries == 0
    else:
        assert counters.denoiser_forwards == 32 * 5 and counters.reward_backward_queries == 32


@each_algorithm
def test_a_gradient_that_is_not_finite_changes_nothing(build):
    env = gaussian_env()
    policy = full_policy(env)
    algorithm = build(env, policy)
    (weight,) = policy.trainable_parameters()
    before = weight.detach().clone()
    handle = weight.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(FloatingPointError, match="Lower the learning rate"):
        algorithm.update()
    handle.remove()
    assert torch.equal(weight, before)
    algorithm.update()
    assert torch.isfinite(weight).all()


# --------------------------------------------------------------------------------------------- DDPO's own


@pytest.mark.parametrize("schedule", ["flow", "epsilon"])
def test_the_ratio_is_exactly_one_before_the_first_update(schedule):
    env = gaussian_env(schedule)
    metrics = ddpo_on(env, full_policy(env), updates_per_rollout=1).update()
    assert metrics["ratio_first_error"] == 0.0
    assert metrics["ratio_mean"] == 1.0 and metrics["ratio_std"] == 0.0 and metrics["kl_old_nats"] == 0.0
    assert metrics["clip_fraction_low"] == metrics["clip_fraction_high"] == 0.0


def test_later_updates_on_a_rollout_see_the_ratio_move_and_clip():
    env = gaussian_env()
    metrics = ddpo_on(env, full_policy(env), num_inner_epochs=2, updates_per_rollout=2).update()
    assert metrics["ratio_first_error"] == 0.0
    assert metrics["ratio_std"] > 0 and metrics["kl_old_nats"] > 0
    assert metrics["clip_fraction_low"] > 0 and metrics["clip_fraction_high"] > 0
    assert metrics["optimiser_steps"] == 4


@pytest.mark.parametrize(
    ("options", "optimiser_steps", "backwards"),
    [
        ({"updates_per_rollout": 1}, 1, 32 * 5),
        ({"updates_per_rollout": 2}, 2, 32 * 5),
        ({"updates_per_rollout": 1, "accumulate_timesteps": False}, 5, 32 * 5),
        ({"updates_per_rollout": 2, "accumulate_timesteps": False, "timestep_fraction": 0.6}, 6, 32 * 3),
        ({"updates_per_rollout": 1, "timestep_fraction": 0.01}, 1, 32),
    ],
)
def test_optimiser_steps_are_those_asked_for(options, optimiser_steps, backwards):
    env = gaussian_env()
    assert ddpo_on(env, full_policy(env), **options).update()["optimiser_steps"] == optimiser_steps
    assert env.mdp.counters.denoiser_backwards == backwards


def test_steps_without_noise_are_left_out():
    env = gaussian_env("flow", sampler="cps", noise_level=0.7)
    ddpo = ddpo_on(env, full_policy(env))
    assert ddpo.steps == [0, 1, 2, 3]
    ddpo.update()
    assert env.mdp.counters.denoiser_backwards == 32 * 4


def test_a_rollout_is_what_the_policy_does():
    env = gaussian_env()
    policy = full_policy(env)
    env.reset(seed=7)
    stream = env.state_dict()
    rollout = collect(env, policy)
    env.load_state_dict(stream)
    obs, _ = env.reset()
    for k in range(env.num_steps):
        with torch.no_grad():
            action = policy(obs)
            assert torch.equal(rollout.actions[k], action)
            assert torch.equal(rollout.log_probs[k], policy.dist(obs).log_prob(action))
        assert torch.equal(rollout.observations[k]["latents"], obs["latents"])
        obs, reward, *_ = env.step(action)
    assert torch.equal(rollout.reward, reward)


# --------------------------------------------------------------------------------------------- refusals


def blind(video, prompts):
    return video.mean((1, 2, 3, 4)).detach()


def test_vader_refuses_what_it_cannot_do():
    blind.differentiable = False
    env = gaussian_env(reward=blind)
    with pytest.raises(ValueError, match="differentiable=False.*DDPO"):
        vader_on(env, full_policy(env))
    blind.differentiable = True
    env = gaussian_env(reward=blind)
    with pytest.raises(ValueError, match="no graph"):
        vader_on(env, full_policy(env)).update()
    env = gaussian_env()
    for options, message in (
        ({"truncation": "last", "backprop_steps": 6}, "backprop_steps is 6.* 5 denoising steps"),
        ({"truncation": "step", "cutoff_step": 5}, r"cutoff_step is 5, expected 0\.\.4"),
        ({"videos_per_update": 24}, "videos_per_update is 24.*num_envs=16"),
    ):
        with pytest.raises(ValueError, match=message):
            vader_on(env, full_policy(env), **options)


def test_ddpo_refuses_what_it_cannot_do():
    for options, message in (
        ({"noise_level": 0.0}, "'ddim' at this noise level has none.*VADER"),
        ({"group_size": 1}, "group_size=1.*make it with group_size=8"),
    ):
        env = gaussian_env(**options)
        with pytest.raises(ValueError, match=message):
            ddpo_on(env, full_policy(env), advantage="group")
    env = gaussian_env()
    for options, message in (
        ({"videos_per_rollout": 40}, "videos_per_rollout is 40.*num_envs=16"),
        ({"updates_per_rollout": 3}, "updates_per_rollout is 3.*2 batches"),
        ({"tracker_min_count": 20}, "min_count 20"),
    ):
        with pytest.raises(ValueError, match=message):
            ddpo_on(env, full_policy(env), **options)
    env = gaussian_env(num_envs=1, group_size=1)
    with pytest.raises(ValueError, match="sample at least 2"):
        ddpo_on(env, full_policy(env), videos_per_rollout=1, updates_per_rollout=1)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (DDPOConfig, {"learning_rate": 0}, "learning_rate is 0"),
        (DDPOConfig, {"clip_range": math.nan}, "clip_range is nan"),
        (DDPOConfig, {"advantage": "none"}, "advantage is 'none', expected one of per_prompt, group, batch"),
        (DDPOConfig, {"timestep_fraction": 1.5}, "timestep_fraction=1.5 must be <= 1"),
        (DDPOConfig, {"kl_coefficient": -1}, "kl_coefficient=-1"),
        (DDPOConfig, {"micro_batch": 0}, "micro_batch is 0"),
        (VADERConfig, {"backprop_steps": 0}, "backprop_steps is 0"),
        (VADERConfig, {"loss": "mse"}, "loss is 'mse', expected one of one_minus"),
        (VADERConfig, {"truncation": "first"}, "truncation is 'first'"),
        (VADERConfig, {"cutoff_step": -1}, "cutoff_step=-1"),
    ],
)
def test_configs_are_checked(config, options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)


def test_presets():
    assert DDPOConfig.preset("MovingShapes").advantage == "group"
    assert VADERConfig.preset("MovingShapes").videos_per_update == 64
    for config in (DDPOConfig, VADERConfig):
        with pytest.raises(ValueError, match="only for MovingShapes"):
            config.preset("Sora")
