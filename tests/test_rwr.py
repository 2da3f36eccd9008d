"""Reward-weighted regression: weights by hand, the gradient in closed form, learning, repeats, resumes, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from conduct import goes_on_bit_for_bit
from gaussian import START, Recorder, full_policy, gaussian_env
from models import tiny_env

import vdm_env
from algos import RWR, RWRConfig
from algos.losses import best_of_group_weights, softmax_weights, sparse_weights, weighted_regression
from algos.losses.forward_process import raw_weights
from algos.rollout import sample_videos
from vdm_env.worlds.gaussian import final_law, optimal_means


def rwr_on(env, policy, **options):
    options = {"videos_per_update": 32, "videos_per_step": 16, "learning_rate": 0.02, **options}
    return RWR(env, policy, RWRConfig(**options))


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


def low(video, prompts):
    """Negative rewards."""
    return video.mean((1, 2, 3, 4)) - 2


# ---------------------------------------------------------------------------------------------------- weights, loss


def test_softmax_weights_are_those_worked_out_by_hand():
    # exp: 1, 2, 4, 1; Z = 2
    assert softmax_weights(vector(0, math.log(2), math.log(4), 0), 1.0).tolist() == pytest.approx([0.5, 1, 2, 0.5])
    assert softmax_weights(vector(1, 1 + math.log(3) / 2), 2.0).tolist() == pytest.approx([0.5, 1.5])
    # a common shift has no effect, and large rewards do not overflow
    assert softmax_weights(vector(1e5, 1e5 - 1), 3.0).tolist() == pytest.approx(
        [2 / (1 + math.exp(-3)), 2 / (1 + math.exp(3))]
    )


def test_the_other_weights_are_those_worked_out_by_hand():
    reward = vector(0.1, 0.5, 0.5, 0.3, 0.2, 0.2, 0.2, 0.2)
    assert sparse_weights(reward, 0.3).tolist() == [0, 1, 1, 1, 0, 0, 0, 0]
    assert raw_weights(reward).tolist() == reward.tolist()
    # both best videos count, and a group of equal ones has no best
    assert best_of_group_weights(reward, 4).tolist() == [0, 1, 1, 0, 0, 0, 0, 0]


def test_the_loss_is_the_one_worked_out_by_hand():
    output = vector([1, 2], [0, 4]).requires_grad_()
    loss = weighted_regression(output, vector([0, 0], [1, 1]), vector(0.5, 3.0))
    assert loss.item() == pytest.approx((0.5 * (1 + 4) / 2 + 3 * (1 + 9) / 2) / 2)
    (gradient,) = torch.autograd.grad(loss, output)
    assert gradient.tolist() == [pytest.approx([0.25, 0.5]), pytest.approx([-1.5, 4.5])]


def test_weights_are_constants_and_refuse_nonsense():
    reward = vector(0.2, 0.4).requires_grad_()
    for make in (
        lambda r: softmax_weights(r, 1.0),
        lambda r: sparse_weights(r, 0.3),
        raw_weights,
        lambda r: best_of_group_weights(r, 2),
    ):
        assert not make(reward).requires_grad
        with pytest.raises(ValueError, match=r"shape \(2, 1\), expected \[B\]"):
            make(reward[:, None])
    for beta in (0, -1, math.nan):
        with pytest.raises(ValueError, match=f"beta is {beta}"):
            softmax_weights(reward, beta)
    with pytest.raises(ValueError, match="lowest reward is -0.5.*softmax"):
        raw_weights(vector(0.1, -0.5))
    with pytest.raises(ValueError, match="group_size is 3 for 2 rewards"):
        best_of_group_weights(reward, 3)
    with pytest.raises(ValueError, match="1 numbers for 2 videos"):
        weighted_regression(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(1))


# ---------------------------------------------------------------------------------------------------- the algorithm


def expected_weights(reward, options):
    """Written down once more, in units of a mean of 1 over the videos trained on."""
    kind = options["weighting"]
    if kind == "softmax":
        weight = (options["beta"] * (reward - reward.mean()) / reward.std(correction=0)).exp()
    elif kind == "sparse":
        weight = torch.tensor([float(r >= reward.sort().values[-4]) for r in reward])  # the best quarter of 16
    elif kind == "raw":
        weight = reward.clone()
    else:
        weight = torch.tensor([float(r == reward[i // 4 * 4 : i // 4 * 4 + 4].max()) for i, r in enumerate(reward)])
    return weight / weight[weight > 0].mean()


def bright(video, prompts):
    return video.mean((1, 2, 3, 4))


@pytest.mark.parametrize(
    ("schedule", "options"),
    [
        ("flow", {"weighting": "softmax", "beta": 1.5}),
        ("epsilon", {"weighting": "sparse", "quantile": 0.8}),
        ("flow", {"weighting": "raw"}),
        ("epsilon", {"weighting": "best_of_group"}),
    ],
)
def test_the_gradient_is_that_of_the_closed_form(schedule, options):
    """The network is p x_t + q m, so dL/dm = mean over videos of w 2 q / D * sum (p x_t + q m - target)."""
    env = gaussian_env(schedule, dtype=torch.float64, reward=bright)
    policy = full_policy(env)
    rwr = rwr_on(env, policy, videos_per_update=16, max_grad_norm=1e9, micro_batch=3, **options)
    seen, add_noise = [], env.mdp.add_noise

    def spy(clean, noise, t):
        seen.extend(zip(clean, noise, t, strict=True))
        return add_noise(clean, noise, t)

    env.mdp.add_noise, recorder = spy, Recorder(rwr)
    stream = env.state_dict()
    metrics = rwr.update()
    env.load_state_dict(stream)
    clean, prompt, reward = sample_videos(env, policy, 1)
    weight = expected_weights(reward, options)
    assert metrics["videos_kept"] == len(seen) == int((weight > 0).sum())
    assert metrics["effective_videos"] == pytest.approx(float(weight.sum() ** 2 / (weight**2).sum()))
    expected, total = torch.zeros(3, 2, dtype=torch.float64), 0.0
    for x0, noise, t in seen:
        (video,) = (clean == x0).flatten(1).all(1).nonzero().flatten().tolist()
        p, q = (float(v) for v in env.model.denoiser.coefficients(t[None]))
        if schedule == "flow":
            level = float(t) / 1000
            noised, target = (1 - level) * x0 + level * noise, noise - x0
        else:
            alpha = float(env.mdp.schedule.alphas_cumprod[int(t)])
            noised, target = math.sqrt(alpha) * x0 + math.sqrt(1 - alpha) * noise, noise
        error = p * noised + q * START[prompt[video]].double().view(3, 1, 1, 1) - target
        expected[:, prompt[video]] += float(weight[video]) * 2 * q * error.sum((1, 2, 3)) / error.numel() / len(seen)
        total += float(weight[video] * error.square().mean()) / len(seen)
    assert torch.allclose(recorder.gradients[0][0], expected, rtol=1e-5, atol=1e-8)
    assert float(expected.abs().max()) > 1e-3 and metrics["loss"] == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize(
    ("schedule", "options"),
    [
        ("flow", {"weighting": "softmax", "beta": 2.0}),
        ("epsilon", {"weighting": "sparse", "quantile": 0.75}),
        ("flow", {"weighting": "best_of_group"}),
    ],
)
def test_it_moves_towards_the_optimum(schedule, options):
    """Not all the way: its own samples are what it fits, so it also drifts where the sampler is not exact.

    One prompt for the sparse rule, whose threshold holds for all prompts: of two, only the better one would be trained.
    """
    start = START[:1] if options["weighting"] == "sparse" else START
    env = gaussian_env(schedule, num_envs=64, group_size=8, means=start)
    policy = full_policy(env)
    rwr = rwr_on(env, policy, videos_per_update=64, learning_rate=0.05, weight_decay=0.0, micro_batch=64, **options)
    rows = [rwr.update() for _ in range(60)]
    best = optimal_means(final_law(env.model, env.mdp.table), 1.0).float()[:, None]
    found = policy.trainable_parameters()[0].detach()
    assert (found - best).norm() < 0.4 * (start.T - best).norm(), found
    assert sum(row["reward_mean"] for row in rows[-10:]) / 10 > rows[0]["reward_mean"] / 2  # rewards are negative


def test_the_threshold_may_be_given_and_may_leave_nothing():
    env = gaussian_env(reward=bright)
    policy = full_policy(env)
    metrics = rwr_on(env, policy, weighting="sparse", threshold=9.0).update()
    assert metrics["videos_kept"] == metrics["optimiser_steps"] == metrics["loss"] == metrics["effective_videos"] == 0
    assert torch.equal(policy.trainable_parameters()[0], START.T)
    metrics = rwr_on(env, policy, weighting="sparse", threshold=-9.0, num_inner_epochs=2, videos_per_step=20).update()
    assert metrics["videos_kept"] == 32 and metrics["optimiser_steps"] == 2 * 2


def test_costs_are_counted_and_training_has_no_guidance():
    env = gaussian_env("flow", guidance_scale=2.0)
    metrics = rwr_on(env, full_policy(env)).update()
    assert all(type(value) is float and math.isfinite(value) for value in metrics.values())
    assert env.mdp.counters.denoiser_forwards == 32 * 5 * 2 + 32
    assert env.mdp.counters.denoiser_backwards == 32 and env.mdp.counters.reward_backward_queries == 0


def test_only_the_adapter_moves():
    env = tiny_env("flow", num_envs=4, group_size=2)
    policy = env.make_policy(lora_rank=2)
    original = {n: p.detach().clone() for n, p in env.model.denoiser.named_parameters() if "policy_" not in n}
    before = [p.detach().clone() for p in policy.trainable_parameters()]
    rwr_on(env, policy, videos_per_update=4).update()
    assert any(not torch.equal(a, b) for a, b in zip(before, policy.trainable_parameters(), strict=True))
    for name, parameter in env.model.denoiser.named_parameters():
        assert "policy_" in name or torch.equal(parameter, original[name]), name


@pytest.mark.parametrize("weighting", ["softmax", "best_of_group"])
def test_it_repeats_and_resumes_bit_for_bit(weighting, tmp_path):
    def build(seed=0, policy_seed=0):
        env = gaussian_env("flow")
        policy = env.make_policy(lora_rank=2, seed=policy_seed)
        return rwr_on(env, policy, seed=seed, weighting=weighting), policy

    rwr, policy = build()
    first = [rwr.update() for _ in range(2)]

    def another():
        other, policy = build(seed=99, policy_seed=5)
        assert other.update()["reward_mean"] != first[0]["reward_mean"]
        return other, policy

    expected, _ = goes_on_bit_for_bit(rwr, policy, another, tmp_path, 2)
    again, _ = build()
    assert [again.update() for _ in range(4)] == first + expected


def test_one_update_of_moving_shapes():
    env = vdm_env.make("MovingShapes-HPS", num_envs=2, group_size=2, num_steps=3, guidance_scale=1.0)
    policy = env.make_policy(lora_rank=2)
    before = [p.detach().clone() for p in policy.trainable_parameters()]
    metrics = rwr_on(env, policy, videos_per_update=2).update()
    assert metrics["optimiser_steps"] == 1 and metrics["grad_norm"] > 0 and math.isfinite(metrics["loss"])
    assert any(not torch.equal(a, b) for a, b in zip(before, policy.trainable_parameters(), strict=True))


def test_refusals_name_the_way_out():
    env = gaussian_env(group_size=1)
    with pytest.raises(ValueError, match="group_size=1.*group_size=8.*weighting='softmax'"):
        rwr_on(env, full_policy(env), weighting="best_of_group")
    env = gaussian_env(num_envs=1, group_size=1)
    with pytest.raises(ValueError, match="videos_per_update is 1"):
        rwr_on(env, full_policy(env), videos_per_update=1)
    env = gaussian_env(reward=low)
    policy = full_policy(env)
    with pytest.raises(ValueError, match="videos_per_update is 24.*num_envs=16"):
        rwr_on(env, policy, videos_per_update=24)
    with pytest.raises(ValueError, match="rewards must be >= 0; use weighting='softmax'"):
        rwr_on(env, policy, weighting="raw").update()
    assert torch.equal(policy.trainable_parameters()[0], START.T)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0}, "beta is 0"),
        ({"weighting": "best"}, "weighting is 'best', expected one of softmax, sparse, raw"),
        ({"quantile": 1.0}, "quantile is 1.0, expected less than 1"),
        ({"threshold": math.nan}, "threshold is nan"),
        ({"videos_per_step": 0}, "videos_per_step is 0"),
    ],
)
def test_the_config_is_checked(options, message):
    with pytest.raises(ValueError, match=message):
        RWRConfig(**options)


def test_presets():
    assert RWRConfig.preset("MovingShapes").videos_per_update == 64
    with pytest.raises(ValueError, match="only for MovingShapes"):
        RWRConfig.preset("Sora")
