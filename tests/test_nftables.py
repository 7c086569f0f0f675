"""The firewall rules of ``contrib/nftables``, in a network namespace of their own."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import PATIENCE

RULES = Path(__file__).parent.parent / "contrib" / "nftables" / "zmqpull.nft"
PORTS = (5014, 5015)
LIMIT = 32
# Connects until it is refused, from each address in turn; prints how often it could.
CONNECT = """
import socket, sys
family, port, *addresses = sys.argv[1:]
family = {"4": socket.AF_INET, "6": socket.AF_INET6}[family]
any_address = {socket.AF_INET: "0.0.0.0", socket.AF_INET6: "::"}[family]
listener = socket.create_server((any_address, int(port)), family=family, backlog=1000)
held = []
for address in addresses:
    before = len(held)
    for _ in range(100):
        client = socket.socket(family)
        client.bind((address, 0))
        try:
            client.connect((addresses[0], int(port)))
        except ConnectionRefusedError:
            break
        held.append(client)
    print(len(held) - before)
"""

# Connects and resets until an attempt is not answered; then from another address, once.
FLOOD = """
import socket, struct
listener = socket.create_server(("0.0.0.0", 5015), backlog=1000)
def connect(address):
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.bind((address, 0))
        client.settimeout(0.5)
        client.connect(("127.0.0.1", 5015))
    listener.accept()[0].close()
count = 0
try:
    while count < 100_000:
        connect("127.0.0.1")
        count += 1
except TimeoutError:
    connect("127.0.0.2")
    print(count)
"""


@pytest.fixture
def inside():
    """Return a function that loads the rules in a new namespace, and runs a command there."""
    probe = ["unshare", "--net", "true"]
    if not shutil.which("nft", path="/usr/sbin:/usr/bin"):
        pytest.skip("nft is not installed: package nftables")
    if not shutil.which("ip") or subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("a network namespace cannot be made here: that takes root, and iproute2")

    def run(*command):
        script = (
            "export PATH=$PATH:/usr/sbin; ip link set lo up; "
            "ip address add 2001:db8:1::1/128 dev lo; ip address add 2001:db8:1::2/128 dev lo; "
            "ip address add 2001:db8:2::1/128 dev lo; "
            'nft --file "$1" && nft --file "$1" && shift && exec "$@"'
        )
        return subprocess.run(
            ["unshare", "--net", "sh", "-c", script, "sh", RULES, *command],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )

    return run


@pytest.mark.parametrize("port", PORTS)
@pytest.mark.parametrize(
    ("family", "addresses", "expected"),
    [
        ("4", ["127.0.0.1", "127.0.0.2", "127.0.0.1"], [LIMIT, LIMIT, 0]),
        ("6", ["2001:db8:1::1", "2001:db8:1::2", "2001:db8:2::1"], [LIMIT, 0, LIMIT]),
    ],
)
def test_connections_are_limited_for_each_address(inside, port, family, addresses, expected):
    done = inside(sys.executable, "-c", CONNECT, family, str(port), *addresses)

    assert done.returncode == 0, done.stderr
    assert [int(line) for line in done.stdout.split()] == expected


def test_a_flood_of_connections_from_one_address_leaves_others_alone(inside):
    done = inside(sys.executable, "-c", FLOOD)

    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 200


def test_no_other_port_is_limited(inside):
    done = inside(sys.executable, "-c", CONNECT, "4", "5016", "127.0.0.1")

    assert done.stdout.split() == ["100"], done.stderr


def test_the_rules_can_be_loaded_again_and_are_there_once(inside):
    done = inside("nft", "list", "ruleset")

    assert done.returncode == 0, done.stderr
    assert done.stdout.count("jump new") == 1
