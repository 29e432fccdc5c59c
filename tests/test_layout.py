"""Where things are: no circles within packages, one file name for one idea, no way around a package's interface."""

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "codec_dist"
PACKAGES = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
# Names that stand for the same idea wherever they occur.
SHARED_NAMES = {"__init__.py", "errors.py"}


def imported_modules(path: Path) -> Iterator[str]:
    """Dotted names of what a file imports, also within functions, but not what only a type checker sees."""
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            # What is imported may be a name or a module: both are given, of which one exists.
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            waiting += node.orelse
        else:
            waiting += ast.iter_child_nodes(node)


def imports_within(package: str) -> dict[str, set[str]]:
    """Module → modules of the same package that it imports."""
    modules = {path.stem for path in (PACKAGE / package).glob("*.py")} - {"__init__"}
    return {
        module: {
            name.split(".")[2]
            for name in imported_modules(PACKAGE / package / f"{module}.py")
            if name.startswith(f"codec_dist.{package}.") and name.split(".")[2] in modules
        }
        for module in modules
    }


@pytest.mark.parametrize("package", PACKAGES)
def test_modules_of_a_package_import_each_other_without_circles(package: str) -> None:
    waiting = imports_within(package)
    while free := [module for module, imported in waiting.items() if not imported & waiting.keys()]:
        for module in free:
            del waiting[module]
    assert not waiting, f"these import each other in a circle, or one that does: {waiting}"


def test_no_two_packages_have_a_file_of_the_same_name() -> None:
    packages = defaultdict(list)
    for path in sorted(PACKAGE.glob("*/*.py")):
        packages[path.name].append(path.parent.name)
    several = {name: found for name, found in packages.items() if len(found) > 1}
    assert several.keys() <= SHARED_NAMES, several


def test_packages_import_only_what_other_packages_list_in_their_interface() -> None:
    past = {
        f"{path.relative_to(PACKAGE)} imports {name}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for name in imported_modules(path)
        if (parts := name.split("."))[0] == "codec_dist" and len(parts) > 2
        if parts[1] in PACKAGES and path.relative_to(PACKAGE).parts[0] != parts[1]
        if (PACKAGE / parts[1] / f"{parts[2]}.py").exists() and parts[2] not in interface_of(parts[1])
    }
    assert not past, past


def interface_of(package: str) -> set[str]:
    """The names in a package's ``__all__``."""
    tree = ast.parse((PACKAGE / package / "__init__.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"]:
            return set(ast.literal_eval(node.value))
    return set()
