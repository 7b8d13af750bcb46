"""What every command says when something is wrong: one line on stderr, exit code 1, no traceback."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer

from server.engine.errors import EngineError


@contextmanager
def one_line_errors(extra: str) -> Iterator[None]:
    """Turns a user's error into one line on stderr and exit code 1; a missing package into how to install it."""
    try:
        yield
    except ModuleNotFoundError as error:
        fail(f"{error.name} is not installed: run `make venv`, or `pip install --editable '.[{extra}]'` in the checkout")
    except BrokenPipeError:
        raise  # who read the output has closed it, as `| head` does: click ends in silence
    except (ValueError, OSError, EngineError) as error:
        fail(" ".join(str(error).split()))


def fail(*messages: str) -> NoReturn:
    """Says what went wrong, a line each, and ends with exit code 1."""
    for message in messages:
        print(f"fewstep: {message}", file=sys.stderr)
    raise typer.Exit(1)
