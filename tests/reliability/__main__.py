"""Tries faults of processes, nodes and disks under load, and counts what comes of them.

    PYTHONPATH=tests python -m reliability                   # all faults, as often as each is worth it
    PYTHONPATH=tests python -m reliability --fault kill-rank-2 --times 20 --seed 7
    PYTHONPATH=tests python -m reliability --table tries.jsonl      # the table of what has been tried

Each try is written to --json as it ends, and those that are there already are not made again. A try is a function of
its seed but for the machine's timing: `--fault NAME --only SEED` makes one again. Exits with 1 if anything happened
that must not.
"""

import argparse
import logging
import sys
import time
import traceback
from pathlib import Path

from reliability.counts import Try, append, read, table
from reliability.faults import FAULTS, kind_of, load_all
from reliability.runner import Runner


def main() -> int:
    load_all()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fault", action="append", choices=sorted(FAULTS), metavar="NAME", help="of: %(choices)s")
    kinds = sorted({kind_of(fault) for fault in FAULTS.values()})
    parser.add_argument("--kind", action="append", choices=kinds, help="all faults of this kind: %(choices)s")
    parser.add_argument("--times", type=int, help="tries of each fault")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", metavar="SEED", help="the one try of this seed")
    parser.add_argument("--json", type=Path, default=Path("tries.jsonl"), help="file of the tries; default %(default)s")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begins no try after that")
    parser.add_argument("--table", nargs="+", type=Path, help="prints the table of these files, and tries nothing")
    wanted = parser.parse_args()
    descriptions = {name: fault.text for name, fault in FAULTS.items()}
    if wanted.table:
        print(table(read(wanted.table), descriptions))
        return 0
    logging.basicConfig(level=logging.WARNING)
    done = {(one.fault, one.seed) for one in read([wanted.json])}
    deadline = time.monotonic() + 60 * wanted.minutes
    runner, clean = Runner(), True
    last: Try | None = None
    try:
        for name in wanted.fault or [name for name, one in FAULTS.items() if kind_of(one) in (wanted.kind or kinds)]:
            fault = FAULTS[name]
            count = fault.times if wanted.times is None else wanted.times
            for seed in [wanted.only] if wanted.only else [f"{wanted.seed}.{number}" for number in range(count)]:
                if (name, seed) in done or time.monotonic() > deadline:
                    continue
                began = time.monotonic()
                try:
                    record = runner.run(fault, seed)
                except Exception:  # it could not be tried
                    traceback.print_exc()
                    clean = False
                    continue
                if last is not None:  # what its bench has left is known now
                    append(wanted.json, last)
                    clean &= last.is_clean
                last = record
                print(f"{time.monotonic() - began:6.1f} s  {record}", flush=True)
    finally:
        runner.close()
        if last is not None:
            append(wanted.json, last)
            clean &= last.is_clean
            print(f"        at the end: {last.leaked or last.hung or 'nothing is left'}", flush=True)
    print(table(read([wanted.json]), descriptions))
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
