"""
How a sink is found.

``--to SCHEME://…`` is a sink that a package has named among its entry points, in the group
``zmqpush.sinks``; everything else is files. An entry point is called as
``factory(to, context)`` and returns a :class:`~zmqpush.sinks.base.Sink`; it raises SettingsError
for what it cannot understand, and neither connects nor blocks.
"""

import re
from importlib.metadata import entry_points

from zmqpush.errors import SettingsError
from zmqpush.sinks.base import Context, Sink
from zmqpush.sinks.files.sink import FileSink

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_LIKE_A_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/|(kafka|nats)//")


def make_sink(to: str, context: Context) -> Sink:
    """
    Return the sink that ``--to`` names.

    Raises:
        SettingsError: If there is none, or if it does not understand ``to`` or an option.

    """
    match = _SCHEME.match(to)
    if not match:
        if _LIKE_A_SCHEME.match(to):
            raise SettingsError(
                f"--to {to.partition(':')[0]}: is no scheme; one is followed by ://"
            )
        return FileSink(to, context)
    scheme = match[1].lower()
    found = {entry.name: entry for entry in entry_points(group="zmqpush.sinks")}
    if scheme not in found:
        names = ", ".join(f"{name}://" for name in sorted(found))
        raise SettingsError(f"--to {scheme}:// is none of {names}")
    entry = found[scheme]
    package = entry.dist.name if entry.dist else "unknown"
    try:
        factory = entry.load()
    except ImportError as exc:
        mend = f"see {package}"
        if package == "zmqpush":
            mend = f"pip install '.[{scheme}]' in the checkout of zmqpush brings it"
        raise SettingsError(
            f"--to {scheme}:// needs the Python package {exc.name}: {mend}"
        ) from exc
    except Exception as exc:
        raise SettingsError(f"--to {scheme}:// cannot be used, see {package}: {exc!r}") from exc
    sink: Sink = factory(f"{scheme}{to[len(scheme) :]}", context)
    return sink
