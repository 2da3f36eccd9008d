"""The experiments of OnlineVPO (Zhang et al. 2024, arXiv:2412.15159; published at WACV 2026) on MovingShapes.

Of its ablations the values that were tried and the ones that were chosen are known (2, 4, 6 and 8 candidates, of which
6; a new reference every 100, 200, 400 and 600 steps of 4000, of which 200), not the numbers they gave.
"""

from __future__ import annotations

from benchmarks.experiments.claims import Ahead, Falls, Keeps, Measure, Rises, Trend
from benchmarks.experiments.experiment import Experiment
from benchmarks.plan import Arm, Benchmark

_PAPER = {"paper": "OnlineVPO", "arxiv": "2412.15159"}
_REWARD = "The reward is the embedded HPS-style one instead of VideoScore's temporal score. "
_TUNED = "The preset, tuned on validation prompts for 8 candidates and a new reference every 20 steps."

_CANDIDATES = (2, 4, 6, 8)
CANDIDATES = Experiment(
    name="online-vpo-candidates",
    **_PAPER,
    figure="Table 1a",
    finding="More candidates for each prompt make better pairs; of 2, 4, 6 and 8 the paper takes 6.",
    known="direction",
    claims=(
        Trend(("N=2", "N=4", "N=6"), measure=Measure(at="updates")),
        Ahead("N=6", "N=2", Measure(at="updates")),
        Ahead("N=6", "N=8", Measure(at="updates")),
    ),
    benchmark=Benchmark(
        name="online-vpo-candidates",
        arms=tuple(
            Arm(
                label=f"N={n}",
                algo="online_vpo",
                settings={"videos_per_update": 48},
                env={"group_size": n, "num_envs": 48},
            )
            for n in _CANDIDATES
        ),
        seeds=(0, 1, 2),
        updates=30,
        evals=5,
        question="How many candidates of a prompt should the best and the worst be chosen from?",
        hypothesis="The reward rises from 2 to 6 candidates; 6 is ahead of 2, and of 8.",
        expected_ahead=(("N=6", "N=2"), ("N=6", "N=8")),
        tuning=_TUNED,
    ),
    deviation=_REWARD + "All arms sample 48 videos an update, so more candidates mean fewer pairs (24, 12, 8 and 6): "
    "equal costs, where the paper keeps the number of pairs.",
    cpu_minutes=3.0,
)

_INTERVALS: tuple[int | None, ...] = (4, 8, 16, 24, None)


def _interval(steps: int | None) -> str:
    return "never" if steps is None else f"K={steps}"


REFERENCE = Experiment(
    name="online-vpo-reference",
    **_PAPER,
    figure="Table 1b",
    finding="A reference that follows the policy helps, if it follows neither too fast nor too slowly: of a new one "
    "every 100, 200, 400 and 600 steps of 4000 the paper takes 200.",
    known="direction",
    claims=tuple(Ahead("K=8", _interval(k), Measure(at="updates")) for k in (None, 4, 24)),
    benchmark=Benchmark(
        name="online-vpo-reference",
        arms=tuple(Arm(label=_interval(k), algo="online_vpo", settings={"refresh_every": k}) for k in _INTERVALS),
        seeds=(0, 1, 2),
        updates=40,
        evals=5,
        question="How often should the reference become the policy?",
        hypothesis="Every 8 steps is ahead of never, of every 4 and of every 24 steps.",
        expected_ahead=(("K=8", "never"), ("K=8", "K=4"), ("K=8", "K=24")),
        tuning=_TUNED,
    ),
    deviation=_REWARD
    + "160 optimiser steps instead of 4000: K is scaled with them, 4, 8, 16 and 24 for the paper's 100, "
    "200, 400 and 600.",
    cpu_minutes=4.0,
)

_WATCHED = "benchmarks.experiments.frechet:Watched"
QUALITY = Experiment(
    name="online-vpo-quality",
    **_PAPER,
    figure="Table 1c",
    finding="Training brings the videos nearer to real ones (FVD) without making them stand still (dynamics); we take "
    "the direction from the text.",
    known="direction",
    claims=(
        Rises("online_vpo"),
        Falls("online_vpo", Measure(name="train/frechet", at="end")),
        Keeps("online_vpo", 0.9, Measure(name="motion", at="end")),
        Ahead("online_vpo", "dpo", Measure(at="updates")),
    ),
    benchmark=Benchmark(
        name="online-vpo-quality",
        arms=(
            Arm(label="online_vpo", algo=_WATCHED, settings={"algo": "online_vpo"}, env={"group_size": 8}),
            Arm(label="dpo", algo=_WATCHED, settings={"algo": "diffusion_dpo"}, env={"group_size": 8}),
        ),
        seeds=(0, 1, 2),
        updates=30,
        evals=3,
        question="Does what the reward likes come at the cost of realism or motion?",
        hypothesis="The Frechet distance falls, nine tenths of the motion stay, and OnlineVPO is ahead of DPO.",
        expected_ahead=(("online_vpo", "dpo"),),
        tuning=_TUNED,
    ),
    deviation=_REWARD
    + "The distance is the Frechet distance of the embedded VideoMAE's features between 64 videos of an "
    "update and 320 rendered ones of the same captions, on train prompts: no FVD with the published network. Motion is "
    "the mean change of the pixels that change most.",
    cpu_minutes=4.5,
)

EXPERIMENTS = (CANDIDATES, REFERENCE, QUALITY)
