"""README's algorithm of one's own: the file, the README's text of it, and a run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from gaussian import full_policy, gaussian_env

import algos
import vdm_env
from benchmarks.examples import own_algorithm
from benchmarks.examples.own_algorithm import RewardWeighted

README = Path(__file__).parents[1] / "README.md"


def test_readme_shows_the_file():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    (shown,) = [block for block in blocks if "class RewardWeighted" in block]
    source = Path(own_algorithm.__file__).read_text(encoding="utf-8")
    assert shown.strip() == source[source.index("import torch\n") :].strip()


def test_it_runs_on_moving_shapes(tmp_path):
    env = vdm_env.make("MovingShapes-HPS", num_envs=4, num_steps=3, guidance_scale=1.0)
    policy = env.make_policy(lora_rank=4)
    before = policy.lora_state_dict()
    algorithm = RewardWeighted(env, policy)
    result = algos.run(algorithm, updates=2, out=tmp_path / "run", progress=False)
    assert result.updates == 2 and result.ended == "updates"
    assert any(not torch.equal(before[k], v) for k, v in policy.lora_state_dict().items())
    twin = RewardWeighted(env.derive(), env.make_policy(lora_rank=4, seed=1))
    twin.policy.load_lora_state_dict(policy.lora_state_dict())
    twin.load_state_dict(algorithm.state_dict())
    assert twin.update() == algorithm.update()  # it goes on exactly where the other one was


def test_its_loss_is_the_weighted_error_and_it_learns():
    env = gaussian_env("flow", num_envs=64, group_size=1)
    policy = full_policy(env)
    algorithm = RewardWeighted(env, policy, lr=0.03)
    stream, generator = env.state_dict(), torch.Generator().manual_seed(0)
    first = algorithm.update()

    env.load_state_dict(stream)  # the first update by hand, with the untrained model
    obs, _ = env.reset()
    with torch.no_grad(), policy.reference():
        for _ in range(env.num_steps):
            obs, reward, *_ = env.step(policy(obs))
        t = env.mdp.schedule.sample_timesteps(64, generator)
        noise = torch.randn(obs["latents"].shape, generator=generator)
        level = (t / 1000).view(-1, 1, 1, 1, 1)
        output = policy.predict((1 - level) * obs["latents"] + level * noise, t, obs["prompt_id"])
        error = (output - (noise - obs["latents"])).square().flatten(1).mean(1)
    weight = reward.exp() / reward.exp().sum()
    assert first["reward"] == reward.mean().item()
    assert first["loss"] == pytest.approx(float((weight * error).sum()), rel=1e-4)

    rewards = [algorithm.update()["reward"] for _ in range(40)]
    assert sum(rewards[-10:]) / 10 > sum(rewards[:10]) / 10 + 0.03
