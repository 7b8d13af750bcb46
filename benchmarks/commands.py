"""`fewstep bench ...`: every benchmark by one command. Each imports what it needs when it runs."""

from pathlib import Path
from typing import Annotated

import typer

from server.terminal import one_line_errors

REPOSITORY = Path(__file__).resolve().parent.parent / "model_repository"
Student = Annotated[str | None, typer.Option(help="name of the student; default: the first")]
Repository = Annotated[Path, typer.Option(help="where exported students live")]
bench = typer.Typer(no_args_is_help=True, help="Benchmarks; each ends in one line of JSON.")


@bench.callback()
def benchmarks() -> None:
    """Benchmarks; each ends in one line of JSON."""


@bench.command("nfe")
def bench_nfe(
    runs: Annotated[int, typer.Option(min=3, help="measured pictures or videos for each NFE count")] = 30,
    student: Student = None,
    model_repository: Repository = REPOSITORY,
) -> None:
    """Milliseconds of every stage, and the law T(n) = a + b n over NFE counts n.

    Examples: fewstep bench nfe --runs 30; fewstep bench nfe --student motion
    """
    with one_line_errors("triton"):
        from benchmarks.nfe import run

        run(model_repository, student, runs)


@bench.command("determinism")
def bench_determinism(
    trials: Annotated[int, typer.Option(min=1, help="random batches")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="which batches")] = 0,
    student: Student = None,
    model_repository: Repository = REPOSITORY,
) -> None:
    """Random batches of every size and slot, with mates of all kinds: no request's bits may change. Exit code 1: one did.

    Example: fewstep bench determinism --trials 1000
    """
    with one_line_errors("triton"):
        from benchmarks.determinism import run

        failures = run(model_repository, student, trials, seed)
        if failures:
            raise typer.Exit(1)


@bench.command("scheduler")
def bench_scheduler(
    rounds: Annotated[int, typer.Option(min=1, help="interleaved repetitions of everything")] = 5,
    seconds: Annotated[
        float, typer.Option(min=0.1, help="of each throughput measurement; the mix takes five times as long")
    ] = 2.0,
    student: Student = None,
    model_repository: Repository = REPOSITORY,
) -> None:
    """What the NFE scheduler costs at batch 1, its throughput against static batches, and its tail in a mix.

    Example: fewstep bench scheduler --rounds 5
    """
    with one_line_errors("triton"):
        from benchmarks.scheduler import run

        run(model_repository, student, rounds, seconds)


@bench.command("sessions")
def bench_sessions(
    rounds: Annotated[int, typer.Option(min=1, help="interleaved calls of every variant")] = 50,
    student: Student = None,
    model_repository: Repository = REPOSITORY,
) -> None:
    """Milliseconds per row of an NFE and of a decode, by threads and batch, and whether bits change with the threads.

    Example: fewstep bench sessions --rounds 50
    """
    with one_line_errors("triton"):
        from benchmarks.sessions import run

        run(model_repository, student, rounds)


@bench.command("gpu")
def bench_gpu(
    provider: Annotated[str, typer.Option(help="cuda or tensorrt")] = "tensorrt",
    runs: Annotated[int, typer.Option(min=3, help="measured pictures for each NFE count, and NFEs of each batch")] = 30,
    student: Student = None,
    model_repository: Repository = REPOSITORY,
) -> None:
    """A student on the GPU at hand: how far from the processor's pixels, milliseconds per NFE, and the floor below them.

    Example: fewstep bench gpu --provider tensorrt --runs 30
    """
    with one_line_errors("gpu"):
        from benchmarks.gpu import run

        run(model_repository, student, provider, runs)


@bench.command("encoders")
def bench_encoders(
    rounds: Annotated[int, typer.Option(min=1, help="interleaved repetitions of everything")] = 15,
    side: Annotated[
        list[int] | None, typer.Option(min=16, help="of made-up pictures, in pixels; may be repeated; default: 512 and 1024")
    ] = None,
    student: Student = None,
    model_repository: Repository = REPOSITORY,
) -> None:
    """Encoders of png, jpeg and webp side by side, and what base64 and JSON add. Measures those that are installed.

    Example: fewstep bench encoders --side 512 --side 1024
    """
    with one_line_errors("triton"):
        from benchmarks.encoders import run

        run(model_repository, student, rounds, side or [512, 1024])


@bench.command("gateway")
def bench_gateway(
    images: Annotated[int, typer.Option(min=3, help="images alone, of each way, in a round")] = 50,
    rounds: Annotated[int, typer.Option(min=1, help="interleaved repetitions of everything")] = 5,
    seconds: Annotated[float, typer.Option(min=0.1, help="of each closed loop of 16 clients")] = 4.0,
    student: Student = None,
    model_repository: Repository = REPOSITORY,
) -> None:
    """What the gateway and Triton cost on top of the engine, one at a time and 16 at once, as bytes and as base64.

    Example: fewstep bench gateway --rounds 5
    """
    with one_line_errors("triton"):
        from benchmarks.gateway import run

        run(model_repository, student, images, rounds, seconds)


@bench.command("overload")
def bench_overload(
    seconds: Annotated[float, typer.Option(min=0.1, help="of each load")] = 10.0,
    student: Student = None,
    model_repository: Repository = REPOSITORY,
) -> None:
    """Goodput, waiting and refusals under Poisson arrivals at half to ten times the server's capacity.

    Example: fewstep bench overload --seconds 30
    """
    with one_line_errors("triton"):
        from benchmarks.overload import run

        run(model_repository, student, seconds)


@bench.command("fairness")
def bench_fairness(
    rounds: Annotated[int, typer.Option(min=1, help="interleaved repetitions of calm and flood")] = 5,
    seconds: Annotated[float, typer.Option(min=0.1, help="of each calm and each flood")] = 5.0,
    student: Student = None,
    model_repository: Repository = REPOSITORY,
) -> None:
    """What one key that asks for five times the server's capacity costs the other keys.

    Example: fewstep bench fairness --rounds 5
    """
    with one_line_errors("triton"):
        from benchmarks.fairness import run

        run(model_repository, student, rounds, seconds)


@bench.command("interference")
def bench_interference(
    rounds: Annotated[int, typer.Option(min=1, help="interleaved repetitions of calm and busy")] = 5,
    images: Annotated[int, typer.Option(min=1, help="in each calm and each busy")] = 100,
    student: Student = None,
    video: Annotated[str | None, typer.Option(help="name of the student of videos; default: the first")] = None,
    model_repository: Repository = REPOSITORY,
) -> None:
    """What a video that runs beside them costs images.

    Example: fewstep bench interference --rounds 5
    """
    with one_line_errors("triton"):
        from benchmarks.interference import run

        run(model_repository, student, video, rounds, images)


@bench.command("training")
def bench_training(
    rounds: Annotated[int, typer.Option(min=1, help="interleaved iterations of every variant")] = 10,
    width: Annotated[int, typer.Option(min=64, help="of the network, a multiple of 64")] = 384,
    layers: Annotated[int, typer.Option(min=1, help="of the network")] = 8,
) -> None:
    """Iterations per second and peak memory of training: full copies, a shared base, and with no forwards saved.

    Example: fewstep bench training --rounds 10
    """
    with one_line_errors("train"):
        from benchmarks.training import run

        if width % 64:
            raise ValueError(f"--width {width}, legal: multiples of 64")
        run(rounds, width, layers)


@bench.command("export")
def bench_export(
    model: Annotated[str, typer.Option(help="pixart-xl-2, sdxl-unet or cogvideox-2b")] = "pixart-xl-2",
    precision: Annotated[str, typer.Option(help="fp32 or fp16")] = "fp16",
    layers: Annotated[
        int | None, typer.Option(min=1, help="fewer transformer layers than the model's, for a quick look")
    ] = None,
    work: Annotated[Path | None, typer.Option(help="folder for up to twice the weights' bytes, emptied afterwards")] = None,
    tensorrt: Annotated[bool, typer.Option("--tensorrt", help="build an engine of TensorRT for RTX too")] = False,
) -> None:
    """Seconds, peak memory and bytes of exporting a denoiser at full size, with random weights, and its error against eager.

    Example: fewstep bench export --model sdxl-unet --precision fp16
    """
    with one_line_errors("export"):
        from benchmarks.export import run

        run(model, precision, layers, work, tensorrt)
