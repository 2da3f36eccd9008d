"""DiffusionNFT: its loss and first gradient in closed form, the old policy, the optimum, repeats, resumes, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from conduct import goes_on_bit_for_bit, refuses_a_gradient_that_is_not_finite
from gaussian import START, Recorder, full_policy, gaussian_env
from models import tiny_env

import vdm_env
from algos import DiffusionNFT, DiffusionNFTConfig
from algos.diffusion_nft import old_policy_decay
from algos.losses import nft_loss, optimality_probability
from algos.rollout import sample_videos
from vdm_env.worlds.gaussian import final_law, optimal_means


def nft_on(env, policy, **options):
    options = {"videos_per_update": 32, "learning_rate": 0.02, **options}
    return DiffusionNFT(env, policy, DiffusionNFTConfig(**options))


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------- the loss


def test_the_loss_is_the_one_worked_out_by_hand():
    policy, old, clean = vector([1, 2], [1, 3]), vector([0, 1], [2, 1]), vector([0, 0], [1, 1])
    loss, metrics = nft_loss(policy, old, clean, vector(0.8, 0.25), mixture=0.5, scale=5)
    # x+ - x0: (0.5, 1.5) and (0.5, 1); x- - x0: (-0.5, 0.5) and (1.5, -1); w+ = 1, 0.75; w- = 0.5, 1.25
    positive, negative = (1.25 / 1, 0.625 / 0.75), (0.25 / 0.5, 1.625 / 1.25)
    terms = 0.8 * positive[0] + 0.2 * negative[0], 0.25 * positive[1] + 0.75 * negative[1]
    assert float(loss) == pytest.approx(5 / 0.5 * sum(terms) / 2, rel=1e-14)
    assert float(metrics["positive_error"]) == pytest.approx(sum(positive) / 2, rel=1e-14)
    assert float(metrics["negative_error"]) == pytest.approx(sum(negative) / 2, rel=1e-14)


@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_the_loss_is_the_published_one_of_velocities(beta):
    """Mixing clean estimates is mixing velocities; value and gradient, with the weights as constants."""
    shape = (3, 4, 2, 2, 2)
    x0, noise, velocity, old = (randn(*shape, seed=i) for i in range(4))
    t, r = vector(0.2, 0.5, 0.9).view(3, 1, 1, 1, 1), vector(0.1, 0.5, 1.0)
    x_t = (1 - t) * x0 + t * noise
    velocity.requires_grad_()
    expected = torch.zeros((), dtype=torch.float64)
    for b in range(3):
        plus = beta * velocity[b] + (1 - beta) * old[b]
        minus = (1 + beta) * old[b] - beta * velocity[b]
        for share, v in ((r[b], plus), (1 - r[b], minus)):
            error = x_t[b] - t[b] * v - x0[b]
            weight = max(1e-5, float(error.detach().abs().mean()))
            expected = expected + share * (error**2).sum() / error.numel() / weight / beta * 5 / 3
    loss, _ = nft_loss(x_t - t * velocity, x_t - t * old, x0, r, mixture=beta, scale=5)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    gradients = [torch.autograd.grad(value, velocity)[0] for value in (loss, expected)]
    assert torch.allclose(*gradients, rtol=1e-10, atol=1e-14) and float(gradients[0].abs().max()) > 0


def test_the_weights_are_float64_have_a_floor_and_no_gradient():
    clean = torch.zeros(1, 4)
    estimate = torch.full((1, 4), 1e-7, requires_grad=True)
    loss, _ = nft_loss(estimate, estimate.detach(), clean, torch.ones(1), mixture=1.0, scale=1.0)
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(1e-14 / 1e-5)
    (gradient,) = torch.autograd.grad(loss, estimate)
    assert torch.allclose(gradient, torch.full((1, 4), 2 * 1e-7 / 4 / 1e-5))
    # a mean of |1e-3| over half-precision numbers, which half precision cannot sum
    loss, _ = nft_loss(
        torch.full((1, 9000), 1e-3).half(), torch.zeros(1, 9000).half(), torch.zeros(1, 9000).half(), torch.ones(1),
        mixture=1.0, scale=1.0,
    )  # fmt: skip
    assert float(loss) == pytest.approx(1e-3, rel=2e-2)


def test_nft_loss_refuses_what_does_not_fit():
    x, r = torch.zeros(2, 3), torch.full((2,), 0.5)
    for arguments, options, message in (
        ((x, x, x[:1], r), {}, "x0 has shape"),
        ((x, x, x, r[:1]), {}, "1 numbers for 2 videos"),
        ((x, x, x, r + 1), {}, r"leaves \[0, 1\]"),
        ((x, x, x, r), {"mixture": 0.0}, "mixture is 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            nft_loss(*arguments, **{"mixture": 1.0, "scale": 5.0, **options})


ADVANTAGES = (-7.0, -5.0, -1.0, 0.0, 2.5, 5.0, 9.0)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("all", (0, 0, 0.4, 0.5, 0.75, 1, 1)),
        ("positive_only", (0.5, 0.5, 0.5, 0.5, 0.75, 1, 1)),
        ("negative_only", (0, 0, 0.4, 0.5, 0.5, 0.5, 0.5)),
        ("one_only", (0.5, 0.5, 0.5, 0.5, 0.6, 0.6, 0.6)),
        ("binary", (0.4, 0.4, 0.4, 0.5, 0.6, 0.6, 0.6)),
    ],
)
def test_the_probability_of_being_good(mode, expected):
    assert optimality_probability(vector(*ADVANTAGES), 5.0, mode).tolist() == pytest.approx(expected)
    if mode == "all":
        assert optimality_probability(vector(-5, 0, 5)).tolist() == [0, 0.5, 1]


def test_the_probability_refuses():
    with pytest.raises(ValueError, match="adv_clip_max is 0"):
        optimality_probability(vector(1.0), 0)
    with pytest.raises(ValueError, match="mode is 'good', expected one of all, positive_only"):
        optimality_probability(vector(1.0), 5, "good")


# ---------------------------------------------------------------------------------------------------- the algorithm


@pytest.mark.parametrize(
    ("schedule", "options"),
    [
        ("flow", {"mixture": 1.0, "adv_mode": "all"}),
        ("epsilon", {"mixture": 0.1, "adv_mode": "binary", "micro_batch": 5}),
        ("v", {"mixture": 0.5, "adv_mode": "positive_only", "global_std": False}),
    ],
)
def test_the_first_gradient_is_that_of_advantage_weighted_regression(schedule, options):
    """While the policy is the old one, dL/dx = 2 A (x - x0) / (w D): A_max (2 r - 1) = f(A), and beta cancels.

    On Gaussian data x = c x_t + d m_p with constants c, d at each timestep, so dx/dm is d.
    """
    env = gaussian_env(schedule, dtype=torch.float64)
    policy = full_policy(env)
    nft = nft_on(env, policy, videos_per_update=16, max_grad_norm=1e9, timestep_fraction=0.6, **options)
    seen, add_noise = [], env.mdp.add_noise

    def spy(clean, noise, t):
        seen.extend(zip(clean, noise, t, strict=True))
        return add_noise(clean, noise, t)

    env.mdp.add_noise, recorder = spy, Recorder(nft)
    stream = env.state_dict()
    nft.update()
    env.load_state_dict(stream)
    clean, prompt, reward = sample_videos(env, policy, 1)

    groups = reward.reshape(4, 4)
    spread = groups.std(1, correction=0, keepdim=True) if "global_std" in options else reward.std(correction=0)
    advantage = ((groups - groups.mean(1, keepdim=True)) / (spread + 1e-4)).flatten()
    shaped = {"all": lambda a: a, "binary": torch.sign, "positive_only": lambda a: a.clamp(min=0)}
    advantage = shaped[options["adv_mode"]](advantage)
    expected = torch.zeros(3, 2, dtype=torch.float64)
    assert len(seen) == 16 * 3
    for x0, noise, t in seen:
        (video,) = (clean == x0).flatten(1).all(1).nonzero().flatten().tolist()
        p, q = (float(v) for v in env.model.denoiser.coefficients(t[None]))
        if schedule == "flow":
            signal, sigma = 1 - float(t) / 1000, float(t) / 1000
            on_x, on_a = 1.0, -sigma
        else:
            alpha = float(env.mdp.schedule.alphas_cumprod[int(t)])
            signal, sigma = math.sqrt(alpha), math.sqrt(1 - alpha)
            on_x, on_a = (1 / signal, -sigma / signal) if schedule == "epsilon" else (signal, -sigma)
        x_t = signal * x0 + sigma * noise
        mean = START[prompt[video]].double().view(3, 1, 1, 1)
        error = on_x * x_t + on_a * (p * x_t + q * mean) - x0
        slope = 2 * advantage[video] * error.sum((1, 2, 3)) / (error.abs().mean() * error.numel()) * on_a * q
        expected[:, prompt[video]] += slope / len(seen)
    assert float(expected.abs().max()) > 1e-3
    assert torch.allclose(recorder.gradients[0][0], expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("first", ["policy", "old"])
def test_swapping_in_the_old_weights_leaves_the_policys_graph_alone(first, checkpointing):
    """The gradient is that of an old output computed elsewhere, by a policy that was never swapped."""
    env = tiny_env("flow", num_envs=2, group_size=2)
    policy = env.make_policy(lora_rank=2, seed=1, gradient_checkpointing=checkpointing)
    with torch.no_grad():
        for i, parameter in enumerate(policy.trainable_parameters()):
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
    nft = nft_on(env, policy, videos_per_update=2)
    with torch.no_grad():
        for i, old in enumerate(nft.old):
            old += 0.1 * torch.randn(old.shape, generator=torch.Generator().manual_seed(100 + i))
    own = [p.detach().clone() for p in nft.parameters]
    x = randn(2, *env.mdp.latent_shape).float()
    noised, t, prompts = x + 0.1, torch.tensor([300.0, 700.0]), [0, 1]

    if first == "policy":
        output = policy.predict(noised, t, prompts)
    with nft._old_policy():
        old_output = policy.predict(noised, t, prompts)
        assert not old_output.requires_grad
    if first == "old":
        output = policy.predict(noised, t, prompts)

    def loss(output, old):
        estimates = (env.mdp.schedule.x0_from(noised, a, t) for a in (output, old))
        return nft_loss(*estimates, x, torch.tensor([0.9, 0.2]), mixture=0.7, scale=5.0)[0]

    loss(output, old_output).backward()
    assert all(torch.equal(p, q) for p, q in zip(nft.parameters, own, strict=True))

    def separate(weights):
        other = tiny_env("flow", num_envs=2, group_size=2).make_policy(lora_rank=2, seed=5)
        with torch.no_grad():
            for parameter, value in zip(other.trainable_parameters(), weights, strict=True):
                parameter.copy_(value)
        return other

    with torch.no_grad():
        expected_old = separate(nft.old).predict(noised, t, prompts)
    other = separate(own)
    expected_output = other.predict(noised, t, prompts)
    assert torch.equal(old_output, expected_old) and not torch.allclose(old_output, expected_output, atol=1e-3)
    gradients = torch.autograd.grad(loss(expected_output, expected_old), other.trainable_parameters())
    for parameter, expected in zip(nft.parameters, gradients, strict=True):
        assert torch.allclose(parameter.grad, expected, rtol=1e-5, atol=1e-8)
    assert max(float(g.abs().max()) for g in gradients) > 1e-3


@pytest.mark.parametrize(
    ("schedule", "options"),
    [("flow", {"mixture": 1.0}), ("epsilon", {"mixture": 0.5, "decay": "none", "timestep_fraction": 0.6})],
)
def test_it_finds_the_optimum(schedule, options):
    env = gaussian_env(schedule, num_envs=64, group_size=8)
    policy = full_policy(env)
    options = {"learning_rate": 0.05, "weight_decay": 0.0, "videos_per_update": 64, "micro_batch": 64, **options}
    nft = nft_on(env, policy, **options)
    history = [policy.trainable_parameters()[0].detach().clone() for _ in range(80) if nft.update()]
    best = optimal_means(final_law(env.model, env.mdp.table), 1.0)
    found = torch.stack(history[-30:]).mean(0)
    assert torch.allclose(found.double(), best[:, None].expand_as(found), atol=0.25), found
    assert (START.T - best[:, None]).abs().max() > 0.9


def test_videos_are_sampled_by_the_old_policy():
    env = gaussian_env("flow", num_envs=16)
    policy = full_policy(env)
    nft = nft_on(env, policy, videos_per_update=16)
    Recorder(nft)
    nft.old = [START.T + 1.5]
    metrics = nft.update()
    other = gaussian_env("flow", num_envs=16, means=START + 1.5)
    other.load_state_dict({"seed": 0, "videos_drawn": 0, "groups_drawn": 0})
    _, _, reward = sample_videos(other, full_policy(other), 1)
    assert metrics["reward_mean"] == pytest.approx(float(reward.mean()), rel=1e-6)
    assert torch.equal(policy.trainable_parameters()[0], START.T) and metrics["old_error"] > 0


def test_the_old_policy_follows_at_the_published_pace():
    assert [old_policy_decay(k, "none") for k in (0, 1000)] == [0, 0]
    assert [old_policy_decay(k, "type1") for k in (0, 1, 250, 500, 900)] == pytest.approx([0, 0.001, 0.25, 0.5, 0.5])
    published = [0, 0, 0, 0.0075, 0.75, 0.999, 0.999]
    assert [old_policy_decay(k, "type2") for k in (0, 74, 75, 76, 175, 209, 900)] == pytest.approx(published)

    env = gaussian_env("flow")
    policy = full_policy(env)
    nft = nft_on(env, policy, updates_per_rollout=2)
    nft.steps_taken = 298
    before = nft.old[0].clone()
    assert nft.update()["old_decay"] == pytest.approx(0.3)  # after two steps more
    new = policy.trainable_parameters()[0].detach()
    assert torch.allclose(nft.old[0], 0.3 * before + 0.7 * new) and not torch.equal(new, before)


def test_the_pull_to_the_untrained_model_is_the_formulas():
    env = gaussian_env("flow")
    policy = full_policy(env)
    with torch.no_grad():
        policy.trainable_parameters()[0].add_(0.3)

    def first(coefficient):
        nft = nft_on(env, policy, reference_coefficient=coefficient, timestep_fraction=1.0)
        Recorder(nft)
        return nft.update()

    with_it, without = first(7.0), first(0.0)
    _, q = env.model.denoiser.coefficients(env.mdp.base_table.timesteps)
    expected = float((0.3 * q).square().mean())
    assert with_it["reference_error"] == pytest.approx(expected, rel=1e-4) and without["reference_error"] == 0.0
    assert with_it["loss"] - without["loss"] == pytest.approx(7 * expected, rel=1e-3)


@pytest.mark.parametrize(("options", "steps"), [({}, 1), ({"updates_per_rollout": 5}, 5)])
def test_optimiser_steps_and_costs_are_those_asked_for(options, steps):
    env = gaussian_env("flow", guidance_scale=2.0)
    nft = nft_on(env, full_policy(env), videos_per_update=16, **options)
    metrics = nft.update()
    assert metrics["optimiser_steps"] == nft.steps_taken == steps
    assert all(type(value) is float and math.isfinite(value) for value in metrics.values())
    # sampled with guidance; trained without at 4 of 5 timesteps, for the old policy, the reference and the policy
    assert env.mdp.counters.denoiser_forwards == 16 * 5 * 2 + 16 * 4 * 3
    assert env.mdp.counters.denoiser_backwards == 16 * 4
    assert env.mdp.counters.reward_backward_queries == 0


def test_every_video_is_trained_at_different_timesteps_of_the_grid():
    env = gaussian_env("flow")
    nft = nft_on(env, full_policy(env))
    dealt = nft._deal_timesteps(500)
    assert dealt.shape == (500, 4)
    grid = set(env.mdp.table.timesteps.tolist())
    assert all(len(set(row)) == 4 and set(row) <= grid for row in dealt.tolist())
    counts = torch.stack([(dealt == t).sum() for t in env.mdp.table.timesteps])
    assert (counts - 400).abs().max() < 50


@pytest.mark.parametrize("updates", [0, 2])
def test_it_repeats_and_resumes_bit_for_bit(updates, tmp_path):
    def build(seed=0, policy_seed=0):
        env = gaussian_env("flow")
        policy = env.make_policy(lora_rank=2, seed=policy_seed)
        return nft_on(env, policy, seed=seed, updates_per_rollout=2), policy

    nft, policy = build()
    first = [nft.update() for _ in range(updates)]
    elsewhere = []

    def another():
        other, policy = build(seed=99, policy_seed=5)
        elsewhere.append(other.update())
        return other, policy

    expected, state = goes_on_bit_for_bit(nft, policy, another, tmp_path, 2)
    assert elsewhere[0]["reward_mean"] != expected[0]["reward_mean"]
    again, _ = build()
    assert [again.update() for _ in range(updates + 2)] == first + expected
    env = gaussian_env("flow")
    with pytest.raises(ValueError, match="weights of other shapes.*LoRA rank"):
        nft_on(env, env.make_policy(lora_rank=1)).load_state_dict(state)


def test_a_loaded_state_stays_the_callers():
    env = gaussian_env()
    nft = nft_on(env, full_policy(env))
    nft.update()
    state = nft.state_dict()
    kept = [old.clone() for old in state["old"]]
    nft.load_state_dict(state)
    nft.update()
    assert not all(torch.equal(a, b) for a, b in zip(nft.old, kept, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(state["old"], kept, strict=True))


def test_a_gradient_that_is_not_finite_changes_nothing():
    env = gaussian_env()
    policy = full_policy(env)
    nft = nft_on(env, policy)
    refuses_a_gradient_that_is_not_finite(nft, policy)
    assert torch.equal(nft.old[0], START.T) and nft.steps_taken == 0


def test_one_update_of_moving_shapes():
    env = vdm_env.make("MovingShapes-HPS", num_envs=2, group_size=2, num_steps=3, guidance_scale=1.0)
    policy = env.make_policy(lora_rank=2)
    before = [p.detach().clone() for p in policy.trainable_parameters()]
    metrics = nft_on(env, policy, videos_per_update=2).update()
    assert all(math.isfinite(value) for value in metrics.values()) and metrics["optimiser_steps"] == 1
    assert metrics["zero_std_fraction"] == 0 and metrics["grad_norm"] > 0
    assert any(not torch.equal(a, b) for a, b in zip(before, policy.trainable_parameters(), strict=True))


def test_refusals_name_the_way_out():
    env = gaussian_env(group_size=1)
    with pytest.raises(ValueError, match="group_size=1.*group_size=8.*DDPO"):
        nft_on(env, full_policy(env))
    env = gaussian_env()
    with pytest.raises(ValueError, match="videos_per_update is 24.*num_envs=16"):
        nft_on(env, full_policy(env), videos_per_update=24)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixture": 0}, "mixture is 0"),
        ({"adv_clip_max": math.nan}, "adv_clip_max is nan"),
        ({"reference_coefficient": -1}, "reference_coefficient is -1"),
        ({"decay": "type3"}, "decay is 'type3', expected one of type1, type2, none"),
        ({"adv_mode": "best"}, "adv_mode is 'best', expected one of all, positive_only"),
        ({"timestep_fraction": 1.5}, "timestep_fraction is 1.5, expected at most 1"),
        ({"updates_per_rollout": 9, "videos_per_update": 8}, "updates_per_rollout is 9.*videos_per_update=8"),
    ],
)
def test_the_config_is_checked(options, message):
    with pytest.raises(ValueError, match=message):
        DiffusionNFTConfig(**options)


def test_defaults_and_preset():
    config = DiffusionNFTConfig()
    assert (config.mixture, config.adv_clip_max, config.reference_coefficient, config.decay) == (1, 5, 1e-4, "type1")
    assert DiffusionNFTConfig.preset("MovingShapes").videos_per_update == 64
    with pytest.raises(ValueError, match="only for MovingShapes"):
        DiffusionNFTConfig.preset("Sora")
