"""The rules of docs/architecture.md that hold the source roots apart, read from its own table."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
ROOTS = tuple(
    tomllib.loads((REPO / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"][
        "wheel"
    ]["only-include"]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One row of the table: what a package may import of ours, at once and inside functions."""

    root: str
    package: str
    eager: frozenset[str]
    lazy: frozenset[str]


def read_rules() -> list[Rule]:
    """Parse the table `root | package | what it is | may import | inside functions also`."""
    rules = []
    for line in (REPO / "docs/architecture.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 5 and re.fullmatch(r"`\w+/`", cells[0]):
            root, package, _, eager, lazy = cells
            eager_names = frozenset(re.findall(r"`(lorary\.\w+)`", eager))
            lazy_names = frozenset(re.findall(r"`(lorary\.\w+)`", lazy))
            rules.append(
                Rule(
                    root=root.strip("`/"),
                    package=package.strip("`"),
                    eager=eager_names,
                    lazy=eager_names | lazy_names,
                )
            )
    return rules


RULES = read_rules()


def sources(rule: Rule) -> list[Path]:
    place = REPO / rule.root / rule.package.replace(".", "/")
    module = place.with_suffix(".py")
    return [module] if module.is_file() else sorted(place.rglob("*.py"))


def imported_packages(tree: ast.AST, *, is_lazy: bool = False) -> set[tuple[str, bool]]:
    """Return each ``lorary.x`` imported under ``tree``, and whether only inside a function.

    Imports for type checkers count like those at the top: they, too, make one part know another.
    """
    found: set[tuple[str, bool]] = set()
    for node in ast.iter_child_nodes(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name the whole path"
            if node.module == "lorary":
                names = [f"lorary.{alias.name}" for alias in node.names]
            else:
                names = [node.module or ""]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names = [str(arg.value) for arg in node.args if isinstance(arg, ast.Constant)]
        found |= {
            (".".join(name.split(".")[:2]), is_lazy) for name in names if name.startswith("lorary.")
        }
        inside = is_lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        found |= imported_packages(node, is_lazy=inside)
    return found


def test_the_table_names_every_package() -> None:
    held = {
        f"lorary.{path.stem}"
        for root in ROOTS
        for path in (REPO / root / "lorary").iterdir()
        if path.name != "__pycache__"
    }
    assert {rule.package for rule in RULES} == held
    assert {rule.root for rule in RULES} == set(ROOTS)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.package)
def test_imports_go_one_way(rule: Rule) -> None:
    files = sources(rule)
    assert files
    wrong = []
    for path in files:
        for package, is_lazy in sorted(imported_packages(ast.parse(path.read_text()))):
            allowed = rule.lazy if is_lazy else rule.eager
            if package != rule.package and package not in allowed:
                wrong.append(f"{path.relative_to(REPO)} imports {package}")
    assert not wrong, "docs/architecture.md does not allow: " + "; ".join(wrong)


@pytest.mark.parametrize("root", ROOTS)
def test_no_root_holds_the_namespace_for_itself(root: str) -> None:
    """A ``lorary/__init__.py`` in one root would hide every other root."""
    assert not (REPO / root / "lorary/__init__.py").exists()


@pytest.mark.parametrize("root", ROOTS)
def test_every_package_says_it_is_typed(root: str) -> None:
    packages = [path for path in (REPO / root / "lorary").iterdir() if path.is_dir()]
    untyped = [
        str(path.relative_to(REPO))
        for path in packages
        if path.name != "__pycache__" and not (path / "py.typed").is_file()
    ]
    assert not untyped


def test_public_names_are_sorted() -> None:
    unsorted = []
    for root in ROOTS:
        for path in sorted((REPO / root).rglob("*.py")):
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                    names = ast.literal_eval(node.value)
                    # Constants, then classes, then functions: the order that ruff's RUF022 keeps.
                    kinds = [(0 if n.isupper() else 1 if n[:1].isupper() else 2) for n in names]
                    if [(k, n) for k, n in zip(kinds, names, strict=True)] != sorted(
                        zip(kinds, names, strict=True)
                    ):
                        unsorted.append(str(path.relative_to(REPO)))
    assert not unsorted


@pytest.mark.parametrize("package", ["lorary.registry", "lorary.client", "lorary.cli"])
def test_a_client_machine_needs_no_torch(package: str) -> None:
    """Every module of the package is imported, as the core installation would."""
    program = f"""
import importlib, pkgutil, sys
package = importlib.import_module({package!r})
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
heavy = {{"torch", "transformers", "peft", "safetensors", "bitsandbytes"}} & set(sys.modules)
sys.exit(f"imported {{sorted(heavy)}}" if heavy else 0)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
