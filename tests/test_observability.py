"""The dashboard and the alert rules name only metrics and labels that /metrics has, and are what their programs can read."""

import asyncio
import json
import re
from collections.abc import Iterator
from typing import Any

import promql_parser as promql
import pytest
import yaml
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from server.gateway.app import create_app
from server.gateway.inprocess_backend import InProcessBackend
from server.gateway.settings import Settings
from tests.conftest import ROOT
from tests.tiny_student import build_tiny_student
from tests.tiny_video import build_tiny_video

FOLDER = ROOT / "server" / "observability"
DASHBOARD = json.loads((FOLDER / "dashboard.json").read_text())
RULES = [rule for group in yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"] for rule in group["rules"]]
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
PATH = "/v1/images/generations"
SET_BY_PROMETHEUS = {"instance", "job"}


def parsed(expression: str) -> Any:
    """The syntax tree of a PromQL expression, Grafana's variables filled in."""
    return promql.parse(expression.replace("$__rate_interval", "1m").replace("$model", ".*"))


def selectors(node: Any) -> Iterator[promql.VectorSelector]:
    """Every `name{label="value"}` below a node."""
    if isinstance(node, promql.VectorSelector):
        yield node
    for name in ("expr", "lhs", "rhs", "vector_selector"):
        if (below := getattr(node, name, None)) is not None:
            yield from selectors(below)
    for argument in getattr(node, "args", None) or []:
        yield from selectors(argument)


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """By name of a series: its labels, as /metrics shows them after traffic of every kind."""
    repository = tmp_path_factory.mktemp("students")
    build_tiny_student(repository)
    build_tiny_student(repository, "poisoned", poisoned=True)
    build_tiny_video(repository)
    backend = InProcessBackend(repository)
    asyncio.run(backend.start())
    app = create_app(backend, Settings(jobs_folder=tmp_path_factory.mktemp("jobs"), video_workers=0))
    with TestClient(app) as client:
        client.portal.call(app.state.videos.start)  # type: ignore[union-attr]
        traffic(client)
        text = client.get("/metrics").text
        client.portal.call(app.state.videos.stop)  # type: ignore[union-attr]
    asyncio.run(backend.stop())
    return {sample.name: set(sample.labels) for family in text_string_to_metric_families(text) for sample in family.samples}


def traffic(client: TestClient) -> None:
    """An image, a stream, a numerical error, a cancellation, a reject and a video that fails."""
    video = client.post("/v1/videos", json={"prompt": "a"}).json()
    assert client.post(f"/v1/videos/{video['id']}/cancel").json()["status"] == "failed"
    ask = {"prompt": "a", "model": "tiny"}
    assert client.post(PATH, json=ask).status_code == 200
    assert client.post(PATH, json=ask | {"stream": True, "partial_images": 1}).status_code == 200
    assert client.post(PATH, json=ask | {"model": "poisoned", "steps": 2}).status_code == 500
    state = client.app.state  # type: ignore[attr-defined]
    state.backend.metrics["tiny"].add("fewstep_cancelled_total", at="nfe1")  # a race otherwise; see test_streaming.py
    state.drain.draining = True
    assert client.post(PATH, json=ask).status_code == 503
    state.drain.draining = False


def test_every_expression_is_promql_over_metrics_and_labels_that_exist(shown: dict[str, set[str]]) -> None:
    expressions = QUERIES + [rule["expr"] for rule in RULES]
    assert len(expressions) > 20
    for expression in expressions:
        found = list(selectors(parsed(expression)))
        assert found, expression
        for selector in found:
            assert selector.name in shown, selector.name
            assert {matcher.name for matcher in selector.matchers.matchers} <= shown[selector.name] | SET_BY_PROMETHEUS
        grouped = {label.strip() for group in re.findall(r"(?:by|on) \(([^)]*)\)", expression) for label in group.split(",")}
        assert grouped <= set().union(*(shown[selector.name] for selector in found)) | SET_BY_PROMETHEUS, expression


def test_legends_and_messages_name_labels_that_their_expressions_keep(shown: dict[str, set[str]]) -> None:
    texts = [(t["legendFormat"], t["expr"]) for panel in DASHBOARD["panels"] for t in panel["targets"]]
    texts += [(" ".join(rule["annotations"].values()).replace("$labels.", ""), rule["expr"]) for rule in RULES]
    for text, expression in texts:
        used = set(re.findall(r"{{ ?([a-z]+) ?}}", text))
        kept = {label.strip() for group in re.findall(r"by \(([^)]*)\)", expression) for label in group.split(",")}
        if not kept:
            kept = set().union(*(shown[selector.name] for selector in selectors(parsed(expression)))) | SET_BY_PROMETHEUS
        assert used <= kept, (text, expression)


def test_a_name_that_does_not_exist_would_be_found() -> None:
    (one, two) = selectors(parsed("sum by (x) (rate(no_such_total[5m])) / (1 + histogram_quantile(0.5, nor_this_bucket))"))
    assert (one.name, two.name) == ("no_such_total", "nor_this_bucket")


def test_every_metric_of_the_contract_is_on_the_dashboard(shown: dict[str, set[str]]) -> None:
    drawn = {re.sub(r"_(bucket|sum|count)$", "", selector.name) for query in QUERIES for selector in selectors(parsed(query))}
    exist = {re.sub(r"_(bucket|sum|count)$", "", name) for name in shown if name.startswith("fewstep_")}
    assert drawn == exist


def test_panels_have_ids_of_their_own_and_do_not_overlap() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24


def test_every_rule_says_how_urgent_it_is_and_what_it_means() -> None:
    assert len({rule["alert"] for rule in RULES}) == len(RULES) >= 5
    for rule in RULES:
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert rule["annotations"]["summary"]
