"""Contracts that users meet first: wrong arguments to make, reset, derive and make_policy."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from models import tiny_env

from vdm_env import CorruptWeightsError, list_envs, make
from vdm_env.models import moving_shapes
from vdm_env.worlds.moving_shapes import WEIGHTS


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"id": 3}, TypeError, "id must be a text"),
        ({"dtype": "float16"}, ValueError, "dtype='float16'"),
        ({"dtype": torch.int64}, ValueError, "expected torch.float32"),
        ({"device": "foo"}, ValueError, "device='foo' cannot be used"),
        ({"device": "meta"}, ValueError, "holds shapes without numbers"),
        ({"guidance_scale": float("nan")}, ValueError, "guidance_scale=nan"),
        ({"guidance_scale": "x"}, ValueError, "guidance_scale='x'"),
        ({"noise_level": "a"}, ValueError, "noise_level='a'"),
        ({"seed": "a"}, ValueError, "seed='a'"),
        ({"num_envs": True}, ValueError, "num_envs=True"),
    ],
)
def test_make_refuses(arguments, error, message):
    arguments = {"id": "MovingShapes-HPS", **arguments}
    with pytest.raises(error, match=message):
        make(arguments.pop("id"), **arguments)


def test_numpy_numbers_are_numbers():
    assert make("MovingShapes-Brightness", num_envs=np.int64(2)).num_envs == 2


def test_published_names_are_not_given_to_the_small_networks():
    assert "MovingShapes-HPS" in list_envs() and "VideoCrafter2-HPSv2.1" in list_envs()
    for name in ("HPSv2", "HPSv2.1"):
        assert f"MovingShapes-{name}" not in list_envs()
        with pytest.raises(ValueError, match=f"{name} is a published network"):
            make(f"MovingShapes-{name}")


def test_making_an_env_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    make("MovingShapes-HPS").make_policy()
    assert torch.equal(torch.rand(2), expected)


def test_a_damaged_tokenizer_is_named(tmp_path):
    folder = tmp_path / "weights"
    shutil.copytree(WEIGHTS, folder)
    file = folder / "shared" / "tokenizer" / "tokenizer.json"
    file.write_text(file.read_text()[:100])
    with pytest.raises(CorruptWeightsError, match="tokenizer"):
        moving_shapes.load(
            moving_shapes.FLOW_SPEC, weights="pretrained", device="cpu", dtype=torch.float32, folder=folder
        )


def test_derive_takes_rewards_by_name():
    env = make("MovingShapes-HPS")
    assert env.derive(reward="Brightness").mdp.reward.name == "Brightness"
    assert env.derive(reward={"HPS": 2.0, "Brightness": 1.0}).mdp.reward.name == "2*HPS+Brightness"


@pytest.mark.parametrize(
    ("options", "message"),
    [({"lora_rank": 1.5}, "lora_rank"), ({"lora_alpha": -1}, "lora_alpha"), ({"guidance_scale": 1e999}, "guidance")],
)
def test_make_policy_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_env().make_policy(**options)


def test_a_refused_reset_adds_no_prompts():
    env = tiny_env(num_envs=2)
    before = len(env.prompts)
    with pytest.raises(ValueError):
        env.reset(options={"prompts": ["one", "two", "three"]})
    with pytest.raises(ValueError):
        env.reset(options={"prompts": ["one", "two"], "step": 99})
    assert len(env.prompts) == before
    for wrong in ({"seed": "a"}, {"seed": 1.5}, {"options": "foo"}):
        with pytest.raises(TypeError):
            env.reset(**wrong)
    with pytest.raises(ValueError, match="prompt_ids=3"):
        env.reset(options={"prompt_ids": 3})


def test_rollout_seconds_are_counted_apart_from_decoding_and_scoring():
    env = tiny_env(num_envs=2)
    policy = env.make_policy()
    obs, _ = env.reset(seed=0)
    with torch.no_grad():
        for _ in range(env.num_steps):
            assert env.mdp.counters.rollout_s == 0.0
            obs, *_ = env.step(policy(obs))
    assert env.mdp.counters.rollout_s > 0.0 and env.mdp.counters.decode_s > 0.0


def test_a_reward_that_edits_the_video_is_named():
    def dark(video, prompts):
        return video.mul_(0).mean((1, 2, 3, 4))

    env = tiny_env(reward=dark)
    obs, _ = env.reset(seed=0)
    with torch.no_grad(), pytest.raises(ValueError, match="reward 'dark' changed the video it was given, in place"):
        for _ in range(env.num_steps):
            obs, *_ = env.step(torch.zeros_like(obs["latents"]))
    with pytest.raises(ValueError, match="reward 'dark' changed the video"):
        env.mdp.score(torch.rand(1, 4, 3, 8, 8), ["a"])
    with torch.inference_mode():  # nothing is counted there
        assert env.mdp.score(torch.rand(1, 4, 3, 8, 8), ["a"]) == 0


def test_a_video_in_bytes_is_not_encoded_as_if_it_were_between_0_and_1() -> None:
    env = make("MovingShapes-HPS", num_envs=1)
    with pytest.raises(TypeError, match="divide bytes by 255"):
        env.mdp.encode(torch.zeros(1, 8, 3, 32, 32, dtype=torch.uint8))
