"""
The commands: ``zmqpush`` (push.py), ``zmqpull`` (pull.py) and ``zmqpush-keys`` (keys.py).

Here flags, environment variables and the TOML file become checked settings; an option is
declared here once. A command imports its program only when it runs it, so that ``--help``
starts soon. No module here touches records or sockets; push.py reads a spool for its status.
"""
