"""Runs work on distkv, by `LLM`."""

import time

import driver_loop


def load(options):
    from distkv import LLM, SamplingParams

    llm = LLM(
        options.model,
        dtype=options.dtype,
        num_threads=options.threads,
        max_model_len=options.max_model_len,
        device_kv_bytes=options.kv_bytes,
        host_kv_bytes=0,
        enable_prefix_caching=False,
    )

    def params(count):
        return SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)

    def run(prompts, new_tokens):
        if len(prompts) > 1:
            outputs = llm.generate(prompts, [params(count) for count in new_tokens], use_tqdm=False)
            return None, [list(output.outputs[0].token_ids) for output in outputs]
        first, start = None, time.perf_counter()
        for output in llm.stream(prompts[0], params(new_tokens[0])):
            first = first or time.perf_counter() - start
            tokens = output.outputs[0].token_ids
        return first, [list(tokens)]

    return run


driver_loop.serve(load)
