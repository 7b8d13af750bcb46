"""The storage of files, in a folder and in S3, and what is swept out of it."""

import hashlib
import os
from pathlib import Path

import pytest

from server.jobs import storage as storage_module
from server.jobs.errors import JobsMisconfigured, NoSuchFile, StorageUnavailable
from server.jobs.models import Facts
from server.jobs.storage import LocalStorage, Storage, open_storage
from server.jobs.store import JobStore
from server.jobs.sweep import sweep
from tests.fakes import FakeClock

CONTENT = os.urandom(6_000_003)  # more than S3 takes in one part
FACTS = Facts("ef" * 32, "fp-1", 1.5, 200.0, {})


def read(storage: Storage, job_id: str, sha256: str, *part: int) -> bytes:
    return b"".join(storage.read(job_id, sha256, *part))


@pytest.mark.parametrize("from_file", [False, True])
def test_a_file_is_read_back_whole_and_in_parts(storage: Storage, tmp_path: Path, from_file: bool) -> None:
    (tmp_path / "clip").write_bytes(CONTENT)
    stored = storage.put("video_1", tmp_path / "clip" if from_file else CONTENT)
    assert stored == {"sha256": hashlib.sha256(CONTENT).hexdigest(), "size": len(CONTENT)}
    digest = stored["sha256"]
    assert read(storage, "video_1", digest) == CONTENT
    for begin, end in ((0, 1), (5, 5), (300_000, 900_001), (len(CONTENT) - 1, len(CONTENT))):
        assert read(storage, "video_1", digest, begin, end) == CONTENT[begin:end]
    assert read(storage, "video_1", digest, len(CONTENT) - 3) == CONTENT[-3:]


def test_a_file_that_is_written_twice_is_there_once(storage: Storage) -> None:
    stored = storage.put("video_1", b"clip")
    assert storage.put("video_1", b"clip") == stored
    assert storage.prune("video_1") == 1


def test_a_file_that_is_not_there_is_told_at_once(storage: Storage) -> None:
    digest = storage.put("video_1", b"clip")["sha256"]
    for job_id, sha256 in (("video_1", "0" * 64), ("video_2", digest)):
        with pytest.raises(NoSuchFile):
            storage.read(job_id, sha256)


def test_pruning_keeps_what_it_is_told_to_keep_of_one_job_alone(storage: Storage) -> None:
    kept, gone, other = storage.put("video_1", b"a"), storage.put("video_1", b"b"), storage.put("video_2", b"b")
    assert set(storage.job_ids()) == {"video_1", "video_2"}
    assert storage.prune("video_1", frozenset({kept["sha256"]})) == 1
    assert read(storage, "video_1", kept["sha256"]) == b"a"
    assert read(storage, "video_2", other["sha256"]) == b"b"
    with pytest.raises(NoSuchFile):
        storage.read("video_1", gone["sha256"])
    assert storage.prune("video_1") == 1
    assert storage.prune("video_1") == 0
    assert set(storage.job_ids()) == {"video_2"}


def test_the_sweep_deletes_what_no_job_refers_to_and_nothing_that_one_may_yet_refer_to(
    storage: Storage, tmp_path: Path, clock: FakeClock
) -> None:
    store = JobStore(f"sqlite:///{tmp_path}/jobs.sqlite", expiry_seconds=100, clock=clock)
    done, running, failed, deleted = (store.create({}, "ann", 1)[0].id for _ in range(4))
    strangers = storage.put("video_of_another_database", b"x")
    digests = {job_id: storage.put(job_id, b"clip")["sha256"] for job_id in (done, running, failed, deleted)}
    storage.put(done, b"of an attempt whose worker died before it said so")
    lease = store.claim("w")
    assert lease
    store.complete(lease, {"video": {"sha256": digests[done], "size": 4}}, FACTS)
    store.claim("w")
    store.cancel(failed, "ann")
    store.delete(deleted, "ann")
    assert (sweep(store, storage), sweep(store, storage)) == (3, 0)
    assert set(storage.job_ids()) == {done, running, "video_of_another_database"}
    assert read(storage, done, digests[done]) == b"clip"
    clock.now += 100
    assert sweep(store, storage) == 1
    assert set(storage.job_ids()) == {running, "video_of_another_database"}
    assert read(storage, "video_of_another_database", strangers["sha256"]) == b"x"
    store.close()


def test_a_file_has_its_name_only_once_its_bytes_are_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, seen = LocalStorage(tmp_path), []

    def fsync(descriptor: int) -> None:
        target = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        seen.append((target.name.startswith("."), sorted(name.name[:1] == "." for name in (tmp_path / "video_1").iterdir())))

    monkeypatch.setattr(storage_module.os, "fsync", fsync)
    storage.put("video_1", b"clip")
    # The parent's new folder, the temporary file while it alone is there, the folder once it holds the name.
    assert seen == [(False, []), (True, [True]), (False, [False])]


def test_a_storage_that_cannot_be_is_refused_in_one_line() -> None:
    for location in ("gs://bucket/x", "http://127.0.0.1/x"):
        with pytest.raises(JobsMisconfigured, match="legal are a folder and s3://BUCKET/PREFIX"):
            open_storage(location)


def test_s3_that_is_down_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ALLOW_HTTP": "true", "AWS_REGION": "x"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "any")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "any")
    down = open_storage("s3://clips/x")
    for act in (lambda: down.put("video_1", b"x"), lambda: down.read("video_1", "0" * 64), down.job_ids):
        with pytest.raises(StorageUnavailable):
            act()
