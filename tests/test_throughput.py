"""The benchmark of speed: its figures agree with each other and with what was counted, whatever the clock says."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_run import Clock

import algos
import vdm_env
from algos.flops import Flops
from algos.meter import Meter
from benchmarks import ceiling, overhead, throughput, throughput_measure
from benchmarks.ceiling import matmul_flops, measure_ceiling
from benchmarks.throughput import ThroughputConfig, main
from benchmarks.throughput_calls import BACKWARD as B
from benchmarks.throughput_calls import FORWARD as F
from benchmarks.throughput_calls import GRAPH_FORWARD as G
from benchmarks.throughput_calls import REWARD_BACKWARD as R
from benchmarks.throughput_calls import Ledger, bare_cost, bare_seconds, without_recomputed
from benchmarks.throughput_measure import Bench, largest_group, one_update
from benchmarks.throughput_rows import COLUMNS, CONDITIONS, Round, figures, line, rounded
from vdm_env.mdp import Counters

SMALL = ["--num-steps", "2", "--guidance-scale", "2", "--repeats", "1", "--num-threads", "1"]


@pytest.fixture(autouse=True)
def quick_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceiling, "CPU_SIZES", (8, 16))


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# ---------------------------------------------------------------------- the table


def test_the_figures_of_a_row_agree_with_each_other_and_with_the_counts(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "new" / "speed.csv"
    assert main([*SMALL, "--algos", "vader", "ddpo", "--batches", "2", "--out", str(out)]) == 0
    table = read(out)
    assert [row["what"] for row in table] == ["matmul", "sampling", "vader", "ddpo"]
    assert all(list(row) == list(COLUMNS) and not row["error"] for row in table)
    assert len({(row["build_s"], row["embed_s"]) for row in table}) == 1  # once for all rows
    assert float(table[0]["build_s"]) > 0 and float(table[0]["embed_s"]) > 0
    optional = {"decode_frames", "options", "settings"}
    assert all(row[name] for row in table for name in set(CONDITIONS) - optional)
    matmul, *measured = [{k: float(v) for k, v in row.items() if v and k in NUMBERS} for row in table]
    assert matmul["tflop"] == pytest.approx(matmul_flops(int(table[0]["note"].split()[0])) / 1e12)
    assert matmul["tflop_per_s"] == pytest.approx(matmul["tflop"] / matmul["seconds"], rel=1e-4)
    for row in measured:
        phases = [row[name] for name in ("rollout_s", "decode_s", "reward_s", "update_s")]
        assert min(phases) >= 0 and sum(phases) == pytest.approx(row["seconds"], rel=0.03)
        assert row["videos"] == 2 and row["videos_per_s"] * row["seconds"] == pytest.approx(2, rel=1e-4)
        assert row["tflop_per_s"] * row["seconds"] == pytest.approx(row["tflop"], rel=1e-4)
        assert row["share"] == pytest.approx(row["tflop_per_s"] / matmul["tflop_per_s"], rel=1e-4)
        assert row["seconds_min"] == row["seconds"] and row["peak_rss_gib"] > 0.1
    env = vdm_env.make("MovingShapes-HPS", num_steps=2, guidance_scale=2.0)
    flops = Flops(env=env, policy=env.make_policy())
    flops.measure(["denoiser_forward", "denoiser_backward", "decode", "reward"])
    forward, backward, decode, reward = flops.costs.values()
    sampling, vader, ddpo = measured
    assert sampling["tflop_guided_step"] == pytest.approx(2 * forward / 1e12, rel=1e-4)  # both branches
    assert sampling["denoiser_tflop"] == pytest.approx(2 * 2 * 2 * forward / 1e12, rel=1e-4)  # of 2 videos, 2 steps
    assert sampling["tflop"] == pytest.approx((8 * forward + 2 * decode + 2 * reward) / 1e12, rel=1e-4)
    assert sampling["passes"] == 0 and "update_per_bare" not in sampling
    assert vader["denoiser_tflop"] == pytest.approx((8 * forward + 4 * backward) / 1e12, rel=1e-4)  # its last step
    noisy = len(algos.load("ddpo")[0](**ddpo_parts()).steps)
    expected = (8 + 4 * noisy) * forward + 4 * noisy * backward
    assert ddpo["denoiser_tflop"] == pytest.approx(expected / 1e12, rel=1e-4) and ddpo["passes"] == 4 * noisy
    assert "grad_norm" not in sampling
    for row in (vader, ddpo):
        assert 0 < row["grad_norm"] < float("inf")
        assert row["update_per_bare"] == pytest.approx(row["update_s"] / row["bare_s"], rel=1e-4)
    assert table[3]["group_size"] == "2" and "videos_per_rollout=2" in table[3]["settings"]
    shown = capsys.readouterr().out.splitlines()
    assert [text.split()[0] for text in shown[3:]] == ["matmul", "sampling", "vader", "ddpo"]


NUMBERS = {"seconds", "seconds_min", "rollout_s", "decode_s", "reward_s", "update_s", "videos", "videos_per_s", "tflop"}
NUMBERS |= {"tflop_guided_step", "denoiser_tflop", "tflop_per_s", "share", "passes", "bare_s", "update_per_bare"}
NUMBERS |= {"peak_rss_gib", "grad_norm"}


def ddpo_parts() -> dict[str, Any]:
    env = vdm_env.make("MovingShapes-HPS", num_envs=2, group_size=2, num_steps=2, guidance_scale=2.0)
    config = algos.load("ddpo")[1](videos_per_rollout=2, updates_per_rollout=1, advantage="group")
    return {"env": env, "policy": env.make_policy(), "config": config}


def test_a_row_shows_its_median_round_and_the_median_of_the_ratios() -> None:
    counts = {"videos_sampled": 4, "denoiser_forwards": 40, "denoiser_backwards": 8, "reward_queries": 4}
    counts["reward_backward_queries"] = 0
    costs = {"denoiser_forward": 10, "denoiser_backward": 30, "decode": 5, "reward": 1}
    flops = Flops(env=None, policy=None, costs=costs)
    rounds = [
        Round(seconds=s, cpu_s=2 * s, rollout_s=s / 4, decode_s=s / 8, reward_s=s / 8, counts=counts, bare_s=bare)
        for s, bare in ((4.0, 4.0), (2.0, 0.5), (8.0, 2.0), (1.0, 0.4))
    ]
    row = figures(rounds, flops, 1e12, 5)
    assert (row["seconds"], row["seconds_min"], row["cpu_s"]) == (2, 1, 4)  # the lower middle one of four
    assert (row["rollout_s"], row["decode_s"], row["reward_s"], row["update_s"]) == (0.5, 0.25, 0.25, 1)
    assert row["videos_per_s"] == 2 and row["tflop"] == pytest.approx((400 + 240 + 20 + 4) / 1e12)
    assert row["denoiser_tflop"] == pytest.approx(640 / 1e12) and row["share"] == pytest.approx(664 / 2 / 1e12)
    assert row["bare_s"] == 0.5 and row["update_per_bare"] == pytest.approx((1.25 + 2.0) / 2)  # of 0.5, 2, 2, 1.25
    assert "rollout_share" not in row  # its forwards are not those of the rollout alone
    sampled = figures([Round(**{**vars(rounds[1]), "counts": {**counts, "denoiser_backwards": 0}})], flops, 1e3, 5)
    assert sampled["rollout_share"] == pytest.approx(400 / 0.5 / 1e3) and sampled["tflop_guided_step"] == 20 / 1e12
    unknown = figures(rounds, Flops(env=None, policy=None), 1e12, 5)
    assert "tflop" not in unknown and "share" not in unknown and unknown["seconds"] == 2


def test_rows_are_rounded_and_an_error_stands_in_place_of_figures() -> None:
    assert (rounded(3.0), rounded(0.123456789), rounded(1234567.8)) == (3, 0.123457, 1234570.0)
    assert line({"what": "ddpo", "batch": 1, "error": "no room"}).split(maxsplit=2) == ["ddpo", "1", "no room"]
    card = line({"what": "vader", "batch": 1, "peak_allocated_gib": 7.25, "peak_rss_gib": 3.0, "note": "why"})
    assert card.endswith("7.25 why")


def test_what_has_no_room_or_does_not_fit_says_so_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sample = throughput_measure.sample

    def full(env: Any, policy: Any) -> None:
        if env.num_envs == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 17 GiB\nmore")
        sample(env, policy)

    monkeypatch.setattr(throughput_measure, "sample", full)
    out = tmp_path / "speed.csv"
    out.write_text("of another time\n")
    assert main([*SMALL, "--algos", "ddpo", "--batches", "2", "1", "--out", str(out)]) == 0
    rows = {(row["what"], row["batch"]): row for row in read(out)}
    assert rows["sampling", "2"]["error"] == "out of memory: CUDA out of memory. Tried to allocate 17 GiB"
    assert rows["sampling", "2"]["seconds"] == "" and rows["sampling", "2"]["device_name"]
    assert "group_size=1" in rows["ddpo", "1"]["error"]  # one video has nobody to be compared with
    assert all(float(rows[key]["seconds"]) > 0 for key in (("ddpo", "2"), ("sampling", "1")))
    assert "Tried to allocate 17 GiB" in capsys.readouterr().out


def test_each_row_is_in_the_file_before_the_next_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(bench: Bench, batch: int) -> dict[str, object]:
        assert [row["what"] for row in read(out)] == ["matmul"] + ["sampling"] * (batch - 1)
        if batch == 3:
            raise RuntimeError("the device fell over")
        return {"seconds": 0.5}

    out = tmp_path / "speed.csv"
    monkeypatch.setattr(throughput_measure, "sampling_row", fails)
    with pytest.raises(RuntimeError, match="fell over"):
        main([*SMALL, "--algos", "--batches", "1", "2", "3", "--out", str(out)])
    assert [(row["what"], row["batch"]) for row in read(out)] == [("matmul", ""), ("sampling", "1"), ("sampling", "2")]


def test_the_settings_make_an_update_of_one_batch() -> None:
    assert one_update(algos.load("ddpo")[1], 4) == {"videos_per_rollout": 4, "updates_per_rollout": 1}
    assert one_update(algos.load("vader")[1], 4) == {"videos_per_update": 4}
    assert one_update(None, 4) == {}
    assert [largest_group(8, batch) for batch in (1, 4, 6, 12, 16)] == [1, 4, 6, 6, 8]


# ---------------------------------------------------------------------- what an update should cost


class FakeNetwork:
    """One second a video forward, three backward (one more without the plain path), by a clock of its own."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.weight = clock, torch.nn.Parameter(torch.ones(()))

    def predict(self, x: torch.Tensor, t: Any = None, condition: Any = None) -> torch.Tensor:
        self.clock.now += len(x)
        output = x * self.weight
        if output.requires_grad:
            output.register_hook(lambda _: setattr(self.clock, "now", self.clock.now + 3 * len(x)))
        return output


def fake(clock: Clock, **policy: Any) -> tuple[Any, Any]:
    network = FakeNetwork(clock)

    def decode(latents: torch.Tensor, frames: Any) -> torch.Tensor:
        video = latents * 2.0
        video.register_hook(lambda _: setattr(clock, "now", clock.now + 5 * len(latents)))
        return video

    mdp = SimpleNamespace(
        initial_latents=lambda seeds: torch.ones(len(seeds), 1, 1, 1, 1),
        table=SimpleNamespace(timesteps=torch.ones(2)),
        condition=lambda prompts: {},
        frames_of=lambda seeds: None,
        decode=decode,
        score=lambda video, texts: video.flatten(1).sum(1),
    )
    env = SimpleNamespace(mdp=mdp, model=network, prompt_ids=lambda: [0, 1], prompts=["a", "b"])
    options = {"lora_rank": 4, "gradient_checkpointing": False, "offload_activations": False} | policy
    trained = lambda: [network.weight]  # noqa: E731
    return env, SimpleNamespace(predict=network.predict, trainable_parameters=trained, **options)


def test_the_ratio_is_one_for_an_update_that_costs_what_its_calls_do() -> None:
    clock = Clock()
    env, policy = fake(clock)
    calls = {(F, 2): 7, (G, 4): 5, (B, 4): 6, (R, 3): 2}
    price = bare_seconds(env, policy, calls, repeats=2, clock=clock)
    assert price == {(F, 2): 2.0, (G, 4): 4.0, (B, 4): 12.0, (R, 3): 15.0}
    assert bare_cost(calls, price) == 7 * 2 + 5 * 4 + 6 * 12 + 2 * 15
    assert policy.trainable_parameters()[0].grad is None  # an update's own gradients are not touched


def test_forwards_that_a_checkpoint_repeats_belong_to_the_backward() -> None:
    calls = {(G, 4): 10, (B, 4): 5, (F, 4): 3, (G, 2): 1, (B, 2): 1}
    assert without_recomputed(calls) == Counter({(G, 4): 5, (B, 4): 5, (F, 4): 3, (B, 2): 1})


def test_the_ledger_leaves_out_what_rollouts_spent() -> None:
    ledger = Ledger(denoiser_forwards=100)

    class Env:
        def __init__(self, counters: Counters) -> None:
            self.mdp = SimpleNamespace(counters=counters)

        def reset(self) -> str:
            return "obs"

    class Special(Env):
        pass

    env, reset = Special(ledger), Env.reset
    ledger.denoiser_forwards += 50  # nobody is recording
    with ledger.recording(env) as calls:
        assert env.reset() == "obs"
        with torch.no_grad():
            ledger.denoiser_forwards += 8
        ledger.denoiser_forwards += 8  # the last step, with its graph
        ledger.rollout_s += 1.5
        ledger.reward_backward_queries += 4
        ledger.denoiser_backwards += 8
        with torch.no_grad():
            ledger.denoiser_forwards += 2  # a reference
        ledger.denoiser_forwards += 2
        Env(Counters()).reset()  # of another environment, such as one for evaluation
        ledger.denoiser_forwards += 5
        Env(ledger).reset()  # of a twin
        ledger.denoiser_forwards += 3  # of a rollout that never ended: its time is in update_s
    assert calls == {(R, 4): 1, (B, 8): 1, (F, 2): 1, (G, 2): 1, (G, 5): 1, (G, 3): 1}
    assert Env.reset is reset and ledger.denoiser_forwards == 178
    ledger.denoiser_forwards += 1
    assert sum(calls.values()) == 6


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_calls_of_real_updates(checkpointing: bool) -> None:
    env = vdm_env.make("MovingShapes-HPS", num_envs=2, group_size=2, num_steps=2, guidance_scale=2.0)
    env.mdp.counters = ledger = Ledger()

    def calls_of(name: str, **settings: Any) -> dict[Any, int]:
        policy = env.make_policy(gradient_checkpointing=checkpointing)
        kind, config = algos.load(name)
        algorithm = kind(env, policy, config(**settings))
        with ledger.recording(env) as calls:
            algorithm.update()
        return without_recomputed(calls) if checkpointing else calls

    small: dict[str, Any] = {"videos_per_rollout": 2, "updates_per_rollout": 1, "advantage": "group"}
    steps = int(env.mdp.base_table.stochastic.sum())
    assert calls_of("ddpo", **small) == {(G, 4): steps, (B, 4): steps}  # two videos, each in two branches
    held = calls_of("ddpo", **small, kl_coefficient=0.1, micro_batch=1)
    assert held == {(G, 2): 2 * steps, (B, 2): 2 * steps, (F, 2): 2 * steps}
    assert calls_of("vader", videos_per_update=2) == {(B, 4): 1, (R, 2): 1}  # its forward is in the rollout
    assert calls_of("refl", videos_per_update=2)[R, 2] == 1


# ---------------------------------------------------------------------- the ceiling, and metering


def test_the_ceiling_counts_two_operations_for_each_product_and_takes_the_best_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert matmul_flops(100) == 2_000_000
    clock = Clock()

    def ticking() -> float:
        clock.now += 1.0
        return clock.now

    found = measure_ceiling("cpu", torch.float64, sizes=(4, 8), repeats=3, calls=2, timer=ticking)
    assert found.rates == {4: 2 * 4**3 / 0.5, 8: 2 * 8**3 / 0.5}  # a second for two products
    assert (found.size, found.flop_per_s, found.seconds) == (8, 2048, 0.5)
    times = {8: [1.0, 100.0, 1.0], 16: [9.0, 10.0, 0.1]}

    class Timer:
        def __init__(self, code: str, globals: dict[str, Any], num_threads: int) -> None:
            self.size = len(globals["a"])
            assert code == "mm(a, b, out=c)" and num_threads == torch.get_num_threads()

        def timeit(self, calls: int) -> Any:
            return SimpleNamespace(median=times[self.size].pop())

    monkeypatch.setattr(ceiling, "Timer", Timer)
    best = measure_ceiling("cpu", torch.bfloat16, sizes=(8, 16), repeats=3)
    assert (best.size, best.seconds, best.flop_per_s) == (8, 1.0, 1024.0)  # 16: 8192 / 9, less
    with pytest.raises(ValueError, match="repeats=0"):
        measure_ceiling("cpu", torch.float32, repeats=0)


def test_metering_is_timed_by_the_update() -> None:
    clock = Clock()

    def ticking() -> float:
        clock.now += 3.0
        return clock.now

    meter = Meter(counters=Counters())
    rows: list[int] = []
    meter.row = lambda update, metrics: rows.append(update) or {}  # type: ignore[method-assign,func-returns-value]
    assert overhead.metering_seconds(meter, 2, ticking) == 3.0 / overhead.METERED
    assert len(rows) == 3 * overhead.METERED and meter.seconds["train"] > 0


# ---------------------------------------------------------------------- wrong arguments


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--batches 0", "--batches: expected at least 1, got 0"),
        ("--batches", "--batches"),
        ("--batches four", "four"),
        ("--repeats 0", "--repeats: expected at least 1"),
        ("--num-threads 0", "--num-threads: expected at least 1"),
        ("--videos-per-update 0", "--videos-per-update: expected at least 1"),
        ("--algos vadre", "did you mean 'vader'"),
        ("--env-id MovingShape-HPS", "MovingShapes"),
        ("--env-id MovingShapes", "no environment id"),
        ("--set vader.learning_rat=1", "learning_rate"),
        ("--set refl.learning_rate=1", "no arm 'refl'"),
        ("--set learning_rate", "name=value"),
        ("--device tpu", "device"),
        ("--dtype int8", "int8"),
        ("--num-steps 0", "num_steps"),
        ("--lora-rank -1", "lora_rank"),
        ("--weights random --scale huge", "huge"),
        ("--scale tiny", "tiny"),
        ("--height 31", "31"),
        ("--decode-chunk 2", "decode_chunk"),
        ("--no-such-option", "no-such-option"),
    ],
)
def test_wrong_arguments_are_one_line(given: str, message: str, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "speed.csv"
    try:
        code = main([*given.split(), "--out", str(out)])
    except SystemExit as stop:
        code = stop.code  # type: ignore[assignment]
    said = capsys.readouterr()
    assert (code, said.out, said.err.count("\n")) == (2, "", 1) and message in said.err, said
    assert said.err.startswith("throughput: ") and not out.exists()


def test_help_names_every_option(capsys: Any) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0 and throughput.PROGRAM in said
    for name in ("--env-id", "--algos", "--gradient-checkpointing", "--free-text-encoder", "--offload-activations"):
        assert name in said


@pytest.mark.parametrize("env_id", ["MovingShapes-Brightness", "MovingShapesUNet-Brightness"])
def test_the_plain_network_can_be_measured_beside_the_fast_one(env_id: str) -> None:
    kinds = {}
    for plain in (False, True):
        env = throughput._make(ThroughputConfig(env_id=env_id, plain=plain))
        kinds[plain] = {type(module).__name__ for module in env.model.denoiser.modules()}
        assert throughput._conditions(ThroughputConfig(env_id=env_id, plain=plain), env)["options"] == "plain" * plain
    assert "FastLinear" in kinds[False] and not any(name.startswith("Fast") for name in kinds[True])
