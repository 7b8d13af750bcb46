"""What runs a student's graphs: onnxruntime on the processor, onnxruntime on a GPU, or TensorRT on a GPU."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import onnxruntime as ort

from server.engine.device_runtime import DeviceRuntime, Program
from server.engine.device_session import DeviceSession
from server.engine.device_step import DeviceStep
from server.engine.engine_plan import EnginePlan, built_by, check_profile, fitting, read_engines, read_plan
from server.engine.errors import EngineError, StudentError
from server.engine.fingerprint import device_class
from server.engine.session import OPTIMISATION_LEVEL, PROVIDER, OnnxSession, Session, refuse_bf16
from server.engine.shapes import NFE_BATCH, Shape, input_shapes, most_rows
from server.engine.student import Contents, ExportedStudent, GraphName, StudentManifest, weights_of
from server.engine.tensorrt_program import installed_packages

Provider = Literal["cpu", "cuda", "tensorrt"]
VARIABLE = "FEWSTEP_PROVIDER"


@dataclass(frozen=True)
class Sessions:
    """The sessions of one student. device: as locks name it; identity: what the fingerprint says of them."""

    by_graph: dict[str, Session]
    device: str
    identity: dict[str, str]


def provider_asked_for() -> Provider:
    """From $FEWSTEP_PROVIDER, cpu without it. Raises StudentError."""
    told = os.environ.get(VARIABLE) or "cpu"
    providers: dict[str, Provider] = {provider: provider for provider in get_args(Provider)}
    if told in providers:
        return providers[told]
    raise StudentError(f"${VARIABLE} must be one of {', '.join(get_args(Provider))}, got {told!r:.40}")


def open_sessions(student: ExportedStudent, provider: Provider, strict: bool, runtime: DeviceRuntime | None = None) -> Sessions:
    """Opens a student's graphs. strict: every NFE and every decode will have one shape (see engine.batch_policy).

    Raises StudentError, where a GPU or a package is missing too.
    """
    if provider == "cpu":
        return on_processor(student)
    if runtime is None:
        from server.engine.cuda_runtime import CudaRuntime

        runtime = CudaRuntime()
    try:
        return on_cuda(student, runtime, strict) if provider == "cuda" else on_tensorrt(student, runtime, strict)
    except StudentError:
        raise
    except EngineError as error:  # of CUDA: most often there is no room
        name, rows = student.manifest.name, student.manifest.max_batch
        raise StudentError(
            f"{name} cannot be made ready for {rows} rows on {runtime.device}, {runtime.name}: {error}"
        ) from None


def on_processor(student: ExportedStudent) -> Sessions:
    """onnxruntime's CPU provider."""
    refuse_bf16(student.manifest.precision)
    sessions: dict[str, Session] = {}
    for graph in student.manifest.graphs:
        contents, weights = contents_of(student, graph)
        sessions[graph] = OnnxSession(graph, contents, student.manifest.tensors(graph), weights)
    identity = onnxruntime_identity(PROVIDER) | {"device": device_class()}
    return Sessions(sessions, "cpu", identity)


def contents_of(student: ExportedStudent, graph: GraphName) -> tuple[Contents, Contents | None]:
    """A graph, and its weights where they are kept beside it."""
    file = f"{graph}.onnx"
    return student.files[file], student.files.get(weights_of(file))


def on_cuda(student: ExportedStudent, runtime: DeviceRuntime, strict: bool) -> Sessions:
    """onnxruntime's CUDA provider, by I/O binding."""
    sessions = on_device(
        student.manifest, runtime, strict, lambda graph: runtime.load_onnx(graph, *contents_of(student, graph))
    )
    identity = onnxruntime_identity("CUDAExecutionProvider") | device_identity(runtime)
    return Sessions(sessions, runtime.device, identity)


def on_tensorrt(student: ExportedStudent, runtime: DeviceRuntime, strict: bool) -> Sessions:
    """TensorRT. Every engine is chosen, and its digest checked, before the first one is loaded."""
    version = student.folder / "1"
    plans = chosen_plans(student, runtime.capability, strict)
    contents = {graph: read_plan(version, plan) for graph, plan in plans.items()}
    sessions = on_device(
        student.manifest,
        runtime,
        strict,
        lambda graph: runtime.load_plan(graph, contents[graph], plans[graph].recipe.package),
    )
    digest = hashlib.sha256("".join(plan.sha256 for plan in plans.values()).encode()).hexdigest()[:16]
    identity = {"provider": "TensorRT", "package": built_by(plans["student_step"].recipe), "engines": digest}
    return Sessions(sessions, runtime.device, identity | device_identity(runtime))


def chosen_plans(student: ExportedStudent, capability: str, strict: bool) -> dict[GraphName, EnginePlan]:
    """For every graph the engine that fits this GPU, a package that is installed, and all that may come. Raises
    StudentError."""
    version = student.folder / "1"
    engines = read_engines(version, student.manifest)
    packages = [f"{package} {number}" for package, number in installed_packages().items()]
    if not packages:
        raise StudentError("TensorRT is not installed; run `pip install 'fewstep[tensorrt]'`, or choose the provider cuda")
    plans = {graph: fitting(engines, graph, packages, capability, version) for graph in student.manifest.graphs}
    for graph, plan in plans.items():
        largest = {name: shape.max for name, shape in plan.recipe.profile.items()}
        for size in student.manifest.sizes:
            for batch in batches(graph, student.manifest, strict):
                check_profile(plan, input_shapes(largest, student.manifest, size, batch, text={}), version)
    return plans


def on_device(
    manifest: StudentManifest, runtime: DeviceRuntime, strict: bool, load: Callable[[GraphName], Program]
) -> dict[str, Session]:
    """The graphs on one device, ready for every batch that may come."""
    sessions: dict[str, Session] = {}
    text: dict[str, Shape] = {}
    for graph in manifest.graphs:
        program = load(graph)
        declared = {name: spec.dims for name, spec in program.inputs.items()}
        sizes = list(manifest.sizes)[: 1 if graph == "text_encoder" else None]
        rows = batches(graph, manifest, strict)
        cases = [input_shapes(declared, manifest, size, batch, text) for size in sizes for batch in rows]
        session = DeviceSession(graph, program, runtime, manifest.tensors(graph), cases)
        sessions[graph] = DeviceStep(session) if graph == "student_step" else session
        if graph == "text_encoder":
            (call,) = session.calls.values()
            text = {name: tensor.shape for name, tensor in call.tensors.items()}
    return sessions


def batches(graph: GraphName, manifest: StudentManifest, strict: bool) -> list[int]:
    """The batches that the engine gives a graph: one alone where every call has one shape."""
    if strict:
        return [manifest.max_batch if graph == "student_step" else 1]
    return list(range(1, min(NFE_BATCH, most_rows(graph, manifest)) + 1))


def onnxruntime_identity(provider: str) -> dict[str, str]:
    return {"provider": provider, "onnxruntime": ort.__version__, "optimisation_level": OPTIMISATION_LEVEL}


def device_identity(runtime: DeviceRuntime) -> dict[str, str]:
    return {"device": f"{runtime.name}, compute capability {runtime.capability}"}
