"""Runs work on transformers: its own LLaMA with its default attention and cache.

Several prompts are generated for in batches, padded on the left and sorted by length, as transformers' users do it:
its continuous batching is made for GPUs.
"""

import time

import driver_loop

BATCH = 8


def load(options):
    import torch
    import transformers

    torch.set_num_threads(options.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = transformers.AutoModelForCausalLM.from_pretrained(
        options.model, dtype=getattr(torch, options.dtype), local_files_only=True, trust_remote_code=False
    )
    model = model.eval().to(device)

    def one(prompt, count):
        """By hand, so that the first token's time is known."""
        start = time.perf_counter()
        out = model(torch.tensor([prompt], device=device), use_cache=True, logits_to_keep=1)
        tokens = [int(out.logits[0, -1].argmax())]
        first = time.perf_counter() - start
        while len(tokens) < count:
            token = torch.tensor([tokens[-1:]], device=device)
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
            tokens.append(int(out.logits[0, -1].argmax()))
        return first, [tokens]

    def batch(prompts, counts):
        """Each runs as long as the longest answer of the batch; tokens beyond an answer's own length do not count."""
        length = max(map(len, prompts))
        ids = torch.tensor([[0] * (length - len(prompt)) + prompt for prompt in prompts], device=device)
        mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=max(counts), min_new_tokens=max(counts), do_sample=False,
            pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
        return [row[length : length + count].tolist() for row, count in zip(out, counts, strict=True)]

    @torch.inference_mode()
    def run(prompts, new_tokens):
        if len(prompts) == 1:
            return one(prompts[0], new_tokens[0])
        order = sorted(range(len(prompts)), key=lambda n: len(prompts[n]))
        tokens = [None] * len(prompts)
        for start in range(0, len(order), BATCH):
            part = order[start : start + BATCH]
            found = batch([prompts[n] for n in part], [new_tokens[n] for n in part])
            for n, row in zip(part, found, strict=True):
                tokens[n] = row
        return None, tokens

    return run


driver_loop.serve(load)
