"""A trained LoRA as others can use it: a folder with PEFT's and diffusers' files, a model card, and its upload.

The folder holds `adapter_model.safetensors` and `adapter_config.json` (PEFT; `policy.load` reads them),
`pytorch_lora_weights.safetensors` where a pipeline of diffusers runs the network, and README.md. With `lora_rank=0` it
is the whole network, in `model.safetensors`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from vdm_env.lora_export import save_diffusers_lora
from vdm_env.policy import DenoisingPolicy

_WHOLE = "model.safetensors"


class PushError(RuntimeError):
    """The hub took nothing; the message says what to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """A score before and after training on the same prompts and noise, and the interval of its change, if any."""

    name: str
    before: float
    after: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """What a model card says."""

    title: str
    env_id: str
    """environment it was trained in"""
    model: str
    """base model, as in environment ids"""
    repositories: Sequence[str]
    """of the base model on the hub; none if its weights come with the package"""
    licence: str
    """of the base model, or where to read it"""
    spdx: str
    """licence identifier of the hub: "other" unless it is known"""
    reward: str
    algorithm: str
    updates: int
    seed: int
    command: str | None
    """what repeats the training"""
    config: Mapping[str, Any]
    """every setting of the run"""
    sampling: Mapping[str, Any]
    """options of `vdm_env.make` it was trained and evaluated with"""
    changes: Sequence[Change] = ()
    interval: str = ""
    """what the intervals are taken over"""
    limits: Sequence[str] = ()
    diffusers: bool = field(default=True)
    """whether the folder has a LoRA in diffusers' format"""


def export(policy: DenoisingPolicy, folder: str | Path) -> list[Path]:
    """Writes a policy's trained weights in PEFT's format and, where a pipeline of diffusers runs them, in diffusers'.

    Args:
        policy: trained.
        folder: made if it is not there.

    Returns:
        The files; without `pytorch_lora_weights.safetensors` where there is no such pipeline.
    """
    folder = policy.save(folder)
    try:
        more = save_diffusers_lora(policy, folder)
    except ValueError:  # all weights are trained, or the network is none of diffusers': the card says so
        more = []
    names = ("adapter_model.safetensors", "adapter_config.json") if policy.lora_rank else (_WHOLE,)
    return [*(folder / name for name in names), *more]


def write_card(card: Card, policy: DenoisingPolicy, folder: str | Path) -> Path:
    """Writes the model card README.md into a folder."""
    path = Path(folder) / "README.md"
    path.write_text(model_card(card, policy), encoding="utf-8")
    return path


def model_card(card: Card, policy: DenoisingPolicy) -> str:
    """The text of the model card, with the hub's metadata at its head."""
    data = ModelCardData(
        base_model=list(card.repositories) or None,
        license=card.spdx,
        license_name="see-base-model" if card.spdx == "other" else None,
        library_name="diffusers" if card.diffusers else "peft" if policy.lora_rank else None,
        pipeline_tag="text-to-video",
        tags=["video-diffusion", "alignment", card.algorithm, *(["lora"] if policy.lora_rank else [])],
    )
    base = ", ".join(f"`{name}`" for name in card.repositories)
    what = f"LoRA of rank {policy.lora_rank}" if policy.lora_rank else "All weights of the network"
    lines = ["---", data.to_yaml(), "---", "", f"# {card.title}", ""]
    lines += [f"{what}, trained with `vdm_env` in the environment `{card.env_id}`.", ""]
    facts = {
        "Base model": f"{card.model}{f': {base}' if base else ', whose small weights come with vdm_env'}",
        "Reward": card.reward,
        "Algorithm": f"{card.algorithm}, {card.updates} updates, seed {card.seed}",
    }
    lines += [f"- **{name}:** {text}" for name, text in facts.items()]
    lines += ["", "## Results", "", *_results(card), "", "## Use", "", *_use(card, policy), ""]
    lines += [
        "## Licence",
        "",
        f"Weights derived from {card.model}; the licence of the base model applies to them.",
        "",
    ]
    lines += [f"Licence of the base model: {card.licence}.", "", "## Limits", ""]
    lines += [f"- {limit}" for limit in card.limits or ("None are recorded.",)]
    lines += ["- A higher reward is no better video by itself: look at samples.", "", "## Training", ""]
    if card.command is not None:
        lines += ["```sh", card.command, "```", ""]
    settings = yaml.safe_dump(dict(card.config), sort_keys=False, allow_unicode=True, width=120)
    return "\n".join([*lines, "Every setting:", "", "```yaml", settings.rstrip(), "```", ""])


def _results(card: Card) -> list[str]:
    """The table of scores."""
    if not card.changes:
        return ["This state of the training was not evaluated."]
    lines = ["| score | before | after | change |", "|---|---|---|---|"]
    for change in card.changes:
        interval = "" if change.low is None else f" [{change.low:+.3g}, {change.high:+.3g}]"
        difference = f"{change.after - change.before:+.3g}{interval}"
        lines.append(f"| {change.name} | {change.before:.4g} | {change.after:.4g} | {difference} |")
    return [*lines, "", f"The same held-out prompts and noise before and after. {card.interval}".rstrip()]


def _use(card: Card, policy: DenoisingPolicy) -> list[str]:
    """How to load the weights."""
    sampling = "".join(f", {name}={value!r}" for name, value in card.sampling.items())
    options = f"lora_rank={policy.lora_rank}"
    if policy.lora_rank:
        targets = sorted(policy._config.target_modules or ())
        options += f", lora_alpha={policy._config.lora_alpha}"
        if targets != sorted(policy._mdp.model.spec.lora_targets):
            options += f", lora_targets={targets!r}"
    lines = [
        "```python",
        "from vdm_env import make",
        "",
        f'env = make("{card.env_id}"{sampling})',
        f"policy = env.make_policy({options})",
        'policy.load("path/to/this/folder")',
        "```",
    ]
    if card.diffusers and policy.lora_rank:
        lines += ["", 'A pipeline of diffusers takes it with `pipeline.load_lora_weights("path/to/this/folder")`.']
    elif policy.lora_rank:
        lines += ["", "No pipeline of diffusers runs this network; the adapter is in PEFT's format."]
    return lines


def push(folder: str | Path, repository: str, *, private: bool = True) -> str:
    """Uploads a folder to the hub with the login of this machine's user (`hf auth login`, or HF_TOKEN).

    Args:
        folder: what `export` and `write_card` wrote.
        repository: "user/name"; made if it is not there.
        private: of a repository that is made.

    Returns:
        The address of the repository.

    Raises:
        ValueError: no name of a repository.
        PushError: no login, no access or no network.
    """
    api = HfApi()
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=str(folder), commit_message="Upload from vdm_env")
    except HFValidationError as error:
        raise ValueError(f"{repository!r} is no repository of the hub, expected user/name: {error}") from error
    except LocalTokenNotFoundError as error:
        raise PushError("not logged in to the hub: run `hf auth login`, or set HF_TOKEN") from error
    except (HfHubHTTPError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise PushError(f"the hub did not take {repository}: {reason}. What was exported is in {folder}") from error
    return str(address)
