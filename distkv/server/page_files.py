"""The files of the pages for people."""

from pathlib import Path

from fastapi import APIRouter
from starlette.responses import FileResponse, Response

from distkv.server.errors import ApiError

FILES = {path.name: path for path in (Path(__file__).parent / "page").iterdir()}
HEADERS = {
    "content-security-policy": "default-src 'self'; img-src data:; frame-ancestors 'none'; base-uri 'none'",
    "cache-control": "no-cache",
}


def page_file_routes() -> APIRouter:
    """The routes."""
    router = APIRouter(include_in_schema=False)

    @router.get("/page/{name}")
    async def file(name: str) -> Response:
        """A file that a page asks for."""
        if name not in FILES:
            raise ApiError(404, f"the page has no file {name!r}")
        return page_file(name)

    return router


def page_file(name: str) -> Response:
    """A file of the folder `page`, for a browser that is to ask nobody else for anything."""
    return FileResponse(FILES[name], headers=HEADERS)
