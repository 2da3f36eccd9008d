"""A short version of the learning benchmarks: the reward rises on prompts that training never saw.

The long ones, with more seeds and every algorithm, are committed under benchmarks/results.
"""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.aggregate import t_interval
from benchmarks.plan import Arm
from benchmarks.training import Setup, build


@pytest.mark.parametrize(
    ("name", "model", "updates"),
    [("vader", "MovingShapes", 6), ("online_vpo", "MovingShapes", 5), ("diffusion_dpo", "MovingShapesUNet", 2)],
)
def test_the_reward_rises_on_held_out_prompts_and_the_gold_score_does_not_fall(
    name: str, model: str, updates: int
) -> None:
    setup = Setup(env_id=f"{model}-HPS", split="validation", noise_seeds=range(4))
    built = build(Arm(label=name, algo=name), setup, seed=0)
    policy, algorithm, (evaluator,) = built.policy, built.algorithm, built.evaluators

    def scores() -> dict[str, np.ndarray]:
        rows = evaluator.evaluate(policy).rows
        return {key: np.array([row["value"] for row in rows if row["reward"] == key]) for key in ("proxy", "gold")}

    before = scores()
    for _ in range(updates):
        algorithm.update()
    after = scores()
    change = t_interval(after["proxy"] - before["proxy"])
    assert change.n == 64 and change.low > 0, change  # paired over 16 prompts x 4 noise seeds
    assert after["gold"].mean() > 0.98 * before["gold"].mean()
