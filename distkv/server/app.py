"""The server of a model as an ASGI application."""

from fastapi import FastAPI

from distkv.server.about import about_routes
from distkv.server.cache_files import cache_file_routes
from distkv.server.chat import chat_routes
from distkv.server.completions import completion_routes
from distkv.server.guarded_app import guarded_app
from distkv.server.health import health_routes
from distkv.server.live import live_routes
from distkv.server.messages import message_routes
from distkv.server.own import own_routes
from distkv.server.own_model import own_plan_routes
from distkv.server.page_files import page_file_routes
from distkv.server.responses import response_routes
from distkv.server.service import Service


def make_app(service: Service) -> FastAPI:
    """The application that serves a model; until that is loaded, most routes answer with status 503."""
    makers = (
        health_routes, about_routes, completion_routes, chat_routes, response_routes, message_routes, own_routes,
        own_plan_routes, cache_file_routes, live_routes,
    )  # fmt: skip
    return guarded_app([*(routes(service) for routes in makers), page_file_routes()], service.options)
