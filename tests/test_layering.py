"""Which package may import which, as ``docs/architecture.md`` says."""

import ast
from pathlib import Path

import pytest

import zmqpush

ROOT = Path(zmqpush.__file__).parent
# Packages and modules by floor: each imports what is on floors below it, and itself.
FLOORS = [
    {"", "errors"},
    {"core.records", "runtime"},
    {"core.protocol", "core.zmtp"},
    {"core"},
    {"settings"},
    {"security", "sinks"},
    {"spool", "transport"},
    {"sender", "receiver"},
    {"cli"},
    {"__main__"},
]
FLOOR = {package: floor for floor, packages in enumerate(FLOORS) for package in packages}
# What lies below, and is none of its business.
FORBIDDEN = {
    "core.records": {"runtime"},
    "core": {"runtime"},
    "core.protocol": {"runtime"},
    "core.zmtp": {"core.records", "runtime"},
    "sinks": {"settings", "core.protocol", "core.zmtp", "core.records"},
    "spool": {"security", "sinks", "core.zmtp"},
    "transport": {"sinks"},
    "sender": {"sinks"},
    "receiver": {"spool"},
    "cli": {"core.zmtp", "transport"},
}
MODULES = sorted(
    ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").rstrip(".")
    for p in ROOT.rglob("*.py")
)
CORE = [module for module in MODULES if module.split(".")[0] == "core"]
FORBIDDEN_IN_CORE = {"asyncio", "os", "select", "signal", "socket", "sys", "threading", "time"}


def package(module):
    """Return the package of a module that the rules are about."""
    parts = module.split(".")
    known = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next(name for name in known if name in FLOOR)


def imports(module):
    """Yield the full names of what a module imports."""
    path = ROOT / module.replace(".", "/")
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def ours(module):
    """Return the modules of ours that a module imports."""
    names = {name.removeprefix("zmqpush.") for name in imports(module)}
    return names & {*MODULES} - {""}


@pytest.mark.parametrize("module", MODULES)
def test_a_package_imports_only_what_lies_below_it(module):
    here = package(module)
    used = {package(name) for name in ours(module)} - {here}

    assert {name for name in used if FLOOR[name] >= FLOOR[here]} == set()
    assert not used & FORBIDDEN.get(here, set())


@pytest.mark.parametrize("module", MODULES)
def test_within_a_package_nothing_is_imported_in_a_circle(module):
    seen, found = set(), ours(module)
    while found:
        assert module not in found
        seen |= found
        found = set().union(*map(ours, found)) - seen


def test_sinks_do_not_know_each_other():
    for module in MODULES:
        if module.startswith("sinks."):
            kind = module.split(".")[1]
            others = {name.split(".")[1] for name in ours(module) if name.startswith("sinks.")}
            assert kind == "registry" or others <= {kind, "base", "template"}


@pytest.mark.parametrize("module", CORE)
def test_the_core_knows_no_files_sockets_clocks_or_loops(module):
    assert not FORBIDDEN_IN_CORE & {name.split(".")[0] for name in imports(module)}


@pytest.mark.parametrize("module", CORE)
def test_two_modules_of_the_core_do_cryptography(module):
    assert ("nacl" in {name.split(".")[0] for name in imports(module)}) == (
        module in ("core.zmtp.curve", "core.zmtp.boxes")
    )


def test_every_package_says_what_lives_there():
    for path in ROOT.rglob("__init__.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), path
