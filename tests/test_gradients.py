"""The algorithms' gradients against exact ones and against loops written by hand."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from gaussian import START, Recorder, full_policy, gaussian_env
from torch import nn
from weights import redraw

import vdm_env
from algos.ddpo import DDPO, DDPOConfig
from algos.flow_grpo import FlowGRPO, FlowGRPOConfig
from algos.vader import VADER, VADERConfig
from vdm_env import noise
from vdm_env.worlds.gaussian import PIXEL_RANGE, VP_SCHEDULE, TargetReward, final_law, gaussian_model


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
    config = DDPOConfig(
        videos_per_rollout=1024, updates_per_rollout=1, advantage="batch", adv_clip_max=1e9, max_grad_norm=1e9
    )
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


@pytest.mark.parametrize(
    ("schedule", "reward", "exact"),
    [("flow", linear, linear_law), ("epsilon", TargetReward(1.0), quadratic_law)],
)
def test_flow_grpo_gradient_is_that_of_the_expected_reward(schedule, reward, exact):
    """As DDPO's, but for a factor 1 - 1/G: a video's own reward is in the group mean it is compared to."""
    mean = torch.tensor([[0.2, -0.3, 0.6]], dtype=torch.float64)
    env = gaussian_env(schedule, means=mean, reward=reward, dtype=torch.float64, num_envs=512, group_size=2)
    config = FlowGRPOConfig(
        videos_per_rollout=1024,
        kl_coefficient=0.0,
        timestep_fraction=1.0,
        std_eps=1e-12,
        adv_clip_max=1e9,
        max_grad_norm=1e9,
        seed=3,
    )
    grpo = FlowGRPO(env, full_policy(env), config)
    recorder = Recorder(grpo)
    for _ in range(8):
        grpo.update()
    gradients = torch.stack([g.squeeze(1) for (g,) in recorder.gradients])
    elements = math.prod(env.mdp.latent_shape)
    slope, spread = exact(final_law(env.model, env.mdp.table), mean[0], elements)
    expected = -slope / spread / elements / len(grpo.noisy) * (1 - 1 / 2)
    error = gradients.std(0) / math.sqrt(len(gradients))
    assert (error < 0.2 * expected.abs().max()).all(), "too few samples for the test to mean anything"
    assert ((gradients.mean(0) - expected).abs() < 4 * error).all(), (gradients.mean(0), expected, error)


class TinyNetwork(nn.Module):
    """Not affine, so that the gradient through the network's input counts."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer, self.text = nn.Conv3d(3, 6, 3, padding=1), nn.Conv3d(6, 3, 1), nn.Linear(2, 6)
        redraw(self.parameters(), 0.3)

    def forward(self, x, t, prompt):
        hidden = self.inner(x) + self.text(prompt)[:, :, None, None, None] + (t / 1000)[:, None, None, None, None]
        return self.outer(hidden.tanh())


def tiny_env(**options):
    model = dataclasses.replace(gaussian_model(START), denoiser=TinyNetwork().requires_grad_(False))
    model = dataclasses.replace(
        model, schedule=VP_SCHEDULE, spec=dataclasses.replace(model.spec, sampler="ddim", noise_level=1.0)
    )
    options = {"num_envs": 4, "group_size": 1, **options}
    return vdm_env.make(model=model, reward=TargetReward(1.0), prompts=list(model.prompts), **options)


@pytest.mark.parametrize("steps", [1, 3, 5])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_vader_gradient_is_bit_for_bit_that_of_a_loop_written_by_hand(steps, eta):
    env = tiny_env(noise_level=eta)
    policy = full_policy(env)
    vader = VADER(
        env, policy, VADERConfig(backprop_steps=steps, videos_per_update=4, loss="negative", max_grad_norm=1e9)
    )
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

    assert metrics["loss"] == loss.item()
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
