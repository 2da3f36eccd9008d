"""The alarm for over-optimisation: when it goes off, when it must not, and what a run does then."""

import json

import numpy as np
import pytest
from gaussian import gaussian_env

import algos
from algos.alarm import Alarm, alarms
from benchmarks.alarms import main


def rows(update, **curves):
    """One evaluation of 16 prompts x 2 noise seeds; each curve is (mean, spread) with the same noise at each update."""
    found = []
    for name, mean in curves.items():
        spread = np.random.default_rng(sum(map(ord, name)) + update).normal(0, 0.01, 32)
        for place in range(32):
            found.append(
                {"update": update, "device_s": 10.0 * update, "split": "test", "reward": name.replace("__", "/"),
                 "prompt_id": place // 2, "noise_seed": place % 2, "value": mean + float(spread[place])}
            )  # fmt: skip
    return found


def evaluations(**curves):
    count = len(next(iter(curves.values())))
    return [
        row
        for update in range(count)
        for row in rows(update, **{name: values[update] for name, values in curves.items()})
    ]


RISING = (0.1, 0.2, 0.3, 0.4, 0.5)


def test_it_goes_off_where_gold_falls_twice_while_the_reward_rises():
    found = alarms(evaluations(proxy=RISING, gold=(0.5, 0.6, 0.55, 0.5, 0.4)), Alarm())
    assert [(one["update"], one["alarm"], one["since_update"], one["device_s"]) for one in found] == [
        (3, "gold", 1, 30.0)
    ]
    assert found[0]["proxy_change"] == pytest.approx(0.2, abs=0.01)
    assert found[0]["watched_change"] == pytest.approx(-0.1, abs=0.01)


@pytest.mark.parametrize(
    ("proxy", "gold"),
    [
        (RISING, (0.5, 0.6, 0.7, 0.8, 0.9)),  # both rise
        ((0.5, 0.5, 0.5, 0.5, 0.5), (0.5, 0.4, 0.3, 0.2, 0.1)),  # the reward does not: this is failing, not hacking
        ((0.5, 0.4, 0.3, 0.2, 0.1), (0.5, 0.4, 0.3, 0.2, 0.1)),
        (RISING, (0.5, 0.6, 0.5, 0.6, 0.6)),  # not twice in a row
        (RISING, (0.5, 0.501, 0.5, 0.499, 0.5)),  # within the noise
    ],
)
def test_it_keeps_silent_otherwise(proxy, gold):
    assert alarms(evaluations(proxy=proxy, gold=gold), Alarm()) == []


def test_patience_and_names():
    curves = evaluations(
        proxy=RISING, gold__colour=(0.9, 0.5, 0.4, 0.3, 0.2), heldout__Aesthetic=(0.9, 0.5, 0.4, 0.3, 0.2)
    )
    assert [one["alarm"] for one in alarms(curves, Alarm())] == ["heldout/Aesthetic"]
    assert [one["update"] for one in alarms(curves, Alarm(patience=4))] == [4]
    assert alarms(curves, Alarm(patience=5)) == []
    assert [one["alarm"] for one in alarms(curves, Alarm(watch=("gold/*",)))] == ["gold/colour"]


def test_gold_does_not_stop_a_run_unless_it_is_asked_to():
    assert "gold" in Alarm().watched
    assert "gold" not in Alarm(stop=True).watched
    assert Alarm(stop=True, watch=("gold",)).watched == ("gold",)


def test_missing_scores_and_few_pairs_are_no_alarm():
    curves = evaluations(proxy=RISING, gold=(0.5, 0.6, 0.5, 0.4, 0.3))
    assert alarms([{**row, "value": None} if row["reward"] == "gold" else row for row in curves], Alarm()) == []
    assert alarms([row for row in curves if row["prompt_id"] == 0], Alarm()) == []


@pytest.mark.parametrize(("name", "value"), [("patience", 0), ("z", 0.0)])
def test_settings_are_checked(name, value):
    with pytest.raises(ValueError, match=name):
        Alarm(**{name: value})


class Hacked:
    """Evaluations of a reward that is hacked, whatever the policy does."""

    def __init__(self, env):
        self.split, self.count, self.env = "test", 0, env

    def info(self):
        return {"eval_split": self.split}

    def split_info(self):
        return {}

    def evaluate(self, policy):
        from algos.evaluate import Evaluation

        curves = {"proxy": RISING[self.count % 5], "heldout__A": 0.9 - 0.2 * self.count, "gold": 0.9 - 0.2 * self.count}
        found = [
            {k: v for k, v in row.items() if k not in ("update", "device_s")} for row in rows(self.count, **curves)
        ]
        self.count += 1
        return Evaluation(found, None, [], [])


def hacked_run(folder, **options):
    env = gaussian_env()
    algorithm_class, config_class = algos.load("ddpo")
    config = config_class(videos_per_rollout=env.num_envs, updates_per_rollout=1)
    algorithm = algorithm_class(env, env.make_policy(), config)
    return algos.run(
        algorithm, out=folder, updates=4, eval_every=1, evaluate=Hacked(env), progress=False, **options
    )  # fmt: skip


def test_a_run_says_it_once_and_goes_on(tmp_path, capsys):
    result = hacked_run(tmp_path / "run")
    assert (result.ended, result.updates) == ("updates", 4)
    found = [json.loads(line) for line in (tmp_path / "run" / "alarms.jsonl").read_text().splitlines()]
    assert [(one["alarm"], one["update"]) for one in found] == [("heldout/A", 2), ("gold", 2)]
    told = [line for line in capsys.readouterr().err.splitlines() if "ALARM" in line]
    assert len(told) == 2 and "heldout/A fell by 0.4" in told[0]
    written = (tmp_path / "run" / "alarms.jsonl").read_bytes()
    assert main([str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "alarms.jsonl").read_bytes() == written


def test_it_ends_a_run_that_asks_for_it(tmp_path):
    result = hacked_run(tmp_path / "run", alarm=Alarm(stop=True))
    assert (result.ended, result.updates) == ("over-optimisation", 2)
    assert json.loads((tmp_path / "run" / "DONE").read_text())["reason"] == "over-optimisation"


def test_nobody_watches_if_not_asked(tmp_path):
    hacked_run(tmp_path / "run", alarm=None)
    assert not (tmp_path / "run" / "alarms.jsonl").exists()


def test_the_command_refuses_what_is_no_run(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert main([]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2
