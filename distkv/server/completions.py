"""`/v1/completions`."""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from distkv.frontend.request_checks import check_params
from distkv.outputs import CompletionOutput, RequestOutput
from distkv.server.answers import Outputs, answer_all
from distkv.server.connection import DONE, event, openai_failed, respond
from distkv.server.logprobs import Echo, completion_logprobs
from distkv.server.schemas.completion import CompletionBody
from distkv.server.service import Service
from distkv.server.usage import Usage


def completion_routes(service: Service) -> APIRouter:
    """The route."""
    router = APIRouter(tags=["OpenAI"])

    @router.post("/v1/completions")
    async def completions(request: Request, body: CompletionBody) -> Response:
        """Goes on with prompts."""
        completion = _Completion(service, request.scope["request_id"], body)
        return await respond(request, completion, body.stream, openai_failed)

    return router


class _Completion:
    """The answers to one request."""

    def __init__(self, service: Service, request_id: str, body: CompletionBody):
        self._service, self._body = service, body
        self._params = body.params()
        self._head = {
            "id": f"cmpl-{request_id}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": service.check_model(body.model),
        } | service.kv_policy
        self._usage = Usage()
        check_params(self._params, service.llm.info)  # before so many answers have a place in the queue

    async def whole(self) -> dict[str, Any]:
        """The body of the response."""
        choices = []
        async with aclosing(self._answers()) as answers:
            async for index, output in answers:
                self._usage.add(index, output)
                choices += [self._choice(index, answer, 0, self._echo(index, output)) for answer in output.outputs]
        choices.sort(key=lambda choice: choice["index"])
        return self._head | {"choices": choices, "usage": self._usage.openai()}

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """The events of the response."""
        options = self._body.stream_options
        offsets: dict[tuple[int, int], int] = {}  # by request and answer
        async with aclosing(self._answers()) as answers:
            async for index, output in answers:
                self._usage.add(index, output)
                usage = {"usage": self._usage.openai()} if options.continuous_usage_stats else {}
                for answer in output.outputs:
                    offset = offsets.get((index, answer.index), 0)
                    choice = self._choice(index, answer, offset)
                    if choice["logprobs"] is not None:
                        offsets[index, answer.index] = offset + sum(map(len, choice["logprobs"]["tokens"]))
                    yield event(self._head | {"choices": [choice]} | usage)
        if options.include_usage:
            yield event(self._head | {"choices": [], "usage": self._usage.openai()})
        yield DONE

    def _answers(self) -> AsyncGenerator:
        body, generate = self._body, self._service.llm.generate
        outputs: list[Outputs] = [
            generate(prompt, self._params, priority=body.priority, cache_salt=body.cache_salt)
            for prompt in body.prompts
        ]
        return answer_all(self._service, len(outputs) * self._params.n, outputs)

    def _echo(self, index: int, output: RequestOutput) -> Echo | None:
        """The prompt of a request, where answers are to begin with it."""
        if not self._body.echo:
            return None
        prompt, tokenizer = self._body.prompts[index], self._service.llm.tokenizer
        text = prompt if isinstance(prompt, str) else tokenizer.decode_all(prompt)
        first = tokenizer.token_text(output.prompt_token_ids[0])
        return Echo(text, output.prompt_token_ids, output.prompt_logprobs or [], first)

    def _choice(self, index: int, answer: CompletionOutput, offset: int, echo: Echo | None = None) -> dict[str, Any]:
        return {
            "index": index * self._params.n + answer.index,
            "text": answer.text if echo is None else echo.text + answer.text,
            "logprobs": completion_logprobs(answer, offset, echo),
            "finish_reason": answer.finish_reason,
            "stop_reason": answer.stop_reason,
        }
