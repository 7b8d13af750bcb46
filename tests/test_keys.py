"""Keys at rest: nothing in the file opens a door, writers exclude each other, and a server hears of changes."""

import hashlib
import json
import logging
import math
import os
import re
import stat
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from fewstep import app
from server.gateway.errors import ApiError
from server.gateway.keys import Key, KeysError, KeyStore, create, read, revoke
from server.gateway.limits import WINDOW_SECONDS, Usage
from tests.fakes import FakeClock

KEY = Key(prefix="0" * 8, name="a", sha256="0" * 64, scopes=("images",), created=datetime.now(UTC))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["keys", *arguments])


def test_a_key_is_found_by_itself_and_by_nothing_else(file: Path) -> None:
    whole, other = create(file, "alice", ["images"]), create(file, "bob", ["images"])
    store = KeyStore(file)
    found = store.find(whole)
    assert found is not None
    assert (found.name, found.prefix) == ("alice", whole.split("_")[1])
    mixed = whole[:12] + other[12:]
    for wrong in ("", whole[:-1], whole + "a", whole.upper(), mixed, whole[3:], f" {whole}", whole + "\n", "é", found.sha256):
        assert store.find(wrong) is None, wrong


def test_the_file_holds_hashes_alone_and_is_its_owner_s_alone(file: Path) -> None:
    whole = create(file, "alice", ["images"])
    secret = whole.split("_", 2)[2]
    assert re.fullmatch(r"fs_[0-9a-f]{8}_[A-Za-z0-9_-]{43}", whole)
    assert secret not in file.read_text()
    assert hashlib.sha256(whole.encode()).hexdigest() in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    create(file, "bob", ["images"])
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert os.listdir(file.parent) == [file.name]


def test_keys_made_at_once_by_many_processes_are_all_kept(file: Path) -> None:
    with ProcessPoolExecutor(4) as pool:
        wholes = list(pool.map(create, [file] * 24, ["a"] * 24, [("images",)] * 24))
    store = KeyStore(file)
    assert len(store.keys) == 24
    assert all(store.find(whole) for whole in wholes)


def test_a_failed_write_leaves_the_old_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create(file, "alice", ["images"])
    before = file.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        create(file, "bob", ["images"])
    assert file.read_bytes() == before
    assert os.listdir(file.parent) == [file.name]


def test_a_link_to_the_file_stays_a_link(file: Path, tmp_path: Path) -> None:
    create(file, "alice", ["images"])
    (link := tmp_path / "link.json").symlink_to(file)
    create(link, "bob", ["images"])
    assert link.is_symlink()
    assert len(read(file).keys) == 2


def test_a_revoked_key_is_remembered_and_revoking_twice_changes_nothing(file: Path) -> None:
    whole = create(file, "alice", ["images"])
    first = revoke(file, f"fs_{whole[3:11]}")
    assert revoke(file, whole[3:11]) == first
    found = KeyStore(file).find(whole)
    assert found is not None
    assert found.state(datetime.now(UTC)) == "revoked"
    with pytest.raises(KeysError, match="has no key"):
        revoke(file, "00000000")


def test_a_key_expires_to_the_second(file: Path) -> None:
    create(file, "alice", ["images"], days=1)
    (key,) = read(file).keys
    assert key.expires == key.created + timedelta(days=1)
    assert key.state(key.expires - timedelta(seconds=1)) == "active"
    assert key.state(key.expires) == "expired"


def test_a_server_hears_of_changes_but_looks_once_a_second_at_most(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock()
    first = create(file, "alice", ["images"])
    store = KeyStore(file, clock)
    second = create(file, "bob", ["images"])
    looks: list[object] = []
    real = Path.stat
    monkeypatch.setattr(Path, "stat", lambda self, **options: looks.append(self) or real(self, **options))
    clock.now = 0.99
    assert [store.find(second) for _ in range(100)] == [None] * 100
    assert looks == []
    clock.now = 1.0
    assert all(store.find(second) for _ in range(100))
    assert len(looks) == 1
    revoke(file, first[3:11])
    clock.now = 2.0
    found = store.find(first)
    assert found is not None
    assert found.revoked


@pytest.mark.parametrize("contents", [b"", b"{", b'{"keys": [{}]}', b'{"keys": [], "more": 1}', b"\xff", None])
def test_a_broken_file_keeps_the_last_good_keys_and_is_told_once(
    file: Path, contents: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    clock = FakeClock()
    whole = create(file, "alice", ["images"])
    store = KeyStore(file, clock)
    good = file.read_bytes()
    file.unlink() if contents is None else file.write_bytes(contents)
    with caplog.at_level(logging.ERROR, "fewstep"):
        for clock.now in (1.0, 2.0, 3.0):
            assert store.find(whole)
    assert len(caplog.records) == 1
    assert str(file) in caplog.text
    assert "\n" not in caplog.records[0].getMessage()
    file.write_bytes(good)
    revoke(file, whole[3:11])
    clock.now = 4.0
    found = store.find(whole)
    assert found is not None
    assert found.revoked
    with pytest.raises(KeysError):
        KeyStore(file.with_name("none.json"))


@pytest.mark.parametrize("name", ["", "a" * 65, "new\nline", "slash/"])
def test_illegal_names_and_scopes_make_no_key(name: str, file: Path) -> None:
    with pytest.raises(KeysError, match="name"):
        create(file, name, ["images"])
    with pytest.raises(KeysError, match="scopes"):
        create(file, "alice", ["everything"])
    assert not file.exists()


def test_the_command_makes_shows_and_revokes_keys(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSTEP_KEYS_FILE", str(file))
    monkeypatch.chdir(file.parent)
    made = run("create", "alice", "--scopes", "images,metrics", "--requests-per-minute", "9", "--expires", "2")
    whole = made.stdout.strip()
    assert KeyStore(file).find(whole)
    assert whole not in made.stderr
    listed = run("list").stdout
    assert listed.splitlines()[1].split()[:6] == [whole[3:11], "alice", "active", "images,metrics", "9", "-"]
    assert whole[12:] not in listed
    assert run("revoke", whole[3:11]).exit_code == 0
    assert "revoked" in run("list").stdout


@pytest.mark.parametrize(
    "arguments",
    [("create", "alice"), ("list",), ("list", "--keys-file", "none.json"), ("create", "a", "--keys-file", "no/keys.json")],
)
def test_a_command_that_cannot_do_it_says_so_in_a_line(
    arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 1
    assert len(result.output.splitlines()) == 1


def test_the_file_is_plain_json(file: Path) -> None:
    create(file, "alice", ["images"], concurrency=2)
    (key,) = json.loads(file.read_text())["keys"]
    assert set(key) == {"prefix", "name", "sha256", "scopes", "concurrency", "created"}


def refused(usage: Usage, key: Key) -> ApiError | None:
    try:
        usage.enter(key)
    except ApiError as refusal:
        return refusal
    return None


@given(
    rate=st.integers(1, 5),
    gaps=st.lists(st.floats(0, 50, allow_nan=False), max_size=40),
)
def test_no_sixty_seconds_hold_more_requests_than_the_rate(rate: int, gaps: list[float]) -> None:
    clock = FakeClock()
    usage, key = Usage(clock), KEY.model_copy(update={"requests_per_minute": rate})
    accepted: list[float] = []
    for gap in gaps:
        clock.now += gap
        refusal = refused(usage, key)
        if refusal is not None:
            assert sum(time > clock.now - WINDOW_SECONDS for time in accepted) == rate, "refused too early"
            clock.now += int((refusal.headers or {})["retry-after-ms"]) / 1000 + 1e-6
            assert refused(usage, key) is None, "refused at the time it was told"
        accepted.append(clock.now)
    for time in accepted:
        assert sum(time - WINDOW_SECONDS < other <= time for other in accepted) <= rate


def test_a_refusal_says_when_to_come_back() -> None:
    clock = FakeClock()
    usage, key = Usage(clock), KEY.model_copy(update={"requests_per_minute": 2, "concurrency": 5})
    usage.enter(key)
    clock.now = 10.5
    usage.enter(key)
    clock.now = 20.25
    with pytest.raises(ApiError) as caught:
        usage.enter(key)
    seconds = 60 - 20.25
    assert caught.value.status == 429
    assert caught.value.headers == {
        "RateLimit-Policy": '"requests";q=2;w=60, "concurrency";q=5;qu="concurrent-requests"',
        "RateLimit": f'"requests";r=0;t={math.ceil(seconds)}, "concurrency";r=3',
        "Retry-After": "40",
        "retry-after-ms": "39750",
        "x-should-retry": "true",
    }


def test_places_at_once_are_given_back() -> None:
    usage, key = Usage(FakeClock()), KEY.model_copy(update={"concurrency": 2})
    for _ in range(3):
        usage.enter(key)
        usage.enter(key)
        with pytest.raises(ApiError):
            usage.enter(key)
        usage.leave()
        usage.leave()
    assert usage.headers(KEY) == {}
