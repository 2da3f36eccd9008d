"""The TorchRL environment: its checker, autograd through rollouts, actors and the clipped PPO loss."""

from __future__ import annotations

import pytest
import torch
from models import LATENT_SHAPE, PROMPTS, tiny_env
from tensordict.nn import TensorDictModule
from torchrl.envs import EnvBase
from torchrl.envs.utils import check_env_specs
from torchrl.objectives import ClipPPOLoss
from weights import nudge

from vdm_env.torchrl import make_actor, make_module


@pytest.mark.parametrize(
    "options", [{}, {"kind": "unet"}, {"observe_embedding": True}, {"num_steps": 2}, {"num_envs": 1}]
)
def test_torchrl_check_env_specs_passes(options):
    check_env_specs(tiny_env(api="torchrl", **options), break_when_any_done="both")
    check_env_specs(tiny_env(**options).to_torchrl(), seed=3)


def test_keys_shapes_and_the_vector_env_behind():
    env = tiny_env(api="torchrl")
    assert isinstance(env, EnvBase) and env.num_steps == 4 and env.prompts[0] == PROMPTS[0]
    td = env.rollout(10, make_module(env.make_policy(lora_rank=2)))
    assert td.batch_size == (2, 4) and td["action"].shape == (2, 4, *LATENT_SHAPE)
    assert td["next", "reward"].shape == td["next", "done"].shape == td["next", "terminated"].shape == (2, 4, 1)
    assert td["next", "done"][..., 0].tolist() == [[False, False, False, True]] * 2
    assert not td["next", "reward"][:, :-1].any() and td["next", "reward"][:, -1].all()
    assert set(env.info) == {"reward_parts", "video"}
    with pytest.raises(AttributeError):
        env.no_such_attribute  # noqa: B018


def test_the_same_seed_gives_the_vector_env_s_episode():
    vector = tiny_env()
    policy = vector.make_policy(lora_rank=2)
    env = vector.derive().to_torchrl()
    for seed in (0, 5):
        with torch.no_grad():
            obs, _ = vector.reset(seed=seed)
            env.set_seed(seed)
            td = env.rollout(4, make_module(policy))
            for k in range(4):
                for name, value in obs.items():
                    assert torch.equal(td[:, k][name], value), (k, name)
                obs, reward, *_ = vector.step(policy(obs))
        assert torch.equal(td["next", "reward"][:, -1, 0], reward) and torch.equal(
            td["next", "latents"][:, -1], obs["latents"]
        )
    first, again = env.reset(seed=9), env.reset(seed=9)
    assert torch.equal(first["latents"], again["latents"])


@pytest.mark.parametrize("last_steps", [1, 3, 4])
@pytest.mark.parametrize("noise_level", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["flow", "unet"])
def test_gradient_through_rollout_equals_a_plain_loop_bit_for_bit(kind, noise_level, last_steps):
    vector = tiny_env(kind, noise_level=noise_level)
    policy = nudge(vector.make_policy(lora_rank=2, guidance_scale=2.0))
    env = vector.derive().to_torchrl()
    env.set_seed(21)

    def truncated(latents, timestep, step, action_std, prompt_id, video_seed):
        values = dict(latents=latents, timestep=timestep, step=step, action_std=action_std, prompt_id=prompt_id)
        with torch.set_grad_enabled(int(step.min()) >= 4 - last_steps):
            return policy(values | {"video_seed": video_seed})

    keys = ["latents", "timestep", "step", "action_std", "prompt_id", "video_seed"]
    td = env.rollout(4, TensorDictModule(truncated, in_keys=keys, out_keys=["action"]))
    reward = td["next", "reward"][:, -1, 0]
    gradient = torch.autograd.grad(reward.sum(), policy.trainable_parameters())

    obs, _ = vector.reset(seed=21)
    for k in range(4):
        with torch.set_grad_enabled(k >= 4 - last_steps):
            obs, expected_reward, *_ = vector.step(policy(obs))
    expected = torch.autograd.grad(expected_reward.sum(), policy.trainable_parameters())
    assert torch.equal(reward, expected_reward) and any(g.any() for g in gradient)
    assert all(torch.equal(a, b) for a, b in zip(gradient, expected, strict=True))


def test_a_rollout_starts_anywhere():
    env = tiny_env(api="torchrl")
    module = make_module(env.make_policy(lora_rank=2))
    with torch.no_grad():
        whole = env.rollout(4, module, tensordict=env.reset(seed=1), auto_reset=False)
        env.reset(seed=2)  # the env itself stands elsewhere now
        rest = env.rollout(
            4,
            module,
            tensordict=whole[:, 2].select(*env.observation_spec.keys(), "done", "terminated"),
            auto_reset=False,
        )
    assert rest.batch_size == (2, 2) and torch.equal(rest["next", "reward"], whole["next", "reward"][:, 2:])
    td = env.reset(options={"prompts": PROMPTS[2:], "step": 3})
    assert td["prompt_id"].tolist() == [2, 3] and env.rollout(
        4, module, tensordict=td, auto_reset=False
    ).batch_size == (2, 1)


def test_partial_reset_leaves_the_others_bit_identical():
    env = tiny_env(api="torchrl", num_envs=4, group_size=2)
    td = env.rand_step(env.reset(seed=0))["next"].exclude("reward")
    before = td.clone()
    td["_reset"] = torch.tensor([False, False, True, True])[:, None]
    after = env.reset(td)
    for name in env.observation_spec.keys():
        assert torch.equal(after[name][:2], before[name][:2]), name
    assert after["step"].tolist() == [1, 1, 0, 0] and not torch.equal(after["latents"][2:], before["latents"][2:])


def test_finished_envs_and_bad_actions_are_refused():
    env = tiny_env(api="torchrl", num_steps=1)
    td = env.reset(seed=0)
    with pytest.raises(ValueError, match="NaN or infinity"):
        env.step(td.clone().set("action", torch.full((2, *LATENT_SHAPE), torch.nan)))
    done = env.step(td.set("action", torch.zeros(2, *LATENT_SHAPE)))["next"].exclude("reward")
    with pytest.raises(RuntimeError, match="finished"):
        env.step(done.set("action", torch.zeros(2, *LATENT_SHAPE)))


def test_automatic_resets_continue_the_stream():
    env = tiny_env(api="torchrl", num_steps=2)
    td = env.rollout(5, break_when_any_done=False)
    assert td["step"][0].tolist() == [0, 1, 0, 1, 0] and len(set(td["video_seed"].flatten().tolist())) == 6


def test_an_actor_samples_the_policy_s_own_episode():
    env = tiny_env(api="torchrl")
    policy = nudge(env.make_policy(lora_rank=2))
    actor = make_actor(policy)
    with torch.no_grad():
        torch.manual_seed(0)
        acted = env.rollout(4, actor, tensordict=env.reset(seed=4), auto_reset=False)
        torch.manual_seed(1)
        called = env.rollout(4, make_module(policy), tensordict=env.reset(seed=4), auto_reset=False)
    assert torch.equal(acted["action"], called["action"]) and torch.equal(
        acted["next", "reward"], called["next", "reward"]
    )
    trained = {id(p) for p in actor.parameters() if p.requires_grad}
    assert trained == {id(p) for p in policy.trainable_parameters()}


def test_clipped_ppo_loss_without_critic_equals_its_formula():
    env = tiny_env(api="torchrl", num_steps=3)
    policy = nudge(env.make_policy(lora_rank=2))
    actor = make_actor(policy)
    with torch.no_grad():
        td = env.rollout(3, actor, tensordict=env.reset(seed=4), auto_reset=False).flatten()
    td["advantage"] = torch.linspace(-1, 1, len(td))[:, None]
    old = td["action_log_prob"].clone()
    torch.testing.assert_close(
        policy.dist(td).log_prob(td["action"]), old, rtol=1e-6, atol=1e-6
    )  # ratio 1 before any update
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.mul_(1.05)
    ratio = (policy.dist(td).log_prob(td["action"]) - old).exp()[:, None]
    clip = float((ratio.detach() - 1).abs().median()) * 1.01  # half of them are clipped
    assert clip > 1e-6
    expected = -torch.minimum(ratio * td["advantage"], ratio.clamp(1 - clip, 1 + clip) * td["advantage"]).mean()
    expected_gradient = torch.autograd.grad(expected, policy.trainable_parameters())

    loss = ClipPPOLoss(actor, critic_network=None, clip_epsilon=clip, entropy_bonus=False, critic_coeff=None)
    result = loss(td)
    gradient = torch.autograd.grad(result["loss_objective"], policy.trainable_parameters())
    assert 0.2 < float(result["clip_fraction"]) < 0.8
    torch.testing.assert_close(result["loss_objective"], expected, rtol=1e-6, atol=1e-7)
    for a, b in zip(gradient, expected_gradient, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
