"""The gateway as one ASGI application."""

from litestar import Litestar, Router
from litestar.datastructures import State
from litestar.di import Provide
from litestar.middleware import DefineMiddleware
from litestar.openapi import OpenAPIConfig
from litestar.openapi.plugins import JsonRenderPlugin

from spellq.gateway import artifacts, errors, runs, socket, streams
from spellq.gateway.auth import AuthenticationMiddleware
from spellq.gateway.services import Services
from spellq.version import __version__

API = "/api"


def create_app(services: Services) -> Litestar:
    """The application; `/api/openapi.json` describes it."""
    api = Router(
        API,
        route_handlers=[
            *runs.HANDLERS,
            *artifacts.HANDLERS,
            *streams.HANDLERS,
            socket.event_socket,
        ],
    )

    def provide() -> Services:
        return services

    return Litestar(
        [api],
        dependencies={"services": Provide(provide, sync_to_thread=False, use_cache=True)},
        exception_handlers=errors.HANDLERS,
        middleware=[DefineMiddleware(AuthenticationMiddleware)],
        openapi_config=OpenAPIConfig(
            title="spellq",
            version=__version__,
            # Not API itself: whatever else lies below this path is answered 405, not 404.
            path=f"{API}/openapi.json",
            render_plugins=[JsonRenderPlugin(path="/")],
            use_handler_docstrings=True,
        ),
        state=State({"services": services}),
        logging_config=None,
    )


__all__ = ["Services", "create_app"]
