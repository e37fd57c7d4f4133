"""Run harnesses with atheris, each in a process of its own: `python -m fuzz [NAME ...] [--seconds 600]`.

Inputs that were worth keeping stay in `.fuzz/NAME`, and what was found beside them as `.fuzz/NAME-crash-…`. `python -m fuzz NAME
--input FILE` runs one input, without atheris.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
from pathlib import Path

FOLDER = Path(".fuzz")
PACKAGES = ["farpoint", "farpoint_msgpack", "farpoint_torchsave", "farpoint_tcp", "farpoint_websocket"]
MOST_BYTES, MOST_MEBIBYTES, MOST_SECONDS = 64 * 1024, 2048, 10
"""Of one input, of the process, and of one run: what exceeds the latter two is a finding."""


def _fuzz(name: str, seconds: int) -> None:
    """Fuzz one target. Does not return: libFuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(include=PACKAGES):
        from fuzz.targets import TARGETS
    target = TARGETS[name]
    inputs = FOLDER / name
    inputs.mkdir(parents=True, exist_ok=True)
    for seed in target.seeds():
        (inputs / hashlib.sha1(seed, usedforsecurity=False).hexdigest()).write_bytes(seed)
    words = FOLDER / f"{name}.words"
    words.write_text("".join(f'"{_escape(word)}"\n' for word in target.words), encoding="ascii")
    options = {
        "max_total_time": seconds,
        "max_len": MOST_BYTES,
        "rss_limit_mb": MOST_MEBIBYTES,
        "timeout": MOST_SECONDS,
        "artifact_prefix": FOLDER / f"{name}-",
        "dict": words,
        "print_final_stats": 1,
        "verbosity": 1,
    }

    def run(data: bytes) -> None:
        target.run(data)

    atheris.Setup([sys.argv[0], *(f"-{option}={value}" for option, value in options.items()), str(inputs)], run)
    atheris.Fuzz()


def _escape(word: bytes) -> str:
    return "".join(rf"\x{byte:02x}" for byte in word)


def main() -> int:
    """Run what the command line names, all if it names none. Return 1 if there was a finding."""
    from fuzz.targets import TARGETS

    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(TARGETS)}; all if none is given")
    parser.add_argument("--seconds", type=int, default=600, help="for each")
    parser.add_argument("--input", type=Path, help="run this one input")
    options = parser.parse_args()
    if unknown := [name for name in options.names if name not in TARGETS]:
        parser.error(f"no harness is called {', '.join(unknown)}; there are {', '.join(TARGETS)}")
    if options.input is not None:
        for name in options.names:
            print(name, "taken" if TARGETS[name].run(options.input.read_bytes()) else "refused")
        return 0
    found = []
    for name in options.names or TARGETS:
        print(f"== {name}, {options.seconds} s", flush=True)
        # A process for each, in which nothing is imported before atheris can watch it.
        command = [sys.executable, "-c", f"from fuzz.__main__ import _fuzz; _fuzz({name!r}, {options.seconds})"]
        if subprocess.run(command, check=False).returncode:
            found.append(name)
    print(f"Findings: {', '.join(found) or 'none'}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
