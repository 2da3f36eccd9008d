"""The package as others receive it: one version, the right files in the wheel, nothing of this machine in it."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

import vdm_env

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("vdm_env", "algos", "benchmarks")
WEIGHTS = "vdm_env/worlds/moving_shapes/weights"
MAX_TRACKED_MIB = 20
# Put together from pieces, so that this file does not find itself.
MACHINE_PATH = re.compile(r"(?<![\w.:/])/(?:" + "|".join(["home", "root", "Users", "work", "mnt"]) + r")/\w")


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def repository_files() -> list[Path]:
    """Files that are tracked or would be: git's list, or every file that is no cache where there is no git."""
    try:
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listing = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode()
        files = [ROOT / name for name in listing.split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        files = [path for folder in (*PACKAGES, "tests") for path in (ROOT / folder).rglob("*")]
        files += [path for path in ROOT.iterdir() if path.is_file()]
    return [path for path in files if path.is_file() and "__pycache__" not in path.parts]


def machine_paths(text: str) -> list[str]:
    """Lines that name a folder of somebody's machine."""
    return [line.strip() for line in text.splitlines() if MACHINE_PATH.search(line)]


def wheel_files() -> set[str]:
    """Paths inside the wheel, asked of the build backend without building."""
    from hatchling.builders.wheel import WheelBuilder

    return {Path(item.distribution_path).as_posix() for item in WheelBuilder(str(ROOT)).recurse_included_files()}


def test_version_stands_in_one_place(project: dict) -> None:
    assert project["project"]["dynamic"] == ["version"] and "version" not in project["project"]
    assert project["tool"]["hatch"]["version"]["path"] == "vdm_env/__init__.py"
    assert re.fullmatch(r"\d+\.\d+\.\d+([ab.]\w+)?", vdm_env.__version__)
    written = re.compile(r"version[\"']?\s*[:=]\s*[\"']?" + re.escape(vdm_env.__version__))
    places = [ROOT / name for name in ("pyproject.toml", "CITATION.cff", "README.md", "Makefile")]
    places += [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    repeated = [path for path in places if written.search(path.read_text(encoding="utf-8").replace("__version__", ""))]
    assert not repeated, f"the version is written again in {repeated}; read vdm_env.__version__ instead"
    assert f"[{vdm_env.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_build_backend_reads_that_version() -> None:
    from hatchling.metadata.core import ProjectMetadata
    from hatchling.plugin.manager import PluginManager

    assert ProjectMetadata(str(ROOT), PluginManager()).version == vdm_env.__version__


def test_entry_point_lies_outside_vdm_env_and_exists(project: dict) -> None:
    module, _, function = project["project"]["scripts"]["vdm-env"].partition(":")
    assert (module, function) == ("benchmarks.cli", "main")
    source = (ROOT / module.replace(".", "/")).with_suffix(".py").read_text(encoding="utf-8")
    assert function in [node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]


def test_dependencies_leave_pairs_to_the_resolver(project: dict) -> None:
    names = {re.split(r"[\s<>=!~;\[]", text)[0].lower() for text in project["project"]["dependencies"]}
    assert not names & {"tensordict", "torchvision"}, "torchrl and open_clip_torch bring the versions that fit"
    assert {"torch", "gymnasium", "torchrl", "diffusers", "stable-baselines3", "open_clip_torch"} <= names


def test_wheel_holds_code_types_and_weights() -> None:
    inside = wheel_files()
    assert {name.split("/")[0] for name in inside} == set(PACKAGES)
    assert {"vdm_env/py.typed", "algos/py.typed", "vdm_env/__init__.py"} <= inside
    code = {path.relative_to(ROOT).as_posix() for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert not code - inside
    weights = {path.relative_to(ROOT).as_posix() for path in (ROOT / WEIGHTS).rglob("*") if path.is_file()}
    assert any(name.endswith(".safetensors") for name in weights) and any(name.endswith(".json") for name in weights)
    assert not weights - inside, "the wheel leaves out weights: does .gitignore name them?"
    pickled = [name for name in inside if name.endswith((".pt", ".pth", ".bin", ".pkl"))]
    assert not pickled, f"weights are stored as safetensors, not as {pickled}"


def test_every_folder_of_code_is_a_package() -> None:
    folders = {path.parent for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert not [folder for folder in folders if not (folder / "__init__.py").is_file()]


def test_no_large_file() -> None:
    large = [path for path in repository_files() if path.stat().st_size > MAX_TRACKED_MIB * 2**20]
    assert not large, f"over {MAX_TRACKED_MIB} MiB: {large}"


def test_no_path_of_a_machine() -> None:
    found = {}
    for path in repository_files():
        try:
            lines = machine_paths(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            continue  # binary
        if lines:
            found[path.relative_to(ROOT).as_posix()] = lines
    assert not found


@pytest.mark.parametrize("folder", ["home", "root", "Users"])
def test_a_path_of_a_machine_is_found(folder: str) -> None:
    assert machine_paths(f"weights = '/{folder}/someone/weights'") and machine_paths(f"cd /{folder}/x")
    assert not machine_paths(f"https://example.org/{folder}/x and docs/{folder}/x and ../{folder}/y")


def test_ci_runs_make_test() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    commands = [line for line in script.read_text().splitlines() if "make" in line]
    assert commands == ["exec make test"]


def test_makefile_keeps_the_status_of_every_check() -> None:
    """`make -n test` shows what would run; no installation, no test."""
    command = ["make", "-n", "--no-print-directory", "test", "ARGS=-x"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    plan = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    for check in ("ruff check", "mypy vdm_env algos benchmarks", "pytest -n 2 --dist loadfile -x"):
        assert re.search(re.escape(check) + r".*\|\| status=1", plan), check
    assert "exit $status" in plan


def readme_blocks(language: str) -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [block for name, block in fences if name == language]


def test_readme_examples_use_names_that_exist() -> None:
    blocks = readme_blocks("python")
    assert len(blocks) >= 4
    for block in blocks:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module == "vdm_env":
                assert not [alias.name for alias in node.names if not hasattr(vdm_env, alias.name)]
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "vdm_env":
                assert hasattr(vdm_env, node.attr), f"README.md uses vdm_env.{node.attr}"


def test_readme_layout_names_files_that_exist() -> None:
    layout = next(block for block in readme_blocks("") if block.startswith("vdm_env/"))
    folder, missing = ROOT, []
    for line in layout.splitlines():
        indent, name = len(line) - len(line.lstrip()), line.split()[0]
        if indent == 0:
            folder = ROOT / name
        if indent > 2:
            continue
        names = {name.rstrip(","), *re.findall(r"(?<![\w/])\w+\.py", line)}
        missing += [f"{folder.name}/{n}" for n in names if not ((ROOT if indent == 0 else folder) / n).exists()]
    assert not missing, f"the layout in README.md names {missing}"
