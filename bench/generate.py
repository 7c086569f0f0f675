"""
Make input for the benchmark: syslog lines as a busy host writes them.

Usage: python generate.py LINES > FILE

The same lines every time: 122 bytes on average, a few with quotes, backslashes, tabs or
letters beyond ASCII.
"""

import random
import sys

TEMPLATES = (
    "sshd[{pid}]: Failed password for invalid user {user} from {ip} port {port} ssh2",
    "sshd[{pid}]: Accepted publickey for {user} from {ip} port {port} ssh2: ED25519 SHA256:{hash}",
    'nginx[{pid}]: {ip} - - "GET /api/v1/items/{n}?page={m} HTTP/1.1" 200 {port} "-" "curl/7.88.1"',
    "kernel: [{n}.{m}] eth0: renamed from veth{hash} entered forwarding state, link becomes ready",
    "systemd[1]: session-{n}.scope: Deactivated successfully, consumed {m}ms CPU time",
    "CRON[{pid}]: ({user}) CMD (test -x /usr/sbin/anacron || run-parts --report /etc/cron.{n})",
    "postfix/smtpd[{pid}]: connect from unknown[{ip}], queue id {hash}, status=deferred, tries {m}",
    "app[{pid}]: worker\t{n}: order {hash} für {user} took {m} ms on C:\\data\\{port}",
    "dhclient[{pid}]: DHCPACK of {ip} from {ip}, bound to {ip} -- renewal in {n} seconds",
)
WEIGHTS = (20, 10, 15, 10, 15, 10, 10, 2, 8)
USERS = ("root", "admin", "postgres", "deploy", "www-data", "backup", "oracle")
CHUNK_LINES = 20_000


def chunk(rng: random.Random, second: int) -> str:
    """Return the lines of one chunk."""
    lines = []
    for template in rng.choices(TEMPLATES, WEIGHTS, k=CHUNK_LINES):
        text = template.format(
            pid=rng.randrange(300, 32768),
            user=rng.choice(USERS),
            ip=".".join(str(rng.randrange(1, 255)) for _ in range(4)),
            port=rng.randrange(1024, 65536),
            hash=f"{rng.getrandbits(48):012x}",
            n=rng.randrange(100_000),
            m=rng.randrange(1000),
        )
        clock = f"{second // 3600 % 24:02}:{second // 60 % 60:02}:{second % 60:02}"
        lines.append(f"Nov 23 {clock} host-{rng.randrange(20):02} {text}\n")
    return "".join(lines)


def main() -> None:
    rng = random.Random(2014)
    left = int(sys.argv[1])
    # Ten chunks in turn: making lines is slower than shipping them.
    chunks = [chunk(rng, 60 * i).encode() for i in range(min(10, -(-left // CHUNK_LINES)))]
    turn = 0
    while left > 0:
        data = chunks[turn % len(chunks)]
        if left < CHUNK_LINES:
            data = b"".join(data.splitlines(keepends=True)[:left])
        sys.stdout.buffer.write(data)
        left -= CHUNK_LINES
        turn += 1


if __name__ == "__main__":
    main()
