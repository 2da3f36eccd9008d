"""The world of Gaussian data is what it says: its denoiser is the best one, and its final law is that of samples."""

from __future__ import annotations

import math

import pytest
import torch
from gaussian import SCHEDULES, START, full_policy, gaussian_env

from vdm_env.worlds.gaussian import final_law, gaussian_model, to_latents


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


@pytest.mark.parametrize(
    ("schedule", "level"), [("flow", 0.7), ("flow", 0.3), ("epsilon", 1.0), ("epsilon", 0.0), ("v", 0.5)]
)
def test_the_final_law_is_that_of_sampled_videos(schedule, level):
    env = gaussian_env(schedule, num_envs=512, group_size=256, noise_level=level, means=START * 2)
    env.reset(seed=1, options={"prompt_ids": [0, 1]})
    obs = env._observation()
    for _ in range(env.num_steps):
        obs, *_ = env.step(full_policy(env)(obs))
    law = final_law(env.model, env.mdp.table)
    error = obs["latents"].detach() - law.gain * 2 * START[obs["prompt_id"]][:, :, None, None, None]
    assert abs(float(error.mean())) < 4 * law.std / math.sqrt(error.numel())
    assert float(error.std()) == pytest.approx(law.std, rel=0.03)


def test_pixels_are_latents_in_other_units():
    model = gaussian_model(START)
    latents = torch.randn(2, *model.latent_shape(2, 2, 2), generator=torch.Generator().manual_seed(0))
    video = model.decode(latents)
    assert torch.allclose(model.encode(video), latents, atol=1e-5)
    assert torch.allclose(to_latents(video), latents.transpose(1, 2), atol=1e-5)
    assert torch.equal(model.decode(latents, torch.tensor([[1], [0]]))[:, 0], video[[0, 1], [1, 0]])
