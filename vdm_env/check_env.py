"""The contract of environments, tried step by step; see `vdm_env.checker`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vdm_env.env_drivers import Driver, driver_of
from vdm_env.errors import ContractError, expect
from vdm_env.noise import normal


def check_env_spec(env: Any) -> None:
    """Checks an environment of any of the three kinds: torch-native vector env, single numpy env, TorchRL `EnvBase`.

    Observation (keys, shapes, types, the space's bounds), seeding, the transition, rewards and ends, that old
    observations stay as they were, autograd, partial resets, and that a finished env, a misshapen action and NaN are
    refused. Actions are plain noise: the network is never run, the reward model is. The env is left in the middle of
    nothing: reset it afterwards.

    Raises:
        ContractError: the first breach found.
        TypeError: not an environment of these kinds.
    """
    driver = driver_of(env)
    _check_start(driver)
    first = _check_episode(driver, seed=7)
    second = _check_episode(driver, seed=7)
    for name in ("latents", "reward"):
        same = torch.allclose(first[name], second[name], rtol=1e-4, atol=1e-6)
        expect(same, f"the same seed and actions gave another final {name}; draw all randomness from the seed")
    _check_refusals(driver)
    if driver.keeps_graph:
        _check_graph(driver)
    if driver.num_envs > driver.group_size and driver.takes_mask:
        _check_partial_reset(driver)


def _check_start(driver: Driver) -> None:
    batch, shape = driver.num_envs, tuple(driver.mdp.latent_shape)
    expect(driver.num_steps >= 1, f"num_steps is {driver.num_steps}; an episode has at least one denoising step")
    obs = driver.reset(seed=3)
    kinds = {"latents": (batch, *shape)} | dict.fromkeys(("timestep", "step", "action_std"), (batch,))
    kinds |= dict.fromkeys(("stochastic", "prompt_id", "video_seed"), (batch,))
    missing = sorted(set(kinds) - set(obs))
    expect(not missing, f"the observation lacks {missing}; it needs {sorted(kinds)}")
    for name, wanted in kinds.items():
        got = tuple(obs[name].shape)
        expect(got == wanted, f"observation {name!r} has shape {got}, expected {wanted}")
    for name in ("step", "prompt_id", "video_seed"):
        expect(obs[name].dtype == torch.int64, f"observation {name!r} is {obs[name].dtype}, expected torch.int64")
    expect(obs["stochastic"].dtype == torch.bool, f"'stochastic' is {obs['stochastic'].dtype}, expected torch.bool")
    for name in ("latents", "timestep", "action_std"):
        expect(obs[name].is_floating_point(), f"observation {name!r} is {obs[name].dtype}, expected a float type")
        expect(bool(torch.isfinite(obs[name]).all()), f"observation {name!r} has NaN or infinity after reset")
    expect(not obs["step"].any(), f"'step' is {obs['step'].tolist()} after reset, expected 0 everywhere")
    agree = bool(((obs["action_std"] > 0) == obs["stochastic"]).all())
    expect(agree, "'stochastic' must be True exactly where 'action_std' > 0: policies rely on either")
    expect(driver.in_space(), "the observation after reset is outside the env's own observation space or spec")
    again, other = driver.reset(seed=3), driver.reset(seed=4)
    for name, value in obs.items():
        expect(torch.equal(value, again[name]), f"reset(seed=3) twice gave different {name!r}; seed everything from it")
    expect(not torch.equal(other["latents"], obs["latents"]), "reset(seed=3) and reset(seed=4) gave the same latents")


def _check_episode(driver: Driver, seed: int) -> dict[str, Tensor]:
    obs = driver.reset(seed=seed)
    reward = torch.zeros(driver.num_envs)
    for k in range(driver.num_steps):
        kept = {name: value.clone() for name, value in obs.items()}
        action = _action(obs)
        after, reward, terminated, truncated = driver.step(action)
        where = f"step {k} of {driver.num_steps}"
        for name, value in kept.items():
            expect(
                torch.equal(value, obs[name]),
                f"{where} changed the previous observation's {name!r}; return new tensors",
            )
        expect(
            tuple(reward.shape) == (driver.num_envs,),
            f"{where}: reward has shape {tuple(reward.shape)}, expected [num_envs]",
        )
        expected = driver.mdp.step(obs["latents"], action, obs["step"])
        near = torch.allclose(after["latents"].to(expected), expected, rtol=1e-4, atol=1e-5)
        expect(near, f"{where}: latents are not A_k x + B_k a of the table; use env.mdp.step")
        expect(
            bool((after["step"] == k + 1).all()),
            f"{where}: 'step' is {after['step'].tolist()} afterwards, expected {k + 1}",
        )
        last = k == driver.num_steps - 1
        flags = terminated.tolist()
        expect(
            bool((terminated == last).all()),
            f"{where}: terminated is {flags}, expected {last}: only the last step ends",
        )
        expect(not bool(truncated.any()), f"{where}: truncated is True; episodes have a fixed length and are never cut")
        if not last:
            expect(not bool(reward.any()), f"{where}: reward is {reward.tolist()}, expected 0 before the last step")
        expect(driver.in_space(), f"{where}: the observation is outside the env's own observation space or spec")
        obs = after
    expect(bool(torch.isfinite(reward).all()), f"the final reward is {reward.tolist()}, expected finite numbers")
    quiet = not obs["stochastic"].any() and not obs["action_std"].any()
    expect(quiet, "after the last step 'stochastic' must be False and 'action_std' 0: there is no further step")
    return {"latents": obs["latents"].detach(), "reward": reward.detach()}


def _check_refusals(driver: Driver) -> None:
    obs = driver.reset(seed=5)
    good = _action(obs)
    nan, later = torch.full_like(good, torch.nan), driver.num_steps - 1
    # Numbers on an accelerator may be looked at when the episode ends, shapes at once.
    for action, what, further in ((good[..., :-1], "of the wrong shape", 0), (nan, "full of NaN", later)):
        driver.reset(seed=5)
        try:
            driver.step(action)
            for _ in range(further):
                driver.step(good)
        except (ValueError, TypeError, RuntimeError):
            continue
        raise ContractError(f"an action {what} was accepted; raise ValueError and say what was expected")
    obs = driver.reset(seed=5)
    for _ in range(driver.num_steps):
        obs = driver.step(_action(obs))[0]
    try:
        driver.step(good)
    except RuntimeError:
        return
    raise ContractError("a finished env was stepped without an error; raise RuntimeError, autoreset is off")


def _check_graph(driver: Driver) -> None:
    if not driver.mdp.reward.differentiable:
        return
    obs = driver.reset(seed=5)
    actions = []
    reward = torch.zeros(driver.num_envs)
    for _ in range(driver.num_steps):
        actions.append(_action(obs).requires_grad_())
        obs, reward, *_ = driver.step(actions[-1])
    what = "the reward says it is differentiable, but"
    expect(
        reward.requires_grad,
        f"{what} the final reward has no graph; keep step free of detach and no_grad, or say it is not",
    )
    gradients = torch.autograd.grad(reward.sum(), actions, allow_unused=True)
    for k, gradient in enumerate(gradients):
        expect(gradient is not None, f"{what} no gradient reaches the action of step {k}")
        expect(bool(torch.isfinite(gradient).all()), f"{what} its gradient at the action of step {k} is not finite")


def _check_partial_reset(driver: Driver) -> None:
    obs = driver.reset(seed=5)
    before = driver.step(_action(obs))[0]
    mask = torch.zeros(driver.num_envs, dtype=torch.bool)
    mask[: driver.group_size] = True
    after = driver.reset(options={"reset_mask": mask})
    for name, value in before.items():
        kept = torch.equal(after[name].cpu()[~mask], value.cpu()[~mask])
        expect(kept, f"reset_mask changed {name!r} of envs it did not name; leave them bit-identical")
    expect(not after["step"].cpu()[mask].any(), "envs named by reset_mask do not start at step 0")


def _action(obs: dict[str, Tensor]) -> Tensor:
    drawn = normal(obs["video_seed"], obs["step"], obs["latents"].shape[1:])
    return drawn.to(obs["latents"].device, obs["latents"].dtype)
