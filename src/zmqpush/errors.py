"""
Every exception of the package.

::

    ZmqpushError
    ├─ SettingsError    a setting is wrong, or two exclude each other   exit 2
    ├─ ConfigError      a configuration file is wrong                  exit 78
    ├─ KeyFileError     a key or a list of keys cannot be used         exit 78
    ├─ EndpointError    an endpoint cannot be bound or connected       exit 69
    ├─ RemoteProtocolError   a peer breaks the delivery protocol
    ├─ SourceError      the input cannot be read                       exit 74
    ├─ SpoolError       the spool cannot be read or written            exit 74
    │  ├─ SpoolBusyError     other processes use it                    exit 73
    │  ├─ SpoolFullError     it cannot be opened now: tried again
    │  └─ SpoolForeignError  it is no spool, or not ours alone         exit 78
    ├─ StateError       the receiver's state cannot be used            exit 74
    │  ├─ StateBusyError     another process uses it                   exit 73
    │  └─ StateForeignError  it is not ours alone, or of a later version   exit 78
    ├─ ResourceError    the system gives too little                    exit 71
    └─ SinkError        the output cannot be written                   exit 74
       ├─ SinkClosedError   nobody reads the output any more: no failure
       ├─ SinkStalledError  it cannot be written now: tried again
       │  └─ SinkUndoneError   what was written is to be written again
       ├─ SinkBusyError     another process writes it                  exit 73
       └─ SinkSetupError    somebody must set it up first            exit 78

What ends a run is caught in ``cli/options.py``, which prints one line and exits with
``exit_code``. The numbers are those of ``sysexits.h``.
"""

import errno
import re

EXIT_LOSS = 1
EXIT_USAGE = 2
EXIT_NO_RECEIVER = 69
EXIT_INTERNAL = 70
EXIT_RESOURCES = 71
EXIT_BUSY = 73
EXIT_IO = 74
EXIT_LATER = 75
EXIT_CONFIG = 78

# What Python and the dynamic linker say when they have no exception for it.
_no_memory = re.compile("(?i)can't start new thread|failed to map|cannot allocate memory").search


class ZmqpushError(Exception):
    """Base class: what went wrong in one line, and the exit code that says so."""

    exit_code = EXIT_INTERNAL


class SettingsError(ZmqpushError, ValueError):
    """A setting is wrong, or two exclude each other."""

    exit_code = EXIT_USAGE


class ConfigError(ZmqpushError, ValueError):
    """A configuration file cannot be read or says something impossible."""

    exit_code = EXIT_CONFIG


class KeyFileError(ZmqpushError):
    """A file with keys cannot be used."""

    exit_code = EXIT_CONFIG


class ResourceError(ZmqpushError):
    """The system gives too little memory, or too few descriptors or threads."""

    exit_code = EXIT_RESOURCES

    @classmethod
    def of(cls, error: BaseException) -> "ResourceError | None":
        """Return what an exception means, if that is what it means."""
        number = getattr(error, "errno", None)
        if isinstance(error, MemoryError) or number == errno.ENOMEM or _no_memory(str(error)):
            return cls("out of memory: raise the limit (ulimit -v, MemoryMax=), or hold less")
        if number == errno.EMFILE:
            return cls("too few file descriptors: raise the limit (ulimit -n, LimitNOFILE=)")
        if number == errno.ENFILE:
            return cls("the system has no file descriptor left (fs.file-max)")
        return None


class EndpointError(ZmqpushError):
    """An endpoint cannot be bound or connected."""

    exit_code = EXIT_NO_RECEIVER


class RemoteProtocolError(ZmqpushError):
    """
    A peer breaks the delivery protocol: tell it ``code`` and go on without it.

    Attributes:
        code: As in ``docs/protocol.md``.
        session: The session that the frame claims to belong to; 0 for none.

    """

    def __init__(self, code: int, text: str, session: int = 0) -> None:
        super().__init__(text)
        self.code = code
        self.session = session


class SourceError(ZmqpushError):
    """The input cannot be read."""

    exit_code = EXIT_IO


class SpoolError(ZmqpushError):
    """The spool cannot be read or written."""

    exit_code = EXIT_IO


class SpoolBusyError(SpoolError):
    """Other processes use all slots of the spool."""

    exit_code = EXIT_BUSY


class SpoolFullError(SpoolError):
    """There is no room to make a file of the spool: a reason to wait, not to end."""


class SpoolForeignError(SpoolError):
    """The directory is no spool, belongs to somebody else, or is of a later version."""

    exit_code = EXIT_CONFIG


class StateError(ZmqpushError):
    """The receiver's state cannot be read or written."""

    exit_code = EXIT_IO


class StateBusyError(StateError):
    """Another process uses the state."""

    exit_code = EXIT_BUSY


class StateForeignError(StateError):
    """Others may change the state, or it is of a later version."""

    exit_code = EXIT_CONFIG


class SinkError(ZmqpushError):
    """The output cannot be written."""

    exit_code = EXIT_IO


class SinkClosedError(SinkError):
    """The reader of the output has gone: a reason to end, not a failure."""


class SinkStalledError(SinkError):
    """The output takes nothing now: a reason to wait, not to end."""


class SinkUndoneError(SinkStalledError):
    """What was written is gone again: a write of nothing writes it anew."""


class SinkBusyError(SinkError):
    """Another process writes the output."""

    exit_code = EXIT_BUSY


class SinkSetupError(SinkError):
    """The output is not there, or as it is nothing could be relied on."""

    exit_code = EXIT_CONFIG
