"""What holds for several algorithms at once: envs that were used before, envs of several clips, clipping, resuming."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gaussian import ddpo_on, full_policy, gaussian_env
from models import tiny_env
from svd import svd_env, tiny_svd

from algos.d3po import D3PO, D3POConfig
from algos.ddpo import DDPO, DDPOConfig
from algos.diffusion_nft import DiffusionNFT, DiffusionNFTConfig
from algos.flow_grpo import FlowGRPO, FlowGRPOConfig
from algos.ppo_sb3 import SB3PPO, SB3PPOConfig
from algos.ppo_torchrl import TorchRLPPO, TorchRLPPOConfig
from algos.rollout import collect
from algos.rwr import RWR, RWRConfig
from algos.training import free_elements
from algos.vader import VADERConfig
from vdm_env.continuation import ContinuationVectorEnv

# ------------------------------------------------------------------------------------- envs that were used before


@pytest.mark.parametrize("levels", [[0.7, 0.0, 0.0, 0.0, 0.0], [0.0] * 5])
def test_the_steps_are_the_envs_own_and_not_those_of_its_last_episode(levels):
    env = gaussian_env("flow")
    policy = full_policy(env)
    assert env.mdp.base_table.stochastic.all()
    for algorithm_class, config in (
        (DDPO, DDPOConfig(videos_per_rollout=16, updates_per_rollout=1)),
        (TorchRLPPO, TorchRLPPOConfig(videos_per_rollout=16)),
        (SB3PPO, SB3PPOConfig(videos_per_rollout=16)),
        (D3PO, D3POConfig.preset("MovingShapes")),
    ):
        env.reset(options={"noise_levels": levels})
        assert algorithm_class(env, policy, config).steps == [0, 1, 2, 3, 4], algorithm_class


# ------------------------------------------------------------------------------------------------- several clips


@pytest.fixture(scope="module")
def long_env():
    return ContinuationVectorEnv(svd_env(tiny_svd(), num_steps=2, num_envs=2, group_size=2, noise_level=1.0), clips=3)


@pytest.mark.parametrize(
    ("algorithm_class", "config", "message"),
    [
        (TorchRLPPO, TorchRLPPOConfig(videos_per_rollout=2), "cannot go through TorchRL"),
        (SB3PPO, SB3PPOConfig(videos_per_rollout=2), "makes 3 clips.*SB3's spaces leave out; use env.single"),
        (DiffusionNFT, DiffusionNFTConfig(videos_per_update=2), "DiffusionNFT learns from one clip.* makes 3.*DDPO"),
        (RWR, RWRConfig(videos_per_update=2), "RWR learns from one clip.* makes 3.*DDPO"),
    ],
)
def test_what_cannot_learn_from_several_clips_says_so_at_once(algorithm_class, config, message, long_env):
    with pytest.raises(ValueError, match=message):
        algorithm_class(long_env, long_env.make_policy(lora_rank=2), config)
    assert long_env.mdp.counters.videos_sampled == 0


@pytest.mark.parametrize("clips", [1, 3])
def test_divergences_are_in_nats_whatever_the_number_of_clips(clips, request):
    """Against differences of summed log-probabilities; the policy moves between the two passes."""
    if clips == 3:
        env = request.getfixturevalue("long_env")
    else:
        env = tiny_env("unet", num_envs=2, group_size=2)
    shape = env.mdp.latent_shape
    assert free_elements(env) * clips == shape[0] * shape[1] * shape[2] * shape[3]
    policy = env.make_policy(lora_rank=2)
    config = DDPOConfig(videos_per_rollout=2, updates_per_rollout=1, num_inner_epochs=2, advantage="group")
    ddpo = DDPO(env, policy, replace(config, learning_rate=1e-3))
    before = policy.lora_state_dict()
    stream = env.state_dict()
    steps_taken = []
    ddpo.optimizer.register_step_post_hook(lambda *_: steps_taken.append(policy.lora_state_dict()))
    metrics = ddpo.update()
    env.load_state_dict(stream)
    policy.load_lora_state_dict(before)
    rollout = collect(env, policy)
    squares = []
    for weights in (before, steps_taken[0]):
        for k in ddpo.steps:
            obs, action = rollout.observations[k], rollout.actions[k]
            sums = []
            for where in (before, weights):
                policy.load_lora_state_dict(where)
                with torch.no_grad():
                    sums.append(policy.dist(obs).log_prob_sum(action))
            squares.append((sums[1] - sums[0]).square())
    expected = 0.5 * float(torch.cat(squares).mean()) * len(ddpo.steps)
    assert expected > 0 and metrics["kl_old_nats"] == pytest.approx(expected, rel=2e-2)


# --------------------------------------------------------------------------------------------------- advantages


def outlier(video, prompts):
    return torch.tensor([0.0] * 15 + [1.0])


@pytest.mark.parametrize(
    ("algorithm_class", "config_class", "options"),
    [
        (DDPO, DDPOConfig, {"advantage": "group", "updates_per_rollout": 1}),
        (FlowGRPO, FlowGRPOConfig, {"kl_coefficient": 0.0}),
        (TorchRLPPO, TorchRLPPOConfig, {"critic": False}),
    ],
)
def test_advantages_are_clipped_where_they_are_used(algorithm_class, config_class, options):
    env = gaussian_env("flow", reward=outlier, group_size=16)
    algorithm = algorithm_class(env, full_policy(env), config_class(videos_per_rollout=16, adv_clip_max=0.5, **options))
    seen, accumulate = [], algorithm._accumulate

    def watched(given, *rest):
        seen.extend([given["advantage"]] if algorithm_class is TorchRLPPO else [entry[1] for entry in given])
        return accumulate(given, *rest)

    algorithm._accumulate = watched
    algorithm.update()
    largest = max(float(advantage.abs().max()) for advantage in seen)
    assert largest == 0.5  # the outlier's is 3.9


def test_equal_rewards_move_nothing():
    """Also where the optimiser would make a full step of any rounding."""
    env = gaussian_env(reward=lambda video, prompts: torch.full((len(video),), 0.3))
    policy = full_policy(env)
    before = policy.trainable_parameters()[0].detach().clone()
    ddpo_on(env, policy, advantage="batch", videos_per_rollout=16, updates_per_rollout=1, weight_decay=0.0).update()
    assert torch.equal(policy.trainable_parameters()[0], before)


# ----------------------------------------------------------------------------------------------- configs and resuming


def test_the_tracker_is_only_made_and_checked_where_it_is_used():
    assert DDPOConfig(advantage="group", tracker_buffer_size=8).tracker_buffer_size == 8
    with pytest.raises(ValueError, match="buffer_size is 8 and min_count 16"):
        DDPOConfig(advantage="per_prompt", tracker_buffer_size=8)
    env = gaussian_env()
    ddpo = ddpo_on(env, full_policy(env), advantage="group", updates_per_rollout=1)
    ddpo.update()
    assert ddpo.tracker is None and ddpo.state_dict()["tracker"] == {"prompts": [], "rewards": []}


@pytest.mark.parametrize(
    ("config_class", "options", "name"),
    [
        (DDPOConfig, {"videos_per_rollout": 32.0}, "videos_per_rollout is 32.0"),
        (DDPOConfig, {"micro_batch": 4.0}, "micro_batch is 4.0"),
        (DDPOConfig, {"tracker_min_count": 4.0}, "tracker_min_count is 4.0"),
        (FlowGRPOConfig, {"window_size": 2.0}, "window_size is 2.0"),
        (FlowGRPOConfig, {"window_start": 0.5}, "window_start is 0.5"),
        (FlowGRPOConfig, {"num_inner_epochs": True}, "num_inner_epochs is True"),
        (RWRConfig, {"videos_per_step": 8.0}, "videos_per_step is 8.0"),
        (DiffusionNFTConfig, {"micro_batch": "8"}, "micro_batch is '8'"),
        (VADERConfig, {"videos_per_update": 64.0}, "videos_per_update is 64.0"),
    ],
)
def test_counts_have_to_be_whole(config_class, options, name):
    with pytest.raises(ValueError, match=f"{config_class.__name__}.{name}, expected a whole number"):
        config_class(**options)


def test_a_continued_run_uses_the_learning_rate_that_it_reports():
    env = gaussian_env()
    ddpo = ddpo_on(env, full_policy(env), learning_rate=0.01, updates_per_rollout=1)
    ddpo.update()
    state = ddpo.state_dict()
    env = gaussian_env()
    policy = full_policy(env)
    other = ddpo_on(env, policy, learning_rate=0.002, updates_per_rollout=1, weight_decay=0.5)
    other.load_state_dict(state)
    (group,) = other.optimizer.param_groups
    assert group["lr"] == other.update()["learning_rate"] == 0.002 and group["weight_decay"] == 0.5
    assert other.optimizer.state_dict()["state"][0]["step"] == 2  # the moments are the saved ones


def test_prompts_are_embedded_one_by_one():
    """A restarted run meets texts in other batches; rounding that depends on the batch would make it another run."""

    class Watching:
        def __init__(self, model):
            self.model, self.sizes = model, []

        def __getattr__(self, name):
            return getattr(self.model, name)

        def encode_prompts(self, texts):
            self.sizes.append(len(texts))
            return self.model.encode_prompts(texts)

    env = tiny_env(num_envs=4)
    env.mdp.model = Watching(env.mdp.model)
    together = env.mdp.condition([0, 1, 2, 3, 1])
    assert env.mdp.model.sizes == [1, 1, 1, 1]
    env.mdp._conditions.clear()
    alone = env.mdp.condition([2])
    assert all(torch.equal(together[name][2], alone[name][0]) for name in alone)
