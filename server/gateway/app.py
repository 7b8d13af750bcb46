"""The FastAPI application around a backend."""

import time

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline
from starlette.middleware.cors import CORSMiddleware

from server.gateway import files, routes_images, routes_metrics, routes_models, routes_playground, routes_videos
from server.gateway.admission import Admission
from server.gateway.auth import Auth
from server.gateway.backend import Backend
from server.gateway.boundary import Boundary
from server.gateway.drain import Drain, Gate
from server.gateway.errors import install_error_handlers
from server.gateway.keys import KeyStore
from server.gateway.metrics import Metrics
from server.gateway.observe import Observed
from server.gateway.openapi import install_openapi
from server.gateway.pipeline import Pipeline
from server.gateway.readiness import Readiness
from server.gateway.result_files import ResultFiles
from server.gateway.results import Results
from server.gateway.settings import Settings
from server.gateway.shedding import Shedding
from server.gateway.video_content import Contents
from server.gateway.video_jobs import VideoJobs

DOCS_ASSETS = "/docs-assets"


def create_app(backend: Backend, settings: Settings) -> FastAPI:
    """Routes, errors and keys; starting and stopping `backend` and then app.state.videos is the caller's affair (see serve.py).
    Raises KeysError."""
    app = FastAPIOffline(
        title="fewstep",
        description="Few-step diffusion students over OpenAI's image and video API.",
        redirect_slashes=False,
        redoc_url=None,
        static_url=DOCS_ASSETS,
    )
    app.state.backend = backend
    app.state.settings = settings
    app.state.pipeline = open_pipeline(backend, settings)
    app.state.keys = KeyStore(settings.keys_file) if settings.keys_file else None
    app.state.files = files.open_files(settings)
    app.state.videos, app.state.contents = VideoJobs(backend, settings), Contents()
    app.state.created = int(time.time())
    app.state.metrics, app.state.tracing = Metrics(), None
    app.state.readiness, app.state.drain = Readiness(backend), Drain()
    install_error_handlers(app)
    app.include_router(routes_images.router)
    app.include_router(routes_videos.router)
    app.include_router(routes_models.router)
    app.include_router(files.router)
    app.include_router(routes_playground.router)
    app.include_router(routes_metrics.router)
    # From the inside out. Other origins' preflights carry no key, so they are answered before anybody asks for one.
    app.add_middleware(Shedding, admission=app.state.pipeline.admission)
    app.add_middleware(Gate, drain=app.state.drain)
    app.add_middleware(Auth, keys=app.state.keys)
    if settings.cors_origins:
        allow_cross_origin(app, settings.cors_origins)
    install_openapi(app)
    app.add_middleware(Boundary, max_body_bytes=settings.max_body_bytes)
    app.add_middleware(Observed)
    return app


def open_pipeline(backend: Backend, settings: Settings) -> Pipeline:
    """What makes images, as the settings want it. Raises OSError when the folder of results cannot be made."""
    admission = Admission(settings.max_queue_seconds, settings.key_share if settings.keys_file else 1.0)
    if not settings.result_cache:
        return Pipeline(backend, admission, None)
    files = None
    if settings.result_cache_folder and settings.result_cache_disk_mb:
        files = ResultFiles(settings.result_cache_folder, settings.result_cache_disk_mb * 10**6)
    return Pipeline(backend, admission, Results(settings.result_cache_mb * 10**6, files))


def allow_cross_origin(app: FastAPI, origins: tuple[str, ...]) -> None:
    """Lets pages of these origins call the API with a key and read its headers."""
    app.add_middleware(
        CORSMiddleware,
        allow_origins=origins,
        allow_methods=["GET", "HEAD", "POST", "DELETE"],
        allow_headers=["*"],
        expose_headers=["*"],
    )
