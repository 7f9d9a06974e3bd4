"""`PYTHONPATH=tests python -m simulation 42` runs seed 42; `python -m simulation 0 --seeds 100` the first hundred."""

import argparse
import logging
import sys
import time
from collections import Counter

from simulation.run import simulate


def main() -> int:
    """Runs seeds and says what came of them."""
    parser = argparse.ArgumentParser("python -m simulation", description="Runs seeds of the simulation.")
    parser.add_argument("seed", type=int, help="the first one")
    parser.add_argument("--seeds", type=int, default=1, help="how many")
    parser.add_argument("--plans", type=int, default=300, help="that the ranks of each run")
    parser.add_argument(
        "--ends-at", type=int, help="the point at which the first process ends, nothing else goes wrong"
    )
    parser.add_argument("--log", action="store_true", help="show what the engine logs")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO if options.log else logging.CRITICAL)
    total: Counter[str] = Counter()
    start, failures, tokens = time.perf_counter(), 0, 0
    for seed in range(options.seed, options.seed + options.seeds):
        outcome = simulate(seed, options.plans, options.ends_at)
        total += outcome.counts
        tokens += outcome.num_tokens
        if outcome.failure:
            failures += 1
            print(outcome.failure)
        elif options.seeds == 1:
            print(f"digest {outcome.digest}")
    seconds = time.perf_counter() - start
    for what, count in sorted(total.items()):
        print(f"{count:9d} {what}")
    print(f"{total['plans'] / seconds:.0f} plans a second, {tokens} tokens compared, {failures} seeds failed")
    return failures > 0


if __name__ == "__main__":
    sys.exit(main())
