"""What the README shows is what works."""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fewstep import app
from tests.conftest import Server, start_server

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.S)
SHELL = "\n".join(text for language, text in BLOCKS if language == "sh")


def words(kind: str) -> list[list[str]]:
    """The shell commands of the README that start with `kind`, comments and line breaks taken out."""
    lines = re.sub(r"\\\n", " ", SHELL).splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.split()[:1] == [kind]]


def commands_in(text: str) -> set[str]:
    return set(re.findall(r"`?\bfewstep ((?:bench )?[a-z]+)\b", text))


def test_every_fewstep_command_in_the_readme_exists() -> None:
    prose = re.sub(r"```.*?```", "", README, flags=re.S)
    named = commands_in(" ".join(re.findall(r"`([^`]+)`", prose)) + SHELL)
    assert {"serve", "train", "export", "generate", "eval", "bench nfe"} <= named
    for command in named:
        assert CliRunner().invoke(app, [*command.split(), "--help"]).exit_code == 0, command


def test_every_make_target_in_the_readme_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for _, target, *_ in words("make"):
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_every_entry_of_the_tree_exists_and_every_module_is_in_it() -> None:
    tree = next(text for language, text in BLOCKS if language == "text")
    paths, folder = set(), ""
    for line in tree.splitlines():
        name = line.split()[0]
        folder = name if not line.startswith(" ") and name.endswith("/") else "" if not line.startswith(" ") else folder
        paths.add(name if name == folder else folder + name)
    assert all((ROOT / path).exists() for path in paths), [path for path in paths if not (ROOT / path).exists()]
    parts = (
        "server/engine",
        "server/gateway",
        "server/jobs",
        "export",
        "tdm_train",
        "tdm_train/backbones",
        "tdm_train/scenes",
        "tdm_train/scenes_video",
        "benchmarks",
    )
    modules = {
        str(file.relative_to(ROOT)) for part in parts for file in (ROOT / part).glob("*.py") if file.name != "__init__.py"
    }
    assert modules <= paths, modules - paths


def test_every_file_the_readme_links_to_exists() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert links
    assert all((ROOT / link).exists() for link in links), links


@pytest.fixture(scope="module")
def server(served_repository: Path) -> Iterator[Server]:
    """What `make serve` starts."""
    server = start_server(served_repository)
    yield server
    assert server.stop() == 0


@pytest.mark.slow
def test_the_curl_and_python_examples_work(server: Server, tmp_path: Path) -> None:
    def here(text: str) -> str:
        return text.replace("http://127.0.0.1:8000", server.url)

    lines = re.sub(r"\\\n", " ", SHELL).splitlines()
    said = []
    for command in (line for line in lines if line.startswith("curl")):
        run = subprocess.run(["bash", "-c", here(command)], cwd=tmp_path, check=True, timeout=60, stdout=subprocess.PIPE)
        said.append(run.stdout)
    assert said[1].count(b"event: image_generation.partial_image") == 3
    assert sum(answer.count(b"event: video.partial_image") for answer in said) <= 3
    assert sum(answer.count(b"event: video.completed") for answer in said) == 1
    for code in (text for language, text in BLOCKS if language == "python"):
        subprocess.run([sys.executable, "-c", here(code)], cwd=tmp_path, check=True, timeout=60)
    for name in ("out.png", "star.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG"), name
    for name in ("clip.mp4", "circle.mp4"):
        assert (tmp_path / name).read_bytes()[4:8] == b"ftyp", name
    assert (tmp_path / "clip.gif").read_bytes().startswith(b"GIF89a")
