"""What rewards on vision-language models read besides weights: a tokenizer, the published query, sharded weights.

A query is part of a release as its weights are: a network is only what it was trained to be with the very text it was
trained with. So the text is read from the release's own file, and none is kept here. Nothing of that file is executed.
"""

from __future__ import annotations

import ast
import json
import re
import string
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vdm_env.errors import CorruptWeightsError
from vdm_env.rewards.loading import RewardContext, corrupt, frozen, read_tensors

SLOT = "{text_prompt}"
"""what the prompt takes the place of in a query"""
_PYTHON_BLOCK = re.compile(r"^```python\s*$(.*?)^```\s*$", re.MULTILINE | re.DOTALL)


def fill(query: str, prompt: str) -> str:
    """The query about one prompt; braces in the prompt stay as they are."""
    return query.replace(SLOT, prompt)


def read_query(path: Path, name: str) -> str:
    """The text that a file assigns to `name` (upper or lower case): Python source, or Markdown with Python in it.

    Raises:
        CorruptWeightsError: no such text, or one without a place for the prompt.
    """
    text = path.read_text(encoding="utf-8")
    sources = [text] if path.suffix == ".py" else _PYTHON_BLOCK.findall(text)
    for source in sources:
        try:
            tree = ast.parse(source)
        except SyntaxError:
            continue
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)):
                continue
            named = any(isinstance(t, ast.Name) and t.id.lower() == name.lower() for t in node.targets)
            if named and isinstance(node.value.value, str) and SLOT in node.value.value:
                return node.value.value
    raise CorruptWeightsError(
        f"{path} gives no text named {name} with a place {SLOT} for the prompt, which the network was trained with; "
        "fetch the file again"
    )


def read_json(path: Path) -> dict[str, Any]:
    """The object a JSON file holds.

    Raises:
        CorruptWeightsError: it holds none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise corrupt(path, error) from error
    if not isinstance(content, dict):
        raise CorruptWeightsError(f"{path} holds {type(content).__name__}, expected an object; fetch the file again")
    return content


def read_shards(index: Path) -> dict[str, Tensor]:
    """All tensors of weights that lie in several files, by their index file.

    Raises:
        CorruptWeightsError: a damaged file, one outside the folder, or a tensor that is not where the index says.
    """
    places = _weight_map(index)
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(places.values())):
        tensors |= read_tensors(index.parent / file)
    lost = sorted(set(places) - set(tensors))
    if lost:
        raise CorruptWeightsError(f"{index} names tensors that its files do not hold: {lost[:8]}; fetch them again")
    return tensors


def shard_files(index: Path) -> list[str]:
    """Names of the files that an index names, all of them beside it.

    Raises:
        CorruptWeightsError: it names none, or one elsewhere.
    """
    return sorted(set(_weight_map(index).values()))


def _weight_map(index: Path) -> dict[str, str]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(Path(str(f)).name == f for f in places.values()):
        raise CorruptWeightsError(f"{index} has no weight_map of tensors to files beside it; fetch the file again")
    return places


def read_tokenizer(path: Path, special: Sequence[str] = ()) -> Any:
    """A transformers tokenizer from its `tokenizer.json`, with these special tokens added where it lacks them.

    Raises:
        CorruptWeightsError: the file cannot be read.
    """
    from transformers import PreTrainedTokenizerFast

    try:
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path))
    except Exception as error:  # the tokenizers library raises plain Exception
        raise corrupt(path, error) from error
    return _with_special(tokenizer, special)


def letter_tokenizer(special: Sequence[str]) -> Any:
    """A tokenizer of single characters and these special tokens, for networks with random weights: it needs no file."""
    from tokenizers import Regex, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from transformers import PreTrainedTokenizerFast

    pieces = ["[PAD]", "[UNK]", *string.ascii_letters, *string.digits, *string.punctuation, " ", "\n"]
    tokenizer = Tokenizer(WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    return _with_special(PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]"), special)


def _with_special(tokenizer: Any, special: Sequence[str]) -> Any:
    known = tokenizer.get_vocab()
    new = [token for token in special if token not in known]
    if new:
        tokenizer.add_tokens(new, special_tokens=True)
    return tokenizer


def token_id(tokenizer: Any, token: str, path: Path | str) -> int:
    """The number of a special token.

    Raises:
        CorruptWeightsError: the tokenizer has none.
    """
    number = tokenizer.get_vocab().get(token)
    if number is None:
        raise CorruptWeightsError(f"{path} knows no token {token!r}; it is another network's tokenizer, fetch it again")
    return int(number)


def encode(tokenizer: Any, texts: Sequence[str], device: torch.device, pad: int = 0) -> tuple[Tensor, Tensor]:
    """Token numbers [B,L], padded on the right, and their mask [B,L] (int64, 1 where there is text)."""
    rows = [torch.tensor(tokenizer(text)["input_ids"], dtype=torch.int64) for text in texts]
    mask = [torch.ones_like(row) for row in rows]
    padded = [
        torch.nn.utils.rnn.pad_sequence(r, batch_first=True, padding_value=v) for r, v in ((rows, pad), (mask, 0))
    ]
    return padded[0].to(device), padded[1].to(device)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """New parameters are of this type: a network of eight billion weights is never held in float32 on the way."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def empty(build: Callable[[], Any]) -> Any:
    """The network that `build` makes, without the time to draw weights that a checkpoint is about to replace."""
    from transformers.initialization import no_init_weights

    with no_init_weights():
        return build()


def frozen_vlm(module: nn.Module, context: RewardContext) -> Any:
    """`loading.frozen`, but frequencies of rotary positions stay float32: half precision confuses far positions."""
    rotary = {name: buffer.clone() for name, buffer in module.named_buffers() if "inv_freq" in name}
    module = frozen(module, context)
    for name, buffer in rotary.items():
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, buffer.to(context.device))
    return module
