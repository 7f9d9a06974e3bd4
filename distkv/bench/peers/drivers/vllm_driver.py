"""Runs work on vLLM, by its offline `LLM`. Its engine is a process of its own, which multiprocessing starts by running
this file once more, up to the last lines."""

import time

import driver_loop

STARTS_WITH = 0.2  # share of the memory that must be free; on a CPU too, and with its KV memory given


def load(options):
    from vllm import LLM, SamplingParams

    llm = LLM(
        options.model,
        dtype=options.dtype,
        max_model_len=options.max_model_len,
        enforce_eager=options.eager,
        kv_cache_memory_bytes=options.kv_bytes,
        gpu_memory_utilization=STARTS_WITH,
        enable_prefix_caching=False,
    )
    numbers = iter(range(10**9))

    def params(count):
        return SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)

    def run(prompts, new_tokens):
        if len(prompts) > 1:
            requests = [{"prompt_token_ids": prompt} for prompt in prompts]
            outputs = llm.generate(requests, [params(count) for count in new_tokens], use_tqdm=False)
            return None, [list(output.outputs[0].token_ids) for output in outputs]
        engine = llm.llm_engine  # `generate` tells nothing of the first token
        first, start = None, time.perf_counter()
        engine.add_request(f"bench-{next(numbers)}", {"prompt_token_ids": prompts[0]}, params(new_tokens[0]))
        while engine.has_unfinished_requests():
            for output in engine.step():
                first = first or time.perf_counter() - start
                tokens = output.outputs[0].token_ids
        return first, [list(tokens)]

    return run


if __name__ == "__main__":
    driver_loop.serve(load)
