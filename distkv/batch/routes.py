"""The server's routes over an engine of this process, without HTTP in between."""

import httpx2
from msgspec import Raw

from distkv.async_llm import AsyncLLM
from distkv.batch.input_file import MOST_LINE_BYTES
from distkv.batch.records import Response
from distkv.server.app import make_app
from distkv.server.options import ServerOptions
from distkv.server.service import Service


class Routes:
    """Answers as `distkv serve` does: the same bodies, the same errors."""

    def __init__(self, llm: AsyncLLM, names: list[str]):
        """`names` are what lines may call the model by."""
        options = ServerOptions(max_body_bytes=2 * MOST_LINE_BYTES)  # a body has no more than its line and a seed
        self._headers = {"content-type": "application/json"}
        if options.api_key is not None:  # of the environment
            self._headers["x-api-key"] = options.api_key
        service = Service(names, options)
        service.loaded(llm)
        self._transport = httpx2.ASGITransport(make_app(service))

    async def post(self, url: str, body: bytes) -> Response:
        """What a route answers."""
        request = httpx2.Request("POST", f"http://batch{url}", content=body, headers=self._headers)
        response = await self._transport.handle_async_request(request)
        return Response(response.status_code, response.headers["x-request-id"], Raw(await response.aread()))
