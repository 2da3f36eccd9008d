"""Our own checkers: they pass what keeps the contract on every API, and name what does not."""

from __future__ import annotations

from dataclasses import replace

import gymnasium
import numpy as np
import pytest
import torch
from models import brightness, tiny_env, tiny_model

import vdm_env
from vdm_env import check_env_spec, check_model, check_reward
from vdm_env.errors import ContractError
from vdm_env.rewards import as_reward
from vdm_env.single import DenoisingEnv

MOVING_SHAPES = "MovingShapes-HPS"


# -------------------------------------------------------------------------------------------------------- keep it


@pytest.mark.parametrize("kind", ["flow", "unet"])
def test_our_environments_pass_on_every_api(kind):
    check_env_spec(tiny_env(kind, num_envs=4, group_size=2))
    check_env_spec(tiny_env(kind, api="torchrl"))
    check_env_spec(DenoisingEnv(tiny_env(kind)))
    check_env_spec(gymnasium.wrappers.OrderEnforcing(DenoisingEnv(tiny_env(kind))))


@pytest.mark.parametrize("model", ["MovingShapes", "MovingShapesUNet"])
def test_every_checker_passes_on_the_embedded_world(model):
    """Each foreign checker on its own kind of environment, ours on all three."""
    from gymnasium.utils.env_checker import check_env
    from stable_baselines3.common.env_checker import check_env as check_env_of_sb3
    from torchrl.envs.utils import check_env_specs

    vector = vdm_env.make(f"{model}-HPS", num_envs=2, num_steps=2)
    check_model(vector.model)
    check_reward(vector.mdp.reward)
    check_env_spec(vector)
    check_env_spec(vector.to_torchrl())
    check_env_specs(vector.to_torchrl())
    single = DenoisingEnv(vector, action_bound=1e4)
    check_env_spec(single)
    with pytest.warns(UserWarning):
        check_env(single)
    with pytest.warns(UserWarning):
        check_env_of_sb3(single)


def test_what_is_no_environment_is_refused():
    with pytest.raises(TypeError, match="int is no environment"):
        check_env_spec(3)
    with pytest.raises(TypeError, match="no denoising environment"):
        check_env_spec(gymnasium.make("CartPole-v1"))


# ------------------------------------------------------------------------------------------- broken environments


class Broken:
    """A vector env whose outputs are changed on the way out."""

    def __new__(cls, reset=None, step=None, **options):
        env = tiny_env(**options)
        own_reset, own_step = env.reset, env.step
        env.reset = (lambda **given: reset(env, own_reset, given)) if reset else own_reset
        env.step = (lambda action: step(env, own_step, action)) if step else own_step
        return env


def changed_reset(**changes):
    def reset(env, own, given):
        obs, info = own(**given)
        return {k: v for k, v in (obs | {k: f(obs) for k, f in changes.items()}).items() if v is not None}, info

    return reset


def changed_step(change):
    return lambda env, own, action: change(env, *own(action))


def in_place(env, own, action):
    kept = env._latents
    result = own(action)
    kept.mul_(0.5)
    return result


def forgiving(env, own, action):
    if int(env._step.max()) >= env.num_steps:
        env.reset()
    return own(action)


def forgets_the_seed(env, own, given):
    return own(**({k: v for k, v in given.items() if k != "seed"}))


def careless_mask(env, own, given):
    return own(options={}) if "reset_mask" in (given.get("options") or {}) else own(**given)


@pytest.mark.parametrize(
    "env, message",
    [
        (lambda: Broken(changed_reset(video_seed=lambda o: None)), r"lacks \['video_seed'\]"),
        (lambda: Broken(changed_reset(step=lambda o: o["step"][:, None])), "'step' has shape"),
        (lambda: Broken(changed_reset(step=lambda o: o["step"].float())), "'step' is torch.float32"),
        (lambda: Broken(changed_reset(step=lambda o: o["step"] + 1)), "after reset, expected 0"),
        (lambda: Broken(changed_reset(latents=lambda o: o["latents"] / 0)), "'latents' has NaN or infinity"),
        (lambda: Broken(changed_reset(stochastic=lambda o: ~o["stochastic"])), "exactly where 'action_std' > 0"),
        (lambda: Broken(changed_reset(extra=lambda o: o["step"])), "outside the env's own observation space"),
        (lambda: Broken(forgets_the_seed), r"reset\(seed=3\) twice gave different"),
        (lambda: Broken(careless_mask), "of envs it did not name"),
        (lambda: Broken(step=in_place), "changed the previous observation's 'latents'"),
        (lambda: Broken(step=forgiving), "finished env was stepped without an error"),
        (lambda: Broken(step=changed_step(lambda e, o, r, d, t, i: (o, r[:, None], d, t, i))), "reward has shape"),
        (
            lambda: Broken(step=changed_step(lambda e, o, r, d, t, i: (o, r + 1, d, t, i))),
            "expected 0 before the last step",
        ),
        (lambda: Broken(step=changed_step(lambda e, o, r, d, t, i: (o, r, ~d, t, i))), "only the last step ends"),
        (lambda: Broken(step=changed_step(lambda e, o, r, d, t, i: (o, r, d, ~t, i))), "truncated is True"),
        (lambda: Broken(step=changed_step(lambda e, o, r, d, t, i: (o, r.detach(), d, t, i))), "has no graph"),
        (
            lambda: Broken(step=changed_step(lambda e, o, r, d, t, i: (o | {"latents": o["latents"] + 1}, r, d, t, i))),
            "latents are not A_k x",
        ),
        (
            lambda: Broken(step=lambda e, own, a: own(torch.nan_to_num(a)) if a.shape[-1] == 4 else own(a)),
            "full of NaN was accepted",
        ),
    ],
)
def test_a_broken_environment_is_named(env, message):
    with pytest.raises(ContractError, match=message):
        check_env_spec(env())


def test_a_broken_single_env_is_named():
    env = DenoisingEnv(tiny_env())
    own = env.step
    buffer = {}

    def reused(action):
        obs, *rest = own(action)
        buffer.setdefault("latents", obs["latents"])[:] = obs["latents"]
        return obs | {"latents": buffer["latents"]}, *rest

    env.step = reused
    with pytest.raises(ContractError, match="changed the previous observation's 'latents'"):
        check_env_spec(env)


# --------------------------------------------------------------------------------------------------------- rewards


@pytest.mark.parametrize("name", ["Brightness", "JPEGCompressibility"])
def test_our_rewards_pass(name):
    check_reward(vdm_env.make(model=tiny_model(), reward=name, prompts=["a"]).mdp.reward)
    check_reward(brightness)


@pytest.mark.parametrize(
    "reward, error, message",
    [
        (lambda v, p: v.mean(), ValueError, "one score a video"),
        (lambda v, p: brightness(v, p) * torch.nan, ValueError, "not finite"),
        (lambda v, p: brightness(v, p).detach(), ContractError, "scores have no graph"),
        (lambda v, p: v.mul(255).round().mean((1, 2, 3, 4)), ContractError, "no gradient reaches the pixels"),
        (lambda v, p: brightness(v, p) - v.mean(), ContractError, "may depend on video i and prompt i only"),
        (lambda v, p: brightness(v, p) + torch.rand(len(v)), ContractError, "dropout"),
        (lambda v, p: brightness(v.mul_(0.5), p), ContractError, "changed the video"),
        (lambda v, p: brightness(v.clamp_(0, 1), p), ContractError, "changed the video"),
        (lambda v, p: p.pop() and brightness(v, p), ContractError, "changed the list of prompts"),
        (as_reward(brightness, range=(0.9, 1.0)), ContractError, r"outside its range \(0.9, 1.0\)"),
        (as_reward(brightness, range=(1.0, 0.0)), ContractError, "low < high"),
        (as_reward(brightness, frames="sometimes"), ValueError, "unknown frame policy 'sometimes'"),
        (as_reward(brightness, differentiable="yes"), ContractError, "differentiable is 'yes'"),
        ("HPS", TypeError, "a reward is a callable"),
    ],
)
def test_a_broken_reward_is_named(reward, error, message):
    with pytest.raises(error, match=message):
        check_reward(reward)


# ---------------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("kind", ["flow", "unet"])
def test_our_models_pass(kind):
    check_model(tiny_model(kind))


def test_a_random_model_at_tiny_scale_passes():
    with pytest.warns(UserWarning, match="random weights"):
        env = vdm_env.make(
            "VideoCrafter2-Brightness", weights="random", scale="tiny", height=64, width=64, num_frames=2, num_steps=2
        )
    model = replace(env.model, spec=replace(env.model.spec, height=64, width=64, num_frames=2))
    check_model(model)
    check_env_spec(env)


def with_call(change):
    model = tiny_model()
    return replace(model, call=lambda *given: change(model.call(*given)))


def test_a_broken_model_is_named():
    noisy = tiny_model("unet")
    noisy.denoiser.train()
    lonely = replace(tiny_model(), spec=replace(tiny_model().spec, lora_targets=("query",)))
    for model, message in (
        (object(), "lacks attributes"),
        (noisy, "training mode"),
        (lonely, "no linear layer's name ends with"),
        (with_call(lambda a: a[:, :2]), "predict gave"),
        (with_call(lambda a: a / 0), "NaN or infinity"),
        (with_call(lambda a: a + torch.rand(())), "not deterministic"),
        (with_call(lambda a: a - a.mean()), "depends on the batch"),
        (with_call(lambda a: a.detach()), "cuts the graph"),
    ):
        with pytest.raises(ContractError, match=message):
            check_model(model)


def test_a_broken_codec_is_named():
    model = tiny_model()

    class Codec:
        def __init__(self, change):
            self.change = change

        def encode(self, video):
            return model.encode(video)

        def decode(self, latents, frames=None):
            return self.change(model.decode(latents, frames), frames)

    for change, message in (
        (lambda v, f: v * 2 - 1, "expected 0 .. 1"),
        (lambda v, f: v.detach(), "decode cuts the graph"),
        (lambda v, f: v[:, :1], "decode gave"),
        (lambda v, f: v if f is None else 1 - v, "differs from those frames"),
    ):
        with pytest.raises(ContractError, match=message):
            check_model(replace(model, codec=Codec(change)))


def test_checks_use_no_global_randomness():
    torch.manual_seed(0)
    np.random.seed(0)
    expected = torch.rand(2), np.random.rand()
    torch.manual_seed(0)
    np.random.seed(0)
    check_env_spec(tiny_env())
    check_reward(brightness)
    check_model(tiny_model())
    assert torch.equal(torch.rand(2), expected[0]) and np.random.rand() == expected[1]
