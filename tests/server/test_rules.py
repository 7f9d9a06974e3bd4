"""What answers are made of, the prompt's own log-probabilities, and metrics, through a server."""

import json
from typing import Any

import httpx2
import pytest
from openai import BadRequestError, OpenAI
from support.servers import ServerProcess

from distkv import LLM, Client, SamplingParams
from distkv.metrics.catalogue import CATALOGUE, PREFIX

ASKED: Any = [{"role": "user", "content": "Hello world"}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}


@pytest.mark.parametrize(
    "extra",
    [
        {"guided_choice": ["yes", "no"]},
        {"structured_outputs": {"choice": ["yes", "no"]}},
        {"guided_regex": "yes|no"},
        {"structured_outputs": {"regex": "yes|no", "json": None}},
        {"guided_grammar": 'start: "yes" | "no"'},
    ],
)
def test_answers_keep_to_what_is_asked(openai: OpenAI, extra: dict[str, Any]) -> None:
    for seed in range(4):
        made = openai.completions.create(model="talker", prompt="Hello", max_tokens=12, seed=seed, extra_body=extra)
        assert made.choices[0].text in ("yes", "no")
        said = openai.chat.completions.create(
            model="talker", messages=ASKED, max_tokens=12, seed=seed, extra_body=extra
        )
        assert said.choices[0].message.content in ("yes", "no")


def test_a_chat_answers_in_json(openai: OpenAI) -> None:
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "pair", "schema": SCHEMA, "strict": True}}
    options: Any = {"max_tokens": 64, "seed": 3, "extra_body": {"logit_bias": {}}}
    for stream in (False, True):
        made: Any = openai.chat.completions.create(
            model="talker", messages=ASKED, response_format=wanted, stream=stream, **options
        )
        if stream:
            parts = [chunk.choices[0] for chunk in made]
            text, reason = "".join(part.delta.content or "" for part in parts), parts[-1].finish_reason
        else:
            text, reason = made.choices[0].message.content, made.choices[0].finish_reason
        if reason == "stop":
            assert isinstance(json.loads(text)["a"], int)
        else:  # a number that has no end yet
            assert text.startswith('{"a"') or text.startswith("{")


def test_biases_and_bans_reach_the_sampler(openai: OpenAI) -> None:
    made = openai.completions.create(
        model="talker",
        prompt=[5, 6],
        max_tokens=4,
        temperature=0,
        logit_bias={"40": 100},
        extra_body={"ignore_eos": True},
    )
    with_none = openai.completions.create(
        model="talker", prompt=[5, 6], max_tokens=4, temperature=0,
        extra_body={"ignore_eos": True, "allowed_token_ids": [40]},
    )  # fmt: skip
    assert made.choices[0].text == with_none.choices[0].text


@pytest.mark.parametrize(
    "extra, message",
    [
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"guided_choice": ["a"], "guided_regex": "b"}, "both say what the answer keeps to"),
        ({"structured_outputs": {"backend": "x", "regex": "a"}}, "backend"),
        ({"structured_outputs": {"regex": "("}}, "regex"),
        ({"logit_bias": {"40": 1000}}, "logit_bias"),
        ({"min_tokens": 99}, "min_tokens"),
    ],
)
def test_rules_that_cannot_be_kept_are_refused(openai: OpenAI, extra: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRequestError, match=message):
        openai.completions.create(model="talker", prompt="Hello", max_tokens=4, extra_body=extra)


def test_an_echo_has_the_log_probabilities_of_the_prompt(openai: OpenAI, talker: Any) -> None:
    """As programs that score texts ask for them: batches of token ids, one token more."""
    prompts = [[40, 41, 42, 43], [44, 45]]
    made = openai.completions.create(model="talker", prompt=prompts, echo=True, logprobs=1, max_tokens=1, temperature=0)
    with LLM(talker, page_size=16, device_kv_bytes="4MiB") as llm:
        params = SamplingParams(prompt_logprobs=1, max_tokens=1, temperature=0)
        expected = llm.generate(prompts, params, use_tqdm=False)
        texts = [llm.tokenizer.decode_all(prompt) for prompt in prompts]
    for choice, prompt, output, text in zip(made.choices, prompts, expected, texts, strict=True):
        assert choice.text == text + output.outputs[0].text
        assert choice.logprobs is not None and choice.logprobs.token_logprobs is not None
        assert len(choice.logprobs.tokens or []) == len(prompt) + 1
        values: list[Any] = list(choice.logprobs.token_logprobs)
        assert values[0] is None
        tables = output.prompt_logprobs
        assert tables is not None
        for token, value, table in zip(prompt[1:], values[1:], tables[1:], strict=False):
            assert table is not None and value == table[token].logprob
        tops: list[Any] = list(choice.logprobs.top_logprobs or [])
        for value, top in zip(values[1:], tops[1:], strict=True):
            assert max(top.values()) >= value
    with pytest.raises(BadRequestError, match="echo"):
        openai.completions.create(model="talker", prompt="Hello", echo=True, stream=True)
    plain = openai.completions.create(model="talker", prompt="Hello", echo=True, max_tokens=2)
    assert plain.choices[0].text.startswith("Hello") and plain.choices[0].logprobs is None


def test_the_client_has_the_same_rules(server: ServerProcess) -> None:
    with Client(server.url) as client:
        params = SamplingParams(allowed_token_ids=[40, 41], max_tokens=6, ignore_eos=True, prompt_logprobs=0)
        [output] = client.generate([[5, 6, 7]], params, use_tqdm=False)
        assert set(output.outputs[0].token_ids) <= {40, 41}
        assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == 3
        assert client.stats().requests.generation_tokens >= 6


def test_metrics_of_a_server(server: ServerProcess, openai: OpenAI) -> None:
    openai.completions.create(model="talker", prompt="Hello", max_tokens=4)
    response = httpx2.get(f"{server.url}/metrics", timeout=60)
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/plain")
    for metric in CATALOGUE:
        assert f"# HELP {PREFIX}{metric.name}" in response.text
    assert 'model_name="talker"' in response.text
