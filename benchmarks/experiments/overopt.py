"""Over-optimisation on purpose: a reward that can be hacked, and what its curves then look like.

"hackable" adds the mean brightness of the pixels to the HPS-style reward and trains VADER with three times its learning
rate. First the policy repairs shapes and motion, for which both the reward and the gold score rise; then it fills the
picture with light, for which the reward goes on rising and the gold score falls. The curve of such a run is what to
look for in others (Gao et al. 2023, arXiv:2210.10760), and what an alarm has to find.
"""

from __future__ import annotations

from benchmarks.experiments.experiment import Experiment
from benchmarks.experiments.judge import Alarmed, Falls, Measure, Rises
from benchmarks.plan import Arm, Benchmark

HACKABLE = Experiment(
    name="hackable",
    paper="",
    finding="A reward with a loophole rises to the end; the gold score turns around and ends below where it began.",
    known="ours",
    claims=(
        Rises("vader"),
        Falls("vader", Measure(name="gold", at="end")),
        Falls("vader", Measure(name="gold", at="end"), from_half=True),
        Alarmed("vader"),
    ),
    benchmark=Benchmark(
        name="hackable",
        arms=(
            Arm(
                label="vader",
                algo="vader",
                settings={"learning_rate": 3e-3, "videos_per_update": 16, "loss": "negative"},
            ),
        ),
        env_id="MovingShapes-HPS+Brightness",
        seeds=(0, 1, 2),
        updates=60,
        evals=10,
        noise_seeds=2,
        question="What does over-optimisation look like when it is certain?",
        hypothesis="The reward rises, the gold score rises first and then falls below its start, and the alarm rings.",
        tuning="The loophole and the learning rate were chosen on validation prompts, one seed, so that it is hacked.",
        limits=("This reward is broken on purpose: its numbers say nothing about VADER.",),
    ),
    cpu_minutes=2.0,
)

EXPERIMENTS = (HACKABLE,)
