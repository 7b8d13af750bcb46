"""`fewstep keys ...`: API keys made, shown and revoked."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from server.terminal import one_line_errors

keys = typer.Typer(no_args_is_help=True, help="API keys of `fewstep serve`: made, shown and revoked while it runs.")
KeysFile = Annotated[Path | None, typer.Option(help="the file (default: the setting keys_file, as `fewstep serve` has it)")]


@keys.command("create")
def keys_create(
    name: Annotated[str, typer.Argument(help="whose key it is, for you to remember")],
    keys_file: KeysFile = None,
    scopes: Annotated[str, typer.Option(help="of images, videos, models, metrics")] = "images,videos,models",
    requests_per_minute: Annotated[int | None, typer.Option(min=1, help="in any 60 seconds; default: no bound")] = None,
    concurrency: Annotated[int | None, typer.Option(min=1, help="requests at once; default: no bound")] = None,
    expires: Annotated[int | None, typer.Option(min=1, max=36500, help="days from now; default: never")] = None,
) -> None:
    """Makes a key and prints it, this once: the file keeps only what is needed to know it again.

    Example: fewstep keys create alice --keys-file keys.json --requests-per-minute 60
    """
    with one_line_errors("triton"):
        from server.gateway.keys import create

        file = configured(keys_file)
        print(create(file, name, scopes.split(","), requests_per_minute, concurrency, expires))
        print(f"kept nowhere else, so store it now; `fewstep serve --keys-file {file}` asks for it", file=sys.stderr)


@keys.command("list")
def keys_list(keys_file: KeysFile = None) -> None:
    """Shows all keys by their prefixes, the revoked and expired ones too.

    Example: fewstep keys list --keys-file keys.json
    """
    with one_line_errors("triton"):
        from server.gateway.keys import read, table

        print(table(read(configured(keys_file)).keys))


@keys.command("revoke")
def keys_revoke(
    prefix: Annotated[str, typer.Argument(help="the eight characters after fs_, as `fewstep keys list` shows them")],
    keys_file: KeysFile = None,
) -> None:
    """Revokes a key for good; a running server refuses it within a second.

    Example: fewstep keys revoke 0a1b2c3d --keys-file keys.json
    """
    with one_line_errors("triton"):
        from server.gateway.keys import revoke

        key = revoke(configured(keys_file), prefix)
        print(f"{key.prefix} ({key.name}) is revoked")


def configured(keys_file: Path | None) -> Path:
    """The file of keys that was named, or else the one that `fewstep serve` would use here. Raises ValueError."""
    from server.gateway.settings import SettingsError, load

    try:
        found = keys_file or load({})[0].keys_file
    except SettingsError as error:
        raise ValueError(f"{error}; or name the file with --keys-file") from None
    if found is None:
        raise ValueError("no file of keys is configured: name one with --keys-file, FEWSTEP_KEYS_FILE or in fewstep.toml")
    return found
