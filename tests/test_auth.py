"""Who gets in: no route without a key once there are keys, and no key in anything the server says or writes."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from server.gateway.app import create_app
from server.gateway.backend import Generated, GenerationRequest
from server.gateway.inprocess_backend import InProcessBackend
from server.gateway.keys import create, revoke
from server.gateway.settings import Settings
from tests.conftest import ROOT, Server, start_server

PATH = "/v1/images/generations"
BODY = {"prompt": "a red circle", "seed": 7}
# Everything that answers without a key. A new line here is a decision, not a repair.
OPEN = {"/", "/livez", "/readyz", "/health", "/playground/{name}", "/files/{name}"}
CANARY_PROMPT = "canary circle"


@dataclass(frozen=True)
class Keys:
    """A file of keys and the keys themselves."""

    file: Path
    good: str
    revoked: str
    expired: str
    models_only: str
    slow: str
    single: str


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    file = tmp_path_factory.mktemp("keys") / "keys.json"
    revoked = create(file, "revoked", ["images"])
    revoke(file, revoked[3:11])
    return Keys(
        file,
        good=create(file, "good", ["images", "videos", "models", "metrics"]),
        revoked=revoked,
        expired=create(file, "expired", ["images"], days=-1),
        models_only=create(file, "models", ["models"]),
        slow=create(file, "slow", ["images", "models"], requests_per_minute=2),
        single=create(file, "single", ["images"], concurrency=1),
    )


@pytest.fixture(scope="module")
def app(tiny_backend: InProcessBackend, keys: Keys) -> FastAPI:
    return create_app(tiny_backend, Settings(keys_file=keys.file, cors_origins=("https://a.example",)))


@pytest.fixture
def client(app: FastAPI) -> Iterator[TestClient]:
    with TestClient(app) as client:
        yield client


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def routes(app: FastAPI) -> list[tuple[str, str]]:
    """(method, path) of everything that can be asked for, as the router itself knows it."""
    found: list[tuple[str, str]] = []
    waiting: list[Any] = list(app.routes)
    while waiting:
        route = waiting.pop()
        below = getattr(route, "routes", None) or getattr(getattr(route, "original_router", None), "routes", None)
        if below:
            waiting += below
        else:
            found += [(method, route.path) for method in getattr(route, "methods", None) or ["GET"]]
    return found


def test_the_list_of_routes_is_complete(app: FastAPI) -> None:
    found = {path for _, path in routes(app)}
    assert {PATH, "/v1/models", "/v1/models/{model}", "/livez", "/docs", "/openapi.json"} <= found
    assert set(app.openapi()["paths"]) <= found


def test_no_key_and_every_wrong_key_is_refused_on_every_route(app: FastAPI, client: TestClient, keys: Keys) -> None:
    wrong = keys.good[:-1] + ("a" if keys.good[-1] != "a" else "b")
    basic = {"authorization": "Basic Zm9vOmJhcg=="}
    refused = [{}, basic, {"authorization": "Bearer"}, *map(bearer, (wrong, "none", "", keys.revoked, keys.expired))]
    checked = [(method, path) for method, path in routes(app) if path not in OPEN]
    assert len(checked) >= 5
    for method, path in [*checked, ("GET", "/nowhere"), ("POST", "/v1/videos"), ("GET", "/metrics"), ("GET", "/v1/models/")]:
        for headers in refused:
            answer = client.request(method, path.replace("{", "").replace("}", ""), headers=headers)
            assert answer.status_code == 401, (method, path, headers)
            assert answer.headers["www-authenticate"].startswith("Bearer")
            assert answer.headers["x-request-id"]
            if method != "HEAD":
                assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_a_right_key_opens_every_route(app: FastAPI, client: TestClient, keys: Keys) -> None:
    for method, path in routes(app):
        assert client.request(method, path.replace("{", "").replace("}", ""), headers=bearer(keys.good)).status_code != 401
    assert client.post(PATH, json=BODY, headers=bearer(keys.good)).status_code == 200


def test_what_holds_no_secret_stays_open(app: FastAPI, client: TestClient) -> None:
    for path in ("/livez", "/readyz", "/health"):
        assert client.get(path).status_code == 200
    for path in ("/playground/none.js", "/"):
        assert client.get(path).status_code in (200, 404)
    for sly in (
        "/livez/",
        "//livez",
        "/LIVEZ",
        "/livez%0a",
        "/playground/a/b",
        "/playground/",
        "/files/",
        "/livez/../v1/models",
    ):
        assert client.get(f"http://testserver{sly}").status_code == 401, sly


def test_the_reason_of_a_refusal_is_told(client: TestClient, keys: Keys) -> None:
    for headers, code, said in [
        ({}, "missing_api_key", "Authorization: Bearer"),
        (bearer("none"), "invalid_api_key", "not known"),
        (bearer(keys.revoked), "invalid_api_key", "revoked"),
        (bearer(keys.expired), "invalid_api_key", "expired"),
    ]:
        answer = client.get("/v1/models", headers=headers)
        assert answer.json()["error"]["code"] == code
        assert said in answer.json()["error"]["message"]
        assert ('error="invalid_token"' in answer.headers["www-authenticate"]) == (code == "invalid_api_key")


def test_a_browser_reads_the_docs_with_the_key_as_password_and_can_do_nothing_else_with_it(
    client: TestClient, keys: Keys
) -> None:
    for path in ("/docs", "/openapi.json"):
        assert "Basic realm=" in client.get(path).headers["www-authenticate"]
        assert client.get(path, auth=("anything", keys.models_only)).status_code == 200
        for wrong in (keys.revoked, keys.good[:-1], ""):
            assert client.get(path, auth=("anything", wrong)).status_code == 401
        assert client.get(path, headers={"authorization": b"Basic \xfc"}).status_code == 401
    for method, path in (("GET", "/v1/models"), ("POST", PATH), ("GET", "/metrics"), ("GET", "/docs/x")):
        answer = client.request(method, path, auth=("anything", keys.good))
        assert (answer.status_code, "Basic" in answer.headers["www-authenticate"]) == (401, False)


def test_two_authorizations_are_none(client: TestClient, keys: Keys) -> None:
    twice = [("authorization", f"Bearer {keys.good}"), ("authorization", f"Bearer {keys.good}")]
    assert client.get("/v1/models", headers=httpx.Headers(twice)).status_code == 401


def test_a_key_without_the_scope_is_a_403_that_names_it(client: TestClient, keys: Keys) -> None:
    assert client.get("/v1/models", headers=bearer(keys.models_only)).status_code == 200
    assert client.get("/docs", headers=bearer(keys.models_only)).status_code == 200
    one = "/v1/videos/x"
    videos = [("POST", "/v1/videos"), ("GET", "/v1/videos"), ("POST", "/v1/videos/sync"), ("GET", one), ("DELETE", one)]
    videos += [("GET", f"{one}/content"), ("HEAD", f"{one}/content"), ("GET", f"{one}/events"), ("POST", f"{one}/cancel")]
    scoped = [(method, path, "videos") for method, path in videos]
    for method, path, scope in [("POST", PATH, "images"), ("GET", "/metrics", "metrics"), *scoped]:
        answer = client.request(method, path, headers=bearer(keys.models_only))
        assert answer.status_code == 403
        assert method == "HEAD" or f"'{scope}'" in answer.json()["error"]["message"]
        assert f'scope="{scope}"' in answer.headers["www-authenticate"]


def test_a_rate_is_told_with_every_answer_and_kept(client: TestClient, keys: Keys) -> None:
    for left in (1, 0):
        answer = client.get("/v1/models", headers=bearer(keys.slow))
        assert answer.status_code == 200
        assert answer.headers["ratelimit-policy"] == '"requests";q=2;w=60'
        assert answer.headers["ratelimit"].startswith(f'"requests";r={left};t=')
    answer = client.get("/v1/models", headers=bearer(keys.slow))
    assert answer.status_code == 429
    assert answer.json()["error"]["code"] == "rate_limit_exceeded"
    assert 50 <= int(answer.headers["retry-after"]) <= 60
    assert 50_000 <= int(answer.headers["retry-after-ms"]) <= 60_000
    assert answer.headers["x-should-retry"] == "true"
    assert answer.headers["ratelimit"].startswith('"requests";r=0;t=')
    assert "ratelimit" not in client.get("/v1/models", headers=bearer(keys.good)).headers


def test_another_origin_may_ask_with_a_key_alone(client: TestClient, keys: Keys) -> None:
    origin = {"origin": "https://a.example"}
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    assert client.options(PATH, headers=origin | asked).status_code == 200
    assert client.options(PATH, headers={"origin": "https://b.example"} | asked).status_code == 400
    refused = client.get("/v1/models", headers=origin)
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "https://a.example"
    assert client.get("/v1/models", headers=origin | bearer(keys.good)).status_code == 200


class Waiting:
    """A backend whose images take until somebody lets go."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.students, self.seen = inner, inner.students, asyncio.Event()
        self.let_go = asyncio.Event()

    async def generate(self, request: GenerationRequest, *rest: Any) -> Generated:
        self.seen.set()
        await self.let_go.wait()
        made: Generated = await self.inner.generate(request)
        return made


def test_requests_at_once_are_bounded_and_their_places_given_back(app: FastAPI, keys: Keys) -> None:
    async def scenario() -> None:
        backend = Waiting(app.state.backend)
        waiting: Any = create_app(backend, Settings(keys_file=keys.file))  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=httpx.ASGITransport(waiting), base_url="http://fewstep") as client:
            ask = lambda key: client.post(PATH, json=BODY, headers=bearer(key))  # noqa: E731
            first = asyncio.create_task(ask(keys.single))
            await backend.seen.wait()
            refused = await ask(keys.single)
            assert refused.status_code == 429
            assert refused.headers["ratelimit"] == '"concurrency";r=0'
            assert refused.headers["ratelimit-policy"] == '"concurrency";q=1;qu="concurrent-requests"'
            other = asyncio.create_task(ask(keys.good))
            dropped = asyncio.create_task(ask(keys.good))
            await asyncio.sleep(0.05)
            dropped.cancel()
            backend.let_go.set()
            assert (await first).status_code == (await other).status_code == 200
            assert (await ask(keys.single)).status_code == 200

    asyncio.run(scenario())


def test_the_rest_of_the_server_knows_who_asks(tiny_repository: Path, keys: Keys) -> None:
    seen: list[Any] = []

    def identity(settings: Settings, headers: dict[str, str], path: str) -> Any:
        app = create_app(InProcessBackend(tiny_repository), settings)

        @app.get("/who")
        async def who() -> None: ...

        @app.middleware("http")
        async def look(request: Any, call_next: Any) -> Any:
            answer = await call_next(request)
            seen.append(request.scope["fewstep_key"])
            return answer

        TestClient(app).get(path, headers=headers)
        return seen.pop()

    asked = Settings(keys_file=keys.file)
    assert identity(asked, bearer(keys.good), "/who") == keys.good[3:11]
    assert identity(asked, bearer(keys.models_only), PATH) == keys.models_only[3:11]
    assert identity(asked, bearer("none"), "/who") == "anonymous"
    assert identity(asked, bearer(keys.good), "/livez") == "anonymous"
    assert identity(Settings(), bearer(keys.good), "/who") == "anonymous"


@pytest.fixture(scope="module")
def server(tiny_repository: Path, keys: Keys) -> Iterator[Server]:
    """The real gateway on every address, with keys, over the engine in process."""
    server = start_server(tiny_repository, "inprocess", "--host", "0.0.0.0", "--keys-file", str(keys.file))
    yield server
    server.stop()


def test_a_refusal_comes_at_once_and_before_the_body(server: Server, keys: Keys) -> None:
    """The body never comes, and is larger than any that would be read."""
    host, port = server.url.removeprefix("http://").split(":")
    waits = []
    for key in ["", keys.revoked, keys.models_only] * 10:
        lines = [f"POST {PATH} HTTP/1.1", f"Host: {host}", "Content-Type: application/json", "Content-Length: 99999999"]
        lines += [f"Authorization: Bearer {key}"] if key else []
        with socket.create_connection((host, int(port)), timeout=5) as connection:
            begin = time.perf_counter()
            connection.sendall("\r\n".join([*lines, "", ""]).encode())
            first = connection.recv(4096).split(b"\r\n")[0]
            waits.append(time.perf_counter() - begin)
        assert first.split()[1] == (b"403" if key == keys.models_only else b"401")
    assert sorted(waits)[len(waits) // 2] < 0.05, waits


def test_fewstep_eval_sends_the_key_it_is_given(server: Server, keys: Keys) -> None:
    from benchmarks.evaluate import caller, counts_of

    assert counts_of(caller(server.url, keys.good)) == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="answered 401"):
        counts_of(caller(server.url, None))


def test_the_openai_client_gets_pictures_with_a_good_key_and_its_own_errors_with_a_bad_one(server: Server, keys: Keys) -> None:
    def client(key: str) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)

    assert client(keys.good).images.generate(model="tiny", prompt="a red circle").data
    for key in ("sk-wrong", keys.revoked):
        with pytest.raises(openai.AuthenticationError) as caught:
            client(key).images.generate(model="tiny", prompt="a red circle")
        assert caught.value.code == "invalid_api_key"
    with pytest.raises(openai.PermissionDeniedError):
        client(keys.models_only).images.generate(model="tiny", prompt="a red circle")
    for _ in range(2):
        client(keys.slow).models.list()
    with pytest.raises(openai.RateLimitError):
        client(keys.slow).models.list()


def test_keys_are_made_and_revoked_while_the_server_runs(server: Server, keys: Keys) -> None:
    def command(*arguments: str) -> str:
        full = [sys.executable, str(ROOT / "fewstep.py"), "keys", *arguments, "--keys-file", str(keys.file)]
        return subprocess.run(full, check=True, capture_output=True, text=True).stdout.strip()

    def becomes(status: int) -> float:
        begin = time.monotonic()
        while httpx.get(f"{server.url}/v1/models", headers=bearer(key)).status_code != status:
            assert time.monotonic() - begin < 5
            time.sleep(0.05)
        return time.monotonic() - begin

    key = command("create", "rotated")
    assert becomes(200) < 2
    command("revoke", key[3:11])
    assert becomes(401) < 2


def test_off_loopback_without_a_key_nothing_starts(tiny_repository: Path) -> None:
    command = [sys.executable, str(ROOT / "fewstep.py"), "serve", "--host", "0.0.0.0", "--port", "0"]
    ended = subprocess.run(
        [*command, "--model-repository", str(tiny_repository)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 1
    assert ended.stdout == ""
    (line,) = ended.stderr.splitlines()
    assert "fewstep keys create" in line


def listening(server: Server) -> dict[tuple[str, int], str]:
    """(address, port) -> process name of every socket that the server's processes listen on."""
    found = {}
    for pid in [server.process.pid, *server.children()]:
        for connection in psutil.Process(pid).net_connections("inet"):
            if connection.status == psutil.CONN_LISTEN or connection.type == socket.SOCK_DGRAM:
                found[connection.laddr.ip.removeprefix("::ffff:"), connection.laddr.port] = psutil.Process(pid).name()
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="the Triton wheel exists for Linux alone")
def test_with_triton_only_the_gateway_s_port_is_off_loopback_and_no_key_is_told_to_anybody(
    tiny_repository: Path, keys: Keys, tmp_path: Path
) -> None:
    """Success, errors and a killed Triton; then everything that was answered, printed or logged is searched for the keys."""
    flags = ("--host", "0.0.0.0", "--keys-file", str(keys.file))
    server = start_server(tiny_repository, "triton", *flags, TMPDIR=str(tmp_path))
    heard: list[str] = []
    try:
        port = int(server.url.rpartition(":")[2])
        sockets = listening(server)
        assert len(sockets) >= 3, "the gateway's and Triton's two"
        assert {place for place in sockets if not place[0].startswith("127.")} == {("0.0.0.0", port)}

        threads = [threading.Thread(target=heard_from, args=(server, key, heard)) for key in (keys.good, keys.models_only)]
        for thread in threads:
            thread.start()
        os.kill(server.children()[0], signal.SIGKILL)
        for thread in threads:
            thread.join()
        for log in tmp_path.glob("fewstep-triton-*/log"):
            heard.append(log.read_text(errors="replace"))
        children = [psutil.Process(server.process.pid), *(psutil.Process(pid) for pid in server.children())]
        heard += [" ".join(process.cmdline()) for process in children]
    finally:
        server.process.send_signal(signal.SIGTERM)
        output, _ = server.process.communicate(timeout=30)
    errors = server.log.read_text()
    everything = "\n".join([*heard, output, errors])
    assert "Triton is gone" in errors, "the crash was seen"
    assert "HTTP/1.1 200" in everything
    assert "HTTP/1.1 400" in everything
    for key in (keys.good, keys.models_only):
        assert key.split("_", 2)[2] not in everything
        assert CANARY_PROMPT not in everything


def heard_from(server: Server, key: str, heard: list[str]) -> None:
    """Asks for all kinds of things with a key, good and bad, and keeps what is answered."""
    asks: list[tuple[str, str, dict[str, Any]]] = [
        ("POST", PATH, {"json": BODY | {"prompt": CANARY_PROMPT}, "headers": {"accept": "image/png"}}),
        ("POST", PATH, {"json": BODY | {"prompt": CANARY_PROMPT}}),
        ("POST", PATH, {"json": BODY | {"prompt": CANARY_PROMPT, "seed": -1}}),
        ("POST", PATH, {"content": b"{", "headers": {"content-type": "application/json"}}),
        ("GET", "/metrics", {}),
        ("GET", "/v1/models", {}),
        ("GET", "/v1/models/none", {}),
        ("PATCH", "/v1/models", {}),
    ]
    with httpx.Client(base_url=server.url, timeout=60) as client:
        for _ in range(5):
            for method, path, rest in asks:
                with contextlib.suppress(httpx.TransportError):  # the crash
                    answer = client.request(method, path, **rest | {"headers": rest.get("headers", {}) | bearer(key)})
                    pairs = "\n".join(f"{name}: {value}" for name, value in answer.headers.items())
                    heard.append(f"HTTP/1.1 {answer.status_code}\n{pairs}\n\n{answer.text}")
            time.sleep(0.2)
