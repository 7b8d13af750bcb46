"""`fewstep eval` and `fewstep eval-video`."""

import re
from pathlib import Path
from typing import Annotated

import typer

from server.terminal import one_line_errors

ROOT = Path(__file__).resolve().parent.parent
Captions = Annotated[int, typer.Option(min=2, help="how many held-out captions")]
Guidance = Annotated[str, typer.Option(help="guidance of the teacher's rows")]
Seed = Annotated[int, typer.Option(min=0, max=999, help="which captions and which noise")]
Counts = Annotated[str, typer.Option(help="NFE counts of the students")]
Students = Annotated[list[Path] | None, typer.Option("--student", help="a student folder or an exported student; repeatable")]
Plot = Annotated[Path | None, typer.Option(help="write a plot of both measures over NFE")]
Grid = Annotated[Path | None, typer.Option(help="write a picture of the first captions, one column per row")]
OnlyStudents = Annotated[bool, typer.Option("--only-students", help="leave autoencoder and teacher out")]


def numbers(option: str, text: str) -> list[float]:
    """The numbers above 0 of an option, with commas between. Raises ValueError for anything else."""
    if not re.fullmatch(r"\d+(\.\d+)?(,\d+(\.\d+)?)*", text) or min(map(float, text.split(","))) <= 0:
        raise ValueError(f"{option} {text!r}: legal are numbers above 0 with commas between, e.g. 1,4")
    return [float(number) for number in text.split(",")]


def nfe_counts(text: str) -> list[int]:
    counts = numbers("--nfe", text)
    if any(count != int(count) for count in counts):
        raise ValueError(f"--nfe {text!r}: legal are whole numbers with commas between, e.g. 1,4")
    return [int(count) for count in counts]


def evaluate(
    student: Students = None,
    url: Annotated[str | None, typer.Option(help="a running server, in place of --student")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="FEWSTEP_API_KEY", help="of that server, where it wants one")] = None,
    nfe: Counts = "1,2,3,4",
    captions: Captions = 500,
    teacher: Annotated[Path, typer.Option(help="a teacher folder")] = ROOT / "tdm_train/scenes/teacher",
    guidance: Guidance = "2,3",
    seed: Seed = 0,
    only_students: OnlyStudents = False,
    grid: Grid = None,
    plot: Plot = None,
) -> None:
    """Measures prompt adherence and Fréchet distance of renders, autoencoder, teacher and students.

    Students that differ by their training seed alone are told with their mean and sample standard deviation as well.

    Examples: fewstep eval --nfe 1,4 --captions 100 --grid grid.png; fewstep eval --url http://127.0.0.1:8000; fewstep eval
    --student runs/a/student --student runs/b/student --captions 1000 --plot quality.png
    """
    with one_line_errors("train"):
        from benchmarks import quality
        from benchmarks.evaluate import SceneEvaluation, SceneTeacher, caller, counts_of, server_rows
        from benchmarks.evaluation import check_nfe
        from benchmarks.grid import draw_grid

        if student and url:
            raise ValueError("--student and --url exclude each other")
        counts, scales = nfe_counts(nfe), numbers("--guidance", guidance)
        folders = student or [ROOT / "model_repository/scenes"]
        server = caller(url, api_key) if url else None
        if server:
            check_nfe(counts, counts_of(server))
        else:
            quality.check(folders, counts)
        evaluation = SceneEvaluation(captions, seed)
        rows = [evaluation.rendered()]
        if not only_students:
            judge = SceneTeacher(teacher, evaluation)
            rows += [judge.autoencoder(), *(judge.row(25, scale) for scale in scales)]
            rows += [judge.row(4, scales[-1]), judge.row(2, scales[-1]), judge.row(4, 1.0)]
        if server:
            students, groups = [server_rows(server, counts, evaluation)], []
        else:
            students = quality.rows_of(folders, counts, evaluation, lambda folder: SceneTeacher(folder, evaluation))
            groups = quality.groups_of(folders, students)
        rows += [row for made in students for row in made]
        quality.tell(rows, groups, captions, seed, plot)
        if grid:
            draw_grid(rows, evaluation.captions, grid)


def evaluate_video(
    student: Students = None,
    nfe: Counts = "1,2,3,4",
    captions: Captions = 500,
    teacher: Annotated[Path, typer.Option(help="a teacher folder of clips")] = ROOT / "tdm_train/scenes_video/teacher",
    guidance: Guidance = "2,3",
    steps: Annotated[int, typer.Option(min=1, max=1000, help="DDIM steps of the teacher")] = 50,
    seed: Seed = 0,
    only_students: OnlyStudents = False,
    grid: Annotated[Path | None, typer.Option(help="write a picture of what renders, teacher and students show")] = None,
    plot: Plot = None,
) -> None:
    """Measures adherence (motion and speed included) and Fréchet distance of rendered clips, autoencoder, teacher and students.

    Examples: fewstep eval-video --nfe 1,4 --captions 100 --grid grid.png; fewstep eval-video --teacher
    runs/motion_teacher/teacher --student runs/motion_tdm/student --plot quality.png
    """
    with one_line_errors("train"):
        from benchmarks import quality
        from benchmarks.evaluate_video import VideoEvaluation, VideoTeacher
        from benchmarks.grid import draw_grid

        counts, scales = nfe_counts(nfe), numbers("--guidance", guidance)
        folders = student or [ROOT / "model_repository/motion"]
        quality.check(folders, counts)
        evaluation = VideoEvaluation(captions, seed)
        rows = [evaluation.rendered()]
        if not only_students:
            judge = VideoTeacher(teacher, evaluation)
            rows += [judge.autoencoder(), *(judge.row(steps, scale) for scale in scales)]
            rows += [judge.row(4, scales[-1]), judge.row(4, 1.0)]
        students = quality.rows_of(folders, counts, evaluation, lambda folder: VideoTeacher(folder, evaluation))
        rows += [row for made in students for row in made]
        quality.tell(rows, quality.groups_of(folders, students), captions, seed, plot)
        if grid:
            left_out = [row for row in rows if row.what == "autoencoder" or (row.what == "teacher" and row.nfe < steps)]
            draw_grid([row for row in rows if row not in left_out], evaluation.captions, grid, lines=8)
