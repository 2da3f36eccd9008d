"""The policy: LoRA, guidance, the reference, checkpoints in memory and on disk, and its Gaussian."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from models import LATENT_SHAPE, tiny_env
from safetensors.torch import load_file
from torch import nn
from weights import nudge

from vdm_env import CorruptWeightsError, MeanNormal, transition

KINDS = ("flow", "unet")


def gradients(policy, value):
    return torch.autograd.grad(value, policy.trainable_parameters())


# --------------------------------------------------------------------------------------------------- the network


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_new_policy_and_the_reference_are_the_base_model_exactly(kind):
    env = tiny_env(kind)
    obs, _ = env.reset(seed=0)
    base = env.model.predict(obs["latents"], obs["timestep"], env.mdp.condition(obs["prompt_id"]))
    policy = env.make_policy(lora_rank=2)
    assert torch.equal(policy.mean(obs), base)
    nudge(policy)
    changed = policy.mean(obs)
    assert not torch.allclose(changed, base)
    with policy.reference():
        assert torch.equal(policy.mean(obs), base)
        with policy.reference():
            pass
        assert torch.equal(policy.predict(obs["latents"], obs["timestep"], obs["prompt_id"]), base)
    assert torch.equal(policy.mean(obs), changed)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_policies_on_one_network_do_not_disturb_each_other(kind):
    env = tiny_env(kind)
    obs, _ = env.reset(seed=0)
    base = env.make_policy(lora_rank=2).mean(obs)
    a = nudge(env.make_policy(lora_rank=2))
    alone = a.mean(obs)
    b = nudge(
        env.make_policy(lora_rank=4, lora_targets=["to_q", "to_k", "to_v", "to_out.0", "ff.net.2", "linear_1"]), 0.1
    )
    other = b.mean(obs)
    assert torch.equal(a.mean(obs), alone) and torch.equal(b.mean(obs), other) and not torch.equal(alone, other)
    whole = env.make_policy(lora_rank=0)
    assert torch.equal(whole.mean(obs), base)
    nudge(whole)
    assert not torch.equal(whole.mean(obs), base)
    for policy in (a, b, whole):
        with policy.reference():
            assert torch.equal(policy.mean(obs), base)
    assert torch.equal(a.mean(obs), alone)
    assert not {id(p) for p in a.trainable_parameters()} & {id(p) for p in b.trainable_parameters()}


def test_a_reference_or_another_policy_between_forward_and_backward_changes_no_gradient():
    """PEFT freezes an adapter that it switches off; a gradient must survive that."""
    env = tiny_env()
    a, b = nudge(env.make_policy(lora_rank=2)), nudge(env.make_policy(lora_rank=2), 0.1)
    obs, _ = env.reset(seed=0)
    expected = gradients(a, a.mean(obs).square().mean())
    for checkpointing in (False, True):
        a.gradient_checkpointing = checkpointing
        for between in (lambda: a.mean(obs), lambda: b.mean(obs)):
            loss = a.mean(obs).square().mean()
            with torch.no_grad(), a.reference():
                between()
            b.mean(obs)
            with torch.no_grad(), a.reference():
                between()
            loss.backward()  # not autograd.grad, which asks no leaf whether it is frozen
            for parameter, wanted in zip(a.trainable_parameters(), expected, strict=True):
                assert torch.equal(parameter.grad, wanted)
                parameter.grad = None
    assert any(g.any() for g in expected)


@pytest.mark.parametrize("rank", [2, 0])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_reference_is_the_policy_of_its_latest_refresh_until_it_is_reset(kind, rank):
    env = tiny_env(kind)
    obs, _ = env.reset(seed=0)
    policy, other = env.make_policy(lora_rank=rank), nudge(env.make_policy(lora_rank=2), 0.1)
    base, others = policy.mean(obs), other.mean(obs)

    def of_reference():
        other.mean(obs)  # another policy on the network was the last to be called
        with policy.reference():
            return policy.mean(obs)

    seen = []
    for size in (0.05, -0.02):
        seen.append(nudge(policy, size).mean(obs))
        assert torch.equal(of_reference(), base if len(seen) == 1 else seen[-2])  # training leaves it alone
        with policy.reference():
            policy.refresh_reference()  # takes the policy's weights, also from in here
        assert torch.equal(of_reference(), seen[-1]) and torch.equal(policy.mean(obs), seen[-1])
    nudge(policy)
    assert torch.equal(of_reference(), seen[-1]) and not torch.allclose(seen[-1], seen[-2])
    assert not torch.equal(policy.mean(obs), seen[-1]) and torch.equal(other.mean(obs), others)
    with other.reference():
        assert torch.equal(other.mean(obs), base)
    policy.reset_reference()
    assert torch.equal(of_reference(), base)


def test_a_snapshot_costs_the_trained_weights_alone_and_cannot_be_trained():
    env = tiny_env()
    policy = nudge(env.make_policy(lora_rank=2))
    before = {name: id(parameter) for name, parameter in env.model.denoiser.named_parameters()}
    policy.refresh_reference()
    assert {name: id(parameter) for name, parameter in env.model.denoiser.named_parameters()} == before
    state = policy.reference_state_dict()
    trained = policy.lora_state_dict()
    assert state.keys() == trained.keys() and all(torch.equal(state[name], trained[name]) for name in state)
    obs, _ = env.reset(seed=0)
    latents = obs["latents"].clone().requires_grad_()
    with policy.reference():
        policy.mean({**obs, "latents": latents}).square().sum().backward()
    assert latents.grad.any()  # a graph may be made through it, but it ends at no weight
    assert all(parameter.grad is None for parameter in env.model.denoiser.parameters())


@pytest.mark.parametrize("rank", [2, 0])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_refreshed_reference_between_forward_and_backward_changes_no_gradient(rank, checkpointing):
    env = tiny_env()
    policy = nudge(env.make_policy(lora_rank=rank))
    obs, _ = env.reset(seed=0)
    expected = gradients(policy, policy.mean(obs).square().mean())
    policy.gradient_checkpointing = checkpointing
    nudge(policy, -0.02).refresh_reference()
    nudge(policy, 0.02)
    for between in (policy.refresh_reference, policy.reset_reference, lambda: None):
        loss = policy.mean(obs).square().mean()
        with torch.no_grad(), policy.reference():
            policy.mean(obs)
        between()
        with torch.no_grad(), policy.reference():
            policy.mean(obs)
        loss.backward()  # not autograd.grad, which asks no leaf whether it is frozen
        for parameter, wanted in zip(policy.trainable_parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, wanted, rtol=1e-3, atol=1e-5)
            parameter.grad = None
    assert any(g.any() for g in expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_reference_and_policy_in_one_graph(checkpointing):
    """The distance to a refreshed reference, with the reference's forward last: the graph is the policy's alone."""
    env = tiny_env()
    policy = nudge(env.make_policy(lora_rank=2))
    policy.refresh_reference()
    nudge(policy)
    policy.gradient_checkpointing = checkpointing
    obs, _ = env.reset(seed=0)
    with torch.no_grad(), policy.reference():
        constant = policy.mean(obs)
    expected = gradients(policy, (policy.mean(obs) - constant).square().mean())
    output = policy.mean(obs)
    with policy.reference():
        reference = policy.mean(obs)
    found = gradients(policy, (output - reference).square().mean())
    assert any(g.any() for g in expected) and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("rank", [2, 0])
@torch.no_grad()
def test_the_reference_goes_over_into_another_policy(rank):
    env = tiny_env()
    policy = env.make_policy(lora_rank=rank)
    assert policy.reference_state_dict() == {}
    nudge(policy).refresh_reference()
    state = policy.reference_state_dict()
    obs, _ = env.reset(seed=0)
    expected = policy.mean(obs)
    other = nudge(env.make_policy(lora_rank=rank), 0.2)
    other.load_reference_state_dict(state)
    changed = nudge(policy).mean(obs)  # neither the state nor the other policy hangs on this one's weights
    for value in state.values():
        value.zero_()
    for owner in (other, policy):
        with owner.reference():
            assert torch.equal(owner.mean(obs), expected) and not torch.equal(changed, expected)
    smaller = dict(list(state.items())[1:])
    with pytest.raises(CorruptWeightsError, match="differ"):
        other.load_reference_state_dict(smaller)
    with other.reference():
        assert torch.equal(other.mean(obs), expected)
    other.load_reference_state_dict({})
    assert other.reference_state_dict() == {}


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_gives_equal_gradients(kind):
    env = tiny_env(kind)
    policy = nudge(env.make_policy(lora_rank=2, guidance_scale=3.0))
    obs, _ = env.reset(seed=0)
    plain = gradients(policy, policy.mean(obs).square().sum())
    before = env.mdp.counters.denoiser_forwards
    policy.gradient_checkpointing = True
    again = gradients(policy, policy.mean(obs).square().sum())
    assert env.mdp.counters.denoiser_forwards - before == 8  # two videos, two guidance branches, twice
    assert any(g.any() for g in plain) and all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_guidance_in_one_batch_equals_two_calls(kind):
    env = tiny_env(kind)
    policy = nudge(env.make_policy(lora_rank=2, guidance_scale=3.0))
    obs, _ = env.reset(seed=0)
    x, t = obs["latents"], obs["timestep"]
    conditional = policy.predict(x, t, obs["prompt_id"])
    unconditional = env.model.predict(x, t, env.mdp.unconditional(2))  # this policy is the one switched on
    assert not torch.allclose(conditional, unconditional)
    expected = unconditional + 3.0 * (conditional - unconditional)
    torch.testing.assert_close(policy.mean(obs), expected, rtol=1e-5, atol=1e-5)
    policy.guidance_scale = 1.0
    assert torch.equal(policy.mean(obs), conditional)


@torch.no_grad()
def test_dropout_stays_off():
    env = tiny_env("unet")
    policy = nudge(env.make_policy(lora_rank=2))
    obs, _ = env.reset(seed=0)
    assert any(isinstance(m, nn.Dropout) and m.p > 0 for m in env.model.denoiser.modules())
    before = policy.mean(obs)
    policy.train()
    assert torch.equal(policy.mean(obs), before) and torch.equal(policy.mean(obs), before)
    whole = env.make_policy(lora_rank=0).train()
    assert torch.equal(whole.mean(obs), whole.mean(obs))


def test_only_the_adapter_is_trainable():
    env = tiny_env()
    policy = env.make_policy(lora_rank=2)
    obs, _ = env.reset(seed=0)
    policy.mean(obs).sum().backward()
    own = {id(p) for p in policy.trainable_parameters()}
    assert own == {id(p) for p in env.model.denoiser.parameters() if p.grad is not None}
    assert own == {id(p) for p in env.model.denoiser.parameters() if p.requires_grad}
    first, second = env.make_policy(lora_rank=2, seed=1), env.make_policy(lora_rank=2, seed=1)
    pairs = zip(first.trainable_parameters(), second.trainable_parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)


def test_counters_count_videos_of_both_branches():
    env = tiny_env()
    policy = env.make_policy(lora_rank=2, guidance_scale=2.0)
    obs, _ = env.reset(seed=0)
    policy.mean(obs).sum().backward()
    counters = env.mdp.counters
    assert (counters.denoiser_forwards, counters.denoiser_backwards) == (4, 4)
    with torch.no_grad():
        policy.predict(obs["latents"], obs["timestep"], obs["prompt_id"])
    assert (counters.denoiser_forwards, counters.denoiser_backwards) == (6, 4)


@pytest.mark.parametrize(
    "options, message", [({"lora_rank": -1}, "lora_rank=-1"), ({"lora_targets": ["nowhere"]}, "nowhere")]
)
def test_impossible_policies_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_env().make_policy(**options)


# ---------------------------------------------------------------------------------------------------- on the disk


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_save_and_load_round_trip_and_peft_reads_it_too(kind, tmp_path):
    env = tiny_env(kind)
    obs, _ = env.reset(seed=0)
    policy = nudge(env.make_policy(lora_rank=2, lora_alpha=4, guidance_scale=1.0))
    expected = policy.mean(obs)
    policy.save(tmp_path / "lora")
    loaded = env.make_policy(lora_rank=2, lora_alpha=4, guidance_scale=1.0)
    loaded.load(tmp_path / "lora")
    assert torch.equal(loaded.mean(obs), expected)

    names = load_file(tmp_path / "lora" / "adapter_model.safetensors").keys()
    assert all(name.startswith("base_model.model.") and "policy" not in name for name in names)
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["r"] == 2
    model = tiny_env(kind).model
    network = peft.PeftModel.from_pretrained(model.denoiser, str(tmp_path / "lora")).eval()
    output = model.call(network, obs["latents"], obs["timestep"], env.mdp.condition(obs["prompt_id"]))
    assert torch.equal(output, expected)


@torch.no_grad()
def test_all_weights_round_trip(tmp_path):
    env = tiny_env()
    obs, _ = env.reset(seed=0)
    policy = nudge(env.make_policy(lora_rank=0))
    policy.save(tmp_path)
    loaded = env.make_policy(lora_rank=0)
    loaded.load(tmp_path)
    assert torch.equal(loaded.mean(obs), policy.mean(obs))
    assert (tmp_path / "model.safetensors").is_file()


def test_weights_that_do_not_fit_are_refused(tmp_path):
    env = tiny_env()
    policy = nudge(env.make_policy(lora_rank=2))
    before = policy.lora_state_dict()
    with pytest.raises(FileNotFoundError, match="no adapter_model.safetensors in"):
        policy.load(tmp_path)
    env.make_policy(lora_rank=4).save(tmp_path / "four")
    with pytest.raises(CorruptWeightsError, match="rank 2"):
        policy.load(tmp_path / "four")
    file = policy.save(tmp_path / "two") / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CorruptWeightsError, match="adapter_model.safetensors is damaged or truncated"):
        policy.load(tmp_path / "two")
    with pytest.raises(CorruptWeightsError, match="differ"):
        policy.load_lora_state_dict(dict(list(before.items())[1:]))
    assert all(torch.equal(value, policy.lora_state_dict()[name]) for name, value in before.items())


# ------------------------------------------------------------------------------------------------------- Gaussian


def test_mean_normal_against_torch():
    loc, value = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0)), torch.ones(3, 4, 2)
    scale = torch.tensor([0.5, 0.0, 2.0])
    dist = MeanNormal(loc, scale)
    each = torch.distributions.Normal(loc[[0, 2]], scale[[0, 2], None, None]).log_prob(value[[0, 2]])
    torch.testing.assert_close(dist.log_prob(value)[[0, 2]], each.mean((1, 2)))
    torch.testing.assert_close(dist.log_prob_sum(value)[[0, 2]], each.double().sum((1, 2)))
    assert (
        dist.log_prob(value)[1] == dist.log_prob_sum(value)[1] == 0 and dist.log_prob_sum(value).dtype == torch.float64
    )
    entropy = torch.distributions.Normal(loc[[0, 2]], scale[[0, 2], None, None]).entropy().mean((1, 2))
    torch.testing.assert_close(dist.entropy(), torch.stack([entropy[0], torch.tensor(0.0), entropy[1]]))
    assert (
        torch.equal(dist.mean, loc)
        and torch.equal(dist.mode, loc)
        and torch.equal(dist.stddev[2], torch.full((4, 2), 2.0))
    )
    assert torch.equal(dist.rsample(noise=value)[1], loc[1]) and torch.equal(dist.rsample(noise=value)[2], loc[2] + 2)


def test_mean_normal_kl_against_torch():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 3, 5, generator=generator), torch.randn(2, 3, 5, generator=generator)
    scale = torch.tensor([0.7, 0.0])
    p, q = MeanNormal(a, scale), MeanNormal(b, scale)
    normal = torch.distributions.Normal
    each = torch.distributions.kl_divergence(normal(a[0], 0.7), normal(b[0], 0.7))
    torch.testing.assert_close(p.kl(q)[0], each.double().sum(), rtol=1e-6, atol=0)
    torch.testing.assert_close(p.kl(q, "mean")[0], each.mean())
    assert p.kl(q)[1] == p.kl(q, "mean")[1] == 0


@torch.no_grad()
def test_samples_have_the_published_deviation_and_no_global_randomness():
    env = tiny_env(num_envs=64)
    policy = env.make_policy(lora_rank=2)
    obs, _ = env.reset(seed=0)
    torch.manual_seed(0)
    sample = policy(obs)
    torch.manual_seed(1)
    assert torch.equal(policy(obs), sample)
    spread = (sample - policy.mean(obs)).std()
    assert float(spread / obs["action_std"][0]) == pytest.approx(1.0, abs=0.03)
    quiet, _ = env.reset(options={"noise_levels": [0.0] * 4})
    assert torch.equal(policy(quiet), policy.mean(quiet))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_log_prob_of_stored_transitions(kind):
    """Ratio 1 on stored data, and the density of the action is that of x' up to log|B|."""
    env = tiny_env(kind)
    policy = nudge(env.make_policy(lora_rank=2, guidance_scale=2.0))
    obs, _ = env.reset(seed=0)
    table = env.mdp.table
    for k in range(env.num_steps):
        dist = policy.dist(obs)
        action = policy(obs)
        stored = dist.log_prob(action)
        assert torch.equal(policy.dist(obs).log_prob(action), stored)
        after, *_ = env.step(action)
        if table.stochastic[k]:
            density = transition.log_prob(table, obs["latents"], dist.mean, after["latents"], obs["step"])
            offset = float(table.B[k].abs().log())
            torch.testing.assert_close(density, stored - offset, rtol=1e-4, atol=1e-4)
            elements = torch.Size(LATENT_SHAPE).numel()
            torch.testing.assert_close(dist.log_prob_sum(action) / elements, stored.double(), rtol=1e-6, atol=1e-6)
        else:
            assert not stored.any()
        obs = after
