"""Torch's own databases of operations and modules, run through pointers: `python -m opinfo`."""
