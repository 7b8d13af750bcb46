"""Finished images on disk: one file each, complete or absent, checked when read, the least recently used go first.

Own code, since the well-known disk caches store pickles, which run whatever somebody has put there.
"""

import hashlib
import json
import logging
import os
import tempfile
import threading
from dataclasses import asdict
from pathlib import Path

from server.gateway.made import Made
from server.gateway.media import Encoded

logger = logging.getLogger("fewstep")

SUFFIX = ".result"
FIELDS = ("pixel_sha256", "tokens", "fingerprint")


class ResultFiles:
    """A folder that several servers may share. A disk that is full or gone costs repeats, never an answer."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        """Raises OSError when the folder cannot be made."""
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.folder, self.limit_bytes = folder, limit_bytes
        self.lock = threading.Lock()
        self.used = sum(file.stat().st_size for file in self.files())

    def files(self) -> list[Path]:
        return list(self.folder.glob(f"*{SUFFIX}"))

    def path(self, key: str) -> Path:
        return self.folder / (key + SUFFIX)

    def read(self, key: str, image_index: int) -> Made | None:
        """A kept image; None when there is none, or one that is damaged."""
        path = self.path(key)
        try:
            header, content = path.read_bytes().split(b"\n", 1)
            said = json.loads(header)
            if hashlib.sha256(content).hexdigest() != said.pop("sha256"):
                raise ValueError("another digest")
            os.utime(path)
            return Made(image_index, Encoded(content, 0), **said, nanoseconds={}, round_trip=0)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("a result on disk is damaged and will be made again: %s", type(error).__name__)
            return None

    def write(self, key: str, made: Made) -> None:
        """Puts a file in place whole, and makes room for it."""
        said = {name: value for name, value in asdict(made).items() if name in FIELDS}
        said["sha256"] = hashlib.sha256(made.file.content).hexdigest()
        contents = json.dumps(said).encode() + b"\n" + made.file.content
        if len(contents) > self.limit_bytes:
            return
        try:
            with tempfile.NamedTemporaryFile(dir=self.folder, delete=False) as file:
                file.write(contents)
            os.replace(file.name, self.path(key))
        except OSError as error:
            logger.warning("a result could not be kept on disk: %s", error.strerror)
            return
        with self.lock:
            self.used += len(contents)
            if self.used > self.limit_bytes:
                self.evict()

    def evict(self) -> None:
        """Deletes the least recently used until a tenth is free; counts anew, since others may write here too."""
        files = sorted((status.st_mtime, status.st_size, file) for file in self.files() if (status := stat(file)))
        self.used = sum(size for _, size, _ in files)
        for _, size, file in files:
            if self.used <= 0.9 * self.limit_bytes:
                break
            file.unlink(missing_ok=True)
            self.used -= size


def stat(file: Path) -> os.stat_result | None:
    """None for a file that somebody else has deleted."""
    try:
        return file.stat()
    except FileNotFoundError:
        return None
