"""Who may import whom, as ``docs/architecture.md`` says."""

import ast
from pathlib import Path

import pytest

import zmqpush

ROOT = Path(zmqpush.__file__).parent
# What knows no I/O, and what every file may use.
PURE = {
    "core.dialogue",
    "core.envelope",
    "core.frames",
    "core.framing",
    "core.held",
    "core.holes",
    "core.lines",
    "core.receiver",
    "core.records",
    "core.sender",
}
# The wire: it knows nothing of the rest of core, which does not know it.
ZMTP = {
    "core.zmtp": set(),
    "core.zmtp.errors": set(),
    "core.zmtp.frames": {"core.zmtp.errors"},
    "core.zmtp.greeting": {"core.zmtp.errors"},
    "core.zmtp.metadata": {"core.zmtp.errors"},
    "core.zmtp.mechanism": {"core.zmtp.errors", "core.zmtp.frames", "core.zmtp.metadata"},
    "core.zmtp.null": {"core.zmtp.frames", "core.zmtp.mechanism"},
    "core.zmtp.boxes": set(),
    "core.zmtp.curve": {
        "core.zmtp.boxes",
        "core.zmtp.errors",
        "core.zmtp.frames",
        "core.zmtp.mechanism",
    },
    "core.zmtp.connection": {
        "core.zmtp.errors",
        "core.zmtp.frames",
        "core.zmtp.greeting",
        "core.zmtp.mechanism",
        "core.zmtp.metadata",
    },
}
VOCABULARY = {
    "",
    "errors",
    "settings",
    "queue",
    "telemetry",
    "descriptors",
    "disk",
    "faults",
    "background",
}
# Sockets that receive messages.
ENDS = {"transport.inbound", "transport.channel", "guard", *ZMTP}
ALLOWED = {
    "__main__": {"cli", "keys_cli", "failures"},
    "cli": {"config", "values", "failures", "omprog", "push", "pull", "slots"},
    "push": {"source", "omprog", "outlet", "plain", "acked", "guard", "endings"},
    "omprog": {"source"},
    "outlet": {"endings"},
    "plain": {"outlet", "transport.push", "guard", "endings"},
    "acked": {"outlet", "spool", "slots", "unacked_queue", "transport.dealer", "guard", "endings"},
    "guard": {"keys", "key_lists", *ZMTP},
    "transport.push": {"transport.link", "transport.channel", "guard", *ZMTP},
    "transport.dealer": {*ENDS, "transport.push"},
    "transport.pull": ENDS,
    "transport.inbound": {
        "transport.link",
        "transport.inbox",
        "transport.channel",
        "guard",
        *ZMTP,
    },
    "transport.router": ENDS,
    "transport.link": {
        "transport.channel",
        "transport.dialer",
        "transport.listener",
        "transport.words",
        "guard",
        *ZMTP,
    },
    "transport.words": {"transport.channel", "guard", *ZMTP},
    "transport.inbox": {"transport.channel", *ZMTP},
    "transport.channel": {*ZMTP},
    "transport.dialer": {"transport.addresses"},
    "transport.listener": {"transport.addresses"},
    "key_lists": {"keys"},
    "keys_cli": {"keys", "key_lists"},
    "slots": {"segments"},
    "spool": {"segments", "segment_reader"},
    "segment_reader": {"segments"},
    "pull": {"writer", "sinks", "transport.pull", "transport.router", "guard", "endings"},
    "writer": {"sinks", "sinks.output", "state"},
    "state": {"sinks"},
    "sinks": {"sinks.files"},
    "sinks.kafka": {"sinks", "sinks.kafka_client", "sinks.template"},
    "sinks.files": {"sinks", "sinks.journal", "sinks.output", "sinks.template"},
    "sinks.nats": {"sinks", "sinks.nats_client", "sinks.template"},
}
MODULES = sorted(
    ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for p in ROOT.rglob("*.py")
)
FORBIDDEN_IN_CORE = {"asyncio", "os", "select", "signal", "socket", "sys", "threading", "time"}


def imports(module):
    path = ROOT / module.replace(".", "/")
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            if node.module == "zmqpush.core.zmtp":  # modules are imported by name, too
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            else:
                yield str(node.module)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_lies_below_it(module):
    ours = {
        name.removeprefix("zmqpush").removeprefix(".")
        for name in imports(module)
        if name.split(".")[0] == "zmqpush"
    }
    if module in ZMTP:
        allowed = ZMTP[module] | {"errors"}
    elif module.startswith("core."):
        allowed = PURE | {"errors"}
    else:
        allowed = PURE | VOCABULARY | ALLOWED.get(module, set())

    assert ours <= allowed


@pytest.mark.parametrize("module", sorted(PURE | {*ZMTP}))
def test_the_core_knows_no_files_sockets_clocks_or_loops(module):
    assert not FORBIDDEN_IN_CORE & {name.split(".")[0] for name in imports(module)}


def test_every_module_of_the_core_is_in_a_table():
    core = {module for module in MODULES if module.startswith("core.")}

    assert core == PURE | {*ZMTP}


@pytest.mark.parametrize("module", sorted(PURE | {*ZMTP}))
def test_two_modules_of_the_core_do_cryptography(module):
    assert ("nacl" in {name.split(".")[0] for name in imports(module)}) == (
        module in ("core.zmtp.curve", "core.zmtp.boxes")
    )
