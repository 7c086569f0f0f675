"""
The bytes of the input into records, and back.

lines.py cuts the input into lines, encode.py makes records of them, framing.py divides records
among messages, decode.py checks what a receiver gets. A block of lines is handled by passes
over all of its bytes, never a line at a time. No input or output.
"""
