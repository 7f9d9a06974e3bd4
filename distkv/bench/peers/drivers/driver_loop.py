"""What the drivers share. A driver is a script that the Python of a peer's environment runs, so that nothing here may
need more than the standard library.

It writes a JSON object per line on stdout. The first tells how many seconds loading the engine took (`start_s`), or
why that failed (`error`). Then it answers each line of stdin, a work `{"prompts": [[token ids]], "new_tokens": [int]}`
to be decoded greedily and past end tokens, with `{"first_s", "seconds", "tokens"}`: seconds until the first token (None
where there are several prompts), seconds until the last one, and the drawn tokens of each prompt. It ends with stdin.
"""

import argparse
import json
import os
import sys
import time
import traceback


def options():
    """What every driver is told: model, dtype, threads, max_model_len, kv_bytes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--max-model-len", type=int, required=True)
    parser.add_argument("--kv-bytes", type=int, required=True)
    parser.add_argument("--eager", action="store_true")
    return parser.parse_args()


def serve(load):
    """Loads an engine and runs work on it until stdin ends.

    `load(options)` returns `run(prompts, new_tokens)`, which returns seconds until the first token or None, and the
    drawn tokens of each prompt.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print, in this process and in those that it starts, is no answer
    sys.stdout = os.fdopen(1, "w", buffering=1, encoding="utf-8", closefd=False)  # a line at a time, whatever ends it

    def answer(message):
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    start = time.perf_counter()
    try:
        run = load(options())
    except Exception as error:
        traceback.print_exc()
        answer({"error": f"{type(error).__name__}: {error}"})
        sys.exit(1)
    answer({"start_s": time.perf_counter() - start})
    for line in sys.stdin:
        work = json.loads(line)
        start = time.perf_counter()
        first, tokens = run(work["prompts"], work["new_tokens"])
        answer({"first_s": first, "seconds": time.perf_counter() - start, "tokens": tokens})
