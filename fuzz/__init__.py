"""Harnesses that feed bytes to whatever reads bytes of a peer. `python -m fuzz` runs them with atheris: docs/fuzzing.md."""
