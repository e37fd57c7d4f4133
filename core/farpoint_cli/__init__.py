"""The command `farpoint`.

A top-level package: the package `farpoint` imports torch, which takes seconds, and `farpoint --help` needs none of it. So the
modules of this one import `farpoint` only within functions.
"""

from farpoint_cli.app import app, main

__all__ = ["app", "main"]
