"""Preference data on disk: what was written is read, nothing written is lost, and damage is found and named."""

from __future__ import annotations

import dataclasses
import itertools
import json

import pytest
import torch
from gaussian import full_policy, gaussian_env
from models import tiny_env

from algos import preference_data, preference_files, preference_sampling
from algos.preference_data import PreferenceData
from algos.preference_files import INDEX, DamagedDataError, PreferenceWriter, digest
from algos.preference_sampling import _spent, build_preferences, sample_groups, sampling_settings, video_seed
from vdm_env.worlds.gaussian import TargetReward

SHAPE = (3, 2, 2, 2)
SETTINGS = {"model": "Gaussian", "latent_shape": list(SHAPE), "candidates": 3, "reward": "Given"}
REWARD = torch.tensor([[1.0, 3.0, 2.0], [5.0, 5.0, 5.0], [0.0, -1.0, 7.0]])
PROMPTS = ["prompt 1", "prompt 0", "prompt 1"]


def latents_of(groups: int, first: int = 0) -> torch.Tensor:
    """Every video is one number: 10 * group + candidate."""
    numbers = 10.0 * torch.arange(first, first + groups)[:, None] + torch.arange(3)
    return numbers.view(groups, 3, 1, 1, 1, 1).expand(groups, 3, *SHAPE).contiguous()


def write(folder, settings=SETTINGS):
    """Two shards, of two groups and of one."""
    writer = PreferenceWriter(folder, settings)
    for rows in (slice(0, 2), slice(2, 3)):
        count = len(PROMPTS[rows])
        other = {"B": -REWARD[rows], "A": REWARD[rows] / 3}
        writer.append(PROMPTS[rows], latents_of(count, rows.start), REWARD[rows], other)
    return writer


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture(scope="module")
def env():
    return gaussian_env(num_envs=6, group_size=1)


# ------------------------------------------------------------------ reading


def test_what_was_written_is_read(folder):
    data = PreferenceData(folder)
    data.verify()
    assert len(data) == 3 and data.prompts == PROMPTS and data.settings == SETTINGS
    assert torch.equal(data.reward, REWARD.double()) and list(data.scores) == ["A", "B"]
    assert torch.equal(data.scores["A"], (REWARD / 3).double())  # float32 numbers survive JSON to the last bit
    got = data.latents(torch.tensor([2, 0, 1, 2]), torch.tensor([1, 2, 0, 0]))
    assert got.shape == (4, *SHAPE) and got[:, 0, 0, 0, 0].tolist() == [21.0, 2.0, 10.0, 20.0]
    assert bool((got == got[:, :1, :1, :1, :1]).all())


def test_pairs_by_reward_by_another_score_and_by_numbers(folder):
    data = PreferenceData(folder)
    table = data.pairs()
    assert (table.group.tolist(), table.winner.tolist(), table.loser.tolist()) == ([0, 2], [1, 2], [0, 1])
    assert (table.winner_reward.tolist(), table.loser_reward.tolist()) == ([3.0, 7.0], [1.0, -1.0])
    turned = data.pairs(reward="B")
    assert (turned.winner.tolist(), turned.loser.tolist()) == ([0, 1], [1, 2])
    given = data.pairs(reward=torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]))
    assert (given.group.tolist(), given.winner.tolist()) == ([0, 1], [2, 1])
    assert len(data.pairs("all_pairs")) == 6 and len(data.pairs("all_pairs", groups=2)) == 3
    drawn = [data.pairs("random", torch.Generator().manual_seed(s)).winner.tolist() for s in (0, 0, 1, 2, 3)]
    assert drawn[0] == drawn[1] and len({tuple(row) for row in drawn}) > 1
    with pytest.raises(ValueError, match="no score 'C'.*'A', 'B'"):
        data.pairs(reward="C")
    with pytest.raises(ValueError, match=r"shape \(3, 2\), expected \(3, 3\)"):
        data.pairs(reward=REWARD[:, :2])
    with pytest.raises(ValueError, match="groups is 4, but .* has 3"):
        data.pairs(groups=4)


def test_pairs_with_latents_and_the_numbers_of_the_envs_prompts(folder, env):
    data = PreferenceData(folder)
    ids = data.prompt_ids(env)
    assert ids.tolist() == [1, 0, 1]
    pairs = data.load(data.pairs(), torch.tensor([1, 0]), ids, torch.tensor([0.5, 2.0]))
    assert pairs["winner"][:, 0, 0, 0, 0].tolist() == [22.0, 1.0]
    assert pairs["loser"][:, 0, 0, 0, 0].tolist() == [21.0, 0.0]
    assert pairs["prompt_id"].tolist() == [1, 1] and pairs["weight"].tolist() == [2.0, 0.5]
    assert "weight" not in data.load(data.pairs(), torch.tensor([0]), ids)


def test_only_the_shards_that_are_needed_are_read(folder, monkeypatch):
    opened, safe_open = [], preference_data.safe_open

    def spy(path, **options):
        opened.append(path.rpartition("/")[2])
        return safe_open(path, **options)

    data = PreferenceData(folder)
    monkeypatch.setattr(preference_data, "safe_open", spy)
    data.latents(torch.tensor([1, 0]), torch.tensor([0, 2]))
    assert opened == ["shard-00000.safetensors"] and data._verified == {0}
    data.latents(torch.tensor([2, 0, 2]), torch.tensor([0, 2, 1]))
    assert opened[1:] == ["shard-00000.safetensors", "shard-00001.safetensors"]  # each once, whatever the order


def test_data_that_do_not_fit_the_env_are_refused(folder, env, tmp_path):
    for change, message in (
        ({"model": "Sora"}, "videos of Sora.*the env is of Gaussian"),
        ({"latent_shape": [3, 2, 2, 1]}, r"latents \[3, 2, 2, 1\].*latents \[3, 2, 2, 2\]"),
    ):
        settings = {**SETTINGS, **change}
        writer = PreferenceWriter(tmp_path / settings["model"], settings)
        writer.append(["prompt 0"], torch.zeros(1, 3, *settings["latent_shape"]), REWARD[:1])
        with pytest.raises(ValueError, match=message):
            PreferenceData(writer.folder).prompt_ids(env)
    PreferenceWriter(folder, SETTINGS).append(["a dog"], latents_of(1), REWARD[:1], {"A": REWARD[:1], "B": REWARD[:1]})
    with pytest.raises(ValueError, match="does not know 1 of the prompts.*'a dog'"):
        PreferenceData(folder).prompt_ids(env)
    assert "a dog" not in list(env.prompts)


# ------------------------------------------------------------------ writing


def test_shards_are_added_and_earlier_ones_stay(folder):
    before = {path.name: path.read_bytes() for path in folder.glob("shard-*")}
    identity = PreferenceData(folder).identity()
    writer = PreferenceWriter(folder, SETTINGS)
    assert writer.groups == 3
    writer.append(["prompt 0"], latents_of(1, 7), REWARD[:1], {"A": REWARD[:1], "B": REWARD[:1]})
    data = PreferenceData(folder)
    assert data.prompts == [*PROMPTS, "prompt 0"]
    assert data.latents(torch.tensor([3]), torch.tensor([2]))[0, 0, 0, 0, 0] == 72.0
    assert all((folder / name).read_bytes() == content for name, content in before.items())
    assert data.identity(3) == identity != data.identity()
    assert not list(folder.glob("*.part"))


@pytest.mark.parametrize("moment", ["save_file", "replace_json"])
def test_a_crash_loses_only_the_shard_being_written(folder, moment, monkeypatch):
    def crash(*_):
        raise KeyboardInterrupt

    writer = PreferenceWriter(folder, SETTINGS)
    more = (["prompt 0"], latents_of(1, 7), REWARD[:1], {"A": REWARD[:1], "B": REWARD[:1]})
    with monkeypatch.context() as patched:
        patched.setattr(f"algos.preference_files.{moment}", crash)
        with pytest.raises(KeyboardInterrupt):
            writer.append(*more)
    PreferenceData(folder).verify()
    assert len(PreferenceData(folder)) == writer.groups == 3
    PreferenceWriter(folder, SETTINGS).append(*more)  # also where an unlisted shard lies about
    PreferenceData(folder).verify()
    assert len(PreferenceData(folder)) == 4


def test_other_settings_are_refused_with_the_keys(folder):
    asked = {**SETTINGS, "reward": "HPS", "seed": 3}
    with pytest.raises(
        ValueError, match="differently in reward, seed .*'Given' there, 'HPS' asked for.*another folder"
    ):
        PreferenceWriter(folder, asked)
    with pytest.raises(ValueError, match="settings lack model, reward"):
        PreferenceWriter(folder, {"latent_shape": [1], "candidates": 2})
    with pytest.raises(ValueError, match="candidates=1"):
        PreferenceWriter(folder, {**SETTINGS, "candidates": 1})


def test_two_writers_at_once_are_refused(folder):
    first, second = (PreferenceWriter(folder, SETTINGS) for _ in range(2))
    more = (["prompt 0"], latents_of(1, 7), REWARD[:1], {"A": REWARD[:1], "B": REWARD[:1]})
    first.append(*more)
    with pytest.raises(RuntimeError, match="changed by another writer"):
        second.append(*more)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": [" "]}, "one non-empty text"),
        ({"prompts": []}, "one non-empty text"),
        ({"latents": latents_of(1)[..., :1]}, r"latents is torch.float32 \(1, 3, 3, 2, 2, 1\), expected"),
        ({"latents": latents_of(1).long()}, "latents is torch.int64"),
        ({"reward": REWARD[:1] / 0}, "reward has NaN or infinity"),
        ({"reward": REWARD[:1, :2]}, r"reward is torch.float32 \(1, 2\)"),
        ({"scores": {"A": REWARD[:1]}}, r"scores are \['A'\], but those of the data are \['A', 'B'\]"),
        ({"scores": {"A": REWARD[:1], "B": REWARD}}, r"B is torch.float32 \(3, 3\)"),
        ({"video_seeds": torch.zeros(3)}, "video_seeds has shape"),
    ],
)
def test_what_is_not_a_group_is_refused(folder, change, message):
    given = {
        "prompts": ["prompt 0"],
        "latents": latents_of(1),
        "reward": REWARD[:1],
        "scores": {"A": REWARD[:1], "B": REWARD[:1]},
    }
    writer = PreferenceWriter(folder, SETTINGS)
    with pytest.raises(ValueError, match=message):
        writer.append(**{**given, **change})
    assert len(PreferenceData(folder)) == 3


# ------------------------------------------------------------------ damage


def test_no_data(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no {INDEX}; make them with build_preferences"):
        PreferenceData(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[1]", "{}", '{"format": 1}', "\xff"])
def test_an_index_that_is_no_index(folder, content):
    (folder / INDEX).write_bytes(content.encode("latin-1"))
    with pytest.raises(DamagedDataError, match="damaged or truncated"):
        PreferenceData(folder)
    with pytest.raises(DamagedDataError):
        PreferenceWriter(folder, SETTINGS)


def test_every_changed_letter_of_the_index_is_found(folder):
    text = (folder / INDEX).read_text(encoding="utf-8")
    for old, new in (('"prompt 1"', '"prompt 0"'), ("7.0", "8.0"), ('"candidates": 3', '"candidates": 2')):
        assert old in text
        (folder / INDEX).write_text(text.replace(old, new, 1), encoding="utf-8")
        with pytest.raises(DamagedDataError, match="other checksum"):
            PreferenceData(folder)


def rewritten(folder, change):
    """The index changed by somebody who also puts the checksum right."""
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    del index["sha256"]
    change(index)
    (folder / INDEX).write_text(json.dumps({**index, "sha256": digest(index)}), encoding="utf-8")


def test_other_formats_and_other_places_are_refused(folder):
    rewritten(folder, lambda index: index["shards"][0].update(file="../shard-00000.safetensors"))
    with pytest.raises(DamagedDataError, match="no shard's name"):
        PreferenceData(folder)
    rewritten(folder, lambda index: index.update(shards=[]))
    with pytest.raises(DamagedDataError, match="lists no shards"):
        PreferenceData(folder)
    rewritten(folder, lambda index: index.update(format=2))
    with pytest.raises(ValueError, match="format 2, but this version reads format 1"):
        PreferenceData(folder)


def test_missing_truncated_and_tampered_shards(folder):
    path = folder / "shard-00001.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-4])
    with pytest.raises(DamagedDataError, match=f"{len(content) - 4} bytes, expected {len(content)}"):
        PreferenceData(folder)
    path.unlink()
    with pytest.raises(DamagedDataError, match="shard-00001.safetensors is missing"):
        PreferenceData(folder)
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # one bit, the same size
    data = PreferenceData(folder)
    data.latents(torch.tensor([0]), torch.tensor([0]))  # the other shard is whole
    with pytest.raises(DamagedDataError, match="shard-00001.safetensors is not the file that was written"):
        data.latents(torch.tensor([2]), torch.tensor([0]))
    with pytest.raises(DamagedDataError):
        data.verify()


def test_latents_of_another_shape_than_the_settings_say(folder):
    rewritten(folder, lambda index: index["settings"].update(latent_shape=[3, 2, 2, 3]))
    with pytest.raises(DamagedDataError, match=r"holds latents \[2, 3, 3, 2, 2, 2\], expected \[2, 3, 3, 2, 2, 3\]"):
        PreferenceData(folder).latents(torch.tensor([0]), torch.tensor([0]))


# ------------------------------------------------------------------ sampling


def build(folder, env, policy, groups=5, **options):
    return build_preferences(folder, env, policy, groups=groups, candidates=4, groups_per_shard=2, **options)


def test_building_samples_every_candidate_of_its_own_noise(env, tmp_path):
    policy = full_policy(env)
    data = build(tmp_path, env, policy)
    assert data.prompts == ["prompt 0", "prompt 1", "prompt 0", "prompt 1", "prompt 0"]
    assert sorted(path.name for path in tmp_path.glob("shard-*")) == [f"shard-0000{i}.safetensors" for i in range(3)]
    seeds = [video_seed(0, g, c) for g in range(5) for c in range(4)]
    assert len(set(seeds)) == 20
    # An independent way to the same video: the env's own reset with that seed and prompt.
    obs, _ = env.reset(seed=[video_seed(0, 3, c % 4) for c in range(6)], options={"prompt_ids": [1] * 6})
    with torch.no_grad():
        for _ in range(env.num_steps):
            obs, reward, *_ = env.step(policy(obs))
    got = data.latents(torch.full((4,), 3), torch.arange(4))
    assert torch.equal(got, obs["latents"][:4]) and torch.equal(data.reward[3].float(), reward[:4])
    assert torch.equal(data.scores["Target"], data.reward)
    score = TargetReward(1.0)(env.mdp.decode(got), ["prompt 1"] * 4)
    assert torch.allclose(score, reward[:4])


def without_seconds(folder):
    """The index but for the seconds, which no two builds share."""
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    assert index.pop("sha256") and all(shard["cost"].pop("device_s") > 0 for shard in index["shards"])
    return index


def test_building_goes_on_where_it_was_and_makes_the_same_bytes(env, tmp_path, monkeypatch):
    policy = full_policy(env)
    whole = build(tmp_path / "whole", env, policy)
    calls, sample = [], preference_sampling.sample_groups

    def spy(env, policy, prompts, groups, **options):
        calls.append(list(groups))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return sample(env, policy, prompts, groups, **options)

    monkeypatch.setattr(preference_sampling, "sample_groups", spy)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "parts", env, policy)
    assert len(PreferenceData(tmp_path / "parts")) == 2
    parts = build(tmp_path / "parts", env, policy)
    assert calls == [[0, 1], [2, 3], [2, 3], [4]]
    for path in whole.folder.glob("shard-*"):
        assert (parts.folder / path.name).read_bytes() == path.read_bytes(), path.name
    one, two = (without_seconds(data.folder) for data in (whole, parts))
    assert one == two and whole.identity() == parts.identity()
    build(tmp_path / "parts", env, policy)  # nothing is missing
    build(tmp_path / "parts", env, policy, groups=6)
    assert calls[4:] == [[5]]
    assert torch.equal(PreferenceData(tmp_path / "parts").reward[:5], whole.reward)


def test_the_videos_are_the_untrained_models_and_cost_what_they_cost(env, tmp_path):
    policy = full_policy(env)
    with torch.no_grad():
        policy.trainable_parameters()[0].add_(1.0)
    first, _ = env.reset(seed=4)
    stream, before = env.state_dict(), env.mdp.counters.videos_sampled
    reference = sample_groups(env, policy, [0, 1], range(3), candidates=4, seed=0)
    assert env.mdp.counters.videos_sampled - before == 12
    assert env.state_dict() == stream
    obs, *_ = env.step(torch.zeros_like(first["latents"]))  # the env's own episode goes on
    assert obs["step"].tolist() == [1] * 6
    trained = sample_groups(env, policy, [0, 1], range(3), candidates=4, seed=0, weights="policy")
    untrained = sample_groups(env, full_policy(env), [0, 1], range(3), candidates=4, seed=0, weights="policy")
    assert torch.equal(reference.latents, untrained.latents)
    assert (trained.latents - reference.latents).abs().max() > 0.1


def test_the_size_of_a_batch_does_not_matter(env):
    other = gaussian_env(num_envs=4, group_size=2)
    one, two = (sample_groups(e, full_policy(e), [0, 1], [2, 5], candidates=5, seed=1) for e in (env, other))
    assert torch.allclose(one.latents, two.latents, atol=1e-6) and torch.equal(one.video_seeds, two.video_seeds)
    alone = sample_groups(env, full_policy(env), [0, 1], [5], candidates=5, seed=1)
    assert torch.allclose(alone.reward, one.reward[1:], atol=1e-5)


def test_settings_tell_apart_what_makes_other_videos(env):
    policy, options = full_policy(env), {"candidates": 4, "seed": 0}
    settings = sampling_settings(env, policy, **options)

    def differing(env=env, policy=policy, **changes):
        other = sampling_settings(env, policy, **{**options, **changes})
        return sorted(key for key in settings if settings[key] != other[key])

    assert differing() == differing(env=gaussian_env(num_envs=2, group_size=2)) == []
    assert differing(candidates=6) == ["candidates"]
    assert differing(seed=1) == ["seed"]
    assert differing(env=gaussian_env(num_steps=3)) == ["num_steps"]
    assert differing(env=gaussian_env(noise_level=0.5)) == ["noise_level"]
    assert differing(env=gaussian_env(means=torch.ones(2, 3))) == ["network_sha256"]
    assert differing(policy=env.make_policy(lora_rank=0, guidance_scale=2.0)) == ["guidance_scale"]
    other = sampling_settings(env, env.make_policy(lora_rank=0, guidance_scale=2.0), **options)
    limited = env.make_policy(lora_rank=0, guidance_scale=2.0, guidance_interval=(0.2, float("inf")))
    assert sampling_settings(env, limited, **options) == {**other, "guidance_interval": ["0.2", "inf"]}
    assert differing(policy=env.make_policy(lora_rank=2)) == []  # an adapter does not change the untrained model
    assert differing(policy=env.make_policy(lora_rank=2), weights="policy") == ["adapter_sha256"]


def test_what_cannot_be_sampled_is_refused(env, tmp_path):
    with pytest.raises(ValueError, match="candidates=1"):
        sample_groups(env, full_policy(env), [0], [0], candidates=1, seed=0)
    with pytest.raises(ValueError, match="0 groups"):
        sample_groups(env, full_policy(env), [0], [], candidates=2, seed=0)
    with pytest.raises(ValueError, match="groups=0"):
        build(tmp_path, env, full_policy(env), groups=0)


def test_what_making_the_data_cost_is_kept_with_them(env, tmp_path, monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr("time.process_time", lambda: next(clock) ** 2)  # readings of 0, 1, 4, 9, ...
    before = dataclasses.replace(env.mdp.counters)
    data = build(tmp_path / "built", env, full_policy(env))
    now, names = env.mdp.counters, ("videos_sampled", "reward_queries", "denoiser_forwards")
    spent = {name: getattr(now, name) - getattr(before, name) for name in names}
    # two groups of four fill two batches of six, and the last group one
    assert spent["videos_sampled"] == spent["reward_queries"] == 30 and spent["denoiser_forwards"] == 30 * env.num_steps
    assert data.cost() == {**spent, "device_s": (1 - 0) + (9 - 4) + (25 - 16)}  # CPU-seconds of three shards
    assert data.cost(3)["reward_queries"] == 12 + 12 / 2  # half of the second shard
    assert data.cost(2)["device_s"] < data.cost(4)["device_s"]
    # On a GPU, the time it was held.
    now = dataclasses.replace(before, rollout_s=before.rollout_s + 4, decode_s=before.decode_s + 2)
    assert _spent(before, now, 1.0, torch.device("cuda"))["device_s"] == pytest.approx(6)
    # What it cost is no part of what the data are, and where nobody says it there is no number.
    rows = (PROMPTS, latents_of(3), REWARD)
    cost = {"device_s": 2.0, "videos_sampled": 9.0, "reward_queries": 9.0, "denoiser_forwards": 40.0}
    for name, given in {"told": cost, "not told": None}.items():
        PreferenceWriter(tmp_path / name, SETTINGS).append(*rows, cost=given)
    told, silent = PreferenceData(tmp_path / "told"), PreferenceData(tmp_path / "not told")
    assert told.cost() == cost and silent.cost() is None and told.identity() == silent.identity()
    for wrong in ({"device_s": 1.0}, {**cost, "device_s": -1.0}, {**cost, "device_s": float("inf")}):
        with pytest.raises(ValueError, match="expected finite numbers >= 0 for device_s, videos_sampled"):
            PreferenceWriter(tmp_path / "told", SETTINGS).append(*rows, cost=wrong)


def test_a_shard_is_on_the_disk_before_the_index_lists_it(folder, monkeypatch):
    done, replace_json = [], preference_files.replace_json
    monkeypatch.setattr(preference_files, "sync", lambda path: done.append(path.name))
    monkeypatch.setattr(preference_files, "replace_json", lambda *given: done.append("index") or replace_json(*given))
    more = (["prompt 0"], latents_of(1, 7), REWARD[:1], {"A": REWARD[:1], "B": REWARD[:1]})
    PreferenceWriter(folder, SETTINGS).append(*more)
    assert done == ["shard-00002.safetensors.part", folder.name, "index"]


def test_a_refreshed_reference_makes_other_data_and_says_so(env):
    policy, options = full_policy(env), {"candidates": 4, "seed": 0}
    before = sampling_settings(env, policy, **options)
    assert before["adapter_sha256"] is None
    with torch.no_grad():
        policy.trainable_parameters()[0].add_(0.5)
    assert sampling_settings(env, policy, **options) == before
    policy.refresh_reference()
    after = sampling_settings(env, policy, **options)
    assert [key for key in before if before[key] != after[key]] == ["adapter_sha256"]
    policy.reset_reference()
    assert sampling_settings(env, policy, **options) == before


def test_data_that_the_env_would_score_otherwise_are_refused(tmp_path):
    """Two rewards of one name and equal settings."""

    def made_with(sign):
        env = gaussian_env(num_envs=6, group_size=1, reward=lambda video, prompts: sign * video.mean((1, 2, 3, 4)))
        return env, full_policy(env)

    build(tmp_path, *made_with(1.0), groups=2)
    one, other = made_with(1.001), made_with(-1.0)
    queries = one[0].mdp.counters.reward_queries
    build(tmp_path, *one, groups=2)  # the same but for rounding
    assert one[0].mdp.counters.reward_queries == queries
    for groups in (2, 4):
        with pytest.raises(ValueError, match="the reward gives .* are stored: another reward or decoder"):
            build(tmp_path, *other, groups=groups)
    assert len(PreferenceData(tmp_path)) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_all_weights_are_not_trained_in_half_precision(dtype):
    half = tiny_env("flow", dtype=dtype)
    with pytest.raises(ValueError, match=r"steps of 1e-5 round to nothing; make the env with dtype=torch.float32"):
        half.make_policy(lora_rank=0)
    assert {p.dtype for p in half.make_policy(lora_rank=2).trainable_parameters()} == {torch.float32}
