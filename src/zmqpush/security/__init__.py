"""
Keys, and who may use them.

keyfile.py reads and writes key pairs, allowlist.py the lists of admitted keys, admission.py
decides for a run how a connection is encrypted and whether its peer is admitted. Handshakes and
boxes are in core.zmtp; no module here opens a socket.
"""
