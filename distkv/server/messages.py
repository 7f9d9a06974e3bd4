"""`/v1/messages`: chats in the shape of Anthropic's API."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from distkv.outputs import CompletionOutput, RequestOutput
from distkv.server.answers import answer_all
from distkv.server.connection import error_event, event, respond
from distkv.server.errors import anthropic_error, api_error
from distkv.server.schemas.message import CountBody, MessageBody
from distkv.server.service import Service
from distkv.server.usage import Usage


def message_routes(service: Service) -> APIRouter:
    """The routes."""
    router = APIRouter(tags=["Anthropic"])

    @router.post("/v1/messages")
    async def messages(request: Request, body: MessageBody) -> Response:
        """Goes on with a conversation."""
        message = _Message(service, request.scope["request_id"], body)
        return await respond(
            request, message, body.stream, lambda error: error_event(anthropic_error(api_error(error)), "error")
        )

    @router.post("/v1/messages/count_tokens")
    async def count_tokens(body: CountBody) -> dict[str, int]:
        """How many tokens a conversation has."""
        service.check_model(body.model)
        token_ids = await asyncio.to_thread(service.llm.tokenizer.encode_chat, body.conversation())
        return {"input_tokens": len(service.check_vocab("messages", token_ids))}

    return router


class _Message:
    """The answer to one request."""

    def __init__(self, service: Service, request_id: str, body: MessageBody):
        self._service, self._body, self._params = service, body, body.params()
        self._id, self._model = f"msg_{request_id}", service.check_model(body.model)
        self._usage = Usage()

    async def whole(self) -> dict[str, Any]:
        """The body of the response."""
        async with aclosing(self._outputs()) as outputs:
            async for output in outputs:
                [answer] = output.outputs
        return self._message(answer.text) | _end(answer)

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """The events of the response."""
        has_begun = False
        async with aclosing(self._outputs()) as outputs:
            async for output in outputs:
                if not has_begun:
                    has_begun = True
                    yield _event("message_start", message=self._message(None))
                    yield _event("content_block_start", index=0, content_block={"type": "text", "text": ""})
                [answer] = output.outputs
                if answer.text:
                    yield _event("content_block_delta", index=0, delta={"type": "text_delta", "text": answer.text})
        yield _event("content_block_stop", index=0)
        yield _event("message_delta", delta=_end(answer), usage=self._counts())
        yield _event("message_stop")

    async def _outputs(self) -> AsyncGenerator[RequestOutput, None]:
        body = self._body
        outputs = self._service.llm.chat(
            body.conversation(), self._params, priority=body.priority, cache_salt=body.cache_salt
        )
        async with aclosing(answer_all(self._service, 1, [outputs])) as answers:
            async for index, output in answers:
                self._usage.add(index, output)
                yield output

    def _message(self, text: str | None) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": [] if text is None else [{"type": "text", "text": text}],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": self._counts(),
        } | self._service.kv_policy

    def _counts(self) -> dict[str, int]:
        cached = self._usage.num_cached_tokens
        return {
            "input_tokens": self._usage.num_prompt_tokens - cached,  # those that were not cached
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": self._usage.num_completion_tokens,
        }


def _end(answer: CompletionOutput) -> dict[str, Any]:
    """Why the answer ends."""
    if answer.finish_reason == "length":
        return {"stop_reason": "max_tokens", "stop_sequence": None}
    if isinstance(answer.stop_reason, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": answer.stop_reason}
    return {"stop_reason": "end_turn", "stop_sequence": None}


def _event(kind: str, **fields: Any) -> bytes:
    return event({"type": kind} | fields, kind)
