"""A process that asks an engine on a Ray cluster, and prints in JSON what came of it: run on a node by `namespaces.py`.

Its argument is JSON too: "address" of the cluster, "model", "options" of the engine, "prompts" as token ids, and
"pauses" after how many tokens of each answer it says that it is answering and waits for a line.
"""

import json
import logging
import sys
from typing import Any

from distkv import LLM, SamplingParams

PARAMS = SamplingParams(temperature=1, seed=7, max_tokens=48, ignore_eos=True, logprobs=2)


def main() -> None:
    wanted: dict[str, Any] = json.loads(sys.argv[1])
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    with LLM(wanted["model"], ray_address=wanted["address"], num_threads=1, **wanted["options"]) as llm:
        streams = [llm.stream(prompt, PARAMS) for prompt in wanted["prompts"]]
        last = [next(stream) for stream in streams]
        if pauses := wanted.get("pauses"):
            for stream in streams:
                while len(last[0].outputs[0].token_ids) < pauses:
                    last[0] = next(stream)
                break
            print("answering", flush=True)
            sys.stdin.readline()
        for number, stream in enumerate(streams):
            for output in stream:
                last[number] = output
        stats = llm.stats()
    told = {
        "answers": [[list(one.outputs[0].token_ids), repr(one.outputs[0].logprobs)] for one in last],
        "cached": [one.num_cached_tokens for one in last],
        "moved": stats.bytes_moved,
    }
    print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
