"""One schema, three places to write it, and no value that is silently ignored or shown when it is secret."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from typer.testing import CliRunner, Result

from fewstep import app
from server.gateway.keys import create
from server.gateway.settings import OTHER_VARIABLES, Settings, SettingsError, as_toml, load

CANARY = "canary-secret-0123456789"


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory without fewstep.toml."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def complaints(flags: dict[str, Any], config: Path | None = None) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        load(flags, config)
    assert all("\n" not in line for line in caught.value.complaints)
    return caught.value.complaints


def check(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["serve", "--check", *arguments])


def test_flags_go_before_the_environment_that_before_the_file_that_before_defaults(
    nowhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (nowhere / "fewstep.toml").write_text('port = 1\ngrace_seconds = 1\nkey_share = 0.25\ncors_origins = ["https://a.example"]')
    monkeypatch.setenv("FEWSTEP_PORT", "2")
    monkeypatch.setenv("FEWSTEP_GRACE_SECONDS", "2")
    settings, origins = load({"port": 3})
    assert (settings.port, settings.grace_seconds, settings.key_share, settings.backend) == (3, 2, 0.25, "triton")
    assert settings.cors_origins == ("https://a.example",)
    assert origins == {
        "port": "flag",
        "grace_seconds": "environment",
        "key_share": "fewstep.toml",
        "cors_origins": "fewstep.toml",
    }


def test_the_file_is_named_by_flag_or_by_environment(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for port in (1, 2):
        (nowhere / f"{port}.toml").write_text(f"port = {port}")
    monkeypatch.setenv("FEWSTEP_CONFIG", "1.toml")
    assert load({})[0].port == 1
    assert load({}, Path("2.toml"))[0].port == 2
    assert complaints({}, Path("3.toml")) == ["3.toml: there is no such configuration file"]


@pytest.mark.parametrize("where", ["file", "environment", "flag"])
def test_an_unknown_name_is_refused_with_the_legal_ones(where: str, nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if where == "file":
        (nowhere / "fewstep.toml").write_text("prot = 1")
    if where == "environment":
        monkeypatch.setenv("FEWSTEP_PROT", "1")
    (line,) = complaints({"prot": 1} if where == "flag" else {})
    legal = line.partition("legal are ")[2].split(", ")
    if where == "environment":
        assert "FEWSTEP_PROT" in line
        assert set(legal) == {f"FEWSTEP_{name.upper()}" for name in Settings.model_fields} | OTHER_VARIABLES
    else:
        assert "'prot'" in line
        assert set(legal) == set(Settings.model_fields)


def test_the_engine_s_own_variable_and_empty_variables_are_no_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSTEP_LOCKS", "/tmp")
    monkeypatch.setenv("FEWSTEP_KEYS_FILE", "")
    assert load({}) == (Settings(), {})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", 65536),
        ("port", "eighty"),
        ("backend", "tensorflow"),
        ("key_share", 0),
        ("key_share", "nan"),
        ("max_queue_seconds", "inf"),
        ("request_timeout_ms", 0),
        ("result_cache", "perhaps"),
        ("url_ttl_seconds", 10**9),
        ("public_url", "images.example"),
        ("cors_origins", "https://a.example/path"),
        ("log_format", "xml"),
        ("max_body_bytes", 1),
        ("jobs_storage", "gs://bucket"),
        ("jobs_storage", "s3://"),
        ("video_workers", -1),
        ("video_attempts", 0),
        ("video_ttl_seconds", 0),
        ("max_video_queue_seconds", "nan"),
    ],
)
def test_an_illegal_value_is_one_line_with_its_name_origin_and_value(name: str, value: Any) -> None:
    (line,) = complaints({name: value})
    assert line.startswith(f"{name} (flag): ")
    assert str(value) in line


def test_every_mistake_is_told_at_once() -> None:
    assert len(complaints({"port": -1, "grace_seconds": -1, "key_share": 2})) == 3


def test_lists_are_written_with_commas_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSTEP_CORS_ORIGINS", "https://a.example, http://localhost:3000")
    assert load({})[0].cors_origins == ("https://a.example", "http://localhost:3000")


def test_opentelemetry_s_own_variable_is_heard_after_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4318")
    assert load({})[0].otlp_endpoint == "http://collector:4318"
    monkeypatch.setenv("FEWSTEP_OTLP_ENDPOINT", "http://other:4318")
    assert load({})[0].otlp_endpoint == "http://other:4318"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.7", "example.org", ""])
def test_off_loopback_without_keys_is_refused_with_the_way_out(host: str, nowhere: Path) -> None:
    (line,) = complaints({"host": host})
    assert "fewstep keys create" in line
    assert "allow_no_keys" in line
    assert load({"host": host, "allow_no_keys": True})[0].host == host
    assert load({"host": host, "keys_file": nowhere / "keys.json"})[0].host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback_needs_no_key(host: str) -> None:
    assert load({"host": host})[0].host == host


def test_settings_are_frozen_and_closed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Settings().port = 1  # type: ignore[misc]
    with pytest.raises(ValidationError, match="Extra inputs"):
        Settings(prot=1)  # type: ignore[call-arg]


def test_an_object_made_in_code_reads_neither_environment_nor_file(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSTEP_PORT", "1")
    (nowhere / "fewstep.toml").write_text("grace_seconds = 1")
    assert (Settings().port, Settings().grace_seconds) == (8000, 30)


def test_what_check_prints_gives_the_same_settings_again(nowhere: Path) -> None:
    flags = {"port": 1, "cors_origins": "https://a.example", "public_url": 'https://a.example/"é', "keys_file": "k.json"}
    settings, origins = load(flags)
    printed = as_toml(settings, origins)
    assert Settings(**tomllib.loads(printed)) == settings
    assert all(f"{name} = " in printed for name in Settings.model_fields)
    assert all(field.description for field in Settings.model_fields.values())


def test_check_names_origins_masks_secrets_and_ends_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSTEP_URL_SECRET", CANARY)
    result = check("--port", "8123", "--set", "key_share=0.75")
    assert result.exit_code == 0
    lines = {line.partition(" = ")[0]: " ".join(line.split()) for line in result.output.splitlines()}
    assert lines["port"] == "port = 8123 # flag"
    assert lines["key_share"] == "key_share = 0.75 # flag"
    assert lines["grace_seconds"] == "grace_seconds = 30 # default"
    assert lines["# url_secret"] == '# url_secret = "**********" # environment'
    assert CANARY not in result.output


def test_a_secret_is_in_no_complaint_and_no_representation(monkeypatch: pytest.MonkeyPatch) -> None:
    assert CANARY not in repr(Settings(url_secret=CANARY)) + str(Settings(url_secret=CANARY))  # type: ignore[arg-type]
    short = CANARY[:12]
    monkeypatch.setenv("FEWSTEP_URL_SECRET", short)
    result = check("--port", "-1")
    assert result.exit_code == 1
    assert "url_secret (environment)" in result.output
    assert short not in result.output
    monkeypatch.setenv("FEWSTEP_URL_SECRET", CANARY)
    assert CANARY not in check("--set", f"url_secret={CANARY}", "--set", f"url_secret={CANARY}").output


@pytest.mark.parametrize("url", ["mysql://me:{}@host/jobs", "postgresql:{}", "sqlite://", "{}"])
def test_the_database_of_jobs_is_one_that_is_known_and_its_password_is_in_no_complaint(url: str) -> None:
    (line,) = complaints({"jobs_url": url.format(CANARY)})
    assert line.startswith("jobs_url (flag): ")
    assert "sqlite:///FILE and postgresql://USER:PASSWORD@HOST/DATABASE" in line
    assert CANARY not in line


def test_the_database_of_jobs_is_masked_since_it_may_hold_a_password() -> None:
    url = f"postgresql://me:{CANARY}@host/jobs"
    assert CANARY not in repr(load({"jobs_url": url})[0])
    result = check("--set", f"jobs_url={url}", "--set", "jobs_storage=s3://bucket/videos", "--set", "video_workers=0")
    assert result.exit_code == 0
    assert '# jobs_url = "**********"' in result.output
    assert CANARY not in result.output


def test_check_says_each_mistake_in_a_line_and_ends_with_1() -> None:
    result = check("--port", "70000", "--set", "key_share=7")
    assert result.exit_code == 1
    assert [line.split()[:2] for line in result.output.splitlines()] == [["fewstep:", "port"], ["fewstep:", "key_share"]]


def test_check_opens_the_file_of_keys() -> None:
    result = check("--keys-file", "none.json")
    assert result.exit_code == 1
    assert "none.json" in result.output
    create(Path("keys.json"), "alice", ["images"])
    assert check("--keys-file", "keys.json", "--host", "0.0.0.0").exit_code == 0


@pytest.mark.parametrize("change", ["key_share", "port=1"])
def test_set_takes_pairs_and_each_name_once(change: str) -> None:
    result = check("--port", "1", "--set", change)
    assert result.exit_code == 1
    assert len(result.output.splitlines()) == 1


@pytest.mark.parametrize("text", ["port = ", "port = 1\nport = 2", b"\xff".decode("latin-1")])
def test_a_file_that_is_no_toml_is_one_line(nowhere: Path, text: str) -> None:
    (nowhere / "fewstep.toml").write_text(text, encoding="latin-1")
    (line,) = complaints({})
    assert line.startswith("fewstep.toml: ")
