"""The torch-native vector environment: episodes, resets, seeds, gradients, refusals, rendering."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch
from models import LATENT_SHAPE, PROMPTS, brightness, tiny_env, tiny_model

from vdm_env import make, noise
from vdm_env.starts import MAX_SEED

KINDS = ("flow", "unet")


def play(env, policy, obs):
    """Runs to the end; returns the last observation, the reward and the last info."""
    reward, info = None, {}
    for _ in range(env.num_steps - int(obs["step"].min())):
        obs, reward, terminated, truncated, info = env.step(policy(obs))
    assert bool(terminated.all()) and not bool(truncated.any())
    return obs, reward, info


def noise_action(obs):
    return noise.normal(obs["video_seed"], obs["step"], obs["latents"].shape[1:]).to(obs["latents"])


# ------------------------------------------------------------------------------------------------------- episodes


@pytest.mark.parametrize("kind", KINDS)
def test_an_episode_publishes_the_table_and_rewards_the_decoded_video_at_the_end(kind):
    env = tiny_env(kind, num_envs=3)
    table = env.mdp.table
    obs, info = env.reset(seed=0)
    assert info == {} and obs["latents"].shape == (3, *LATENT_SHAPE)
    for k in range(env.num_steps):
        assert obs["step"].tolist() == [k] * 3
        assert obs["timestep"].tolist() == [float(table.timesteps[k].float())] * 3
        assert obs["action_std"].tolist() == [float(table.action_std[k].float())] * 3
        assert obs["stochastic"].tolist() == [bool(table.stochastic[k])] * 3
        x, a = obs["latents"], noise_action(obs)
        obs, reward, terminated, truncated, info = env.step(a)
        assert torch.equal(obs["latents"], float(table.A[k]) * x + float(table.B[k]) * a)
        last = k == env.num_steps - 1
        assert terminated.tolist() == [last] * 3 and truncated.tolist() == [False] * 3
        assert bool(reward.any()) == last and (info == {}) == (not last)
    video = env.mdp.decode(obs["latents"])
    assert torch.equal(reward, brightness(video, [])) and torch.equal(info["video"], video)
    assert torch.equal(info["reward_parts"]["brightness"], reward)
    assert not obs["stochastic"].any() and not obs["action_std"].any() and obs["step"].tolist() == [env.num_steps] * 3
    assert env.mdp.counters.videos_sampled == env.mdp.counters.reward_queries == 3


def test_spaces_hold_the_observations_and_their_own_samples():
    env = tiny_env()
    obs, _ = env.reset(seed=0)
    assert env.observation_space.contains({k: v.numpy() for k, v in obs.items()})
    assert env.observation_space.contains(env.observation_space.sample())
    assert env.action_space.shape == (2, *LATENT_SHAPE) and env.metadata["autoreset_mode"].name == "DISABLED"


def test_float64_latents_on_request():
    env = tiny_env(dtype=torch.float64)
    obs, _ = env.reset(seed=0)
    obs, reward, *_ = env.step(noise_action(obs))
    assert obs["latents"].dtype == obs["action_std"].dtype == reward.dtype == torch.float64
    assert env.single_action_space.dtype == np.float64


def test_the_embedding_is_observed_by_option_only():
    assert "text" not in tiny_env().reset(seed=0)[0]
    env = tiny_env(observe_embedding=True)
    obs, _ = env.reset(seed=0)
    assert torch.equal(obs["text"], env.mdp.condition(obs["prompt_id"])["text"])
    assert env.observation_space.contains({k: v.numpy() for k, v in obs.items()})


# ------------------------------------------------------------------------------------------------ seeds and prompts


def test_an_int_seed_starts_a_stream_that_reset_continues():
    env = tiny_env()
    runs = []
    for _ in range(2):
        first, second = env.reset(seed=np.int64(11))[0], env.reset()[0]
        runs.append((first, second))
    for name in runs[0][0]:
        assert torch.equal(runs[0][0][name], runs[1][0][name]) and torch.equal(runs[0][1][name], runs[1][1][name])
    assert not torch.equal(runs[0][0]["latents"], runs[0][1]["latents"])
    assert not torch.equal(env.reset(seed=12)[0]["latents"], runs[0][0]["latents"])


def test_state_dict_continues_the_stream():
    env, other = tiny_env(), tiny_env()
    env.reset(seed=5)
    other.load_state_dict(env.state_dict())
    a, b = env.reset()[0], other.reset()[0]
    assert torch.equal(a["latents"], b["latents"]) and torch.equal(a["prompt_id"], b["prompt_id"])


def test_noise_belongs_to_the_video_not_to_its_place_in_the_batch():
    env, wide = tiny_env(num_envs=2), tiny_env(num_envs=4)
    policy, wide_policy = env.make_policy(lora_rank=2), wide.make_policy(lora_rank=2)
    prompts = [PROMPTS[1], PROMPTS[3]]
    small, _ = env.reset(seed=[8, 9], options={"prompts": prompts})
    large, _ = wide.reset(seed=[1, 9, 2, 8], options={"prompts": [PROMPTS[0], prompts[1], PROMPTS[2], prompts[0]]})
    assert torch.equal(small["latents"], large["latents"][[3, 1]])
    with torch.no_grad():
        # The same networks give the same numbers up to what a matrix product of another batch size rounds differently.
        torch.testing.assert_close(
            play(env, policy, small)[1], play(wide, wide_policy, large)[1][[3, 1]], rtol=0, atol=1e-5
        )


def test_a_group_shares_its_prompt_but_not_its_noise():
    env = tiny_env(num_envs=6, group_size=3)
    obs, _ = env.reset(seed=0)
    assert len(set(obs["prompt_id"][:3].tolist())) == len(set(obs["prompt_id"][3:].tolist())) == 1
    assert len(set(obs["video_seed"].tolist())) == 6
    obs, _ = env.reset(options={"prompts": [PROMPTS[2], PROMPTS[0]]})
    assert obs["prompt_id"].tolist() == [2, 2, 2, 0, 0, 0]


def test_prompts_are_an_endless_shuffle_of_the_split():
    env = tiny_env(prompts={"train": PROMPTS, "test": ["a green square moving up"]}, num_envs=2)
    env.reset(seed=3)
    drawn = [int(i) for _ in range(4) for i in env.reset()[0]["prompt_id"]]
    env.reset(seed=3)
    assert sorted(drawn[2:6]) == [0, 1, 2, 3] and drawn == [
        int(i) for _ in range(4) for i in env.reset()[0]["prompt_id"]
    ]
    test = env.derive(split="test")
    assert (
        test.reset()[0]["prompt_id"].tolist() == [4, 4]
        and test.prompt_ids() == [4]
        and test.prompt_ids("train") == [0, 1, 2, 3]
    )


def test_a_text_given_at_reset_gets_the_next_number():
    env = tiny_env()
    obs, _ = env.reset(options={"prompts": ["a red circle moving up", PROMPTS[0]]})
    assert obs["prompt_id"].tolist() == [4, 0] and env.prompts[4] == "a red circle moving up"
    assert env.prompt_ids() == [0, 1, 2, 3]


# -------------------------------------------------------------------------------------------------- starting anywhere


def test_an_episode_goes_on_from_a_stored_state():
    env = tiny_env()
    policy = env.make_policy(lora_rank=2)
    with torch.no_grad():
        obs, _ = env.reset(seed=0)
        obs, *_ = env.step(policy(obs))
        middle, *_ = env.step(policy(obs))
        _, reward, _ = play(env, policy, middle)
        again, _ = env.reset(
            seed=middle["video_seed"].tolist(),
            options={"prompt_ids": middle["prompt_id"], "latents": middle["latents"], "step": 2},
        )
        for name, value in middle.items():
            assert torch.equal(again[name], value), name
        assert torch.equal(play(env, policy, again)[1], reward)
        env.set_state(middle)
        assert torch.equal(play(env, policy, middle)[1], reward)


def test_envs_may_stand_at_different_steps():
    env = tiny_env(num_steps=3)
    policy = env.make_policy(lora_rank=2)
    with torch.no_grad():
        obs, _ = env.reset(seed=[1, 2], options={"prompt_ids": [0, 1], "step": torch.tensor([0, 2])})
        start = obs["latents"]
        obs, reward, terminated, _, info = env.step(policy(obs))
        assert terminated.tolist() == [False, True] and reward[0] == 0 and reward[1] != 0
        assert info["reward_parts"]["brightness"].tolist() == reward.tolist() and len(info["video"]) == 1
        assert torch.equal(info["video"][0], env.mdp.decode(obs["latents"])[1])
        # The finished one is started again, the other one goes on as if nothing had happened.
        after, _ = env.reset(options={"reset_mask": terminated})
        assert all(torch.equal(after[name][0], obs[name][0]) for name in obs)
        assert after["step"].tolist() == [1, 0]
        for _ in range(2):
            after, reward, terminated, *_ = env.step(policy(after))
        assert terminated.tolist() == [True, False]
        alone, _ = env.reset(seed=[1, 7], options={"prompt_ids": [0, 2]})
        assert torch.equal(alone["latents"][0], start[0])
        torch.testing.assert_close(play(env, policy, alone)[1][0], reward[0], rtol=0, atol=1e-5)


def test_partial_reset_of_groups_leaves_the_others_bit_identical():
    env = tiny_env(num_envs=4, group_size=2)
    obs, _ = env.reset(seed=0)
    before, *_ = env.step(noise_action(obs))
    after, _ = env.reset(seed=99, options={"reset_mask": np.array([False, False, True, True])})
    assert all(torch.equal(after[name][:2], value[:2]) for name, value in before.items())
    assert after["step"].tolist() == [1, 1, 0, 0] and not torch.equal(after["latents"][2:], before["latents"][2:])


def test_noise_levels_hold_for_one_episode():
    env = tiny_env(num_steps=4)
    levels = [0.0, 0.7, 0.0, 0.0]
    obs, _ = env.reset(seed=0, options={"noise_levels": levels})
    seen = []
    for _ in range(4):
        seen.append(obs["stochastic"][0].item())
        obs, *_ = env.step(noise_action(obs))
    assert seen == [False, True, False, False]
    assert env.reset()[0]["stochastic"].all()


def test_derive_makes_a_second_env_on_the_same_networks():
    env = tiny_env()
    env.reset(seed=0)
    twin = env.derive(num_envs=3, num_steps=2, sampler="flow_ode", seed=4)
    obs, _ = twin.reset()
    assert twin.model is env.model and twin.num_steps == 2 and len(obs["step"]) == 3 and not obs["stochastic"].any()
    assert env.num_steps == 4 and env.mdp.table.stochastic.any()
    assert torch.equal(obs["latents"], env.derive(num_envs=3).reset(seed=4)[0]["latents"])
    assert env.derive(reward=lambda video, prompts: -video.mean((1, 2, 3, 4))).mdp.reward.name == "<lambda>"
    with pytest.raises(ValueError, match="cannot change"):
        env.derive(model=None)


# ---------------------------------------------------------------------------------------------------------- gradients


def hand_written_gradient(env, policy, seed, last_steps):
    """The terminal reward's gradient by a loop that knows nothing of the environment."""
    table, ids = env.mdp.table, env.reset(seed=seed)[0]
    seeds, prompt_ids = ids["video_seed"].tolist(), ids["prompt_id"]
    x = noise.normal(seeds, noise.INITIAL, LATENT_SHAPE)
    for k in range(table.num_steps):
        with torch.set_grad_enabled(k >= table.num_steps - last_steps):
            a = policy.predict(x, torch.full((len(x),), float(table.timesteps[k])), prompt_ids)
            if table.stochastic[k]:
                a = a + float(table.action_std[k]) * noise.normal(seeds, k, LATENT_SHAPE)
            x = float(table.A[k]) * x + float(table.B[k]) * a
    reward = env.model.decode(x).mean((1, 2, 3, 4))
    return reward, torch.autograd.grad(reward.sum(), policy.trainable_parameters())


@pytest.mark.parametrize("last_steps", [1, 3, 4])
@pytest.mark.parametrize("noise_level", [0.0, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_through_step_equals_a_hand_written_loop_bit_for_bit(kind, noise_level, last_steps):
    env = tiny_env(kind, noise_level=noise_level)
    policy = env.make_policy(lora_rank=2, guidance_scale=1.0)
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.add_(0.05 * noise.normal([1], 0, parameter.shape)[0])
    obs, _ = env.reset(seed=21)
    for k in range(env.num_steps):
        with torch.set_grad_enabled(k >= env.num_steps - last_steps):
            obs, reward, *_ = env.step(policy(obs))
    gradient = torch.autograd.grad(reward.sum(), policy.trainable_parameters())
    expected_reward, expected = hand_written_gradient(env, policy, 21, last_steps)
    assert torch.equal(reward, expected_reward) and any(g.any() for g in gradient)
    assert all(torch.equal(a, b) for a, b in zip(gradient, expected, strict=True))


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda a: a[:1], ValueError, r"shape \(2, 4, 2, 4, 4\).*got \(1, 4, 2, 4, 4\)"),
        (lambda a: a.numpy(), TypeError, "float tensor.*ndarray"),
        (lambda a: a.long(), TypeError, "float tensor.*int64"),
        (
            lambda a: a.clone().index_fill_(0, torch.tensor([1]), torch.nan),
            ValueError,
            r"NaN or infinity for envs \[1\]",
        ),
        (lambda a: a / 0, ValueError, r"NaN or infinity for envs \[0, 1\]"),
    ],
)
def test_bad_actions_are_refused_and_change_nothing(change, error, message):
    env = tiny_env()
    obs, _ = env.reset(seed=0)
    good = noise_action(obs)
    with pytest.raises(error, match=message):
        env.step(change(good))
    assert env.step(good)[0]["step"].tolist() == [1, 1]


def test_actions_of_another_float_type_are_taken_in_the_latents_type():
    env = tiny_env()
    obs, _ = env.reset(seed=0)
    assert env.step(noise_action(obs).to(torch.bfloat16))[0]["latents"].dtype == torch.float32


def test_stepping_too_early_or_too_late_is_refused():
    env = tiny_env(num_steps=1)
    with pytest.raises(RuntimeError, match="call env.reset"):
        env.step(torch.zeros(2, *LATENT_SHAPE))
    with pytest.raises(RuntimeError, match="before reset"):
        env.render()
    obs, _ = env.reset(seed=0)
    env.step(noise_action(obs))
    with pytest.raises(RuntimeError, match="finished.*reset_mask"):
        env.step(noise_action(obs))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"options": {"prompt": "x"}}, r"unknown reset options \['prompt'\]; expected some of"),
        ({"options": {"image": torch.zeros(3, 8, 8)}}, "conditioned on text alone"),
        ({"options": {"prompts": []}}, "non-empty list"),
        ({"options": {"prompts": ["a", " "]}}, "non-empty text"),
        ({"options": {"prompts": ["a", "b"], "prompt_ids": [0, 1]}}, "not both"),
        ({"options": {"prompt_ids": [0, 1, 2]}}, "got 3 prompts; expected 2"),
        ({"options": {"prompt_ids": [0, 4]}}, r"\[4\] are outside the 4 known"),
        ({"options": {"latents": torch.zeros(1, *LATENT_SHAPE)}}, "option latents must be a float tensor of shape"),
        ({"options": {"latents": torch.full((2, *LATENT_SHAPE), torch.nan)}}, "NaN"),
        ({"options": {"step": 4}}, r"0 .. 3"),
        ({"options": {"step": -1}}, r"0 .. 3"),
        ({"options": {"noise_levels": [0.1]}}, "has 1 numbers; expected one for each of the 4"),
        ({"options": {"reset_mask": [True]}}, "reset_mask must be bool of shape"),
        ({"options": {"reset_mask": torch.zeros(2, dtype=torch.bool)}}, "at least one True"),
        ({"seed": [1, 2, 3]}, "expected one int for the stream, or 2 ints"),
        ({"seed": [-1, 2]}, f"0 .. {MAX_SEED}"),
    ],
)
def test_bad_resets_are_refused(arguments, message):
    env = tiny_env()
    before, _ = env.reset(seed=0)
    with pytest.raises(ValueError, match=message):
        env.reset(**arguments)
    assert torch.equal(env.step(noise_action(before))[0]["step"], before["step"] + 1)  # the episode was not lost


def test_group_resets_that_do_not_fit_are_refused():
    env = tiny_env(num_envs=4, group_size=2)
    with pytest.raises(ValueError, match="leave reset_mask out"):
        env.reset(options={"reset_mask": [True, True, False, False]})
    env.reset(seed=0)
    with pytest.raises(ValueError, match="cuts through a group of 2"):
        env.reset(options={"reset_mask": [True, False, False, False]})
    with pytest.raises(ValueError, match="must share their prompt"):
        env.reset(options={"prompt_ids": [0, 1, 2, 2]})
    with pytest.raises(ValueError, match="partial reset_mask"):
        env.reset(options={"reset_mask": [True, True, False, False], "noise_levels": [0.1] * 4})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_steps": 0}, "num_steps=0: expected a whole number of at least 1"),
        ({"num_steps": 2.5}, "num_steps=2.5"),
        ({"num_envs": 0}, "num_envs=0"),
        ({"num_envs": 3, "group_size": 2}, "not a multiple of group_size=2; try num_envs=4"),
        ({"height": 20}, "height=20 is not a positive multiple of 8; try height=16"),
        ({"width": 0}, "width=0"),
        ({"num_frames": 0}, "at least one frame"),
        ({"prompts": []}, "non-empty list"),
        ({"prompts": {"train": ["a"], "test": ["a"]}}, "disjoint"),
        ({"split": "holdout"}, "no prompt split 'holdout'"),
        ({"sampler": "unipc"}, "unipc"),
        ({"sampler": "ddim"}, "flow_ode, flow_grpo, dance, cps"),
        ({"noise_level": [0.1, 0.2]}, "noise_level"),
        ({"decode_frames": "middle0"}, "middle0"),
        ({"render_mode": "human"}, "render_mode='human'"),
        ({"api": "jax"}, "'gymnasium' or 'torchrl'"),
    ],
)
def test_impossible_environments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_env(**options)


@pytest.mark.parametrize(
    "reward, error, message",
    [
        (lambda v, p: brightness(v, p) * torch.nan, ValueError, "not finite"),
        (lambda v, p: brightness(v, p) / 0, ValueError, "not finite"),
        (lambda v, p: v.mean(), ValueError, "one score a video"),
        (lambda v, p: brightness(v, p)[:, None], ValueError, r"shape \(2, 1\)"),
        (lambda v, p: [0.0, 1.0], TypeError, "returned list"),
        (lambda v, p: brightness(v, p).long(), TypeError, "int64"),
    ],
)
def test_rewards_that_break_their_contract_are_named(reward, error, message):
    env = tiny_env(reward=reward, num_steps=1)
    obs, _ = env.reset(seed=0)
    with pytest.raises(error, match=message):
        env.step(noise_action(obs))


def test_make_needs_a_model_and_a_reward():
    with pytest.raises(ValueError, match="both model=... and reward=..."):
        make(model=tiny_model())


# ----------------------------------------------------------------------------------------------------------- pictures


def test_render_shows_the_predicted_clean_video():
    env = tiny_env()
    obs, _ = env.reset(seed=0)
    first = env.render()
    assert len(first) == 2 and first[0].dtype == np.uint8 and first[0].shape == (96, 2 * 96, 3)
    obs, *_ = env.step(noise_action(obs))
    assert not np.array_equal(env.render()[0], first[0])


def test_gymnasium_records_a_video(tmp_path):
    env = gymnasium.wrappers.vector.RecordVideo(tiny_env(num_steps=2), str(tmp_path), episode_trigger=lambda i: i == 0)
    obs, _ = env.reset(seed=0)
    for _ in range(2):
        obs, *_ = env.step(noise_action(obs))
    env.close()
    (file,) = tmp_path.glob("*.mp4")
    assert file.stat().st_size > 500
