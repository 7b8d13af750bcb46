"""Logs on stderr, one line per entry: JSON for machines, text for a terminal. stdout keeps the ready line alone."""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any, Literal

LogFormat = Literal["json", "text"]


def configure_logging(format: LogFormat) -> None:
    """Sends everything of this process through one handler, uvicorn's and other libraries' warnings included."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if format == "json" else TextLines())
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("fewstep").setLevel(logging.INFO)
    logging.captureWarnings(True)


def fields_of(entry: logging.LogRecord) -> dict[str, Any]:
    """What an entry says beside its message; see `extra={"fields": …}`."""
    fields = getattr(entry, "fields", {})
    return dict(fields) if isinstance(fields, dict) else {}


class JsonLines(logging.Formatter):
    """ASCII alone, so that nothing in an entry can end its line."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": moment(record).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **fields_of(record),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=repr)


class TextLines(logging.Formatter):
    """For people. Lines of a traceback begin with ` | `, so that none can pass for an entry."""

    def format(self, record: logging.LogRecord) -> str:
        pairs = "".join(f" {name}={value}" for name, value in fields_of(record).items() if value not in (None, ""))
        lines = [f"{moment(record):%H:%M:%S.%f} {record.levelname:<7} {record.getMessage()}{pairs}"]
        if record.exc_info:
            lines += [f" | {line}" for line in self.formatException(record.exc_info).splitlines()]
        return "\n".join(map(printable, lines))


def printable(text: str) -> str:
    """Text in which control characters, line ends of all kinds among them, are escaped."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def moment(record: logging.LogRecord) -> datetime:
    return datetime.fromtimestamp(record.created, UTC)
