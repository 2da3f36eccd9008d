"""The whole package on a CUDA device that is only pretended: see `tests.pretend_device` for what that can show."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import vdm_env
import vdm_env.single
from algos.checkpoint import load_checkpoint, save_checkpoint
from algos.evaluate import GOLD, Evaluator
from algos.measures import default_features, heldout_rewards, heldout_scores
from algos.meter import Meter
from algos.out_of_memory import is_out_of_memory
from algos.random_state import get_random_state, set_random_state
from algos.rollout import collect, rows, sample_videos
from benchmarks.ceiling import measure_ceiling
from tests.every_model import small_env
from tests.pretend_device import PretendTensor, Waits, pretend_cuda
from tests.svd import pictures
from tests.test_make_matrix import check_gradients, whole_way
from vdm_env import noise, transition
from vdm_env.continuation import ContinuationVectorEnv
from vdm_env.host import joined, on_host, shared, take
from vdm_env.metrics import devil, devil_frames, diversity, evalcrafter, flow, fvd, temporal, vbench
from vdm_env.metrics.devil_measure import dynamics_parts, load_devil
from vdm_env.metrics.vbench_networks import load_dino
from vdm_env.models.visiting import visiting
from vdm_env.rewards.loading import RewardContext

CHEAP = "Wan2.1_1.3B"


@pytest.fixture(scope="module")
def cuda() -> Iterator[Waits]:
    with warnings.catch_warnings(), pretend_cuda(devices=2) as waits:
        warnings.filterwarnings("ignore", ".*random weights")
        yield waits


@pytest.fixture(scope="module")
def env(cuda: Waits) -> Any:
    return small_env(f"{CHEAP}-Brightness", device="cuda", num_envs=2, num_steps=4, guidance_scale=3.0)


# ------------------------------------------------------------------------------------------------ the device itself


REFUSED = {
    "a CPU tensor in a sum": lambda x: x + torch.ones(3),
    "one of them in place": lambda x: torch.ones(3).add_(x),
    "a number on the CPU as the result": lambda x: torch.ones(()).add_(x.sum()),
    "a number on the CPU that is stacked": lambda x: torch.stack([x.sum(), torch.ones(())]),
    "its numbers as places in a CPU tensor": lambda x: torch.ones(3)[x.long()],
    "CPU values for its places": lambda x: x.index_put((torch.tensor([0, 1]),), torch.ones(2)),
    "a CPU matrix in a product": lambda x: x @ torch.ones(3, 3),
    "a CPU mask that chooses": lambda x: torch.where(torch.ones(3, dtype=torch.bool), x, 0.0),
    "a generator of the CPU": lambda x: torch.randn(3, device="cuda", generator=torch.Generator()),
    "another device of its kind": lambda x: x + x.to("cuda:1"),
    "a comparison with a CPU tensor": lambda x: torch.equal(x, torch.ones(3)),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_cuda_device_refuses(what: str, cuda: Waits) -> None:
    with pytest.raises(RuntimeError, match="same device|on cpu or on|Expected a 'cuda'"):
        REFUSED[what](torch.ones(3, device="cuda"))


ALLOWED = {
    "a number on the CPU": (lambda x: x * torch.tensor(2.0), [2.0, 2.0, 2.0]),
    "places on the CPU": (lambda x: x[torch.tensor([0, 0])], [1.0, 1.0]),
    "a list of places": (lambda x: x[[0, 2]], [1.0, 1.0]),
    "a copy from the CPU": (lambda x: x.copy_(torch.tensor([1.0, 2.0, 3.0])), [1.0, 2.0, 3.0]),
    "a number put into places": (lambda x: x.index_put((torch.tensor([1]),), torch.tensor(5.0)), [1.0, 5.0, 1.0]),
    "a tensor like it": (lambda x: torch.zeros_like(x), [0.0, 0.0, 0.0]),
    "another one on purpose": (lambda x: torch.tensor([3.0], device=x.device), [3.0]),
}


@pytest.mark.parametrize("what", ALLOWED)
def test_what_it_allows(what: str, cuda: Waits) -> None:
    call, expected = ALLOWED[what]
    found = call(torch.ones(3, device="cuda"))
    assert found.device == torch.device("cuda:0") and found.is_cuda and found.tolist() == expected


def test_numpy_and_the_host_s_generator_are_apart(cuda: Waits) -> None:
    with pytest.raises(TypeError, match="Tensor.cpu"):
        np.asarray(torch.ones(2, device="cuda"))
    before = torch.get_rng_state()
    first = torch.randn(2, device="cuda")
    assert torch.equal(torch.get_rng_state(), before)
    state = torch.cuda.get_rng_state()
    second = torch.randn(2, device="cuda")
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.randn(2, device="cuda"), second) and not torch.equal(first, second)


def test_a_module_is_trained_there_and_its_parameters_stay_themselves(cuda: Waits) -> None:
    torch.manual_seed(0)
    here = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.SiLU(), nn.Flatten(), nn.Linear(4 * 9, 2))
    there, x = copy.deepcopy(here), torch.randn(2, 3, 5, 5)
    parameters = list(there.parameters())
    optimizers = [torch.optim.AdamW(network.parameters(), lr=0.1) for network in (here, there)]  # before the move
    there.to("cuda")
    assert all(p is q and q.is_cuda for p, q in zip(parameters, there.parameters(), strict=True))
    losses = []
    for network, optimizer, given in zip((here, there), optimizers, (x, x.to("cuda")), strict=True):
        for _ in range(3):
            loss = checkpoint(network, given, use_reentrant=False).square().mean()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss)
    assert float(losses[0]) == pytest.approx(float(losses[1]), rel=1e-5)
    there.to("cpu")
    assert not any(isinstance(p, PretendTensor) for p in there.parameters())
    for p, q in zip(here.parameters(), there.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_every_wait_is_noted_with_its_place(cuda: Waits) -> None:
    x, on_host = torch.ones(3, device="cuda"), torch.ones(3)
    with cuda.counted() as found:
        x.sum().item()
        bool(x.any())
        x.cpu()
        x.nonzero()
        x[x > 0]
        on_host.to("cuda")
        on_host.to("cuda", non_blocking=True)
        (x * 2).sum(dtype=torch.float64).add_(1)
        torch.cuda.synchronize()
    kinds = [kind for kind, _ in found.elements()]
    assert sorted(kinds) == ["from cpu", "item", "item", "nonzero", "nonzero", "synchronize", "to cpu"]
    seeds = torch.tensor([1, 2], device="cuda")
    with cuda.counted() as found:
        noise.normal(seeds, 0, (2,))
    (place,) = found
    assert place[0] == "to cpu" and place[1].startswith("vdm_env/host.py:")


def test_what_the_host_knows_it_knows_until_it_is_changed(cuda: Waits) -> None:
    """`vdm_env.host`: no wait for numbers that came from the CPU, and never an old number."""
    there = shared(torch.tensor([3, 1, 2]), "cuda")
    with cuda.counted() as found:
        some = take({"a": there, "b": there * 2}, torch.tensor([2, 0]))
        assert on_host(some["a"]).tolist() == [2, 3] and on_host(joined(there, some["a"])).tolist() == [3, 1, 2, 2, 3]
        assert on_host(there).tolist() == [3, 1, 2]
    assert not found
    assert some["a"].tolist() == [2, 3] and some["b"].tolist() == [4, 6] and joined(there, there * 2).tolist()[3] == 6
    there.add_(1)
    with cuda.counted() as found:
        assert on_host(there).tolist() == [4, 2, 3]
    assert [kind for kind, _ in found] == ["to cpu"]
    here = torch.tensor([1, 2])
    copied = shared(here, "cpu")
    assert copied.data_ptr() != here.data_ptr() and on_host(copied).data_ptr() == copied.data_ptr()


@pytest.mark.parametrize("text", [
    "CUDA out of memory. Tried to allocate 2.00 GiB",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
])  # fmt: skip
def test_ways_in_which_a_gpu_says_that_its_memory_is_full(text: str) -> None:
    assert is_out_of_memory(RuntimeError(text)) and not is_out_of_memory(RuntimeError("CUBLAS_STATUS_EXECUTION_FAILED"))


# ------------------------------------------------------------------------------------------------ what options do


@pytest.mark.parametrize("sampler", ["flow_ode", "flow_grpo", "dance", "cps"])
def test_samplers_and_the_parts_of_the_process(sampler: str, env: Any) -> None:
    twin = env.derive(sampler=sampler)
    policy = twin.make_policy(lora_rank=1)
    obs, _ = twin.reset(seed=1)
    with torch.no_grad():
        dist = policy.dist(obs)
        action = policy(obs)
        after, *_ = twin.step(action)
        mdp, table = twin.mdp, twin.mdp.table
        scores = [dist.log_prob(action), dist.log_prob_sum(action), dist.kl(dist), dist.entropy()]
        where = (obs["latents"], action, after["latents"], obs["step"])
        scores += [transition.log_prob(table, *where), transition.cps_score(table, *where)]
        scores += [transition.kl(table, action, action, obs["step"])]
        clean = mdp.x0(obs["latents"], action, obs["step"])
        for t in (obs["timestep"], obs["timestep"].cpu()):
            noised = mdp.add_noise(clean, torch.randn_like(clean), t)
            assert noised.is_cuda and mdp.target(clean, noised, t).is_cuda
            assert mdp.schedule.x0_from(noised, action, t).is_cuda
    assert all(s.is_cuda and s.shape == (2,) and bool(torch.isfinite(s).all()) for s in scores)


def test_partial_resets_and_envs_at_different_steps(env: Any) -> None:
    policy = env.make_policy(lora_rank=1)
    obs, _ = env.reset(seed=1, options={"step": [0, 1]})
    with torch.no_grad():
        for _ in range(3):
            obs, reward, terminated, _, info = env.step(policy(obs))
        assert terminated.tolist() == [False, True] and info["video"].shape[0] == 1
        assert reward.is_cuda and reward[0] == 0 and bool(reward[1] != 0)
        kept = obs["latents"][0].cpu()
        obs, _ = env.reset(options={"reset_mask": terminated})
        assert torch.equal(obs["latents"][0].cpu(), kept) and obs["step"].tolist() == [3, 0]
        assert len(env.render()) == 2


def test_an_action_that_is_not_finite_is_refused_at_the_end(env: Any) -> None:
    policy = env.make_policy(lora_rank=1)
    obs, _ = env.reset(seed=1)
    with torch.no_grad():
        obs, *_ = env.step(policy(obs).index_fill(0, torch.tensor([1], device="cuda"), torch.nan))
        with pytest.raises(ValueError, match=r"NaN or infinity for envs \[1\]"):
            for _ in range(3):
                obs, *_ = env.step(policy(obs))


@pytest.mark.parametrize("model", [CHEAP, "VideoCrafter2"])
def test_the_contracts_hold(model: str, cuda: Waits) -> None:
    small = small_env(f"{model}-Brightness", device="cuda", num_envs=2)
    vdm_env.check_env_spec(small)


@pytest.mark.parametrize("options", [
    {"gradient_checkpointing": True},
    {"offload_activations": True},
    {"gradient_checkpointing": True, "offload_activations": True},
    {"guidance_interval": (0.5, 2.0)},
    {"lora_rank": 0},
], ids=str)  # fmt: skip
def test_options_of_policies(options: dict[str, Any], env: Any) -> None:
    policy = env.make_policy(**{"lora_rank": 1} | options)
    obs, _ = env.reset(seed=1, options={"step": [1, 2]})
    gradients = torch.autograd.grad(policy.mean(obs).square().mean(), policy.trainable_parameters(), allow_unused=True)
    check_gradients([g for g in gradients if g is not None])
    policy.refresh_reference()
    with torch.no_grad(), policy.reference():
        assert policy.mean(obs).is_cuda
    policy.load_reference_state_dict(policy.reference_state_dict())
    with torch.no_grad(), policy.reference():
        assert policy.mean(obs).is_cuda


@pytest.mark.parametrize(("model", "options"), [
    ("VideoCrafter2", {"tile_decoding": True, "decode_frames": "random2", "num_steps": 1}),
    ("SVD", {"decode_chunk": 1, "num_steps": 1}),
    (CHEAP, {"free_text_encoder": True, "prompts": ["a dog", "a cat"]}),
    (CHEAP, {"observe_embedding": True}),
    (CHEAP, {"dtype": torch.bfloat16}),
], ids=["tiles", "chunks", "freed", "embedding", "bfloat16"])  # fmt: skip
def test_options_of_make(model: str, options: dict[str, Any], cuda: Waits) -> None:
    reward, gradients = whole_way(small_env(f"{model}-Brightness", device="cuda", **options))
    assert reward.is_cuda
    check_gradients(gradients)


def test_text_encoders_rest_in_main_memory(env: Any) -> None:
    encoder = env.model.text.encoder
    assert {p.device.type for p in encoder.parameters()} == {"cpu"}
    with visiting(encoder, torch.device("cuda")):
        assert {p.device.type for p in encoder.parameters()} == {"cuda"}
    assert {p.device.type for p in encoder.parameters()} == {"cpu"}
    assert env.mdp.condition([0])["text"].is_cuda


def test_other_faces_of_the_env(env: Any) -> None:
    vdm_env.check_env_spec(env.to_torchrl())
    single = vdm_env.single.DenoisingEnv(env)
    vdm_env.check_env_spec(single)
    obs, _ = single.reset(seed=0)
    obs, reward, *_ = single.step(np.zeros(single.action_space.shape, dtype=np.float32))
    assert all(isinstance(v, np.ndarray) for v in obs.values()) and isinstance(reward, float)
    assert single.render().dtype == np.uint8


def test_a_continued_video(cuda: Waits) -> None:
    env = ContinuationVectorEnv(small_env("SVD-Brightness", device="cuda", images=pictures(2)), clips=2)
    reward, gradients = whole_way(env)
    check_gradients(gradients)


def test_a_second_device(cuda: Waits) -> None:
    env = small_env(f"{CHEAP}-Brightness", device="cuda:1")
    reward, gradients = whole_way(env)
    assert {t.device for t in (reward, *gradients)} == {torch.device("cuda:1")}
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "synchronize", lambda device=None: asked.append(torch.device(device)))
        env.mdp.clock()
        with Meter(counters=env.mdp.counters, device=env.device).phase("train"):
            pass
        measure_ceiling("cuda:1", torch.float32, sizes=(4,), repeats=1, calls=1)
    assert set(asked) == {torch.device("cuda:1")} and len(asked) >= 5


# ------------------------------------------------------------------------------------------------ measures and states


def test_metrics_of_videos_there(cuda: Waits) -> None:
    video = torch.rand(4, 9, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to("cuda")
    features = torch.rand(4, 6, 8, generator=torch.Generator().manual_seed(1)).to("cuda")
    motion = torch.rand(6, 2, 32, 32, device="cuda")
    large = torch.rand(1, 8, 3, 128, 128, device="cuda")
    context = RewardContext(weights="random", scale="tiny", device="cuda", num_frames=8)
    found = {
        "flicker": temporal.temporal_flicker(video),
        "smoothness": temporal.motion_smoothness(video),
        "degree": temporal.dynamic_degree(video),
        "consistency": temporal.frame_consistency(features),
        "dino": devil.dino_variation(features),
        "segments": devil.segment_distance(features),
        "similarity": devil_frames.frame_similarity(video),
        "hash": devil_frames.hash_distance(video),
        "entropy": devil_frames.temporal_entropy(video),
        "range": devil.dynamics_range(features[:, 0, 0]),
        "diversity": diversity.diversity(features[:, 0]),
        "frechet": fvd.frechet_distance(features.flatten(0, 1), features.flatten(0, 1) + 1),
        "clip": evalcrafter.clip_temp(features),
        "warp": flow.warp(video[:, 0], motion[:4]),
        "occlusion": evalcrafter.occlusion(motion, motion.flip(0)),
        "subject": vbench.subject_consistency(video, load_dino(context)),
    }
    found |= {f"devil {name}": value for name, value in dynamics_parts(large, load_devil(context)).items()}
    assert {name for name, value in found.items() if not value.is_cuda} == set()


def test_the_gold_score_and_held_out_rewards_in_an_evaluation(cuda: Waits, tmp_path: Path) -> None:
    env = vdm_env.make("MovingShapes-HPS", device="cuda", num_envs=2, num_steps=2)
    policy = env.make_policy(lora_rank=1)
    rewards = heldout_rewards(env, ["Aesthetic", "Action"])
    ids = env.prompt_ids("validation")[:1]
    evaluator = Evaluator(env, ids, [1, 2], num_videos=1, heldout=rewards, features=default_features(env))
    found = evaluator.evaluate(policy)
    assert {row["reward"] for row in found.rows} >= {GOLD, "heldout/Action", "diversity", "kl_ref_nats", "motion"}
    assert found.videos is not None and found.nan_values == 0
    video, prompts = torch.rand(2, 8, 3, 32, 32, device="cuda"), [env.prompts[i] for i in env.prompt_ids()[:2]]
    assert all(s.shape == (2,) for s in heldout_scores(rewards, video, prompts, [1, 2]).values())
    assert env.mdp.gold(video, prompts).total.shape == (2,)


def test_checkpoints_come_back_on_the_device(env: Any, tmp_path: Path) -> None:
    policy = env.make_policy(lora_rank=2)
    optimizer = torch.optim.AdamW(policy.trainable_parameters(), lr=0.1)
    obs, _ = env.reset(seed=1)
    policy.mean(obs).square().mean().backward()
    optimizer.step()
    save_checkpoint(tmp_path / "checkpoint", {"optimizer": optimizer.state_dict()}, policy)
    other = env.make_policy(lora_rank=2, seed=5)
    other.load(tmp_path / "checkpoint" / "policy")
    again = torch.optim.AdamW(other.trainable_parameters(), lr=0.1)
    again.load_state_dict(load_checkpoint(tmp_path / "checkpoint")["optimizer"])
    for p, q in zip(policy.trainable_parameters(), other.trainable_parameters(), strict=True):
        assert q.is_cuda and torch.equal(p, q)
        assert torch.equal(optimizer.state[p]["exp_avg"], again.state[q]["exp_avg"])
        assert again.state[q]["exp_avg"].is_cuda and not again.state[q]["step"].is_cuda
    state = get_random_state("cuda")
    drawn = torch.randn(2, device="cuda")
    set_random_state(state, "cuda")
    assert torch.equal(torch.randn(2, device="cuda"), drawn)


# ------------------------------------------------------------------------------------------------ waits


@pytest.mark.parametrize("model", ["VideoCrafter2", "MovingShapes", "OpenSora1.2", "CogVideoX2B", "Wan2.2_A14B", "SVD"])
def test_no_wait_within_an_episode(model: str, cuda: Waits) -> None:
    """Between the first step, which embeds prompts, and the last, which looks at rewards, the host runs ahead.

    Mochi is left out: its attention, which is diffusers', looks for each prompt's words by their mask.
    """
    small = small_env(f"{model}-Brightness", device="cuda", num_envs=2, num_steps=4)
    policy = small.make_policy(lora_rank=1)
    with torch.no_grad():
        obs, _ = small.reset(seed=0)
        obs, *_ = small.step(policy(obs))
        for _ in range(small.num_steps - 2):
            with cuda.counted() as found:
                obs, *_ = small.step(policy(obs))
            assert not found
        with cuda.counted() as found:
            policy.dist(obs).log_prob(policy(obs))
        assert not found


def test_no_wait_in_what_updates_are_made_of(env: Any, cuda: Waits) -> None:
    policy = env.make_policy(lora_rank=1, guidance_interval=(0.5, 2.0))
    rollout = collect(env, policy)
    ids = torch.tensor([0, 1])
    policy.predict(rollout.observations[0]["latents"], rollout.observations[0]["timestep"], ids)
    with cuda.counted() as found:
        for start in range(2):
            obs, action, old = rows(rollout, 1, start, start + 1)
            (policy.dist(obs).log_prob(action) - old).mean().backward()
        policy.predict(obs["latents"], obs["timestep"], ids[:1]).mean().backward()
    assert not found


def test_what_an_episode_waits_for(env: Any, cuda: Waits) -> None:
    """At its ends: clocks, the check of latents and scores, and the results that somebody asked for."""
    policy = env.make_policy(lora_rank=1)
    sample_videos(env, policy, 1)
    with cuda.counted() as found:
        sample_videos(env, policy, 1)
    kinds = {}
    for (kind, place), times in found.items():
        kinds.setdefault((kind, place.partition(":")[0]), []).append(times)
    assert {key: sum(times) for key, times in kinds.items()} == {
        ("synchronize", "vdm_env/mdp.py"): 6,
        ("item", "vdm_env/env.py"): 1,
        ("item", "vdm_env/rewards/base.py"): 1,
        ("to cpu", "algos/rollout.py"): 3,
    }
