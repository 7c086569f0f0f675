"""
Lines into records at the sender, frames into checked records at the receiver.

lines.py cuts the input into lines, encode.py makes records of them, framing.py divides records
among messages; decode.py checks what a receiver gets. A block of lines is handled by passes over
all of its bytes; only what is too long or broken is looked at by itself. No input or output.
"""
