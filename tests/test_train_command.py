"""What `vdm-env train` hands on, and what it refuses before anything is written: prompts, folders, prompts to judge."""

from __future__ import annotations

import json

import pytest

import vdm_env
from algos.run_files import alone
from benchmarks.commands.train import read
from benchmarks.evaluation import AtGuidance, evaluators
from benchmarks.options import BatchOptions, own_prompts
from benchmarks.plan import Arm
from benchmarks.runs import build
from benchmarks.training import Setup
from benchmarks.training import build as build_arm
from tests.test_wrong_arguments import answer

TINY = [
    "--algo", "vader", "--updates", "1", "--num-envs", "1", "--num-steps", "1", "--num-frames", "2", "--eval-prompts",
    "1", "--eval-seeds", "1", "--eval-videos", "0", "--lora-rank", "1", "--set", "videos_per_update=1",
]  # fmt: skip
CAPTIONS = ["a red circle moving left", "a blue square moving right"]


@pytest.fixture
def handed(monkeypatch):
    """What `algos.run` is called with; it does nothing."""
    found = {}

    def run(algorithm, **options):
        found.update(options, algorithm=algorithm)
        raise ValueError("not begun")

    monkeypatch.setattr("algos.run", run)
    return found


def refused(arguments, capsys):
    code, out, err = answer(["train", *TINY, *arguments], capsys)
    assert code == 2 and err.count("\n") == 1, (code, out, err)
    return out, err


def test_switches_reach_the_run(handed, tmp_path, capsys):
    more = "--keep-checkpoints 5 --skip-nonfinite 3 --stop-on-alarm --offload-activations --heldout Brightness"
    given = [*more.split(), "--out", str(tmp_path)]
    assert "not begun" in refused(given, capsys)[1]
    assert (handed["keep_checkpoints"], handed["skip_nonfinite"], handed["alarm"].stop) == (5, 3, True)
    (evaluator,) = handed["evaluate"]
    assert "Brightness" in evaluator.heldout
    assert handed["policy"].offload_activations and "offload_activations" not in handed["task"]["policy"]
    assert "not begun" in refused(["--out", str(tmp_path / "b")], capsys)[1]
    assert (handed["keep_checkpoints"], handed["skip_nonfinite"], handed["alarm"].stop) == (2, 0, False)


# ------------------------------------------------------------------ prompts


def test_few_texts_say_how_they_can_be_evaluated(tmp_path, handed, capsys):
    file = tmp_path / "few.txt"
    file.write_text("\n".join([*CAPTIONS, "a green circle moving up"]))
    given = ["--prompts", str(file), "--out", str(tmp_path / "runs")]
    _, err = refused(given, capsys)
    assert f"none of the 3 texts of {file} is in the split 'test'" in err and "--eval-split train" in err
    assert '{"train": [...], "test": [...]}' in err and not (tmp_path / "runs").exists()
    # Both ways out.
    assert "not begun" in refused([*given, "--eval-split", "train"], capsys)[1]
    named = tmp_path / "few.json"
    named.write_text(json.dumps({"train": CAPTIONS[:1], "test": CAPTIONS[1:]}))
    assert "not begun" in refused(["--prompts", str(named), "--out", str(tmp_path / "runs")], capsys)[1]
    (evaluator,) = handed["evaluate"]
    assert [evaluator.env.prompts[index] for index in evaluator.prompt_ids] == CAPTIONS[1:]


def test_column_and_encoding_of_a_file_of_prompts(tmp_path):
    file = tmp_path / "few.csv"
    file.write_bytes("a,b\nno,café\n".encode("latin-1"))
    found = own_prompts(BatchOptions(prompts=str(file), prompt_column="b", prompt_encoding="latin-1"))
    assert list(found["prompts"]) == ["café"]
    with pytest.raises(ValueError, match="--prompt-encoding latin-1"):
        own_prompts(BatchOptions(prompts=str(file)))
    with pytest.raises(ValueError, match="--prompt-column"):
        own_prompts(BatchOptions(prompts=str(file), prompt_encoding="latin-1"))
    # They say how a file is read, and nothing of the environment.
    given = [*TINY, "--prompts", str(file), "--prompt-column", "b", "--prompt-encoding", "latin-1"]
    with pytest.raises(ValueError, match="not a MovingShapes caption"):
        build(*read([*given, "--eval-split", "train"]))


def test_prompts_that_the_gold_score_cannot_judge_are_refused_where_they_are_evaluated(tmp_path, handed, capsys):
    named = tmp_path / "p.json"
    named.write_text(json.dumps({"train": CAPTIONS, "test": ["a dog on a bike"]}))
    given = ["--prompts", str(named), "--out", str(tmp_path / "runs")]
    out, err = refused(given, capsys)
    assert "'a dog on a bike' is not a MovingShapes caption" in err and not out
    assert not (tmp_path / "runs").exists()
    named.write_text(json.dumps({"train": ["a dog on a bike"], "test": CAPTIONS}))
    assert "not begun" in refused(given, capsys)[1]


# ------------------------------------------------------------------ folders


def test_the_config_of_a_run_at_work_is_left_alone(tmp_path, handed, capsys):
    folder = tmp_path / "vader" / "MovingShapes-HPS" / "seed_0"
    folder.mkdir(parents=True)
    for name in ("run.json", "config.yaml"):
        (folder / name).write_text("{}")
    with alone(folder):
        out, err = refused(["--fresh", "--out", str(tmp_path)], capsys)
    assert "another process is running" in err and not out and not handed
    assert (folder / "config.yaml").read_text() == "{}"
    refused(["--fresh", "--out", str(tmp_path)], capsys)
    assert handed and "learning_rate" in (folder / "config.yaml").read_text()


def test_a_folder_that_cannot_be_written_is_not_announced(tmp_path, handed, capsys):
    (tmp_path / "afile").write_text("mine")
    out, err = refused(["--out", str(tmp_path / "afile")], capsys)
    assert "cannot write to" in err and not out and not handed


# ------------------------------------------------------------------ guidance of evaluations


def test_an_evaluation_has_its_own_guidance_interval():
    env = vdm_env.make("MovingShapes-HPS", num_envs=2, num_steps=2, num_frames=2, guidance_scale=1.0)
    policy = env.make_policy(lora_rank=1, guidance_scale=3.0, guidance_interval=(0.2, 5.0))
    seen = []
    (evaluator,) = evaluators(env, ["test"], num_prompts=1, noise_seeds=[0], num_videos=0, guidance_scale=2.0)
    assert isinstance(evaluator, AtGuidance) and evaluator.env.config.guidance_scale == 2.0
    evaluator.evaluator.evaluate = lambda one: seen.append((one.guidance_scale, one.guidance_interval))
    evaluator.evaluate(policy)
    assert seen == [(2.0, None)] and (policy.guidance_scale, policy.guidance_interval) == (3.0, (0.2, 5.0))
    (evaluator,) = evaluators(
        env, ["test"], num_prompts=1, noise_seeds=[0], num_videos=0, guidance_scale=2.0, guidance_interval=(0.0, 1e3)
    )
    evaluator.evaluator.evaluate = lambda one: seen.append((one.guidance_scale, one.guidance_interval))
    evaluator.evaluate(policy)
    assert seen[1:] == [(2.0, (0.0, 1e3))]


def test_an_arm_that_trains_with_an_interval_is_evaluated_without():
    sampling = {"num_envs": 2, "num_steps": 2, "num_frames": 2, "guidance_scale": 2.0}
    setup = Setup(env_id="MovingShapes-Brightness", sampling=sampling, num_prompts=1)
    arm = Arm(
        label="x", algo="vader", policy={"lora_rank": 1, "guidance_interval": (0.0, 1e3)},
        settings={"videos_per_update": 2},
    )  # fmt: skip
    built = build_arm(arm, setup, 0, strict=False)
    (evaluator,) = built.evaluators
    assert built.policy.guidance_interval == (0.0, 1e3)
    assert isinstance(evaluator, AtGuidance) and evaluator.env.config.guidance_interval is None
    shared = Setup(**{**vars(setup), "sampling": {**sampling, "guidance_interval": (0.0, 1e3)}})
    (same,) = build_arm(arm, shared, 0, strict=False).evaluators
    assert same.guidance_scale == 2.0 and same.env.config.guidance_interval == (0.0, 1e3)


def test_an_arm_that_is_evaluated_as_trained_has_its_own_guidance():
    sampling = {"num_envs": 2, "num_steps": 2, "num_frames": 2, "guidance_scale": 1.0}
    setup = Setup(env_id="MovingShapes-Brightness", sampling=sampling, num_prompts=1)
    arm = Arm(
        label="x", algo="vader", policy={"lora_rank": 1, "guidance_scale": 5.0, "guidance_interval": (0.0, 1e3)},
        settings={"videos_per_update": 2}, evaluate_as_trained=True,
    )  # fmt: skip
    (evaluator,) = build_arm(arm, setup, 0, strict=False).evaluators
    config = evaluator.env.config
    assert (evaluator.guidance_scale, config.guidance_scale, config.guidance_interval) == (5.0, 5.0, (0.0, 1e3))
