"""Environments on Gaussian data, and algorithms on them, for the tests of the algorithms."""

from __future__ import annotations

import torch

import vdm_env
from algos.ddpo import DDPO, DDPOConfig
from algos.vader import VADER, VADERConfig
from vdm_env.schedule import VPSchedule
from vdm_env.worlds.gaussian import FLOW_SCHEDULE, VP_SCHEDULE, TargetReward, gaussian_model

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


def weight_of(policy):
    """The one trainable parameter of a full policy, [3, P]: a column for each prompt."""
    (weight,) = policy.trainable_parameters()
    return weight


def tied(video, prompts):
    """A reward that is the same for every video."""
    return torch.ones(len(video))


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


def ddpo_on(env, policy, **options):
    options = {
        "videos_per_rollout": 32,
        "updates_per_rollout": 2,
        "learning_rate": 0.01,
        "tracker_min_count": 4,
        **options,
    }
    return DDPO(env, policy, DDPOConfig(**options))


def vader_on(env, policy, **options):
    options = {"videos_per_update": 32, "learning_rate": 0.01, "truncation": "random", "loss": "negative", **options}
    return VADER(env, policy, VADERConfig(**options))
