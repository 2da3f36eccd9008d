"""The single numpy environment, under Gymnasium's and Stable-Baselines3's checkers and recorder."""

from __future__ import annotations

import warnings

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from models import LATENT_SHAPE, PROMPTS, tiny_env
from stable_baselines3.common.env_checker import check_env as check_env_of_sb3

from vdm_env.single import DenoisingEnv


def single(**options):
    kept = {name: options.pop(name) for name in ("observe_embedding", "action_bound") if name in options}
    return DenoisingEnv(tiny_env(num_envs=1, **options), **kept)


def act(env, obs):
    """A fixed action that depends on the observation."""
    return np.tanh(obs["latents"][::-1]).copy()


@pytest.mark.parametrize("kind", ["flow", "unet"])
def test_gymnasium_check_env_passes(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # unbounded boxes, which latents are
        check_env(single(kind=kind))
        check_env(single(kind=kind, observe_embedding=False))


def test_stable_baselines3_check_env_passes_with_a_finite_box():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # shapes that are not images, a box that is not [-1, 1]
        check_env_of_sb3(single(action_bound=1e4))
        with pytest.raises(AssertionError):
            check_env_of_sb3(single())  # what the option is for


def test_an_episode_equals_the_vector_env_s():
    vector = tiny_env(num_envs=1)
    env = DenoisingEnv(vector)
    for seed in (0, 17):
        obs, info = env.reset(seed=seed)
        wide, _ = vector.reset(seed=seed)
        assert info == {}
        terminated = False
        while not terminated:
            for name, value in wide.items():
                assert np.array_equal(obs[name] if obs[name].shape == (1,) else obs[name][None], value.numpy()), name
            action = act(env, obs)
            obs, reward, terminated, truncated, info = env.step(action)
            wide, wide_reward, wide_terminated, _, wide_info = vector.step(torch.as_tensor(action)[None])
            assert truncated is False and terminated is bool(wide_terminated[0]) and reward == float(wide_reward[0])
        assert isinstance(reward, float) and info["reward_parts"] == {"brightness": reward}
        assert np.array_equal(info["video"], wide_info["video"][0].numpy())


def test_the_embedding_is_observed_unless_switched_off():
    env = single()
    obs, _ = env.reset(seed=0)
    text = env.mdp.condition([int(obs["prompt_id"][0])])["text"][0]
    assert np.array_equal(obs["text"], text.numpy()) and env.observation_space.contains(obs)
    plain = single(observe_embedding=False)
    assert "text" not in plain.reset(seed=0)[0] and "text" not in plain.observation_space.spaces


def test_it_drives_a_process_of_its_own():
    vector = tiny_env(num_envs=4, group_size=2)
    before, _ = vector.reset(seed=0)
    env = DenoisingEnv(vector)
    env.reset(seed=1)
    env.step(np.zeros(LATENT_SHAPE, np.float32))
    assert vector.step(torch.zeros(4, *LATENT_SHAPE))[0]["step"].tolist() == [1] * 4 and env.model is vector.model


def test_observations_are_copies():
    """Writing into what the env gave, or into the action it took, changes nothing in the env."""
    env, untouched = single(), single()
    obs, _ = env.reset(seed=0)
    untouched.reset(seed=0)
    for _ in range(2):
        for value in obs.values():
            value[...] = 0
        action = np.ones(LATENT_SHAPE, np.float32)
        obs, *_ = env.step(action)
        action[:] = 7
        expected, *_ = untouched.step(np.ones(LATENT_SHAPE, np.float32))
        assert all(np.array_equal(obs[name], expected[name]) for name in expected)


def test_reset_options():
    env = single()
    latents = np.full(LATENT_SHAPE, 0.5, np.float32)
    obs, _ = env.reset(options={"prompt": PROMPTS[2], "latents": latents, "step": 3})
    assert obs["prompt_id"] == [2] and obs["step"] == [3] and np.array_equal(obs["latents"], latents)
    assert env.step(np.zeros(LATENT_SHAPE, np.float32))[2] is True
    assert env.reset(options={"prompt_id": 1})[0]["prompt_id"] == [1]
    assert not env.reset(options={"noise_levels": [0.0] * 4})[0]["stochastic"].any()
    with pytest.raises(ValueError, match=r"unknown reset options \['reset_mask'\]; expected some of \['prompt'"):
        env.reset(options={"reset_mask": [True]})


@pytest.mark.parametrize(
    "action, error, message",
    [
        (np.zeros(3, np.float32), ValueError, "must have shape"),
        (np.zeros(LATENT_SHAPE, np.int64), TypeError, "float array of shape .*int64"),
        (torch.zeros(LATENT_SHAPE), TypeError, "float array of shape .*Tensor"),
        (np.full(LATENT_SHAPE, np.nan, np.float32), ValueError, "NaN or infinity"),
    ],
)
def test_bad_actions_are_refused(action, error, message):
    env = single()
    env.reset(seed=0)
    with pytest.raises(error, match=message):
        env.step(action)


@pytest.mark.parametrize("bound", [0.0, -1.0, np.inf, np.nan])
def test_a_bound_is_a_positive_finite_number(bound):
    with pytest.raises(ValueError, match="positive finite number"):
        single(action_bound=bound)
    assert single(action_bound=5.0).action_space.high.max() == 5.0


def test_gymnasium_records_a_video(tmp_path):
    env = gymnasium.wrappers.RecordVideo(single(num_steps=2), str(tmp_path / "videos"), episode_trigger=lambda i: True)
    obs, _ = env.reset(seed=0)
    terminated = False
    while not terminated:
        obs, _, terminated, *_ = env.step(act(env, obs))
    env.close()
    (file,) = (tmp_path / "videos").glob("*.mp4")
    assert file.stat().st_size > 500


def test_no_pictures_without_a_render_mode():
    env = single(render_mode=None)
    env.reset(seed=0)
    assert env.render() is None
