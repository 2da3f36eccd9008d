"""Time and operations of training: what is counted, what it costs, and that counting changes nothing."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from gaussian import gaussian_env
from killing import build, rows
from test_run import Clock, Counters, FakeAlgorithm, FakeEnv
from torch import nn

import algos
import vdm_env
from algos.flops import _MEASURES, PRICES, Flops, count_flops
from algos.meter import Meter
from vdm_env.models import fast_path


def spent(count, *, train, cpu):
    """A meter after a train phase of so many wall and CPU seconds with such counts."""
    clock, cpu_clock, counters = Clock(), Clock(), Counters()
    meter = Meter(counters=counters, clock=clock, cpu_clock=cpu_clock)
    with meter.phase("train"):
        clock.now, cpu_clock.now = train, cpu
        for name, value in count.items():
            setattr(counters, name, value)
    return meter


def test_device_seconds_of_a_cpu_are_the_work_of_this_process():
    meter = spent({}, train=10.0, cpu=4.0)
    assert (meter.device_s, meter.cpu_s, meter.row(1, {})["train_s"]) == (4.0, 4.0, 10.0)
    later = Meter(counters=Counters(), clock=Clock(), cpu_clock=Clock())
    later.load_state_dict(json.loads(json.dumps(meter.state_dict())))
    assert later.device_s == 4.0
    # Waiting is no work, and two threads would count twice; other processes of the machine do not enter.
    meter = Meter(counters=Counters())
    with meter.phase("train"):
        time.sleep(0.2)
        until = time.process_time() + 0.05
        while time.process_time() < until:
            pass
    assert 0.05 <= meter.device_s < 0.15 < 0.25 <= meter.seconds["train"]


def test_phases_add_up_to_the_wall_time_of_training():
    env = vdm_env.make("MovingShapes-HPS", num_envs=2, num_steps=2, guidance_scale=1.0)
    policy = env.make_policy()
    meter = Meter(counters=env.mdp.counters)
    started = time.perf_counter()
    with meter.phase("train"), torch.no_grad():
        obs, _ = env.reset(seed=0)
        for _ in range(env.num_steps):
            obs, *_ = env.step(policy(obs))
    wall = time.perf_counter() - started
    row = meter.row(1, {})
    parts = [row[name] for name in ("rollout_s", "decode_s", "reward_s", "update_s")]
    assert all(part >= 0 for part in parts) and row["rollout_s"] > 0.1 * wall
    assert sum(parts) == pytest.approx(row["train_s"], abs=1e-9)
    assert row["train_s"] == pytest.approx(wall, rel=0.03, abs=2e-4)


def test_rounded_columns_add_up_too():
    meter = spent({"decode_s": 0.33335, "reward_s": 0.11115}, train=1.00005, cpu=1.0)
    row = meter.row(1, {})
    assert row["decode_s"] + row["reward_s"] + row["update_s"] == pytest.approx(row["train_s"], abs=1e-12)


def test_an_update_reads_few_clocks_and_waits_for_the_device_at_its_edges_only(tmp_path, monkeypatch):
    reads = {"wall": 0, "cpu": 0, "device": 0}

    def clock(name):
        def read():
            reads[name] += 1
            return time.perf_counter()

        return read

    monkeypatch.setattr(Meter, "_synchronise", lambda self: clock("device")())
    meter = Meter(counters=Counters(), clock=clock("wall"), cpu_clock=clock("cpu"))
    before = dict(reads)
    with meter.phase("train"):
        pass
    meter.measure_flops()
    meter.row(1, {})
    assert {name: reads[name] - before[name] for name in reads} == {"wall": 3, "cpu": 2, "device": 2}


# ---------------------------------------------------------------------- operations


def test_the_counter_agrees_with_operations_counted_by_hand():
    linear, conv = nn.Linear(5, 7), nn.Conv3d(2, 4, 3, padding=1)
    x, video = torch.randn(3, 5), torch.randn(1, 2, 6, 8, 8)
    assert count_flops(lambda: linear(x)) == 2 * 3 * 5 * 7
    assert count_flops(lambda: conv(video)) == 2 * (2 * 27) * 4 * (6 * 8 * 8)
    # Gradients of the weights alone are one product more, those of the input another.
    assert count_flops(lambda: torch.autograd.grad(linear(x).sum(), linear.weight)) == 2 * 2 * 3 * 5 * 7
    free = x.clone().requires_grad_()
    both = [linear.weight, free]
    assert count_flops(lambda: torch.autograd.grad(linear(free.view_as(free)).sum(), both)) == 3 * 2 * 3 * 5 * 7


@pytest.mark.parametrize("backend", ["fused", "math"])
def test_attention_is_counted_whatever_kernel_does_it(backend):
    q = torch.randn(2, 4, 16, 8)  # batch, heads, tokens, width
    kind = torch.nn.attention.SDPBackend
    kernels = [kind.FLASH_ATTENTION] if backend == "fused" else [kind.MATH]
    with torch.nn.attention.sdpa_kernel(kernels):
        found = count_flops(lambda: nn.functional.scaled_dot_product_attention(q, q, q))
    assert found == 2 * (2 * 2 * 4 * 16 * 16 * 8)


def test_a_checkpoint_does_what_it_forgot_again():
    layers = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    x = torch.randn(4, 6, requires_grad=True)
    one = 2 * 4 * 6 * 6
    plain = count_flops(lambda: torch.autograd.grad(layers(x.view_as(x)).sum(), x))
    saved = partial(torch.utils.checkpoint.checkpoint, layers, use_reentrant=False)
    again = count_flops(lambda: torch.autograd.grad(saved(x.view_as(x)).sum(), x))
    assert plain == 4 * one and again in (5 * one, 6 * one)  # the last layer's output is not needed again


EXPECTED = {"MovingShapes-HPS": (290_701_312, 370_081_792), "MovingShapesUNet-HPS": (660_709_376, 694_943_744)}


@pytest.mark.parametrize("env_id", EXPECTED)
def test_costs_of_the_embedded_models(env_id, monkeypatch):
    env = vdm_env.make(env_id, num_envs=1, num_steps=2)
    policy = env.make_policy()
    (weight, *_) = policy.trainable_parameters()
    weight.grad = torch.ones_like(weight)
    counters, state = asdict(env.mdp.counters), torch.get_rng_state()
    flops = Flops(env=env, policy=policy)
    flops.measure(list(_MEASURES))
    assert flops.notes == {} and asdict(env.mdp.counters) == counters
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(weight.grad, torch.ones_like(weight))
    assert all(p.grad is None for p in policy.trainable_parameters()[1:]) and not policy._model.denoiser.training
    assert (flops.costs["denoiser_forward"], flops.costs["denoiser_backward"]) == EXPECTED[env_id]
    # By hand: the matrix products and convolutions of all layers, and attention, which has no layer of its own.
    by_hand = []

    def counted(attention):
        def attend(query, key, value, *given, **options):
            by_hand.append(2 * 2 * query.numel() * key.shape[-2])
            return attention(query, key, value, *given, **options)

        return attend

    def layer(module, given, output):
        by_hand.append(2 * module.weight[0].numel() * output.numel())

    kinds = (nn.Linear, nn.Conv2d, nn.Conv3d)
    hooks = [m.register_forward_hook(layer) for m in policy._model.denoiser.modules() if isinstance(m, kinds)]
    for place, name in ((nn.functional, "scaled_dot_product_attention"), (fast_path, "short_attention")):
        monkeypatch.setattr(place, name, counted(getattr(place, name)))
    with torch.no_grad():
        policy.predict(env.mdp.initial_latents(torch.tensor([0])), torch.tensor([500.0]), [0])
    for hook in hooks:
        hook.remove()
    assert sum(by_hand) == flops.costs["denoiser_forward"]
    # A frozen decoder's gradient is that of its input alone, which costs what the forward costs.
    assert flops.costs["decode_backward"] == flops.costs["decode"] > 0
    assert flops.costs["reward_backward"] > flops.costs["reward"] > 0


def test_a_recomputed_forward_is_paid_once():
    env = vdm_env.make("MovingShapes-HPS", num_envs=1, num_steps=2)
    costs = []
    for checkpointing in (False, True):
        policy = env.make_policy(gradient_checkpointing=checkpointing)
        flops = Flops(env=env, policy=policy)
        flops.measure(["denoiser_forward", "denoiser_backward"])
        x = env.mdp.initial_latents(torch.tensor([0]))
        before = asdict(env.mdp.counters)
        whole = count_flops(lambda p=policy, x=x: p.predict(x, torch.tensor([500.0]), [0]).sum().backward())
        count = {name: value - before[name] for name, value in asdict(env.mdp.counters).items()}
        assert flops.of(count) == whole
        costs.append(whole)
    assert costs[1] > costs[0] + flops.costs["denoiser_forward"] // 2


class Known:
    """An algorithm that makes a known number of calls."""

    def __init__(self, env, policy):
        self.env, self.policy, self.config = env, policy, {}

    def update(self):
        env, batch = self.env, self.env.num_envs
        obs, _ = env.reset(seed=0)
        with torch.no_grad():
            for _ in range(env.num_steps):
                obs, reward, *_ = env.step(self.policy(obs))
        t = torch.full((batch,), 0.5)
        for _ in range(3):
            self.policy.predict(obs["latents"], t, obs["prompt_id"]).sum().backward()
        for parameter in self.policy.trainable_parameters():
            parameter.grad = None
        return {"reward_mean": reward.mean()}

    def state_dict(self):
        return self.env.state_dict()

    def load_state_dict(self, state):
        self.env.load_state_dict(state)


def test_counts_and_operations_of_a_run_are_exact(tmp_path):
    env = gaussian_env(num_envs=4, group_size=1, num_steps=3)
    policy = env.make_policy(lora_rank=2)
    held = env.derive(split="train", num_envs=2, group_size=1, decode_frames=None)
    algos.run(Known(env, policy), out=tmp_path, updates=2, evaluate=algos.Evaluator(held, [0, 1]), progress=False)
    flops = Flops(env=env, policy=policy)
    flops.measure(list(_MEASURES))
    forward, backward = flops.costs["denoiser_forward"], flops.costs["denoiser_backward"]
    assert forward > 0 and backward > 0
    for row in rows(tmp_path / "train.jsonl"):
        n = row["update"]
        assert (row["videos_sampled"], row["reward_queries"], row["reward_backward_queries"]) == (4 * n, 4 * n, 0)
        assert (row["denoiser_forwards"], row["denoiser_backwards"]) == (4 * (3 + 3) * n, 4 * 3 * n)
        assert row["denoiser_flops"] == (24 * forward + 12 * backward) * n
        assert row["flops"] == row["denoiser_flops"] + 4 * n * (flops.costs["decode"] + flops.costs["reward"])
    evals = rows(tmp_path / "eval.jsonl")
    found = {row["update"]: row["flops"] for row in evals}
    assert found == {0: 0, **{row["update"]: row["flops"] for row in rows(tmp_path / "train.jsonl")}}
    assert "flops_note" not in json.loads((tmp_path / "run.json").read_text())


def test_operations_continue_after_a_stop(tmp_path):
    def run(updates, **options):
        env = gaussian_env(num_envs=4, group_size=1, num_steps=3)
        policy = env.make_policy(lora_rank=2)
        algorithm = Known(env, policy)
        real, calls = algorithm.update, []

        def update():
            calls.append(1)
            if len(calls) > updates:
                raise RuntimeError("power")
            return real()

        algorithm.update = update
        options = {"out": tmp_path, "updates": 4, "checkpoint_every": 1, "progress": False, **options}
        return algos.run(algorithm, **options)

    with pytest.raises(RuntimeError, match="power"):
        run(2)
    run(9, resume=True)
    found = [row["flops"] for row in rows(tmp_path / "train.jsonl")]
    assert found == [found[0] * n for n in (1, 2, 3, 4)] and found[0] > 0


def test_what_cannot_be_measured_is_null_and_said(tmp_path):
    algos.run(FakeAlgorithm(), out=tmp_path, updates=2, progress=False)
    assert [row["flops"] for row in rows(tmp_path / "train.jsonl")] == [None, None]
    note = json.loads((tmp_path / "run.json").read_text())["flops_note"]
    assert "denoiser_forward was not measured: AttributeError" in note and "decode was not measured" in note
    # Where the reward alone cannot be, the denoiser's part is known all the same.
    env = gaussian_env(num_envs=2, num_steps=2, group_size=1)
    flops = Flops(env=env, policy=env.make_policy(lora_rank=2))
    env.mdp.reward = SimpleNamespace(name="broken")
    counts = dict.fromkeys(PRICES, 3)
    flops.measure(flops.missing(counts))
    assert list(flops.notes) == ["reward", "reward_backward"] and flops.missing(counts) == []
    assert flops.of(counts) is None and flops.of(counts, ("denoiser_forwards",)) == 3 * flops.costs["denoiser_forward"]


def test_only_what_is_called_is_measured():
    flops = Flops(env=FakeEnv(), policy=None)
    counts = {**dict.fromkeys(PRICES, 0), "denoiser_forwards": 2}
    assert flops.missing(counts) == ["denoiser_forward"]
    assert flops.missing(dict.fromkeys(PRICES, 0)) == [] and flops.of(dict.fromkeys(PRICES, 0)) == 0


def test_measuring_changes_nothing_of_a_run(tmp_path, monkeypatch):
    """The same weights and log with and without it, for an algorithm that uses global random states."""

    def go(out):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            algorithm = build("vader", tmp_path)
            algos.run(algorithm, out=out, updates=2, progress=False)
        return [p.detach().clone() for p in algorithm.policy.trainable_parameters()], rows(out / "train.jsonl")

    weights, log = go(tmp_path / "a")
    monkeypatch.setattr(Meter, "measure_flops", lambda self: "")
    plain, plain_log = go(tmp_path / "b")
    assert all(torch.equal(a, b) for a, b in zip(weights, plain, strict=True))
    ours = ("flops", "denoiser_flops")
    drop = [[{k: v for k, v in row.items() if k not in ours} for row in one] for one in (log, plain_log)]
    assert drop[0] == drop[1] and log[0]["flops"] > 0 and plain_log[0]["flops"] is None
