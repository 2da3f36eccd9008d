"""The three algorithms that follow reward gradients besides VADER, on Gaussian data, and formulas of that world."""

from __future__ import annotations

import torch
from gaussian import gaussian_env

from algos.draft_lv import DRaFTLV, DRaFTLVConfig
from algos.instructvideo import InstructVideo, InstructVideoConfig
from algos.refl import ReFL, ReFLConfig
from algos.video_set import VideoSet


def draft_lv_on(env, policy, **options):
    return DRaFTLV(env, policy, DRaFTLVConfig(**{"videos_per_update": 32, "learning_rate": 0.01, **options}))


def refl_on(env, policy, **options):
    options = {"videos_per_update": 32, "learning_rate": 0.01, "loss": "negative", "loss_coefficient": 1.0, **options}
    return ReFL(env, policy, ReFLConfig(**options))


def own_videos_on(env, policy, **options):
    options = {"videos_per_update": 32, "learning_rate": 0.01, "segments": 2, **options}
    return InstructVideo(env, policy, InstructVideoConfig(**options))


def given_videos_on(env, policy, **options):
    options = {"videos_per_update": 32, "learning_rate": 0.01, "segments": 2, **options}
    return InstructVideo(env, policy, InstructVideoConfig(**options), grey_videos(env, 5))


class Idle:
    """Parameters to optimise and nothing that acts."""

    def trainable_parameters(self):
        return [torch.zeros(1, requires_grad=True)]


ALGORITHMS = {"draft-lv": draft_lv_on, "refl": refl_on, "own videos": own_videos_on, "given videos": given_videos_on}


def grey_videos(env, count, level=None):
    """Videos of the env's size, plain grey of one level each, or of one level all; their texts are the env's."""
    levels = torch.linspace(0.4, 0.6, count) if level is None else torch.full((count,), level)
    size = (env.mdp.num_frames, 3, env.mdp.height, env.mdp.width)
    video = levels.view(-1, 1, 1, 1, 1).expand(count, *size).clone()
    return VideoSet(videos=video, prompts=tuple(env.prompts[i % len(env.prompts)] for i in range(count)))


def exact_env(schedule="epsilon", **options):
    """float64, four videos of six frames, without groups."""
    return gaussian_env(schedule, **{"dtype": torch.float64, "num_envs": 4, "group_size": 1, **options})


def coefficients(env, k):
    """A, B, p, q of step k: x' = A x + B (p x + q m + std z)."""
    table = env.mdp.table
    p, q = env.model.denoiser.coefficients(table.timesteps)
    return float(table.A[k]), float(table.B[k]), float(p[k]), float(q[k])


def levels(env, k):
    """Signal and noise level of the latents before step k, from the definitions of the schedules."""
    t = float(env.mdp.table.timesteps[k])
    if env.mdp.schedule.prediction == "flow":
        return 1 - t / 1000, t / 1000
    alpha = float(env.mdp.schedule.alphas_cumprod[round(t)])
    return alpha**0.5, (1 - alpha) ** 0.5


def means_of(env, policy, prompt_ids):
    """m_p of each video, [B,3,1,1,1]."""
    (weight,) = policy.trainable_parameters()
    return weight.detach().T[prompt_ids][:, :, None, None, None]


def into_weight(per_video, prompt_ids, policy):
    """Gradients [B,3] of the videos' means added up in the weight's shape [3, P]."""
    (weight,) = policy.trainable_parameters()
    total = torch.zeros_like(weight)
    for row, prompt in zip(per_video, prompt_ids.tolist(), strict=True):
        total[:, prompt] += row
    return total


def run_gaussian(env, policy, recorder_of, build, **options):
    """An algorithm's first gradient and metrics, with the stream put back to where it began."""
    algorithm = build(env, policy, max_grad_norm=1e9, videos_per_update=env.num_envs, **options)
    stream = env.state_dict()
    recorder = recorder_of(algorithm)
    metrics = algorithm.update()
    env.load_state_dict(stream)
    return recorder.gradients[0][0], metrics
