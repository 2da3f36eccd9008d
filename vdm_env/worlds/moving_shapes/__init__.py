"""MovingShapes: the embedded world. Renderer, captions, gold score, pretraining and small trained weights."""

from pathlib import Path

from vdm_env.worlds.moving_shapes.gold import GoldScore, gold_score
from vdm_env.worlds.moving_shapes.render import COLOURS, DIRECTIONS, SHAPES, caption

WEIGHTS = Path(__file__).parent / "weights"
"""Folder of the trained weights that come with the package."""

__all__ = ["WEIGHTS", "GoldScore", "caption", "gold_score", "prompt_splits"]


def prompt_splits() -> dict[str, list[str]]:
    """All 112 captions: 80 train, 16 validation, 16 test.

    Every colour, shape and direction occurs in each split; for each pair of shape and direction one colour is held out
    for validation and one for test. The base models were pretrained on all captions; alignment never sees the held-out
    ones.
    """
    splits: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for c, colour in enumerate(COLOURS):
        for s, shape in enumerate(SHAPES):
            for d, direction in enumerate(DIRECTIONS):
                held_out = (c + 2 * s + 3 * d) % len(COLOURS)
                split = {0: "test", 1: "validation"}.get(held_out, "train")
                splits[split].append(caption(colour, shape, direction))
    return splits
