"""Over-optimisation on purpose: a reward that can be hacked, and what its curves then look like.

"hackable" adds four times the mean brightness of the pixels to the HPS-style reward and trains VADER with three times
its learning rate. At first the policy repairs shapes and motion, and the gold score holds or rises with the reward;
then it fills the picture with light, and the reward goes on rising while the gold score falls. The curve of such a run
is what to look for in others (Gao et al. 2023, arXiv:2210.10760), and what an alarm has to find.

The loophole was chosen by trying, on validation prompts with one seed. With a weight of 1 the gold score did not fall
below its start in 32 updates; with 4 it was 0.74 before training, 0.74 after 4 updates, 0.67 after 8, 0.27 after 12 and
0.17 after 16, while the reward went from 1.31 to 2.56. The HPS-style reward alone at the same learning rate turns the
gold score around too (0.74, 0.78 after 8 updates, 0.76 after 24), but not below its start.
"""

from __future__ import annotations

from benchmarks.experiments.claims import Alarmed, Falls, Measure, Rises
from benchmarks.experiments.experiment import Experiment
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
        env_id="MovingShapes-HPS+4*Brightness",
        seeds=(0, 1, 2),
        updates=20,
        evals=10,
        noise_seeds=2,
        question="What does over-optimisation look like when it is certain?",
        hypothesis="The reward rises; the gold score holds at first, then falls far below its start; the alarm rings.",
        tuning="The loophole and the learning rate were chosen on validation prompts, one seed, so that it is hacked.",
        limits=("This reward is broken on purpose: its numbers say nothing about VADER.",),
    ),
    cpu_minutes=1.0,
)

EXPERIMENTS = (HACKABLE,)
