"""`fewstep serve`: gateway and backend in one process tree that starts whole, stops whole and leaves nothing behind."""

import asyncio
import gc
import os
import socket
from typing import Any

import uvicorn

from server.gateway.app import create_app
from server.gateway.backend import Backend, BackendFailed
from server.gateway.drain import DrainingServer
from server.gateway.http11 import Http11
from server.gateway.logs import configure_logging
from server.gateway.settings import Settings
from server.gateway.video_jobs import VideoJobs

READY = """fewstep serves {students} on {url}  (backend: {backend}); try
  curl -s {url}/v1/images/generations -H 'Content-Type: application/json' -H 'Accept: image/png'{key} \\
    -d '{{"prompt": "a red circle above a blue square", "seed": 7}}' -o out.png"""


def serve(settings: Settings) -> None:
    """Serves until SIGTERM or SIGINT. Raises BackendFailed or OSError with a message for the terminal."""
    configure_logging(settings.log_format)
    with listen(settings.host, settings.port) as listener:
        asyncio.run(serve_on(listener, open_backend(settings), settings))


def open_backend(settings: Settings) -> Backend:
    """The backend, not started. Imports only what this one needs."""
    if settings.backend == "inprocess":
        # The engine in this process reads them, as Triton's does.
        os.environ |= {"FEWSTEP_CPU_THREADS": str(settings.cpu_threads), "FEWSTEP_PROVIDER": settings.provider}
        from server.gateway.inprocess_backend import InProcessBackend

        return InProcessBackend(settings.model_repository, settings.determinism)
    from server.gateway.tritonserver import find_triton

    find_triton()  # first, since without the wheel there is no client to import either
    from server.gateway.triton_backend import TritonBackend

    return TritonBackend(settings.model_repository, settings.determinism, settings.cpu_threads, settings.provider)


def listen(host: str, port: int) -> socket.socket:
    """A bound socket; raises OSError that says which port, and the way out."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # named, or asyncio leaves TCP_NODELAY off
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise OSError(f"cannot listen on {host}:{port}: {error.strerror}; choose another with --port or --host") from None
    return listener


async def serve_on(listener: socket.socket, backend: Backend, settings: Settings) -> None:
    """The gateway answers at once (alive, not ready) while the backend warms up."""
    app = create_app(backend, settings)
    app.state.tracing = tracing = open_tracing(settings.otlp_endpoint)
    # X-Forwarded-* are anybody's words.
    config = uvicorn.Config(app, http=Http11, log_config=None, access_log=False, lifespan="off", proxy_headers=False)
    server = DrainingServer(config, app.state.drain, settings.grace_seconds, app.state.videos.leave, backend.kill)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    starting = asyncio.create_task(start(backend, app.state.videos))
    try:
        await asyncio.wait([serving, starting], return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            server.announced()
            settle()
            print(ready_line(listener, backend, settings), flush=True)
        await serving
    finally:
        await end(starting)
        server.should_exit = True
        await end(serving, cancel=False)
        await app.state.videos.stop()
        await backend.stop()
        if tracing:
            await asyncio.to_thread(tracing.close)


def settle() -> None:
    """Keeps garbage collections short: requests wait for them. What is here now stays, so it need not be looked through again;
    what requests leave behind is freed without them but for a few cycles, so a look through all that requests hold (some 100 ms
    under overload) can wait for two million objects more."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(2_000, 1_000, 100)


async def start(backend: Backend, videos: VideoJobs) -> None:
    """Raises BackendFailed, or ValueError where jobs cannot be kept as the settings say."""
    await backend.start()
    await videos.start()


def open_tracing(endpoint: str | None) -> Any:
    """None without an endpoint; then OpenTelemetry is not even imported. Raises ValueError when it is not installed."""
    if not endpoint:
        return None
    try:
        from server.gateway.tracing import Tracing
    except ModuleNotFoundError as error:
        said = f"traces are to go to {endpoint} but {error.name} is not installed: run `pip install 'fewstep[otel]'`"
        raise ValueError(f"{said}, or unset the endpoint") from None
    return Tracing(endpoint)


async def end(task: "asyncio.Task[None]", cancel: bool = True) -> None:
    """Waits for a task to be over, whatever its outcome."""
    if cancel:
        task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def ready_line(listener: socket.socket, backend: Backend, settings: Settings) -> str:
    """What is served, where, and a command to try."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    host = f"[{host}]" if ":" in host else host
    key = ' -H "Authorization: Bearer $KEY"' if settings.keys_file else ""
    students = ", ".join(backend.students)
    return READY.format(students=students, url=f"http://{host}:{port}", backend=settings.backend, key=key)


__all__ = ["BackendFailed", "serve"]
