"""Flow-GRPO and its relatives: the optimum, ratios, the window, who is trained on, the KL, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from conduct import goes_on_bit_for_bit
from gaussian import START, Recorder, full_policy, gaussian_env
from models import tiny_env

from algos import FlowGRPO, FlowGRPOConfig
from algos.flow_grpo import best_and_worst
from algos.losses import clipped_surrogate
from algos.rollout import collect
from vdm_env.rewards.combine import Part, WeightedSum
from vdm_env.worlds.gaussian import final_law, optimal_means


def grpo_on(env, policy, **options):
    options = {"videos_per_rollout": 32, "learning_rate": 0.01, **options}
    return FlowGRPO(env, policy, FlowGRPOConfig(**options))


def constant(video, prompts):
    return torch.ones(len(video))


@pytest.mark.parametrize(
    ("schedule", "options"),
    [
        ("flow", {"timestep_fraction": 1.0}),
        ("epsilon", {"global_std": False, "std": "unbiased", "std_eps": 1e-8}),
        ("flow", {"best_of_n": 4, "timestep_choice": "random", "timestep_fraction": 0.6}),
    ],
)
def test_it_finds_the_optimum(schedule, options):
    env = gaussian_env(schedule, num_envs=64, group_size=8)
    policy = full_policy(env)
    options = {"videos_per_rollout": 64, "learning_rate": 0.04, "weight_decay": 0.0, "kl_coefficient": 0.0, **options}
    grpo = grpo_on(env, policy, **options)
    history = [policy.trainable_parameters()[0].detach().clone() for _ in range(110) if grpo.update()]
    best = optimal_means(final_law(env.model, env.mdp.table), 1.0)
    found = torch.stack(history[-40:]).mean(0)
    assert torch.allclose(found.double(), best[:, None].expand_as(found), atol=0.25), found
    assert (START.T - best[:, None]).abs().max() > 0.9


@pytest.mark.parametrize("window_size", [None, 2])
@pytest.mark.parametrize("kind", ["flow", "unet"])
def test_the_ratio_is_exactly_one_before_the_first_update(kind, window_size):
    env = tiny_env(kind, num_envs=4, group_size=2, guidance_scale=3.0)
    grpo = grpo_on(env, env.make_policy(lora_rank=2), videos_per_rollout=8, window_size=window_size)
    for _ in range(2):  # the second time the adapter is no longer zero
        metrics = grpo.update()
        assert metrics["ratio_first_error"] == 0.0 and metrics["optimiser_steps"] == 1
        assert metrics["ratio_mean"] == 1.0 and metrics["ratio_std"] == 0.0 and metrics["kl_old_nats"] == 0.0
        assert metrics["grad_norm"] > 0


def test_later_passes_over_a_rollout_see_the_ratio_move():
    env = gaussian_env()
    metrics = grpo_on(env, full_policy(env), num_inner_epochs=2, updates_per_rollout=2).update()
    assert metrics["optimiser_steps"] == 4 and metrics["ratio_first_error"] == 0.0
    assert metrics["ratio_std"] > 0 and metrics["clip_fraction_low"] > 0 and metrics["clip_fraction_high"] > 0


class Watcher:
    """A policy that remembers the steps it was asked about, and whether with noise and a gradient."""

    def __init__(self, policy):
        self.policy, self.noisy, self.trained = policy, set(), []

    def __getattr__(self, name):
        return getattr(self.policy, name)

    def dist(self, obs):
        k = int(obs["step"][0])
        if torch.is_grad_enabled():
            self.trained += list(zip(obs["video_seed"].tolist(), [k] * len(obs["step"]), strict=True))
        elif bool((obs["action_std"] > 0).all()):
            self.noisy.add(k)
        return self.policy.dist(obs)


@pytest.mark.parametrize("schedule", ["flow", "epsilon"])
def test_only_the_windows_steps_have_noise_and_are_trained(schedule):
    env = gaussian_env(schedule)
    policy = Watcher(full_policy(env))
    grpo = grpo_on(env, policy, window_size=2, window_iterations=2, window_shift=1, kl_coefficient=0.0)
    places = []
    for _ in range(8):
        policy.noisy, policy.trained = set(), []
        start = grpo.update()["window_start"]
        assert policy.noisy == {k for _, k in policy.trained} == {start, start + 1}
        places.append(start)
    last = grpo.noisy[-1] - 1
    assert places == [[0, 0, 1, 1, 2, 2, 3, 3], [0, 0, 1, 1, 2, 2, 0, 0]][last < 3]
    env.reset()
    assert torch.equal(env.mdp.table.sigma, env.mdp.base_table.sigma)


def test_windows_jump_or_stay():
    env = gaussian_env("flow")
    policy = full_policy(env)
    options = {"window_size": 2, "window_iterations": 1, "window_end": 4}
    jumps = grpo_on(env, policy, window_strategy="random", **options)
    places = [jumps.update()["window_start"] for _ in range(12)]
    assert set(places) == {0, 1, 2} and places != sorted(places)
    stays = grpo_on(env, policy, window_strategy="fixed", window_start=1, **options)
    assert [stays.update()["window_start"] for _ in range(3)] == [1, 1, 1]
    # what the window holds has the env's noise, and only the rest is without
    assert torch.equal(env.mdp.table.sigma > 0, torch.tensor([False, True, True, False, False]))
    assert torch.equal(env.mdp.table.sigma[1:3], env.mdp.base_table.sigma[1:3])


def test_the_best_and_the_worst_of_a_group():
    reward = torch.tensor([0.3, 0.1, 0.9, 0.5, 0.0, 0.0, 0.0, 1.0])
    assert best_and_worst(reward, 4, 2).tolist() == [1, 2, 4, 7]
    assert best_and_worst(reward, 8, 4).tolist() == [2, 4, 5, 7]
    assert best_and_worst(reward, 4, 4).tolist() == best_and_worst(reward, 4, None).tolist() == list(range(8))


def test_only_the_extremes_are_trained_and_equal_groups_are_left_out():
    def score(video, prompts):  # group 0: all equal; the others: by place
        return torch.cat([torch.full((4,), 0.3), torch.tensor([3.0, 1.0, 2.0, 0.0]).repeat(3)])

    env = gaussian_env("flow", reward=score)
    policy = Watcher(full_policy(env))
    grpo = grpo_on(env, policy, videos_per_rollout=16, best_of_n=2, std_eps=1e-8, global_std=False)
    metrics = grpo.update()
    seeds = env._video_seeds.tolist()
    assert {seed for seed, _ in policy.trained} == {seeds[i] for i in (4, 7, 8, 11, 12, 15)}
    assert metrics["videos_trained"] == 6 and metrics["zero_std_fraction"] == 0.25
    assert env.mdp.counters.denoiser_backwards == 6 * metrics["steps_trained"]


def test_without_any_difference_nothing_is_changed():
    env = gaussian_env("flow", reward=lambda video, prompts: torch.full((len(video),), 0.3))
    policy = full_policy(env)
    grpo = grpo_on(env, policy, std_eps=1e-8)
    metrics = grpo.update()
    assert metrics["optimiser_steps"] == metrics["videos_trained"] == metrics["grad_norm"] == 0
    assert all(math.isfinite(value) for value in metrics.values())
    assert torch.equal(policy.trainable_parameters()[0], START.T)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, [0, 1, 2, 3]),
        ({"timestep_fraction": 1.0}, [0, 1, 2, 3, 4]),
        ({"timestep_fraction": 1.0, "drop_last_step": True}, [0, 1, 2, 3]),
        ({"timestep_fraction": 0.01}, [0]),
    ],
)
def test_the_fraction_of_timesteps(options, steps):
    env = gaussian_env("flow")
    policy = Watcher(full_policy(env))
    grpo_on(env, policy, kl_coefficient=0.0, **options).update()
    assert sorted({k for _, k in policy.trained}) == steps
    assert policy.noisy == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("kl", ["exact", "published"])
def test_the_penalty_is_the_formulas(kl):
    env = gaussian_env("flow", reward=constant, num_steps=4)
    policy = full_policy(env)
    (weight,) = policy.trainable_parameters()
    with torch.no_grad():
        weight += 0.3
    options = {"filter_equal_groups": False, "timestep_fraction": 1.0, "kl": kl, "kl_coefficient": 2.0}
    metrics = grpo_on(env, policy, **options).update()
    table, expected = env.mdp.base_table, []
    for k in range(4):  # the means differ by q_k 0.3 everywhere
        _, q = env.model.denoiser.coefficients(table.timesteps[k : k + 1])
        shift = (table.B[k] * q * 0.3) ** 2
        s2 = table.sigma[k] ** 2 / (1.0 if kl == "exact" else -table.dt[k])
        expected.append(float(shift / (2 * s2)))
    assert metrics["kl_reference"] == pytest.approx(sum(expected) / 4, rel=1e-4)
    # all advantages are 0
    assert metrics["loss"] == pytest.approx(2 * sum(expected) / 4, rel=1e-4)


def test_the_gradient_is_that_of_the_loss_over_all_pairs():
    """Written down once more, in one graph, with the advantages worked out by hand."""
    env = gaussian_env("flow")
    policy = full_policy(env)
    grpo = grpo_on(env, policy, videos_per_rollout=16, kl_coefficient=0.0, timestep_fraction=1.0, micro_batch=5)
    stream = env.state_dict()
    recorder = Recorder(grpo)
    grpo.update()
    env.load_state_dict(stream)
    obs, _ = env.reset()
    log_probs = []
    for _ in range(5):
        dist = policy.dist(obs)
        action = policy(obs).detach()
        log_probs.append(dist.log_prob(action))
        obs, reward, *_ = env.step(action)
    groups = reward.reshape(4, 4)
    advantage = ((groups - groups.mean(1, keepdim=True)) / (reward.std(correction=0) + 1e-4)).flatten()
    losses = [clipped_surrogate(lp, lp.detach(), advantage, 1e-4)[0] for lp in log_probs]
    (expected,) = torch.autograd.grad(torch.stack(losses).mean(), policy.trainable_parameters())
    expected *= min(1.0, 1.0 / float(expected.norm()))
    assert torch.allclose(recorder.gradients[0][0], expected, rtol=1e-4, atol=1e-7)


def by_column(values):
    return lambda video, prompts: torch.tensor(values)


def two_rewards(first, second, **weights):
    parts = []
    for name, values in (("first", first), ("second", second)):
        reward = by_column(values)
        reward.name, reward.differentiable, reward.frames, reward.range = name, False, "all", (-math.inf, math.inf)
        parts.append(Part(reward=reward, weight=weights.get(name, 1.0)))
    return WeightedSum(parts)


def test_parts_of_the_reward_can_be_normalised_each_by_itself():
    """In units of its own spread a part of 0.01 counts as much as one of 100 (here: unbiased std, by hand)."""
    first, second = [0.0, 0.01, 0.02, 0.01], [100.0, 100.0, 100.0, 500.0]
    reward = two_rewards(first * 2, second + [7.0] * 4)
    env = gaussian_env("flow", reward=reward, num_envs=8)
    options = {"videos_per_rollout": 8, "std": "unbiased", "global_std": False, "std_eps": 1e-8, "advantage": "parts"}
    grpo = grpo_on(env, full_policy(env), **options)
    rollout = collect(env, grpo.policy)
    assert rollout.parts["first"].tolist() == pytest.approx(first * 2)
    a = 0.01 / math.sqrt(2e-4 / 3)  # std of 0, 1, 2, 1 hundredths
    b, c = -100 / 200, 300 / 200  # std of 100, 100, 100, 500
    advantage, differ = grpo._advantages([rollout])
    # in the second group the second part is all equal and says nothing
    assert advantage.tolist() == pytest.approx([b - a, b, b + a, c, -a, 0, a, 0], rel=1e-4)
    assert differ.all()
    grpo = grpo_on(env, full_policy(env), part_weights={"first": 0.5, "second": 0.0}, **options)
    advantage, _ = grpo._advantages([rollout])
    assert advantage.tolist() == pytest.approx([-a / 2, 0, a / 2, 0] * 2, rel=1e-4)
    metrics = grpo.update()
    assert metrics["videos_trained"] == 8 and metrics["grad_norm"] > 0


def test_a_group_is_left_out_if_no_part_that_counts_differs():
    env = gaussian_env("flow", reward=two_rewards([1.0] * 8, [3.0, 4.0] * 2 + [3.0] * 4), num_envs=8)
    options = {"videos_per_rollout": 8, "advantage": "parts"}
    assert grpo_on(env, full_policy(env), **options).update()["videos_trained"] == 4
    nothing = grpo_on(env, full_policy(env), part_weights={"first": 1.0, "second": 0.0}, **options).update()
    assert nothing["videos_trained"] == nothing["optimiser_steps"] == 0


def test_parts_are_refused_where_there_are_none():
    env = gaussian_env("flow")
    with pytest.raises(ValueError, match="'Target' has only one.*WeightedSum"):
        grpo_on(env, full_policy(env), advantage="parts")
    env = gaussian_env("flow", reward=two_rewards([1.0] * 16, [2.0] * 16))
    policy = full_policy(env)
    with pytest.raises(ValueError, match=r"part_weights are for \['frist'\].*\['first', 'second'\]"):
        grpo_on(env, policy, advantage="parts", part_weights={"frist": 1.0}).update()
    with pytest.raises(ValueError, match="part_weights has no effect with advantage='reward'"):
        FlowGRPOConfig(part_weights={"first": 1.0})


def test_the_pull_to_the_policy_that_sampled_acts_from_the_second_step_on():
    def updates(coefficient):
        env = gaussian_env("flow")
        policy = full_policy(env)
        options = {"num_inner_epochs": 2, "kl_coefficient": 0.0, "videos_per_rollout": 16, "clip_range": 0.5}
        grpo = grpo_on(env, policy, old_kl_coefficient=coefficient, **options)
        recorder = Recorder(grpo)
        step, moved = recorder.step, []

        def move():  # a step of a known size instead of the optimiser's
            step()
            with torch.no_grad():
                policy.trainable_parameters()[0].add_(0.05)
            moved.append(True)

        recorder.step = move
        return grpo.update(), [g[0] for g in recorder.gradients]

    (plain, (first, second)), (pulled, (first_pulled, second_pulled)) = updates(0.0), updates(100.0)
    assert torch.equal(first, first_pulled) and not torch.allclose(second, second_pulled, rtol=1e-2)
    # over all pairs of both passes: 0.5 mean (log r)^2, and only the second pass has any
    elements = 3 * 2 * 2 * 2
    penalty = pulled["kl_old_nats"] / elements**2 / pulled["steps_trained"]
    assert penalty > 0 and pulled["loss"] - plain["loss"] == pytest.approx(100 * penalty, rel=1e-3)


def test_fast_trains_two_steps_of_the_first_half():
    env = gaussian_env("flow", sampler="cps", noise_level=0.8, num_steps=10)
    policy = Watcher(full_policy(env))
    grpo = grpo_on(env, policy)
    fast = FlowGRPO(env, policy, FlowGRPOConfig.fast(videos_per_rollout=16, seed=1))
    assert (fast.config.clip_range, fast.config.kl_coefficient) == (1e-5, 0.0)
    places = set()
    for _ in range(12):
        policy.noisy, policy.trained = set(), []
        start = fast.update()["window_start"]
        assert policy.noisy == {k for _, k in policy.trained} == {start, start + 1}
        places.add(start)
    assert places <= {0, 1, 2, 3} and len(places) > 2 and grpo.window() is None


@pytest.mark.parametrize("strategy", ["decay", "exp_decay"])
def test_windows_stay_shorter_at_later_places(strategy):
    env = gaussian_env("flow")
    options = {"window_size": 2, "window_strategy": strategy, "window_iterations": 4, "window_decay_rate": 0.7}
    grpo = grpo_on(env, full_policy(env), window_decay_after=1, videos_per_rollout=16, **options)
    places = [grpo.update()["window_start"] for _ in range(13)]
    # decay: 4, 3, 2, 1 updates; exp_decay: 4, 4, ceil(4 e^-0.7) = 2, ceil(4 e^-1.4) = 1
    counts = {"decay": (4, 3, 2, 1), "exp_decay": (4, 4, 2, 1)}[strategy]
    expected = [place for place, count in enumerate(counts) for _ in range(count)] + [0] * 3
    assert places == expected[:13]


def test_a_group_can_share_its_initial_noise():
    for shared in (False, True):
        env = gaussian_env("flow")
        policy = Watcher(full_policy(env))
        seen = []
        policy.dist = lambda obs, seen=seen, policy=policy: seen.append(obs["latents"]) or policy.policy.dist(obs)
        grpo_on(env, policy, shared_initial_noise=shared).update()
        groups = seen[0].reshape(4, 4, -1)
        assert bool((groups == groups[:, :1]).all()) is shared
        assert not torch.equal(groups[0], groups[1])
        assert len(torch.unique(seen[1].flatten(1), dim=0)) == 16


SETTINGS = {
    "plain": {},
    "random": {"window_size": 2, "window_strategy": "random", "window_iterations": 2},
    "progressive": {"window_size": 2, "window_iterations": 2, "best_of_n": 2},
    "decay": {"window_size": 2, "window_strategy": "decay", "window_iterations": 3},
    "subset": {"timestep_choice": "random", "timestep_fraction": 0.6, "updates_per_rollout": 2},
}


@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
def test_it_repeats_and_resumes_bit_for_bit(options, tmp_path):
    def build(seed=0, policy_seed=0):
        env = gaussian_env("flow")
        policy = env.make_policy(lora_rank=2, seed=policy_seed)
        return grpo_on(env, policy, seed=seed, **options), policy

    grpo, policy = build()
    first = [grpo.update() for _ in range(3)]
    expected, _ = goes_on_bit_for_bit(grpo, policy, lambda: build(seed=99, policy_seed=5), tmp_path, 3)
    again, _ = build()
    assert [again.update() for _ in range(6)] == first + expected
    other, _ = build(seed=1)
    assert other.update()["reward_mean"] != first[0]["reward_mean"]


@pytest.mark.parametrize(("sampler", "steps"), [("cps", [0, 1, 2, 3]), ("dance", [0, 1, 2, 3, 4])])
def test_other_flow_samplers(sampler, steps):
    env = gaussian_env("flow", sampler=sampler, noise_level=0.5)
    policy = Watcher(full_policy(env))
    metrics = grpo_on(env, policy, timestep_fraction=1.0).update()
    assert policy.noisy >= {k for _, k in policy.trained} == set(steps)
    assert metrics["grad_norm"] > 0


def test_refusals():
    for env, options, message in (
        (gaussian_env(noise_level=0.0), {}, "'ddim' at this noise level has none.*VADER"),
        (gaussian_env(group_size=1), {}, "group_size=1.*group_size=8"),
        (gaussian_env(), {"best_of_n": 6}, "best_of_n is 6.*4 videos"),
        (gaussian_env(), {"kl": "published"}, "flow samplers.*'ddim'; use kl='exact'"),
        (gaussian_env(), {"videos_per_rollout": 24}, "videos_per_rollout is 24.*num_envs=16"),
        (gaussian_env(), {"updates_per_rollout": 3}, "updates_per_rollout is 3.*2 batches"),
        (gaussian_env("flow"), {"window_size": 6}, r"window_size=6 has no place in steps 0\.\.4"),
        (gaussian_env("flow"), {"window_size": 2, "window_start": 4}, "no place in steps 4"),
        (gaussian_env("flow"), {"window_size": 2, "window_end": 6}, r"no place in steps 0\.\.5"),
        (
            gaussian_env("flow", sampler="cps", noise_level=0.5),
            {"window_size": 2, "window_end": 5},
            r"steps \[4\], which have no noise.*0\.\.4",
        ),
        (gaussian_env("flow", sampler="cps"), {"window_size": 2}, "make it with noise_level="),
    ):
        with pytest.raises(ValueError, match=message):
            grpo_on(env, full_policy(env), **options)
    env = gaussian_env("flow")
    grpo = grpo_on(env, full_policy(env), window_size=2)
    state = grpo.state_dict() | {"window": {"start": 4, "age": 0}}
    with pytest.raises(ValueError, match=r"starts at step 4.*0\.\.3"):
        grpo.load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"best_of_n": 3}, "best_of_n is 3, expected an even number"),
        ({"kl": "k3"}, "kl is 'k3', expected one of auto, published, exact"),
        ({"window_strategy": "jump"}, "window_strategy is 'jump', expected one of progressive, decay"),
        ({"window_size": 0}, "window_size is 0"),
        (
            {"window_strategy": "decay", "window_min_iterations": 30},
            "window_min_iterations is 30.*window_iterations=25",
        ),
        ({"advantage": "total"}, "advantage is 'total', expected one of reward, parts"),
        ({"timestep_fraction": 1.5}, "timestep_fraction is 1.5 .*at most 1"),
        ({"clip_range": math.nan}, "clip_range is nan"),
    ],
)
def test_configs_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        FlowGRPOConfig(**options)


def test_settings_by_name():
    assert FlowGRPOConfig.preset("MovingShapes").videos_per_rollout == 64
    with pytest.raises(ValueError, match="only for MovingShapes"):
        FlowGRPOConfig.preset("Sora")
    dance, mix = FlowGRPOConfig.dance(videos_per_rollout=32), FlowGRPOConfig.mix(window_size=2)
    assert (dance.best_of_n, dance.timestep_fraction, dance.kl_coefficient, dance.std) == (8, 0.6, 0.0, "unbiased")
    assert (dance.videos_per_rollout, mix.window_size, mix.window_shift, mix.window_iterations) == (32, 2, 1, 25)


def test_the_best_of_parts_are_the_best_of_what_is_learned_from():
    """The env's reward follows its larger part, which is not learned from."""
    reward = two_rewards([3.0, 0.0, 1.0, 2.0] * 2, [100.0, 200.0, 0.0, 300.0] * 2)
    env = gaussian_env("flow", reward=reward, num_envs=8)
    policy = Watcher(full_policy(env))
    options = {"advantage": "parts", "part_weights": {"first": 1.0, "second": 0.0}, "best_of_n": 2}
    grpo_on(env, policy, videos_per_rollout=8, **options).update()
    seeds = env._video_seeds.tolist()
    assert {seed for seed, _ in policy.trained} == {seeds[i] for i in (0, 1, 4, 5)}  # by the reward: 2, 3, 6, 7


def test_parts_come_in_the_rewards_type():
    class Half:
        name, differentiable, frames, range = "half", False, "all", (-math.inf, math.inf)

        def __call__(self, video, prompts):
            return torch.arange(len(video)) / 7

        def score_parts(self, video, prompts):
            total = self(video, prompts)
            return total, {"part": total.to(torch.float16)}

    env = gaussian_env("flow", reward=Half())
    rollout = collect(env, full_policy(env))
    assert rollout.parts["part"].dtype == rollout.reward.dtype == torch.float32
    metrics = grpo_on(env, full_policy(env), advantage="parts", std_eps=1e-8, videos_per_rollout=16).update()
    assert math.isfinite(metrics["loss"]) and metrics["videos_trained"] == 16


def test_the_default_penalty_is_the_published_one_where_there_is_one():
    config = FlowGRPOConfig()
    assert (config.kl, config.kl_coefficient) == ("auto", 0.04)
    losses = {}
    for schedule in ("flow", "epsilon"):
        for kl in ("auto", "exact", "published"):
            env = gaussian_env(schedule, reward=constant, num_steps=4)
            policy = full_policy(env)
            with torch.no_grad():
                policy.trainable_parameters()[0].add_(0.3)
            if (schedule, kl) != ("epsilon", "published"):
                options = {"filter_equal_groups": False, "videos_per_rollout": 16}
                losses[schedule, kl] = grpo_on(env, policy, kl=kl, **options).update()["loss"]
    assert losses["flow", "auto"] == losses["flow", "published"] > 0
    assert losses["flow", "exact"] > 2 * losses["flow", "auto"]  # 1 / -dt times it, step by step
    assert losses["epsilon", "auto"] == losses["epsilon", "exact"] > 0


def test_a_window_is_refused_where_noise_cannot_be_switched_off():
    env = gaussian_env("epsilon", sampler="lcm", noise_level=1.0)
    grpo_on(env, full_policy(env))  # without a window it serves
    with pytest.raises(ValueError, match="lcm"):
        grpo_on(env, full_policy(env), window_size=2)


def test_weights_of_unknown_parts_are_refused_before_anything_is_sampled():
    env = gaussian_env("flow", reward=two_rewards([1.0] * 16, [2.0] * 16))
    with pytest.raises(ValueError, match=r"part_weights are for \['frist'\].*\['first', 'second'\]"):
        grpo_on(env, full_policy(env), advantage="parts", part_weights={"frist": 1.0})
    assert env.mdp.counters.videos_sampled == 0
