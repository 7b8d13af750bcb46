"""/docs in a real chromium: complete without anybody else's server, and with keys for who has one."""

from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, expect

from tests.conftest import start_server


def test_docs_are_read_without_asking_anybody_else(tiny_repository: Path, browser: Browser) -> None:
    server = start_server(tiny_repository, "inprocess")
    page = browser.new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(server.url + "/docs")
    expect(page.get_by_text("/v1/images/generations", exact=True)).to_be_visible(timeout=30_000)
    assert asked
    assert not [url for url in asked if not url.startswith((server.url, "data:"))]
    page.close()
    assert server.stop() == 0


@pytest.mark.parametrize("name", ["swagger-ui-bundle.js", "swagger-ui.css"])
def test_scripts_of_the_docs_are_there_and_others_are_not(tiny_repository: Path, name: str) -> None:
    server = start_server(tiny_repository, "inprocess")
    with httpx.Client(base_url=server.url) as client:
        assert client.get(f"/docs-assets/{name}").status_code == 200
        for other in ("none.js", "..%2f..%2fapp.py", ""):
            answer = client.get(f"/docs-assets/{other}")
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
        answer = client.post(f"/docs-assets/{name}")
        assert answer.status_code == 405
        assert "GET" in answer.headers["allow"]
    assert server.stop() == 0
