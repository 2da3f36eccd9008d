"""The experiments of VADER (Prabhudesai et al. 2024, arXiv:2407.08737; published at ICLR 2025) on MovingShapes.

Where numbers come from: those of "vader-truncation" (Table 9), of "vader-generalisation" (Table 1) and of
"vader-memory" (Table 7) are the preprint's. Of the other figures and tables the direction alone is given.
"""

from __future__ import annotations

from benchmarks.experiments.claims import Ahead, Generalises, Keeps, LessMemory, Measure, Rises, Trend
from benchmarks.experiments.experiment import Experiment
from benchmarks.plan import Arm, Benchmark

_PAPER = {"paper": "VADER", "arxiv": "2407.08737"}
_VADER, _DDPO, _DPO = (
    Arm(label="vader", algo="vader"),
    Arm(label="ddpo", algo="ddpo"),
    Arm(label="dpo", algo="diffusion_dpo"),
)
_AHEAD = (("vader", "ddpo"), ("vader", "dpo"))
_TUNED = "Each arm has its preset for the embedded model, tuned on validation prompts with about equal effort."
_SMALL = "The video model and the reward are small, of MovingShapes, and HPS-style where the paper has HPS and others. "
_BASELINES = (
    "DPO makes its pairs from its own videos, as the paper's baseline does, with a replay buffer and the embedded "
    "model's beta instead of 5000. "
)
_QUERIES = Measure(at="queries")


def _efficiency(name: str, env_id: str, budget: str, minutes: float) -> Experiment:
    return Experiment(
        name=name,
        **_PAPER,
        figure="Fig. 7",
        published="Fig. 5",
        finding="Reward gradients reach a given reward with far fewer reward queries and less device time than DDPO "
        "and DPO, which do not use them.",
        known="direction",
        claims=(*(Ahead(a, b) for a, b in _AHEAD), *(Ahead(a, b, _QUERIES) for a, b in _AHEAD)),
        benchmark=Benchmark(
            name=name,
            arms=(_VADER, _DDPO, _DPO),
            env_id=env_id,
            budget=budget,
            evals=8,
            question="Which of reward gradients, policy gradients and preferences raises the reward fastest?",
            hypothesis="VADER is ahead of DDPO and of DPO per device-second and per reward query.",
            expected_ahead=_AHEAD,
            tuning=_TUNED,
        ),
        deviation=_SMALL + _BASELINES + "DDPO takes one optimiser step a rollout.",
        cpu_minutes=minutes,
    )


EFFICIENCY = _efficiency("vader-efficiency", "MovingShapes-HPS", "90s", 3.0)
EFFICIENCY_UNET = _efficiency("vader-efficiency-unet", "MovingShapesUNet-HPS", "150s", 5.0)

LONGER = Experiment(
    name="vader-longer",
    **_PAPER,
    published="Fig. 12",
    finding="On-policy DDPO and DPO, with one optimiser step for each rollout and trained for longer, improve but stay "
    "below VADER.",
    known="direction",
    claims=(
        Rises("ddpo on-policy"),
        Rises("dpo on-policy"),
        Ahead("vader", "ddpo on-policy"),
        Ahead("vader", "dpo on-policy"),
    ),
    benchmark=Benchmark(
        name="vader-longer",
        arms=(
            _VADER,
            Arm(label="ddpo on-policy", algo="ddpo", settings={"updates_per_rollout": 1, "num_inner_epochs": 1}),
            Arm(label="dpo on-policy", algo="diffusion_dpo", settings={"on_policy": True}),
        ),
        seeds=(0, 1, 2),
        budget="480s",
        question="Do policy gradients and preferences catch up with reward gradients if they go on for longer?",
        hypothesis="DDPO and DPO on-policy rise over the whole budget and end below VADER.",
        expected_ahead=(("vader", "ddpo on-policy"), ("vader", "dpo on-policy")),
        tuning=_TUNED,
    ),
    deviation=_SMALL
    + "All arms have eight device-minutes: equal budgets, where the paper prolongs the baselines alone.",
    cpu_minutes=9.5,
)

_SIZES = (24, 32, 40)
RESOLUTION = Experiment(
    name="vader-resolution",
    **_PAPER,
    figure="Fig. 4",
    published="Fig. 3",
    finding="After 100 updates the reward that VADER gains over DDPO is the larger, the higher the resolution: a "
    "gradient grows with the number of pixels, a score stays one number.",
    known="direction",
    claims=(
        *(Ahead(f"vader {s} px", f"ddpo {s} px", Measure(at="updates", change=True)) for s in _SIZES),
        Trend(
            tuple(f"vader {s} px" for s in _SIZES),
            tuple(f"ddpo {s} px" for s in _SIZES),
            Measure(at="updates", change=True),
        ),
    ),
    benchmark=Benchmark(
        name="vader-resolution",
        arms=tuple(
            Arm(label=f"{algo} {s} px", algo=algo, env={"height": s, "width": s}, evaluate_as_trained=True)
            for s in _SIZES
            for algo in ("vader", "ddpo")
        ),
        seeds=(0, 1, 2),
        updates=24,
        evals=3,
        question="Does the gap between reward gradients and policy gradients widen with resolution?",
        hypothesis="The gain of VADER over DDPO after equally many updates grows from 24 to 40 pixels.",
        expected_ahead=tuple((f"vader {s} px", f"ddpo {s} px") for s in _SIZES),
        tuning="The presets, which were tuned at 32 pixels, at every size.",
    ),
    deviation="24, 32 and 40 pixels a side instead of up to 512, and 24 updates. The embedded model was trained at 32 "
    "pixels: at 24 and 40 its own videos are worse, so the room above the untrained model differs between sizes.",
    cpu_minutes=6.0,
)

TRUNCATION = Experiment(
    name="vader-truncation",
    **_PAPER,
    figure="Table 9",
    finding="Gradients through the last step alone end higher than through the last ten: reward after 1, 100, 200 and "
    "300 updates 5.047, 5.334, 5.498, 5.648 for K = 1, and 5.095, 5.252, 5.207, 5.191 for K = 10.",
    known="numbers",
    claims=(Ahead("K=1", "K=10", Measure(at="updates")), Ahead("K=1", "K=10")),
    benchmark=Benchmark(
        name="vader-truncation",
        arms=(
            Arm(label="K=1", algo="vader", settings={"backprop_steps": 1}),
            Arm(label="K=10", algo="vader", settings={"truncation": "step", "cutoff_step": 0}),  # all steps, here ten
        ),
        sampling={"num_envs": 16, "num_steps": 10, "guidance_scale": 1.0},
        seeds=(0, 1, 2),
        updates=30,
        question="How many denoising steps should the reward's gradient pass through?",
        hypothesis="K = 1 ends above K = 10 after equally many updates, and per device-second.",
        expected_ahead=(("K=1", "K=10"),),
        tuning="K = 1 has the preset's learning rate, tuned for K = 1; K = 10 has the same, as in the paper.",
    ),
    deviation=_SMALL + "K = 10 is the whole chain of ten steps here, in the paper the end of a longer one; 30 updates.",
    cpu_minutes=8.0,
)

_ON_TRAIN = Measure(split="train")
GENERALISATION = Experiment(
    name="vader-generalisation",
    **_PAPER,
    figure="Table 1",
    finding="VADER gains as much on prompts that it never saw, and more than DDPO and DPO on both. Base, DDPO, DPO, "
    "VADER: Aesthetic 4.61, 4.63, 4.71, 7.31 on train and 4.49, 4.52, 4.41, 7.12 on test prompts; HPS 0.25, 0.24, "
    "0.25, 0.33 and 0.24, 0.23, 0.24, 0.32.",
    known="numbers",
    claims=(
        Rises("vader", Measure(at="end", split="train")),
        Rises("vader"),
        Generalises("vader", 0.8),
        *(Ahead(a, b, measure) for measure in (_ON_TRAIN, Measure()) for a, b in _AHEAD),
    ),
    benchmark=Benchmark(
        name="vader-generalisation",
        arms=(_VADER, _DDPO, _DPO),
        splits=("test", "train"),
        budget="60s",
        evals=4,
        question="Does what is gained on the prompts trained on carry over to other prompts?",
        hypothesis="VADER's gain on test prompts is at least 0.8 of that on train prompts, and above DDPO's and DPO's.",
        expected_ahead=_AHEAD,
        tuning=_TUNED,
    ),
    deviation=_SMALL + _BASELINES + "Test prompts differ from train prompts in the combination of colour, shape and "
    "direction, not in the words. The share of 0.8 is ours: the paper's numbers give 0.97 (Aesthetic) and 1.0 (HPS).",
    cpu_minutes=3.0,
)

_REWARDS = {"HPS": 1.0, "Aesthetic": 0.1, "Action": 1.0}


def _part(name: str) -> Measure:
    return Measure(name=f"proxy/{name}", at="end")


OTHER_REWARDS = Experiment(
    name="vader-other-rewards",
    **_PAPER,
    figure="Table 3 and Fig. 11",
    finding="Fine-tuning on one reward also raises qualities that were not optimised.",
    known="direction",
    claims=(
        *(Rises(f"on {name}", _part(name)) for name in _REWARDS),
        Rises("on HPS", _part("Aesthetic")),
        Rises("on HPS", _part("Action")),
        Rises("on Aesthetic", _part("HPS")),
        Rises("on Action", _part("HPS")),
    ),
    benchmark=Benchmark(
        name="vader-other-rewards",
        arms=tuple(
            Arm(
                label=f"on {name}",
                algo="vader",
                settings={"loss": "negative"},
                env={"reward": {name: 1.0}, "decode_frames": "all" if name == "Action" else "random1"},
            )
            for name in _REWARDS
        ),
        env_id="MovingShapes-" + "+".join(f"{w:g}*{name}" if w != 1 else name for name, w in _REWARDS.items()),
        seeds=(0, 1, 2),
        budget="60s",
        evals=4,
        question="What happens to rewards that are not optimised?",
        hypothesis="Each arm raises its own reward; training on HPS raises Aesthetic and Action too.",
        tuning="VADER's preset with the loss -R for every reward; the learning rate was tuned for HPS.",
    ),
    deviation=_SMALL
    + "The three are the embedded HPS-style, aesthetic and action rewards. Evaluations score their sum, "
    "of which the parts are judged; each arm optimises its own part alone.",
    cpu_minutes=3.5,
)

_MEMORY = "benchmarks.experiments.saved_bytes:SavedBytes"
_TECHNIQUES = ("all weights", "LoRA", "mixed precision", "one frame", "truncated", "checkpoints", "offload")


def _memory_arm(place: int) -> Arm:
    """The arm with the first techniques of the list in use."""
    policy = {
        **({"lora_rank": 0} if place < 1 else {}),
        **({"gradient_checkpointing": True} if place >= 5 else {}),
        **({"offload_activations": True} if place >= 6 else {}),
    }
    return Arm(
        label=_TECHNIQUES[place],
        algo=_MEMORY,
        settings={"autocast": place >= 2, "backprop_steps": None if place < 4 else 1},
        env={"decode_frames": "all" if place < 3 else "random1"},
        policy=policy,
    )


MEMORY = Experiment(
    name="vader-memory",
    **_PAPER,
    figure="Table 7",
    finding="Each technique on top of the ones before it saves memory. ModelScope with LoRA and mixed precision: 12.1 "
    "GB of video memory and 264.2 GB of main memory, to which activations are offloaded; main memory falls to 216.8 GB "
    "with subsampled frames, 57.3 GB with truncated backpropagation and 20.4 GB with gradient checkpointing.",
    known="numbers",
    claims=tuple(LessMemory(after, before) for before, after in zip(_TECHNIQUES, _TECHNIQUES[1:], strict=False)),
    benchmark=Benchmark(
        name="vader-memory",
        arms=tuple(_memory_arm(place) for place in range(len(_TECHNIQUES))),
        sampling={"num_envs": 4, "num_steps": 10, "guidance_scale": 1.0},
        seeds=(0, 1, 2),
        updates=2,
        evals=1,
        eval_prompts=4,
        noise_seeds=1,
        question="What does each technique save?",
        hypothesis="Every technique saves memory on top of the ones before it, truncation most.",
        tuning="none: nothing is learnt in two updates, what counts is what autograd keeps.",
    ),
    deviation="Bytes that autograd keeps for the backward pass, with trained weights, gradients and optimiser state, "
    "counted exactly; what gradient checkpoints compute again is not in them. The paper offloads activations in all "
    "rows, here offloading is the last one. Mixed precision is bfloat16.",
    cpu_minutes=0.4,
)

DIVERSITY = Experiment(
    name="vader-diversity",
    **_PAPER,
    figure="Table 8",
    finding="The paper compares how much videos of one prompt differ, by VideoMAE features, before and after training; "
    "we take it that most of the diversity stays.",
    known="direction",
    claims=(
        Rises("vader"),
        *(Keeps(label, 0.8, Measure(name="diversity", at="end")) for label in ("vader", "ddpo", "dpo")),
    ),
    benchmark=Benchmark(
        name="vader-diversity",
        arms=(_VADER, _DDPO, _DPO),
        seeds=(0, 1, 2),
        budget="60s",
        evals=3,
        noise_seeds=8,
        question="Do videos of one prompt become alike?",
        hypothesis="VADER, DDPO and DPO keep at least 0.8 of the untrained model's diversity.",
        tuning=_TUNED,
    ),
    deviation=_SMALL
    + "Diversity is the mean pairwise 1 - cosine of the embedded VideoMAE's features over eight videos a "
    "prompt, not their variance. The paper's numbers could not be checked, and the share of 0.8 is ours.",
    cpu_minutes=3.5,
)

EXPERIMENTS = (
    EFFICIENCY,
    EFFICIENCY_UNET,
    LONGER,
    RESOLUTION,
    TRUNCATION,
    GENERALISATION,
    OTHER_REWARDS,
    MEMORY,
    DIVERSITY,
)
