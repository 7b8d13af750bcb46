"""What `fewstep serve` can be told, in one schema: by flags, the environment (FEWSTEP_*) or a TOML file."""

import ipaddress
import json
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, StringConstraints, ValidationError, model_validator
from pydantic_settings import BaseSettings, EnvSettingsSource, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

PREFIX = "FEWSTEP_"
CONFIG_VARIABLE = "FEWSTEP_CONFIG"
# FEWSTEP_LOCKS is the engine's: where device locks live (see server/engine/device.py). FEWSTEP_API_KEY is `fewstep eval`'s.
OTHER_VARIABLES = {CONFIG_VARIABLE, "FEWSTEP_LOCKS", "FEWSTEP_API_KEY"}
OPENTELEMETRY_VARIABLE = "OTEL_EXPORTER_OTLP_ENDPOINT"
DEFAULT_FILE = Path("fewstep.toml")
REPOSITORY = Path(__file__).resolve().parents[2] / "model_repository"


def known_database(url: SecretStr) -> SecretStr:
    """Raises ValueError for what is neither a SQLite file nor PostgreSQL."""
    if not re.match(r"sqlite:///.|postgresql(\+psycopg)?://.", url.get_secret_value()):
        raise ValueError("legal are sqlite:///FILE and postgresql://USER:PASSWORD@HOST/DATABASE")
    return url


Secret = Annotated[SecretStr, Field(min_length=16)]
BackendName = Literal["triton", "inprocess"]
Url = Annotated[str, StringConstraints(pattern=r"^https?://[^\s]+$")]
DatabaseUrl = Annotated[SecretStr, AfterValidator(known_database)]  # it may hold a password
Bucket = Annotated[str, StringConstraints(pattern=r"^s3://[a-z0-9][a-z0-9.-]+(/[^\s]*)?$")]
Origin = Annotated[str, StringConstraints(pattern=r"^(\*|https?://[^\s/]+)$")]


class SettingsError(Exception):
    """The configuration is not legal; `complaints` are lines for the terminal."""

    def __init__(self, complaints: list[str]) -> None:
        super().__init__("; ".join(complaints))
        self.complaints = complaints


def split(value: Any) -> Any:
    """ "a, b" -> ["a", "b"], for flags and the environment."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


class Settings(BaseSettings):
    """Frozen. Made from its arguments alone; `load` is what reads the environment and files. Paths are relative to the
    working directory."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_ignore_empty=True,
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    backend: BackendName = Field("triton", description="what runs students: triton, or inprocess where there is no Triton")
    model_repository: Path = Field(REPOSITORY, description="folder of exported students")
    determinism: Literal["strict", "fast"] = Field(
        "strict",
        description="where bits depend on the batch (not on CPUs): strict pads every batch to one shape, fast does not",
    )
    provider: Literal["cpu", "cuda", "tensorrt"] = Field(
        "cpu", description="what runs students: cpu, cuda (onnxruntime on a GPU) or tensorrt (engines by `fewstep engines`)"
    )
    cpu_threads: int = Field(
        min(max((os.cpu_count() or 1) // 2, 1), 4),
        ge=1,
        le=999,
        description="threads that work on one NFE, by default half of the cores; they change no pixel",
    )
    keys_file: Path | None = Field(None, description="file of API keys (see `fewstep keys`); with it, requests need a key")
    allow_no_keys: bool = Field(False, description="listen off loopback without keys: anyone who reaches the port may draw")
    key_share: float = Field(0.5, gt=0, le=1, description="share of max_queue_seconds that one key may hold, 0 to 1")
    max_queue_seconds: float = Field(10.0, gt=0, le=3600, description="seconds of predicted work that may wait in all")
    request_timeout_ms: int = Field(
        60_000, ge=1, le=3_600_000, description="longest and default deadline of a request, milliseconds"
    )
    grace_seconds: int = Field(30, ge=0, le=3600, description="seconds that requests under way get when the server stops")
    max_body_bytes: int = Field(1 << 20, ge=1024, description="longest body of a request, bytes")
    cors_origins: Annotated[tuple[Origin, ...], NoDecode, BeforeValidator(split)] = Field(
        (), description="origins of web pages that may call this server, with commas between; * for all"
    )
    public_url: Url | None = Field(None, description="address that links in answers start with; unset: as the caller said it")
    url_secret: Secret | None = Field(None, description="signs links to results; unset: new at every start")
    url_ttl_seconds: int = Field(3600, ge=1, le=604_800, description="seconds for which a link to a result is good")
    url_memory_mb: int = Field(256, ge=64, description="images that links lead to, kept in memory, MB")
    result_cache: bool = Field(True, description="answer repeated requests from memory or disk")
    result_cache_mb: int = Field(256, ge=1, description="results kept in memory, MB")
    result_cache_disk_mb: int = Field(0, ge=0, description="results kept in result_cache_folder, MB; 0 for none")
    result_cache_folder: Path | None = Field(None, description="folder of results on disk")
    jobs_folder: Path = Field(
        Path("fewstep-jobs"), description="folder of video jobs: their database and files, where no others are named"
    )
    jobs_url: DatabaseUrl | None = Field(
        None, description="database of video jobs, sqlite:///FILE or postgresql://...; unset: SQLite in jobs_folder"
    )
    jobs_storage: Bucket | None = Field(None, description="finished videos, s3://BUCKET/PREFIX; unset: in jobs_folder")
    video_workers: int = Field(1, ge=0, le=64, description="videos made at once by this process; 0: it only takes jobs in")
    video_attempts: int = Field(3, ge=1, le=10, description="attempts of a job whose worker dies")
    video_ttl_seconds: int = Field(86_400, ge=1, le=31_536_000, description="seconds for which a finished video is kept")
    max_video_queue_seconds: float = Field(3600.0, gt=0, le=604_800, description="seconds of predicted videos that may wait")
    otlp_endpoint: Url | None = Field(None, description=f"where traces go; ${OPENTELEMETRY_VARIABLE} is honoured too")
    log_format: Literal["json", "text"] = Field("json", description="one line per request: json or text")

    @model_validator(mode="after")
    def agree(self) -> "Settings":
        """What one value asks of another."""
        if not (loopback(self.host) or self.keys_file or self.allow_no_keys):
            raise ValueError(
                f"host {self.host!a} can be reached from other machines and there are no keys: create one with"
                " `fewstep keys create NAME --keys-file FILE` and serve with --keys-file FILE, or open it to everybody with"
                " --set allow_no_keys=true"
            )
        if self.result_cache_disk_mb and not self.result_cache_folder:
            raise ValueError("result_cache_disk_mb needs result_cache_folder")
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only the arguments, so that an object is what its maker said wherever it is made."""
        return (init_settings,)


def loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone. Names other than localhost may point anywhere."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def load(flags: Mapping[str, Any], config: Path | None = None) -> tuple[Settings, dict[str, str]]:
    """The settings, and by name where each value that is no default came from. Flags go before the environment, that before
    the file (`config`, else $FEWSTEP_CONFIG, else fewstep.toml if there is one). Raises SettingsError."""
    file = config or Path(os.environ.get(CONFIG_VARIABLE) or DEFAULT_FILE)
    explicit = file != DEFAULT_FILE or config is not None
    sources = [("flag", flags), ("environment", from_environment()), (str(file), from_file(file, explicit))]
    complaints = [unknown(name, where) for where, values in sources for name in values if name not in Settings.model_fields]
    if complaints:
        raise SettingsError(complaints)
    origins = {name: where for where, values in reversed(sources) for name in values}
    merged = {name: value for _, values in reversed(sources) for name, value in values.items()}
    try:
        return Settings(**merged), origins
    except ValidationError as error:
        raise SettingsError([complaint(one, origins) for one in error.errors(include_url=False)]) from None


def from_environment() -> dict[str, Any]:
    """Settings by name; a variable of ours that is none stays under its own name, so that it is refused."""
    found = dict(EnvSettingsSource(Settings)())
    known = {PREFIX + name.upper() for name in Settings.model_fields} | OTHER_VARIABLES
    found |= {name: value for name, value in os.environ.items() if is_ours(name) and name.upper() not in known}
    if endpoint := os.environ.get(OPENTELEMETRY_VARIABLE):
        found.setdefault("otlp_endpoint", endpoint)
    return found


def is_ours(variable: str) -> bool:
    """Variables are read whatever their case."""
    return variable.upper().startswith(PREFIX)


def from_file(file: Path, explicit: bool) -> dict[str, Any]:
    """A TOML file; without one, nothing, unless it was asked for. Raises SettingsError."""
    try:
        return tomllib.loads(file.read_text())
    except FileNotFoundError:
        if explicit:
            raise SettingsError([f"{file}: there is no such configuration file"]) from None
        return {}
    except (OSError, ValueError) as error:
        raise SettingsError([f"{file}: {getattr(error, 'strerror', None) or error}"]) from None


def unknown(name: str, where: str) -> str:
    """A line about a name that is no setting."""
    variables = (PREFIX + field.upper() for field in Settings.model_fields)
    legal = sorted({*variables, *OTHER_VARIABLES} if where == "environment" else Settings.model_fields)
    return f"{where}: unknown setting {name!a}; legal are {', '.join(legal)}"


def complaint(error: Any, origins: Mapping[str, str]) -> str:
    """A line about an illegal value: its name, where it came from, what is legal and, unless secret, what it was."""
    said = " ".join(error["msg"].removeprefix("Value error, ").split())
    if not error["loc"]:
        return said
    name = str(error["loc"][0])
    got = "" if secret(name) else f", got {error['input']!a:.80}"
    return f"{name} ({origins.get(name, 'default')}): {said}{got}"


def secret(name: str) -> bool:
    return "SecretStr" in str(Settings.model_fields[name].annotation)


def as_toml(settings: Settings, origins: Mapping[str, str]) -> str:
    """A file that gives the same settings, each with its meaning and its origin; secrets are masked and commented out."""
    lines = []
    for name, value in settings.model_dump(mode="json").items():
        lines.append(f"# {Settings.model_fields[name].description}")
        hidden = value is None or secret(name)
        shown = "" if value is None else json.dumps(value, ensure_ascii=False)
        lines.append(f"{'# ' if hidden else ''}{name} = {shown}".rstrip().ljust(40) + f"  # {origins.get(name, 'default')}")
    return "\n".join(lines)
