"""benchmark.json: what a benchmark was meant to find out, written before its runs and kept. No torch.

It holds the fields of `benchmarks.plan.Benchmark`. Arms and seeds may be added later; everything else stays what it
was, the hypothesis above all, as long as there is a run that was made under it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.plan import Arm, Benchmark, folder_name, record

NAME = "benchmark.json"
SCHEMA_VERSION = 1
_SAID_ONCE = ("question", "hypothesis", "expected_ahead", "tuning", "limits")  # need not be said again
_LATER = ("question", "tuning", "limits")  # may be added when there are runs; an expectation may not


def read(folder: Path) -> dict[str, Any] | None:
    """What the file says; None where there is none.

    Raises:
        ValueError: the file is broken, or of another schema.
    """
    path = folder / NAME
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is broken: {error}; put it back, or choose another --name") from error
    if found.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(f"{path} has schema {found.get('schema_version')}, this version reads {SCHEMA_VERSION}")
    return found


def merged(old: Mapping[str, Any] | None, benchmark: Benchmark, replaced: Sequence[Path] = ()) -> dict[str, Any]:
    """What the file says once this benchmark's runs are added. Changes nothing.

    Args:
        old: what it says now.
        benchmark: whose runs are asked for.
        replaced: folders of arms whose runs are all removed first; what was said of them may change.

    Raises:
        ValueError: something differs from what the earlier runs were made with; the message names the keys.
    """
    new = json.loads(json.dumps({"schema_version": SCHEMA_VERSION, **record(benchmark)}))
    if old is None:
        return new
    kept = [arm for arm in old["arms"] if folder_name(arm["label"]) not in {path.name for path in replaced}]
    asked = {folder_name(arm["label"]): arm for arm in new["arms"]}
    found = []
    for key, value in new.items():
        if key in ("arms", "seeds") or not kept:
            continue
        if key in _SAID_ONCE and not value:
            new[key] = old[key]
        elif not (key in _LATER and not old[key]) and old.get(key, "") != value:
            found.append(f"{key}: {old.get(key)!r} there, {value!r} given")
    for arm in kept:
        given = asked.get(folder_name(arm["label"]))
        if given is not None:
            found += [
                f"{arm['label']}.{key}: {arm.get(key)!r} there, {value!r} given"
                for key, value in given.items()
                if arm.get(key) != value
            ]
    if found:
        raise ValueError(
            f"the benchmark {old['name']!r} was begun with something else: {'; '.join(found)}. Run it as it was, "
            "choose another --name, or remove its runs with --fresh"
        )
    new["arms"] = [*kept, *(arm for name, arm in asked.items() if name not in {folder_name(a["label"]) for a in kept})]
    new["seeds"] = list(dict.fromkeys([*(old["seeds"] if kept else ()), *new["seeds"]]))
    return new


def write(folder: Path, values: Mapping[str, Any]) -> None:
    """Writes the file so that there is the old or the new one at any time."""
    from algos.run_files import replace_json

    folder.mkdir(parents=True, exist_ok=True)
    replace_json(folder / NAME, values)


def benchmark_of(values: Mapping[str, Any]) -> Benchmark:
    """The benchmark that the file describes."""
    given = {key: value for key, value in values.items() if key != "schema_version"}
    given["arms"] = [Arm(**arm) for arm in given["arms"]]
    given["expected_ahead"] = [tuple(pair) for pair in given["expected_ahead"]]
    return Benchmark(**given)
