"""Colour and line style of every algorithm, the same in every figure. Needs nothing but the standard library."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

# Okabe and Ito's palette without its yellow, which a white page swallows, and with a dark purple instead.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#6A3D9A")
_DASHES: tuple[Any, ...] = ("-", (0, (4, 1.6)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)))


@dataclass(frozen=True)
class Look:
    """How an algorithm is drawn: `colour` as #rrggbb, `dash` a line style of matplotlib."""

    colour: str
    dash: Any = "-"


def _looks(dash: Any, *names: str) -> dict[str, Look]:
    return {name: Look(colour, dash) for name, colour in zip(names, _COLOURS, strict=True)}


ZOO_LOOKS: dict[str, Look] = {
    **_looks(
        "-", "vader", "ddpo", "flow_grpo", "diffusion_dpo", "online_vpo", "diffusion_nft", "rwr", "videodpo",
    ),
    **_looks(
        _DASHES[1], "draft_lv", "ppo_sb3", "ppo_torchrl", "offline_dpo", "d3po", "diffusion_kto", "refl",
        "instructvideo",
    ),
}  # fmt: skip
"""The zoo's algorithms: eight colours that colour-blind people can tell apart, each with a solid and a dashed line."""
_ALL = [Look(colour, dash) for dash in _DASHES for colour in _COLOURS]


def looks(labels: Iterable[str]) -> dict[str, Look]:
    """One look for each label, all different up to 32 labels.

    A name of the zoo has its own. Any other label gets one by its hash, and the next free one where two labels of this
    set meet; so it is the same in all figures of a report.
    """
    names = sorted(set(labels))
    found = {name: ZOO_LOOKS[name] for name in names if name in ZOO_LOOKS}
    for name in names:
        if name not in found:
            start = hashlib.sha256(name.encode()).digest()[0]
            order = [_ALL[(start + step) % len(_ALL)] for step in range(len(_ALL))]
            found[name] = next((one for one in order if one not in found.values()), order[0])
    return found


def look(label: str) -> Look:
    """The look of one label on its own."""
    return looks([label])[label]
