"""Several processes train as one: the same gradients, the same weights, the same numbers in the log."""

from __future__ import annotations

import shutil

import pytest
import torch
from gaussian import full_policy, gaussian_env
from spread import CASES, Spread, build, difference, train, train_cases, train_sharded, trained

from algos.distributed import Ranks, current
from algos.launch import LaunchError, launched
from algos.preference_sampling import build_preferences
from algos.rollout import collect
from algos.training import num_batches
from vdm_env.starts import Shard

COMPLETE = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}

# ---------------------------------------------------------------------------------------------- the same training


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """What one process and two processes made of every case; both in folders of their own."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    env = gaussian_env(dtype=torch.float64, num_envs=8, num_steps=3)
    build_preferences(one / "offline_dpo", env, env.make_policy(lora_rank=2), groups=12, candidates=3)
    shutil.copytree(one / "offline_dpo", two / "offline_dpo")
    together = Spread(two, train_cases, list(CASES))
    train_cases(one, CASES)
    codes, errors = together.wait()
    assert codes == [0, 0], errors
    return one, two


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one(case, folders):
    one, two = folders
    alone = trained(one, case, 0)
    for rank in (0, 1):
        off = difference(alone, trained(two, case, rank))
        exact = 1e-4 if case == "ppo_sb3" else 1e-9  # its rollouts are float32
        assert off["gradient"] < 1e-5 and off["moved"] < exact, off
        assert max(off.values()) < max(exact, 1e-6), off  # some metrics are float32 sums
    first, second = (trained(two, case, rank) for rank in (0, 1))
    assert all(torch.equal(first[key], second[key]) for key in first)


SHARDED = ("vader", "ddpo", "diffusion_dpo", "diffusion_nft", "rwr")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, folders):
    out = tmp_path_factory.mktemp("sharded")
    codes, errors = Spread(out, train_sharded, list(SHARDED)).wait()
    assert codes == [0, 0], errors
    return out


@pytest.mark.parametrize("case", SHARDED)
def test_processes_that_share_one_network_train_the_same(case, sharded, folders):
    for rank in (0, 1):
        off = difference(trained(folders[1], case, rank), trained(sharded, case, rank))
        assert off["gradient"] < 1e-9 and off["moved"] < 1e-9, off
        print(rank, case, off["gradient"], off["moved"])


def test_the_comparison_would_notice_a_process_that_trains_alone(folders):
    """Half of the videos make other gradients, by far more than the tolerance."""
    alone = trained(folders[0], "vader", 0)
    algorithm = build("vader", None, videos_per_update=8)
    assert difference(alone, train(algorithm))["gradient"] > 1e-2


# ------------------------------------------------------------------------------------------------------- one env


def test_the_parts_of_an_env_simulate_what_the_whole_does():
    wide, parts = gaussian_env(num_envs=8, group_size=2), [gaussian_env(num_envs=4, group_size=2) for _ in range(2)]
    for rank, part in enumerate(parts):
        part.shard = Shard(rank=rank, world=2)
    for _ in range(3):
        whole = collect(wide, full_policy(wide))
        found = [collect(part, full_policy(part)) for part in parts]
        for name in ("reward", "prompt_id"):
            assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in found]))
        assert wide.state_dict() == parts[0].state_dict() == parts[1].state_dict()


def test_a_part_of_an_env_refuses_to_reset_some_of_its_videos():
    env = gaussian_env(num_envs=4, group_size=1)
    env.shard = Shard(rank=1, world=2)
    env.reset(seed=0)
    before = env.state_dict()
    with pytest.raises(ValueError, match="part 1 of 2 of a wider one.*leave reset_mask out"):
        env.reset(options={"reset_mask": [True, False, True, True]})
    assert env.state_dict() == before
    with pytest.raises(ValueError, match="rank=2 of world=2: expected a rank in 0 .. 1"):
        Shard(rank=2, world=2)


# ------------------------------------------------------------------------------------------------------- the ranks


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [0, 1, 2, 7, 12])
def test_rows_are_dealt_out_completely_in_order_and_evenly(count, world):
    slices = [Ranks(rank=r, world=world).rows(count) for r in range(world)]
    assert [i for s in slices for i in range(count)[s]] == list(range(count))
    sizes = [s.stop - s.start for s in slices]
    assert max(sizes) - min(sizes) <= 1


def test_noise_is_a_cut_of_what_is_drawn_for_all():
    drawn = [Ranks(rank=r, world=3).randn((2, 5), torch.Generator().manual_seed(7)) for r in range(3)]
    assert torch.equal(torch.cat(drawn), torch.randn(6, 5, generator=torch.Generator().manual_seed(7)))


def test_a_single_process_is_left_alone():
    ranks, values = current(), torch.arange(3.0)
    assert ranks == Ranks() and ranks.main
    assert ranks.gather(values) is values and ranks.own(values) is values
    assert ranks.totals({"a": 2.0}) == {"a": 2.0} and ranks.agreed("x") == "x"
    assert ranks.any(True) and not ranks.any(False)
    assert not torch.distributed.is_initialized()


# ------------------------------------------------------------------------------------------------------ the launch


@pytest.mark.parametrize(
    ("environ", "world"),
    [
        ({}, 1),
        ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}, 1),  # `accelerate launch` with one process
        ({"WORLD_SIZE": "1"}, 1),
        ({"SLURM_STEP_NUM_TASKS": "1"}, 1),
        (COMPLETE, 2),
        (COMPLETE | {"OMPI_COMM_WORLD_SIZE": "2"}, 2),
    ],
)
def test_a_launch_is_recognised(environ, world):
    assert launched(environ) == world


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        *[
            ({k: v for k, v in COMPLETE.items() if k != name}, f"{name} is not: half a launch environment")
            for name in COMPLETE
        ],
        ({"RANK": "0"}, "WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not: half a launch environment"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_SIZE=4: several processes.*each would train by itself"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "SLURM_STEP_NUM_TASKS=2: several processes.*accelerate launch"),
        (COMPLETE | {"RANK": "2"}, "RANK=2, WORLD_SIZE=2.*0 <= RANK"),
        (COMPLETE | {"WORLD_SIZE": "two"}, "WORLD_SIZE=two.*expected whole numbers"),
    ],
)
def test_processes_that_could_not_find_each_other_are_refused(environ, message):
    with pytest.raises(LaunchError, match=message):
        launched(environ)


def test_half_a_launch_environment_stops_an_algorithm_before_it_samples(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    env = gaussian_env()
    with pytest.raises(LaunchError, match="WORLD_SIZE=2 is set, but RANK"):
        num_batches(16, env, "videos_per_update")
    with pytest.raises(LaunchError, match="half a launch environment"):
        build("vader", None)
    assert env.mdp.counters.videos_sampled == 0
