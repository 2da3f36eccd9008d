"""What evaluations measure beside the reward: it is right, named as agreed, and changes nothing that is sampled."""

from __future__ import annotations

import json

import pytest
import torch
from gaussian import gaussian_env
from killing import rows
from test_run import FakeAlgorithm, FakeEnv, FakePolicy

import algos
from algos import Evaluator
from algos.measures import diversity, frames_for, motion, step_kl
from vdm_env import noise
from vdm_env.rewards.base import select_frames


def moved(env, by=0.1):
    policy = env.make_policy(lora_rank=2)
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.add_(by)
    return policy


def brightness(video, prompts):
    return video.mean((1, 2, 3, 4))


def of(found, name):
    return {(row["prompt_id"], row["noise_seed"]): row["value"] for row in found.rows if row["reward"] == name}


def test_measures_beside_the_reward_do_not_change_it():
    env = gaussian_env(num_envs=3, group_size=1, num_steps=3)
    policy = moved(env)
    plain = Evaluator(env, [0, 1], (0, 1), kl=False, motion=False).evaluate(policy)
    state = torch.get_rng_state()
    drawing = lambda video, prompts: brightness(video, prompts) + torch.rand(len(video))  # noqa: E731
    full = Evaluator(env, [0, 1], (0, 1), heldout={"B": drawing}, features=lambda video: video.flatten(1))
    found = full.evaluate(policy)
    for name in ("proxy", *(row["reward"] for row in plain.rows)):
        assert of(plain, name) == of(found, name)
    assert {row["reward"] for row in found.rows} - {row["reward"] for row in plain.rows} >= {
        "heldout/B", "kl_ref_nats", "diversity",
    }  # fmt: skip
    assert not torch.equal(torch.get_rng_state(), state)  # the held-out reward did draw


def test_kl_is_the_sum_over_steps_and_elements_for_the_first_noise_seed():
    env = gaussian_env(num_envs=4, group_size=1, num_steps=3)
    policy = moved(env)
    found = of(Evaluator(env, [0, 1], (5, 6)).evaluate(policy), "kl_ref_nats")
    assert set(found) == {(0, 5), (1, 5)}
    obs, _ = env.reset(seed=[5, 6, 5, 6], options={"prompt_ids": [0, 0, 1, 1]})
    total = torch.zeros(4, dtype=torch.float64)
    with torch.no_grad():
        for _ in range(env.num_steps):
            if bool(obs["stochastic"].any()):
                mean = policy.mean(obs)
                with policy.reference():
                    apart = (mean - policy.mean(obs)).flatten(1).double()
                total += (0.5 * (apart / obs["action_std"][:, None]) ** 2).sum(1)
            obs, *_ = env.step(policy(obs))
    assert [found[0, 5], found[1, 5]] == pytest.approx([float(total[0]), float(total[2])], rel=1e-5)
    assert min(found.values()) > 0
    untrained = Evaluator(env, [0, 1]).evaluate(env.make_policy(lora_rank=2))
    assert set(of(untrained, "kl_ref_nats").values()) == {0.0}


def test_no_rows_of_what_cannot_be_measured():
    env = gaussian_env(num_envs=2, group_size=1, num_steps=3, noise_level=0.0)
    assert of(Evaluator(env, [0, 1]).evaluate(moved(env)), "kl_ref_nats") == {}
    found = Evaluator(FakeEnv(), [0, 1], features=brightness).evaluate(FakePolicy())  # no dist, one noise seed
    assert of(found, "kl_ref_nats") == of(found, "diversity") == {}
    assert motion(torch.rand(2, 1, 3, 4, 4)) is None and diversity(torch.ones(1, 3)) is None
    assert step_kl(FakePolicy(), {}, torch.tensor([0])) is None


def test_diversity_is_the_mean_distance_of_the_videos_of_a_prompt():
    features = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])
    assert diversity(features) == pytest.approx((1 + 2 * (1 - 0.5**0.5)) / 3)
    table = dict(zip((0.2, 0.7, 0.5), features, strict=True))  # the fake's video is grey of the seed's level

    def extract(video):
        return torch.stack([table[round(float(one.mean()), 1)] for one in video])

    found = Evaluator(FakeEnv(), [4, 1], (2, 7, 5), features=extract).evaluate(FakePolicy())
    expected = pytest.approx((1 + 2 * (1 - 0.5**0.5)) / 3)
    assert of(found, "diversity") == {(4, None): expected, (1, None): expected}
    assert found.mean("diversity") == expected


def test_heldout_rewards_get_the_frames_they_ask_for():
    seen = []

    class One:
        name, differentiable, frames, range = "One", False, "random1", (0.0, 1.0)

        def __call__(self, video, prompts):
            seen.append(video)
            return video.mean((1, 2, 3, 4))

    video = torch.arange(2 * 4, dtype=torch.float32).view(2, 4, 1, 1, 1).expand(2, 4, 3, 2, 2)
    picked = frames_for("random1", video, [3, 8])[:, 0, 0, 0, 0].tolist()
    wanted = [int(select_frames("random1", 4, noise.generator_for(seed, noise.FRAMES))) for seed in (3, 8)]
    assert picked == [wanted[0], 4 + wanted[1]] and frames_for("all", video, [3, 8]) is video
    found = Evaluator(FakeEnv(), [0], (2, 7), heldout={"One": One()}).evaluate(FakePolicy())
    assert of(found, "heldout/One") == pytest.approx({(0, 2): 0.2, (0, 7): 0.7})
    assert {tuple(part.shape) for part in seen} == {(3, 1, 3, 4, 4)}
    with pytest.raises(ValueError, match=r"held-out reward 'sum' returned shape \(\); expected \(3,\)"):
        Evaluator(FakeEnv(), [0], heldout={"sum": lambda video, prompts: video.mean()}).evaluate(FakePolicy())


def test_a_heldout_score_that_is_not_finite_is_null():
    found = Evaluator(FakeEnv(), [0], heldout={"N": lambda v, p: torch.full((len(v),), torch.nan)}).evaluate(
        FakePolicy()
    )
    assert of(found, "heldout/N") == {(0, 0): None} and found.nan_values == 1


def test_several_splits_stand_side_by_side_and_the_first_decides(tmp_path):
    main, other = FakeEnv(), FakeEnv()
    other.split = "train"
    both = [Evaluator(main, [0], num_videos=1), Evaluator(other, [5, 4], (0, 3))]
    result = algos.run(FakeAlgorithm(), out=tmp_path, updates=2, evaluate=both, eval_every=1, progress=False)
    evals = rows(tmp_path / "eval.jsonl")
    last = [row for row in evals if row["update"] == 2 and row["reward"] == "proxy"]
    assert [(row["split"], row["prompt_id"], row["noise_seed"]) for row in last] == [
        ("test", 0, 0), ("train", 5, 0), ("train", 5, 3), ("train", 4, 0), ("train", 4, 3),
    ]  # fmt: skip
    assert result.scores["proxy"] == 1.0  # of prompt 0 alone
    assert json.loads((tmp_path / "checkpoints/best.json").read_text()) == {"update": 2, "reward": 1.0}
    task = json.loads((tmp_path / "run.json").read_text())["task"]
    assert task["eval_split"] == "test" and task["eval_prompt_ids"] == [0] and task["heldout"] == []
    assert task["eval_splits"]["train"]["prompt_ids"] == [5, 4] and list(task["eval_splits"]) == ["test", "train"]
    assert task["eval_splits"]["test"]["prompts_sha256"] == task["prompts_test_sha256"]
    again = algos.run(FakeAlgorithm(), out=tmp_path, updates=2, evaluate=both, eval_every=1, resume=True)
    assert again.scores == pytest.approx(result.scores)
    with pytest.raises(ValueError, match=r"splits \['test', 'test'\]; expected one for each"):
        algos.run(FakeAlgorithm(), out=tmp_path / "b", updates=1, evaluate=[both[0], both[0]])


def test_the_embedded_world_has_features_and_heldout_rewards():
    import vdm_env

    env = vdm_env.make("MovingShapes-HPS", num_envs=2, num_steps=1)
    features, rewards = algos.default_features(env), algos.heldout_rewards(env, ["Aesthetic"])
    assert features.name == "VideoMAE of moving_shapes (own small weights)" and list(rewards) == ["Aesthetic"]
    evaluator = Evaluator(env, [0, 1], (0, 1), heldout=rewards, features=features)
    assert evaluator.info()["heldout"] == ["Aesthetic"] and evaluator.info()["diversity_features"] == features.name
    video = torch.rand(2, env.mdp.num_frames, 3, env.mdp.height, env.mdp.width)
    first, second = features(video), features(video)
    assert first.ndim == 2 and len(first) == 2 and torch.equal(first, second) and not first.requires_grad
    assert algos.default_features(gaussian_env()) is None


def test_a_heldout_reward_may_want_more_frames_than_the_env_decodes():
    import vdm_env

    env = vdm_env.make("MovingShapes-HPS", num_envs=1, num_steps=1, decode_frames="random1")
    with pytest.raises(ValueError, match="looks at 8 frames"):
        env.derive(reward="Action")
    assert algos.heldout_rewards(env, ["Action"])["Action"](torch.rand(1, 8, 3, 32, 32), [env.prompts[0]]).shape == (1,)
