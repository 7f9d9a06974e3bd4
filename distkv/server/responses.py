"""`/v1/responses`: one answer at a time, each of which a later request may go on from."""

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from distkv.errors import ConfigError, StoreError
from distkv.frontend.conversation import Conversation
from distkv.outputs import CompletionOutput, RequestOutput, join_deltas
from distkv.server.answers import answer_all
from distkv.server.connection import error_event, event, respond
from distkv.server.errors import api_error, openai_error
from distkv.server.kept_responses import KeptResponses
from distkv.server.schemas.response import ResponseBody
from distkv.server.service import Service
from distkv.server.usage import Usage

log = logging.getLogger(__name__)


def response_routes(service: Service) -> APIRouter:
    """The route."""
    router = APIRouter(tags=["OpenAI"])
    kept = KeptResponses(service)

    @router.post("/v1/responses")
    async def responses(request: Request, body: ResponseBody) -> Response:
        """Answers, and keeps the conversation unless `store` is false."""
        response = _Response(service, kept, body)
        return await respond(request, response, body.stream, response.failed)

    return router


class _Response:
    """The answer to one request."""

    def __init__(self, service: Service, kept: KeptResponses, body: ResponseBody):
        self._service, self._kept, self._body = service, kept, body
        self._params, self._messages = body.params(), body.messages()
        self._conversation: Conversation  # once its prompt is known
        self._id, self._item_id = f"resp_{uuid.uuid4().hex}", f"msg_{uuid.uuid4().hex}"
        self._model, self._created = service.check_model(body.model), int(time.time())
        self._usage = Usage()
        self._num_events = 0

    async def whole(self) -> dict[str, Any]:
        """The body of the response."""
        outputs = [output async for output in self._outputs()]
        return await asyncio.to_thread(self._final, outputs)

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """The events of the response."""
        deltas: list[RequestOutput] = []
        place = {"item_id": self._item_id, "output_index": 0, "content_index": 0}
        async with aclosing(self._outputs()) as outputs:
            async for output in outputs:
                if not deltas:
                    yield self._event("response.created", response=self._object("in_progress"))
                    yield self._event("response.in_progress", response=self._object("in_progress"))
                    item = self._item("in_progress")
                    yield self._event("response.output_item.added", output_index=0, item=item)
                    yield self._event("response.content_part.added", **place, part=_part(""))
                deltas.append(output)
                text = output.outputs[0].text
                if text:
                    yield self._event("response.output_text.delta", **place, delta=text, logprobs=[])
        response = await asyncio.to_thread(self._final, deltas)
        [item] = response["output"]
        [part] = item["content"]
        yield self._event("response.output_text.done", **place, text=part["text"], logprobs=[])
        yield self._event("response.content_part.done", **place, part=part)
        yield self._event("response.output_item.done", output_index=0, item=item)
        yield self._event(f"response.{response['status']}", response=response)

    def failed(self, error: Exception) -> bytes:
        """The last event of a stream that cannot go on."""
        told = openai_error(api_error(error))["error"]
        failure = {"code": told["code"] or "server_error", "message": told["message"]}
        response = self._object("failed") | {"error": failure}
        return error_event(self._numbered("response.failed", response=response), "response.failed")

    async def _outputs(self) -> AsyncGenerator[RequestOutput, None]:
        body, llm = self._body, self._service.llm
        prompt = await asyncio.to_thread(self._prompt)
        outputs = llm.generate(prompt, self._params, priority=body.priority, cache_salt=body.cache_salt)
        async with aclosing(answer_all(self._service, 1, [outputs])) as answers:
            async for index, output in answers:
                self._usage.add(index, output)
                yield output

    def _prompt(self) -> list[int]:
        """Tokens of the conversation up to the answer."""
        self._conversation = self._kept.begin(self._body.previous_response_id)
        return self._conversation.prompt(self._service.llm.tokenizer, self._messages)

    def _final(self, outputs: list[RequestOutput]) -> dict[str, Any]:
        """The response when its answer is finished, which is kept now."""
        answer = join_deltas(outputs).outputs[0]
        unkept = self._keep(answer) if self._body.store else {}
        is_cut = answer.finish_reason == "length"
        status = "incomplete" if is_cut else "completed"
        prompt, completion = self._usage.num_prompt_tokens, self._usage.num_completion_tokens
        return (
            self._object(status)
            | unkept
            | {
                "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
                "output": [self._item(status) | {"content": [_part(answer.text)]}],
                "usage": {
                    "input_tokens": prompt,
                    "input_tokens_details": {"cached_tokens": self._usage.num_cached_tokens},
                    "output_tokens": completion,
                    "output_tokens_details": {"reasoning_tokens": 0},
                    "total_tokens": prompt + completion,
                },
            }
        )

    def _keep(self, answer: CompletionOutput) -> dict[str, Any]:
        """Keeps the conversation. Returns what is told beside an answer that could not be kept, as chats tell it."""
        self._conversation.add_output(answer)
        try:
            self._kept.keep(self._id, self._conversation)
        except (StoreError, ConfigError) as error:
            log.warning("a response is not kept: %s", error)
            return {"store": False, "session_error": str(error)}
        return {}

    def _object(self, status: str) -> dict[str, Any]:
        body = self._body
        return {
            "id": self._id, "object": "response", "created_at": self._created, "status": status, "error": None,
            "incomplete_details": None, "instructions": body.instructions, "metadata": body.metadata or {},
            "max_output_tokens": body.max_output_tokens, "model": self._model, "output": [],
            "parallel_tool_calls": False, "previous_response_id": body.previous_response_id, "store": body.store,
            "temperature": body.temperature, "text": {"format": {"type": "text"}}, "tool_choice": "none", "tools": [],
            "top_p": body.top_p, "truncation": "disabled", "usage": None, **self._service.kv_policy,
        }  # fmt: skip

    def _item(self, status: str) -> dict[str, Any]:
        return {"type": "message", "id": self._item_id, "status": status, "role": "assistant", "content": []}

    def _event(self, kind: str, **fields: Any) -> bytes:
        return event(self._numbered(kind, **fields), kind)

    def _numbered(self, kind: str, **fields: Any) -> dict[str, Any]:
        number, self._num_events = self._num_events, self._num_events + 1
        return {"type": kind, "sequence_number": number} | fields


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
