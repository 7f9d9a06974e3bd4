"""What clients may ask of the server itself: its version, the models it serves, their tokens."""

import asyncio
from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from distkv import __version__
from distkv.metrics.exposition import CONTENT_TYPE, exposition
from distkv.server.schemas.tokens import DetokenizeBody, TokenizeBody
from distkv.server.service import Service


def about_routes(service: Service) -> APIRouter:
    """The routes."""
    router = APIRouter(tags=["server"])

    @router.get("/metrics")
    async def metrics() -> Response:
        """Prometheus's text of the engine's counts."""
        llm = service.llm
        text = exposition(await llm.stats(), llm.info, service.names[0])
        return Response(text, headers={"content-type": CONTENT_TYPE})

    @router.get("/version")
    async def version() -> dict[str, str]:
        """The version of distkv."""
        return {"version": __version__}

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The names that the model is served by."""
        return {"object": "list", "data": [_card(service, name) for name in service.names]}

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """One of them."""
        return _card(service, service.check_model(name))

    @router.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> dict[str, Any]:
        """The tokens of a text or a conversation."""
        service.check_model(body.model)
        tokenizer = service.llm.tokenizer
        if body.messages is not None:
            token_ids = await asyncio.to_thread(
                tokenizer.encode_chat, body.messages, body.tools, body.chat_template_kwargs
            )
            service.check_vocab("messages", token_ids)
        else:
            special = body.add_special_tokens is not False
            token_ids = await asyncio.to_thread(tokenizer.encode, body.prompt or "", special)
        texts = [tokenizer.token_text(one) for one in token_ids] if body.return_token_strs else None
        return {
            "count": len(token_ids),
            "max_model_len": service.llm.info.max_model_len,
            "tokens": token_ids,
            "token_strs": texts,
        }

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> dict[str, str]:
        """The text of tokens, special ones too."""
        service.check_model(body.model)
        token_ids = service.check_vocab("tokens", body.tokens)
        return {"prompt": await asyncio.to_thread(service.llm.tokenizer.decode_all, token_ids)}

    @router.get("/tokenizer_info")
    async def tokenizer_info() -> dict[str, Any]:
        """The tokenizer's class, its special tokens and its chat template."""
        return service.llm.tokenizer.describe()

    return router


def _card(service: Service, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "distkv",
        "root": service.llm.info.model,
        "parent": None,
        "max_model_len": service.llm.info.max_model_len,
    } | service.kv_policy
