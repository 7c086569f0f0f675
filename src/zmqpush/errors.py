"""
Every exception of the package.

::

    ZmqpushError
    ├─ ConfigError      a configuration file is wrong                  exit 78
    ├─ EndpointError    an endpoint cannot be bound or connected       exit 69
    ├─ SourceError      the input cannot be read                       exit 74
    └─ SinkError        the output cannot be written                   exit 74
       └─ SinkClosedError   nobody reads the output any more           exit 0

Only ``cli.py`` catches :class:`ZmqpushError`: it prints one line and exits with
``exit_code``. The numbers are those of ``sysexits.h``.
"""


class ZmqpushError(Exception):
    """Base class: what went wrong in one line, and the exit code that says so."""

    exit_code = 1


class ConfigError(ZmqpushError, ValueError):
    """A configuration file cannot be read or says something impossible."""

    exit_code = 78


class EndpointError(ZmqpushError):
    """An endpoint cannot be bound or connected."""

    exit_code = 69


class SourceError(ZmqpushError):
    """The input cannot be read."""

    exit_code = 74


class SinkError(ZmqpushError):
    """The output cannot be written."""

    exit_code = 74


class SinkClosedError(SinkError):
    """The reader of the output has gone: a reason to end, not a failure."""

    exit_code = 0
