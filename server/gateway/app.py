"""The FastAPI application around a backend."""

import time

from fastapi import FastAPI

from server.gateway import routes_images, routes_models
from server.gateway.backend import Backend
from server.gateway.boundary import Boundary
from server.gateway.errors import install_error_handlers
from server.gateway.settings import Settings


def create_app(backend: Backend, settings: Settings) -> FastAPI:
    """Routes and errors; starting and stopping `backend` is the caller's affair (see serve.py)."""
    app = FastAPI(title="fewstep", description="Few-step diffusion students over OpenAI's image API.", redirect_slashes=False)
    app.state.backend = backend
    app.state.settings = settings
    app.state.created = int(time.time())
    install_error_handlers(app)
    app.include_router(routes_images.router)
    app.include_router(routes_models.router)
    app.add_middleware(Boundary, max_body_bytes=settings.max_body_bytes)
    return app
