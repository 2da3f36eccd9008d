"""The experiments of VideoDPO (Liu et al. 2024, arXiv:2412.14167; published at CVPR 2025) on MovingShapes.

That re-weighting pairs matters is in its abstract; that the best and the worst of 4 videos make a pair, and that scores
of the best and the worst lie further apart the more videos there are, is its method. Numbers of its ablations were not
at hand.
"""

from __future__ import annotations

from typing import Any

from benchmarks.experiments.claims import Ahead, Measure, Rises
from benchmarks.experiments.experiment import Experiment
from benchmarks.plan import Arm, Benchmark

_PAPER = {"paper": "VideoDPO", "arxiv": "2412.14167"}
_UPDATES = Measure(at="updates")
_SMALL = (
    "160 prompts with 4 videos each instead of 10000, and 30 updates, of which the first ten make the videos. The "
    "reward is the package's own weighting of the parts of OmniScore, which is not public. "
)
_TUNED = "One setting, tried on one validation seed with the embedded HPS-style reward."
_COMMON: dict[str, Any] = {
    "env_id": "MovingShapes-OmniScore",
    "seeds": (0, 1, 2),
    "updates": 30,
    "evals": 3,
    "tuning": _TUNED,
}

REWEIGHTING = Experiment(
    name="videodpo-reweighting",
    **_PAPER,
    finding="Weights that let rare pairs count more, (0.72 / p) to the power 1, clearly improve the alignment.",
    known="direction",
    claims=(Rises("weighted"), Ahead("weighted", "unweighted", _UPDATES)),
    benchmark=Benchmark(
        name="videodpo-reweighting",
        arms=(
            Arm(label="weighted", algo="videodpo", settings={"prompts": 160, "weight_exponent": 1.0}),
            Arm(label="unweighted", algo="videodpo", settings={"prompts": 160, "weight_exponent": 0.0}),
        ),
        question="Does it help to let rare pairs count more?",
        hypothesis="Weighted pairs end ahead of unweighted ones.",
        expected_ahead=(("weighted", "unweighted"),),
        **_COMMON,
    ),
    deviation=_SMALL + "How common a pair is, is counted by the difference of its two scores.",
    cpu_minutes=4.0,
)

_STRATEGIES = ("best_vs_worst", "best_vs_random", "all_pairs", "random")
PAIRS = Experiment(
    name="videodpo-pairs",
    **_PAPER,
    finding="Of four ways to choose pairs among the videos of a prompt, the best against the worst is the best.",
    known="direction",
    claims=tuple(Ahead("best_vs_worst", other, _UPDATES) for other in _STRATEGIES[1:]),
    benchmark=Benchmark(
        name="videodpo-pairs",
        arms=tuple(Arm(label=name, algo="videodpo", settings={"prompts": 160, "pairs": name}) for name in _STRATEGIES),
        question="Which videos of a prompt should make a pair?",
        hypothesis="The best against the worst is ahead of the three other ways.",
        expected_ahead=tuple(("best_vs_worst", other) for other in _STRATEGIES[1:]),
        **_COMMON,
    ),
    deviation=_SMALL,
    cpu_minutes=4.0,
)

_CANDIDATES = (2, 4, 8)
CANDIDATES = Experiment(
    name="videodpo-candidates",
    **_PAPER,
    finding="The more videos a prompt has, the further the best and the worst lie apart, and the clearer is the pair; "
    "the paper takes 4.",
    known="direction",
    claims=(Ahead("N=4", "N=2", _UPDATES), Ahead("N=8", "N=2", _UPDATES)),
    benchmark=Benchmark(
        name="videodpo-candidates",
        arms=tuple(
            Arm(label=f"N={n}", algo="videodpo", settings={"prompts": 640 // n, "candidates": n}) for n in _CANDIDATES
        ),
        question="How many videos of a prompt should the pair be chosen from?",
        hypothesis="4 and 8 candidates are ahead of 2 for the same number of videos.",
        expected_ahead=(("N=4", "N=2"), ("N=8", "N=2")),
        **_COMMON,
    ),
    deviation=_SMALL.replace("160 prompts with 4 videos each", "640 videos, of 320, 160 or 80 groups,")
    + "All arms have 640 videos, so more candidates mean fewer pairs.",
    cpu_minutes=4.0,
)

EXPERIMENTS = (REWEIGHTING, PAIRS, CANDIDATES)
