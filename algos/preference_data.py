"""Preference data, read: pairs of videos out of groups of candidates that are kept on disk with all their scores.

Which candidates of a group make a pair, by which score and with what weight, is decided here and not when the videos
were made, so that it can be decided anew without sampling again. `algos.preference_files` says what the files are and
writes them; `algos.preference_sampling` makes them with an environment.

Latents are read row by row from the files; what is in memory is the index.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from algos.pairs import Pairs
from algos.preference_files import AGAIN, INDEX, DamagedDataError, digest, read_index, total_cost
from algos.preferences import Strategy, preference_pairs
from vdm_env.checksums import file_sha256


@dataclass(frozen=True, kw_only=True, eq=False)
class PairTable:
    """Pairs by place: of P pairs the group, the winner's and the loser's column, int64 [P]; their rewards, [P]."""

    group: Tensor
    winner: Tensor
    loser: Tensor
    winner_reward: Tensor
    loser_reward: Tensor

    def __len__(self) -> int:
        return len(self.group)


class PreferenceData:
    """Reads preference data.

    The index is checked at once, and that every shard has the right size; a shard's checksum when it is first read
    from, or all of them by `verify()`.

    Attributes:
        settings: how the videos were made. prompts: G texts. reward: [G,N] float64. scores: {name: [G,N] float64}.

    Raises:
        FileNotFoundError: no data in the folder.
        DamagedDataError: damaged, truncated or missing files.
        ValueError: data of another version of the format.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / INDEX).is_file():
            raise FileNotFoundError(
                f"no preference data in {self.folder}: it holds no {INDEX}; make them with build_preferences(...), or "
                f"write your own with PreferenceWriter"
            )
        self._index = read_index(self.folder)
        self.settings: dict[str, Any] = self._index["settings"]
        self._shards: list[dict[str, Any]] = self._index["shards"]
        if not self._shards:
            raise DamagedDataError(f"{self.folder / INDEX} lists no shards; {AGAIN}")
        for shard in self._shards:
            path = self.folder / shard["file"]
            if not path.is_file():
                raise DamagedDataError(f"{path} is missing, but {INDEX} lists it; {AGAIN}")
            if path.stat().st_size != shard["bytes"]:
                raise DamagedDataError(f"{path} has {path.stat().st_size} bytes, expected {shard['bytes']}; {AGAIN}")
        self.prompts: list[str] = [text for shard in self._shards for text in shard["prompts"]]
        self.reward = _join([shard["reward"] for shard in self._shards])
        names = sorted(self._shards[0]["scores"])
        self.scores = {name: _join([shard["scores"][name] for shard in self._shards]) for name in names}
        counts = torch.tensor([len(shard["prompts"]) for shard in self._shards])
        self._ends = counts.cumsum(0)
        self._starts = self._ends - counts
        self._verified: set[int] = set()

    def __len__(self) -> int:
        """Groups."""
        return len(self.prompts)

    def verify(self) -> None:
        """Reads everything once and compares it with the checksums.

        Raises:
            DamagedDataError: the content of a shard is not what was written.
        """
        for number in range(len(self._shards)):
            self._verify(number)

    def _verify(self, number: int) -> None:
        if number not in self._verified:
            path = self.folder / self._shards[number]["file"]
            if not path.is_file() or file_sha256(path) != self._shards[number]["sha256"]:
                raise DamagedDataError(f"{path} is not the file that was written (other checksum); {AGAIN}")
            self._verified.add(number)

    def identity(self, groups: int | None = None) -> str:
        """A hash of the settings and of all content of the first groups; the same after groups were added."""
        wanted = len(self) if groups is None else groups
        used = [s for s, start in zip(self._shards, self._starts.tolist(), strict=True) if start < wanted]
        content = [{name: value for name, value in shard.items() if name != "cost"} for shard in used]
        return digest({"settings": self.settings, "shards": content, "groups": wanted})

    def cost(self, groups: int | None = None) -> dict[str, float] | None:
        """What making and scoring the first groups has cost (None: all), `preference_files.COSTS` by name.

        None where the data do not say it. Whoever compares methods by cost adds it to a run's that found the data.
        """
        return total_cost(self._shards, len(self) if groups is None else groups)

    def pairs(
        self,
        strategy: Strategy = "best_vs_worst",
        generator: torch.Generator | None = None,
        *,
        reward: str | Tensor | None = None,
        groups: int | None = None,
    ) -> PairTable:
        """Pairs of the candidates, see `preferences.preference_pairs`.

        Args:
            strategy: which candidates of a group make pairs.
            generator: needed by the random strategies.
            reward: what ranks them: None for the reward they were written with, the name of a sub-score, or [G,N].
            groups: use the first so many groups only; None: all.

        Raises:
            ValueError: an unknown score, a tensor of another shape, more groups than there are.
        """
        if groups is not None and not 1 <= groups <= len(self):
            raise ValueError(f"groups is {groups}, but {self.folder} has {len(self)}; build more, or ask for fewer")
        if isinstance(reward, str):
            if reward not in self.scores:
                raise ValueError(f"no score {reward!r} in {self.folder}; there are {sorted(self.scores)}")
            reward = self.scores[reward]
        ranked = self.reward if reward is None else reward.double()
        if ranked.shape != self.reward.shape:
            raise ValueError(f"reward has shape {tuple(ranked.shape)}, expected {tuple(self.reward.shape)}: [G,N]")
        ranked = ranked[: groups or len(self)]
        n = ranked.shape[1]
        winner, loser = preference_pairs(ranked.flatten(), n, strategy, generator).unbind(1)
        return PairTable(
            group=winner // n,
            winner=winner % n,
            loser=loser % n,
            winner_reward=ranked.flatten()[winner],
            loser_reward=ranked.flatten()[loser],
        )

    def prompt_ids(self, env: Any) -> Tensor:
        """Number of every group's prompt in an env, int64 [G], once the data are found to fit the env.

        Raises:
            ValueError: data of another model or of latents of another shape, or prompts the env does not know.
        """
        model, shape = env.model.spec.name, list(env.mdp.latent_shape)
        if self.settings["model"] != model or list(self.settings["latent_shape"]) != shape:
            raise ValueError(
                f"{self.folder} has videos of {self.settings['model']} with latents {self.settings['latent_shape']}, "
                f"but the env is of {model} with latents {shape}; make the env for that model and size, or other data"
            )
        known = {text: number for number, text in enumerate(env.prompts)}
        unknown = sorted(set(self.prompts) - set(known))
        if unknown:
            raise ValueError(
                f"the env does not know {len(unknown)} of the prompts of {self.folder}, such as {unknown[0]!r}; make "
                f"it with prompts that contain them: make(..., prompts=list(dict.fromkeys(data.prompts)))"
            )
        return torch.tensor([known[text] for text in self.prompts])

    def latents(self, group: Tensor, column: Tensor) -> Tensor:
        """Clean latents [P,C,F,H,W] of candidates, by group and column [P]; only these rows are read.

        Raises:
            DamagedDataError: see `verify`.
        """
        numbers = torch.searchsorted(self._ends, group, right=True)
        found = torch.empty(len(group), *self.settings["latent_shape"])
        for number in numbers.unique().tolist():
            self._verify(number)
            places = (numbers == number).nonzero().flatten()
            self._read(number, group[places] - self._starts[number], column[places], found, places)
        return found

    def _read(self, number: int, rows: Tensor, columns: Tensor, found: Tensor, places: Tensor) -> None:
        """Copies candidates of one shard to their places in `found`."""
        path = self.folder / self._shards[number]["file"]
        shape = [len(self._shards[number]["prompts"]), self.settings["candidates"], *self.settings["latent_shape"]]
        try:
            with safe_open(str(path), framework="pt") as file:
                stored = file.get_slice("latents")
                if stored.get_shape() != shape:
                    raise DamagedDataError(f"{path} holds latents {stored.get_shape()}, expected {shape}; {AGAIN}")
                for place, row, column in zip(places.tolist(), rows.tolist(), columns.tolist(), strict=True):
                    found[place] = stored[row : row + 1, column : column + 1][0, 0]
        except (SafetensorError, OSError) as error:
            raise DamagedDataError(f"{path} cannot be read ({error}); {AGAIN}") from error

    def load(self, table: PairTable, rows: Tensor, prompt_ids: Tensor, weight: Tensor | None = None) -> Pairs:
        """Some rows of a table of pairs with their latents, as `pairs.paired_loss` takes them.

        Args:
            table: from `pairs`.
            rows: int64, which pairs.
            prompt_ids: [G] from `prompt_ids`.
            weight: of all the table's pairs, [P]; None: all alike.
        """
        group = table.group[rows]
        pairs = {
            "winner": self.latents(group, table.winner[rows]),
            "loser": self.latents(group, table.loser[rows]),
            "prompt_id": prompt_ids[group],
        }
        return pairs if weight is None else {**pairs, "weight": weight[rows]}


def _join(columns: Sequence[list[list[float]]]) -> Tensor:
    return torch.tensor([row for column in columns for row in column], dtype=torch.float64)
