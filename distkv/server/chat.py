"""`/v1/chat/completions`."""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from distkv.frontend.request_checks import check_params
from distkv.outputs import CompletionOutput, RequestOutput
from distkv.server.answers import answer_all
from distkv.server.connection import DONE, event, openai_failed, respond
from distkv.server.logprobs import chat_logprobs
from distkv.server.schemas.chat import ChatBody
from distkv.server.service import Service
from distkv.server.usage import Usage


def chat_routes(service: Service) -> APIRouter:
    """The route."""
    router = APIRouter(tags=["OpenAI"])

    @router.post("/v1/chat/completions")
    async def chat_completions(request: Request, body: ChatBody) -> Response:
        """Goes on with a conversation."""
        return await respond(request, _Chat(service, request.scope["request_id"], body), body.stream, openai_failed)

    return router


class _Chat:
    """The answers to one request."""

    def __init__(self, service: Service, request_id: str, body: ChatBody):
        self._service, self._body = service, body
        self._params = body.params()
        self._head = {
            "id": f"chatcmpl-{request_id}",
            "object": "chat.completion.chunk" if body.stream else "chat.completion",
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
                unkept = _unkept(output)
                for answer in output.outputs:
                    message = {"role": "assistant", "content": answer.text, "refusal": None}
                    choices.append(self._choice(answer) | {"message": message})
        return self._head | {"choices": choices, "usage": self._usage.openai()} | unkept

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """The events of the response."""
        options = self._body.stream_options
        begun: set[int] = set()
        async with aclosing(self._answers()) as answers:
            async for index, output in answers:
                self._usage.add(index, output)
                usage = {"usage": self._usage.openai()} if options.continuous_usage_stats else {}
                for answer in output.outputs:
                    if answer.index not in begun:
                        begun.add(answer.index)
                        delta = {"role": "assistant", "content": ""}
                        first = {"index": answer.index, "delta": delta, "logprobs": None, "finish_reason": None}
                        yield event(self._head | {"choices": [first]} | usage)
                    choice = self._choice(answer) | {"delta": {"content": answer.text}}
                    yield event(self._head | {"choices": [choice]} | usage | _unkept(output))
        if options.include_usage:
            yield event(self._head | {"choices": [], "usage": self._usage.openai()})
        yield DONE

    def _answers(self) -> AsyncGenerator:
        body = self._body
        outputs = self._service.llm.chat(
            body.messages, self._params, priority=body.priority, cache_salt=body.cache_salt, session=body.session,
            tools=body.shown_tools, chat_template_kwargs=body.chat_template_kwargs,
        )  # fmt: skip
        return answer_all(self._service, self._params.n, [outputs])

    def _choice(self, answer: CompletionOutput) -> dict[str, Any]:
        return {
            "index": answer.index,
            "logprobs": chat_logprobs(answer, self._body.top_logprobs or 0),
            "finish_reason": answer.finish_reason,
            "stop_reason": answer.stop_reason,
        }


def _unkept(output: RequestOutput) -> dict[str, str]:
    """What is told beside an answer that could not be added to its session."""
    return {} if output.error is None else {"session_error": str(output.error)}
