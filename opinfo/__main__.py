"""Run torch's databases of operations and modules through pointers: `python -m opinfo [NAME ...] [--column forward]`.

What is returned is compared with local torch, and every entry is passed, a listed exception, failed, or silently wrong.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings


def main() -> int:
    """Run what the command line names, all if it names nothing. Return 1 if something failed or was silently wrong."""
    from opinfo.columns import COLUMNS, matches
    from opinfo.running import Outcome

    parser = argparse.ArgumentParser(prog="python -m opinfo", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="entries, as patterns like 'linalg.*'; all if none is given")
    parser.add_argument("--column", action="append", choices=COLUMNS, help="may be repeated; all if none is given")
    parser.add_argument("--samples", type=int, default=4, help="calls of each entry and dtype, spread over the database's")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    counts = {}
    for name in options.column or COLUMNS:
        counts[name] = dict.fromkeys(Outcome, 0)
        for result in COLUMNS[name].run(matches(options.names), options.samples):
            counts[name][result.outcome] += 1
            if result.outcome in (Outcome.FAILED, Outcome.WRONG):
                print(f"{name}: {result.entry}: {result.outcome.value}: {result.text}", flush=True)
    print("| column | passed | listed exception | failed | silently wrong | not run by local torch |")
    print("|---|---|---|---|---|---|")
    for name, count in counts.items():
        print(f"| {name} | {' | '.join(str(number) for number in count.values())} |")
    return int(any(count[bad] for count in counts.values() for bad in (Outcome.FAILED, Outcome.WRONG)))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
