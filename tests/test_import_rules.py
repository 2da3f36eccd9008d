"""The import rules of the repository, read with `ast`: who may know whom.

Each rule is a function from {path: source} to the lines that break it. Every rule is tested twice: the repository
keeps it, and a made-up source that breaks it is found.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = ("vdm_env", "algos", "benchmarks", "tests")  # each may import itself and those before it
TORCH_FREE = (
    "benchmarks/report.py", "benchmarks/plots.py", "benchmarks/aggregate.py", "benchmarks/tables.py",
    "benchmarks/experiments/__init__.py",
)  # fmt: skip
# torch itself, and packages that import it as soon as they are imported.
TORCH_PACKAGES = frozenset(
    ("torch", "torchvision", "torchrl", "tensordict", "diffusers", "transformers", "peft", "accelerate")
    + ("open_clip", "timm", "stable_baselines3")
)
Sources = Mapping[str, str]
Rule = Callable[[Sources], list[str]]


@dataclass(frozen=True)
class Import:
    """One import: the absolute dotted name, its line, and whether importing the file runs it."""

    name: str
    line: int
    at_import: bool

    @property
    def package(self) -> str:
        return self.name.partition(".")[0]


def module_name(path: str) -> str:
    """'a/b/c.py' -> 'a.b.c', 'a/b/__init__.py' -> 'a.b'."""
    parts = PurePosixPath(path).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: str, source: str) -> list[Import]:
    """All imports of a file. `from a import b` counts as 'a.b': b is a module of a or a name in it."""
    found: list[Import] = []
    package = module_name(path).split(".")
    if not path.endswith("__init__.py"):
        package = package[:-1]

    def visit(node: ast.AST, at_import: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, node.lineno, at_import) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *filter(None, [node.module])])
            found.extend(Import(f"{prefix}.{alias.name}", node.lineno, at_import) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = ast.unparse(node.func).rpartition(".")[2]
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                found.append(Import(node.args[0].value, node.lineno, at_import))
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for child in node.body:
                visit(child, False)
            for child in node.orelse:
                visit(child, at_import)
            return
        inside = at_import and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(ast.parse(source, filename=path), True)
    return found


def resolve(name: str, modules: Mapping[str, str]) -> str | None:
    """The longest prefix of a dotted name that is a module of this repository, or None."""
    parts = name.split(".")
    for size in range(len(parts), 0, -1):
        if (prefix := ".".join(parts[:size])) in modules:
            return prefix
    return None


def each_import(sources: Sources) -> Iterator[tuple[str, Import]]:
    for path, source in sorted(sources.items()):
        for item in imports(path, source):
            yield path, item


def layers_point_down(sources: Sources) -> list[str]:
    """tests -> benchmarks -> algos -> vdm_env, never back."""
    return [
        f"{path}:{item.line} imports {item.name}, but {path.split('/')[0]} lies below {item.package}"
        for path, item in each_import(sources)
        if item.package in LAYERS and LAYERS.index(item.package) > LAYERS.index(path.split("/")[0])
    ]


def is_algorithm(source: str) -> bool:
    """Whether a file defines an algorithm: a class, not a protocol, with `update(self)` and no further argument."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ClassDef) or any("Protocol" in ast.unparse(base) for base in node.bases):
            continue
        for method in node.body:
            if isinstance(method, ast.FunctionDef) and method.name == "update":
                arguments = method.args
                if len(arguments.posonlyargs + arguments.args + arguments.kwonlyargs) == 1:
                    return True
    return False


def algorithms_stand_alone(sources: Sources) -> list[str]:
    """No algorithm file imports another one, neither directly nor through a helper file of `algos`."""
    paths = {module_name(path): path for path in sources if path.startswith("algos/")}
    algorithms = {name for name, path in paths.items() if is_algorithm(sources[path])}
    broken = []
    for start in sorted(algorithms):
        seen, queue = {start}, [(start, start)]
        while queue:
            module, route = queue.pop()
            for item in imports(paths[module], sources[paths[module]]):
                target = resolve(item.name, paths)
                if target is None or target in seen:
                    continue
                seen.add(target)
                if target in algorithms:
                    broken.append(f"{paths[start]} reaches algorithm {target} ({route} -> {target})")
                else:
                    queue.append((target, f"{route} -> {target}"))
    return broken


def models_and_rewards_are_strangers(sources: Sources) -> list[str]:
    """vdm_env.models and vdm_env.rewards know nothing of each other."""
    pairs = {"vdm_env/models/": "vdm_env.rewards", "vdm_env/rewards/": "vdm_env.models"}
    return [
        f"{path}:{item.line} imports {item.name}"
        for path, item in each_import(sources)
        for folder, stranger in pairs.items()
        if path.startswith(folder) and f"{item.name}.".startswith(f"{stranger}.")
    ]


def only_in(package: str, *allowed: str) -> Rule:
    """The rule that a package is imported by these files (and tests) only."""

    def rule(sources: Sources) -> list[str]:
        return [
            f"{path}:{item.line} imports {item.name}; only {', '.join(allowed)} may"
            for path, item in each_import(sources)
            if item.package == package and path not in allowed and not path.startswith("tests/")
        ]

    return rule


def reports_need_no_torch(sources: Sources) -> list[str]:
    """Report, plots and aggregate work where torch is absent: what importing them runs never imports it."""
    modules = {module_name(path): path for path in sources}
    broken = []
    for start in TORCH_FREE:
        if start not in sources:
            continue
        name = module_name(start)
        seen, queue = {name}, [(name, start)]
        while queue:
            module, route = queue.pop()
            path = modules[module]
            # Importing a.b.c also runs the __init__ of a and of a.b.
            parents = [Import(module.rpartition(".")[0], 1, True)] if "." in module else []
            for item in parents + imports(path, sources[path]):
                if not item.at_import and path != start:  # in the three files themselves a late import counts too
                    continue
                if item.package in TORCH_PACKAGES or item.name.startswith("safetensors.torch"):
                    broken.append(f"{route}:{item.line} imports {item.name}")
                target = resolve(item.name, modules)
                if target is not None and target not in seen:
                    seen.add(target)
                    queue.append((target, f"{route} -> {modules[target]}"))
    return broken


def read_repository() -> dict[str, str]:
    files = [path for layer in LAYERS for path in (ROOT / layer).rglob("*.py")]
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in files}


RULES: dict[str, Rule] = {
    "layers": layers_point_down,
    "algorithms": algorithms_stand_alone,
    "strangers": models_and_rewards_are_strangers,
    "torchrl": only_in("torchrl", "vdm_env/torchrl.py", "algos/ppo_torchrl.py"),
    "sb3": only_in("stable_baselines3", "algos/ppo_sb3.py", "algos/sb3_parts.py"),
    "torch-free": reports_need_no_torch,
}

ALGORITHM = "class {}:\n    def update(self):\n        return {{}}\n"
BREACHES: list[tuple[str, dict[str, str]]] = [
    ("layers", {"vdm_env/env.py": "import algos.run"}),
    ("layers", {"algos/run.py": "def f():\n    from benchmarks import plots"}),
    ("layers", {"benchmarks/demo.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import tests.helpers"}),
    ("layers", {"vdm_env/a.py": "import importlib\nimportlib.import_module('algos')"}),
    ("algorithms", {"algos/a.py": "import algos.b\n" + ALGORITHM.format("A"), "algos/b.py": ALGORITHM.format("B")}),
    ("algorithms", {"algos/a.py": "from .b import B\n" + ALGORITHM.format("A"), "algos/b.py": ALGORITHM.format("B")}),
    (
        "algorithms",
        {
            "algos/__init__.py": "from algos.b import B",
            "algos/a.py": "from algos import B\n" + ALGORITHM.format("A"),
            "algos/b.py": ALGORITHM.format("B"),
        },
    ),
    (
        "algorithms",
        {
            "algos/a.py": "def f():\n    from algos import helper\n" + ALGORITHM.format("A"),
            "algos/helper.py": "from algos import b",
            "algos/b.py": ALGORITHM.format("B"),
        },
    ),
    ("strangers", {"vdm_env/models/dit.py": "from vdm_env.rewards.clip import CLIP"}),
    ("strangers", {"vdm_env/rewards/clip.py": "def f():\n    from .. import models"}),
    ("strangers", {"vdm_env/rewards/__init__.py": "from vdm_env.models import base"}),
    ("torchrl", {"vdm_env/env.py": "from torchrl.envs import EnvBase"}),
    ("torchrl", {"benchmarks/demo.py": "def f():\n    import torchrl"}),
    ("sb3", {"vdm_env/checker.py": "def f():\n    from stable_baselines3.common.env_checker import check_env"}),
    ("torch-free", {"benchmarks/plots.py": "def f():\n    import torch"}),
    ("torch-free", {"benchmarks/report.py": "from algos import meter", "algos/meter.py": "import torch.nn as nn"}),
    (
        "torch-free",
        {
            "benchmarks/report.py": "from vdm_env.video import strip",
            "vdm_env/__init__.py": "from vdm_env.registry import make",
            "vdm_env/registry.py": "try:\n    from torch import Tensor\nexcept ImportError:\n    pass",
            "vdm_env/video.py": "import numpy",
        },
    ),
]
ALLOWED: list[tuple[str, dict[str, str]]] = [
    ("layers", {"tests/test_a.py": "import benchmarks, algos, vdm_env", "algos/a.py": "from vdm_env import make"}),
    ("algorithms", {"algos/a.py": "from algos import losses\n" + ALGORITHM.format("A"), "algos/losses.py": ""}),
    (
        "algorithms",  # a statistic with update(x) and the protocol itself are not algorithms
        {
            "algos/a.py": "from algos.tools import P, S\n" + ALGORITHM.format("A"),
            "algos/tools.py": "class S:\n    def update(self, x): ...\nclass P(Protocol):\n    def update(self): ...",
        },
    ),
    ("torchrl", {"vdm_env/env.py": "from vdm_env import torchrl", "vdm_env/torchrl.py": "import torchrl.envs"}),
    ("torchrl", {"vdm_env/env.py": "from . import torchrl"}),
    ("torch-free", {"benchmarks/report.py": "from algos import meter", "algos/meter.py": "def f():\n    import torch"}),
]


@pytest.mark.parametrize("name", RULES)
def test_repository_keeps_the_rule(name: str) -> None:
    sources = read_repository()
    assert {path.split("/")[0] for path in sources} == set(LAYERS), "a layer without a Python file: nothing to check"
    broken = RULES[name](sources)
    assert not broken, "\n".join([(RULES[name].__doc__ or f"rule '{name}' is broken").strip(), *broken])


@pytest.mark.parametrize(("name", "sources"), BREACHES)
def test_a_breach_is_found(name: str, sources: dict[str, str]) -> None:
    assert len(RULES[name](sources)) == 1


@pytest.mark.parametrize(("name", "sources"), ALLOWED)
def test_what_is_allowed_passes(name: str, sources: dict[str, str]) -> None:
    assert RULES[name](sources) == []


def test_rules_name_files_that_exist() -> None:
    """A renamed file must not slip out of its rule."""
    sources = read_repository()
    for path in (*TORCH_FREE, "vdm_env/torchrl.py"):
        assert path in sources, f"{path} is named by an import rule and does not exist: rename it in the rule too"
    assert any(is_algorithm(source) for path, source in sources.items() if path.startswith("algos/"))


def test_reports_import_without_torch() -> None:
    """The same as the 'torch-free' rule, by running the imports."""
    names = ", ".join(module_name(path) for path in TORCH_FREE)
    code = f"import sys, {names}\nsys.exit('torch was imported' if 'torch' in sys.modules else 0)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
