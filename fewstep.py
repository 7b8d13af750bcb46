"""The `fewstep` command. Each subcommand imports what it needs when it runs, so that serving never loads torch."""

import ast
import json
import os
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from benchmarks.commands import bench
from benchmarks.eval_commands import evaluate, evaluate_video
from export.commands import engines, export
from server.gateway.keys_commands import keys
from server.terminal import fail, one_line_errors

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Few-step TDM students: train, export, serve and measure them.",
)
ROOT = Path(__file__).resolve().parent
app.add_typer(keys, name="keys")
app.add_typer(bench, name="bench")
for command in (export, engines):
    app.command()(command)
app.command("eval")(evaluate)
app.command("eval-video")(evaluate_video)


@app.callback()
def main() -> None:
    """Few-step TDM students: train, export, serve and measure them."""
    # Inherited by training's processes; what these libraries say below an error is about themselves.
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


@app.command()
def train(
    recipe: Annotated[
        str,
        typer.Argument(
            help="scenes_evaluator, scenes_vae, scenes_text_encoder, scenes_teacher, scenes_tdm; motion_evaluator, motion_vae, "
            "motion_text_encoder, motion_teacher, motion_tdm for clips; tdm for a teacher of your own, or with the paper's "
            "numbers tdm_pixart, tdm_pixart_1024, tdm_pixart_demo, tdm_sd15, tdm_sdxl, tdm_sd3, tdm_cogvideox_2b, "
            "tdm_cogvideox_5b"
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="folder of the run: checkpoints, then the result")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="change a field of the recipe, e.g. --set iterations=500")
    ] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="data-parallel processes on this machine; default: one per GPU, or per core")
    ] = None,
    resume: Annotated[bool, typer.Option(help="go on from the last checkpoint in --out")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print configuration, memory, FLOPs and hours, and end")] = False,
    gpu: Annotated[Literal["h200", "h100", "a800", "4090"], typer.Option(help="which the hours are of")] = "h200",
) -> None:
    """Runs a named training recipe.

    Examples, the bundled student from the bundled teacher, and a student of your own: fewstep train scenes_tdm --out
    runs/scenes_tdm; fewstep train tdm --out runs/mine --set teacher=FOLDER_OR_HUB_ID --set prompts=FILE
    """
    with one_line_errors("train"):
        from tdm_train.recipes import RECIPES
        from tdm_train.run import default_processes, launch

        if recipe not in RECIPES:
            raise ValueError(f"recipe {recipe!r} is not one of {', '.join(RECIPES)}")
        configuration, count = with_changes(RECIPES[recipe], set_ or []), processes or default_processes()
        if dry_run:
            print_cost(configuration, count, gpu)
            return
        if out is None:
            raise ValueError("--out FOLDER is missing, for example --out runs/mine")
        if not resume and (out / "checkpoints").exists():
            raise ValueError(f"{out} holds a run already: pass --resume to go on with it, or another --out")
        launch(configuration.train, count, out, resume)


def print_cost(recipe: object, processes: int, gpu: Literal["h200", "h100", "a800", "4090"]) -> None:
    """Prints what a distillation costs; raises ValueError for a recipe of another kind."""
    from tdm_train.cost import cost_of, report
    from tdm_train.tdm_recipe import TdmRecipe

    if not isinstance(recipe, TdmRecipe):
        raise ValueError("--dry-run is of distillations alone: scenes_tdm, tdm and tdm_*")
    print(report(recipe, cost_of(recipe, processes), gpu, processes))


def with_changes(recipe: object, changes: list[str]) -> object:
    """A recipe with `field=value` changes; a value is written as in Python, or as plain text."""
    legal = {field.name: field for field in fields(recipe)}
    changed = {}
    for change in changes:
        name, equals, value = change.partition("=")
        if not equals or name not in legal:
            raise ValueError(f"--set {change!r}: legal are field=value with a field of {', '.join(legal)}")
        kind = type(getattr(recipe, name))
        try:
            changed[name] = as_kind(kind, value)
        except (ValueError, SyntaxError, TypeError):
            raise ValueError(f"--set {change!r}: {name} takes {kind.__name__} values") from None
    return replace(recipe, **changed)


def as_kind(kind: type, text: str) -> object:
    """`text` as a value of one of Python's own types, exactly: 2.5 is no int and 1 no bool."""
    parsed = text if kind is str else ast.literal_eval(text)
    if type(parsed) not in {float: (int, float), tuple: (list, tuple)}.get(kind, (kind,)):
        raise TypeError(f"{text} is no {kind.__name__}")
    return kind(parsed)


@app.command()
def adopt(
    release: Annotated[
        str,
        typer.Argument(help="TDM_sd3_lora, TDM_sd3-5_lora, TDM_dreamshaper_LoRA, TDM_CogVideoX-2B_LoRA, or a .toml file"),
    ],
    base: Annotated[str, typer.Argument(help="the pipeline it was made for: a diffusers folder, or a hub id (owner/name)")],
    weights: Annotated[Path, typer.Argument(help="the released file; a pickle is read for its tensors alone")],
    out: Annotated[Path, typer.Option(help="the student folder to make")],
    full_precision: Annotated[bool, typer.Option("--full-precision", help="float32 weights, in place of float16")] = False,
) -> None:
    """Makes a student folder of an adapter (LoRA) that others released, to be run as they say. What a .toml file says: README.

    Example: fewstep adopt TDM_dreamshaper_LoRA lykon/dreamshaper-7 tdm_dreamshaper.pt --out runs/dreamshaper
    """
    with one_line_errors("train"):
        import torch

        from tdm_train.adopt import adopt
        from tdm_train.released import read_release

        adopt(read_release(release), base, weights, out, torch.float32 if full_precision else torch.float16)
        print(f"made {out}; to serve it: fewstep export {out}")


@app.command()
def average(
    students: Annotated[list[Path], typer.Argument(help="student folders that differ by their training seed alone, 2 or more")],
    out: Annotated[Path, typer.Option(help="the student folder to make")],
) -> None:
    """Makes one student of several training seeds: the mean of their weights, as fast as each of them.

    Example: fewstep average runs/a/student runs/b/student --out runs/scenes
    """
    with one_line_errors("train"):
        from tdm_train.average import average_students

        average_students(students, out)
        print(f"made {out}; to serve it: fewstep export {out}")


@app.command()
def inspect(
    student: Annotated[Path, typer.Argument(help="an exported student, e.g. model_repository/scenes")],
    json_: Annotated[bool, typer.Option("--json", help="the same for machines")] = False,
) -> None:
    """Explains an exported student and verifies every file of it. Exit code 1: it is damaged, or no student.

    Example: fewstep inspect model_repository/scenes
    """
    with one_line_errors("triton"):
        from server.inspect import as_text, inspect

        inspection = inspect(student)
        print(json.dumps(inspection.as_json(), indent=1) if json_ else as_text(inspection))


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="address to listen on (127.0.0.1)")] = None,
    port: Annotated[int | None, typer.Option(help="port to listen on; 0 takes a free one (8000)")] = None,
    backend: Annotated[str | None, typer.Option(help="triton, or inprocess where there is no Triton (triton)")] = None,
    model_repository: Annotated[Path | None, typer.Option(help="folder of exported students (model_repository)")] = None,
    provider: Annotated[str | None, typer.Option(help="what runs students: cpu, cuda or tensorrt (cpu)")] = None,
    keys_file: Annotated[Path | None, typer.Option(help="file of API keys; with it, requests need a key")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="any other setting, e.g. --set grace_seconds=5; --check lists them")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file of settings (fewstep.toml, if there is one)")] = None,
    check: Annotated[bool, typer.Option("--check", help="print all settings with their origins, and end")] = False,
) -> None:
    """Serves the students of a model repository over OpenAI's image API.

    Every setting can be given here, in the environment (FEWSTEP_PORT) or in a TOML file (port = 8000), in this order of rank.

    Examples: fewstep serve --port 8000; fewstep serve --set max_queue_seconds=5 --check
    """
    flags = {"host": host, "port": port, "backend": backend, "model_repository": model_repository}
    flags |= {"provider": provider, "keys_file": keys_file}
    with one_line_errors("triton"):
        from server.gateway.backend import BackendError
        from server.gateway.keys import KeyStore
        from server.gateway.serve import serve
        from server.gateway.settings import SettingsError, as_toml, load

        try:
            settings, origins = load(
                with_set({name: value for name, value in flags.items() if value is not None}, set_), config
            )
            if check:
                if settings.keys_file:
                    KeyStore(settings.keys_file)
                print(as_toml(settings, origins))
            else:
                serve(settings)
        except SettingsError as error:
            fail(*error.complaints)
        except BackendError as error:
            fail(str(error))


def with_set(flags: dict[str, object], changes: list[str] | None) -> dict[str, object]:
    """Flags and the name=value pairs of --set. Raises ValueError for one that is no pair, or given twice."""
    for change in changes or []:
        name, equals, value = change.partition("=")
        if not equals or name in flags:
            raise ValueError(f"--set {name!r}: " + ("given twice" if equals else "legal is name=value"))
        flags[name] = value
    return flags


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="what is shown")],
    out: Annotated[Path, typer.Option(help="a .png, .jpg or .webp file; of a student of videos .mp4, .webp or .gif")],
    seed: Annotated[int, typer.Option(help="0 to 2^64 - 1")] = 0,
    nfe: Annotated[int | None, typer.Option(help="denoiser evaluations; default: the student's")] = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT; default: the student's")] = None,
    student: Annotated[str | None, typer.Option(help="name of the student; default: the first that makes such files")] = None,
    embed_prompt: Annotated[bool, typer.Option(help="keep the prompt in the PNG, for `fewstep replay`")] = False,
    trace: Annotated[Path | None, typer.Option(help="write a trace of the stages, for ui.perfetto.dev")] = None,
    model_repository: Annotated[Path, typer.Option(help="where exported students live")] = ROOT / "model_repository",
) -> None:
    """Makes one picture or video in this process, without any server.

    Example: fewstep generate "a red circle above a blue square" --seed 7 --nfe 4 --out out.png
    """
    with one_line_errors("triton"):
        from server.generate import generate_file

        print(generate_file(prompt, out, seed, nfe, size, student, model_repository, embed_prompt, trace))


@app.command()
def replay(
    file: Annotated[Path, typer.Argument(help="a PNG made by fewstep")],
    prompt: Annotated[str | None, typer.Option(help="its prompt, where the PNG does not hold it")] = None,
    model_repository: Annotated[Path, typer.Option(help="where exported students live")] = ROOT / "model_repository",
) -> None:
    """Makes a picture again and says whether it is the same to the bit, or what has changed. Exit code 1: it is not.

    Example: fewstep replay out.png --prompt "a red circle above a blue square"
    """
    with one_line_errors("triton"):
        from server.replay import replay

        outcome = replay(file, prompt, model_repository)
        print("\n".join(outcome.lines))
        if not outcome.identical:
            raise typer.Exit(1)


if __name__ == "__main__":
    app()
