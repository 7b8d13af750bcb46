"""`fewstep export` and `fewstep engines`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from server.terminal import one_line_errors

REPOSITORY = Path(__file__).resolve().parent.parent / "model_repository"


def export(
    student: Annotated[Path, typer.Argument(help="a student folder, as `fewstep train scenes_tdm` writes it")],
    to: Annotated[Path, typer.Option(help="where exported students live")] = REPOSITORY,
    decoder: Annotated[Literal["full", "tiny"], typer.Option(help="tiny: the student's vae_tiny, as NAME-tiny")] = "full",
    precision: Annotated[str, typer.Option(help="fp32, fp16 or bf16; or by stage: text_encoder=, denoiser=, vae=")] = "fp32",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="export and check, but publish nothing")] = False,
    tensorrt: Annotated[str | None, typer.Option(help="also build TensorRT engines, by: rtx, full, or auto")] = None,
    target: Annotated[str | None, typer.Option(help="compute capabilities to build engines for, e.g. 8.6,8.9")] = None,
) -> None:
    """Exports a student to ONNX, proves the graphs equal to PyTorch and to diffusers, and publishes them for Triton.

    Students of PixArt, Stable Diffusion 1.x and 2.x, SDXL, Stable Diffusion 3 and CogVideoX are known.

    Examples: fewstep export runs/scenes_tdm/student --to model_repository; with --precision denoiser=fp16,vae=fp32; with
    --tensorrt rtx --target 8.6,8.9
    """
    with one_line_errors("export"):
        from export.precision import parse_precisions
        from export.publish import export_student
        from export.tensorrt import toolchain

        if target and not tensorrt:
            raise ValueError("--target says for which GPUs engines are built; say --tensorrt rtx as well")
        tools = toolchain(tensorrt, target) if tensorrt else None
        path, report = export_student(student, to, dry_run, decoder, parse_precisions(precision), tools)
        print(report.as_text())
        print(f"\ndry run: all passed, nothing was published as {path}" if dry_run else f"\npublished {path}, with a report.md")


def engines(
    student: Annotated[Path, typer.Argument(help="an exported student, e.g. model_repository/scenes")],
    tensorrt: Annotated[str, typer.Option(help="rtx: for GPUs that are not here; full: for the one that is; auto")] = "auto",
    target: Annotated[str | None, typer.Option(help="compute capabilities to build for, e.g. 8.6,8.9 (rtx)")] = None,
) -> None:
    """Builds the TensorRT engines of a student that is exported already. Needs neither torch nor, for rtx, a GPU.

    Example: fewstep engines model_repository/scenes --target 8.6,8.9
    """
    with one_line_errors("tensorrt"):
        from export.tensorrt import as_text, build_engines, toolchain

        print(as_text(build_engines(student, toolchain(tensorrt, target))))
