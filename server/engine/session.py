"""One graph, ready to run: the seam between the engine and a runtime."""

import functools
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from server.engine.errors import StudentError
from server.engine.external_data import check_external_data
from server.engine.student import STAGES, Contents, GraphName, GraphTensors, Precision, weights_of

Tensors = dict[str, Any]  # arrays; on a device, what one graph has left for another is a DeviceTensor

# The optimisation level changes the last bits of a float32, so it is pinned, and it belongs to the fingerprint.
OPTIMISATION_LEVEL = "all"
PROVIDER = "CPUExecutionProvider"
DEFAULT_CPU_THREADS = min(max((os.cpu_count() or 1) // 2, 1), 4)
THREADS_VARIABLE = "FEWSTEP_CPU_THREADS"
LOG_FATAL_ONLY = 4  # every error is raised as well, and one line is enough


class Session(Protocol):
    """Runs one graph: arrays by name in, arrays in the order of the graph's outputs out.

    batch_invariant: whether a row has the same bits in every batch and slot.
    """

    batch_invariant: bool

    def run(self, tensors: Tensors) -> list[Any]:
        """One call; the first dimension of every array is the batch."""
        ...


def refuse_bf16(precisions: Mapping[GraphName, Precision]) -> None:
    """Raises StudentError for a graph that onnxruntime has no arithmetic for on CPU, with the way out."""
    for graph, precision in precisions.items():
        if precision == "bf16":
            raise StudentError(
                f"{graph}.onnx is bf16, which onnxruntime's {PROVIDER} does not compute: serve this student by TensorRT or "
                f"CUDA, or export it for CPUs with `fewstep export ... --precision {STAGES[graph]}=fp32`"
            )


class OnnxSession:
    """A graph on onnxruntime's CPU provider."""

    batch_invariant = True  # tests and `fewstep bench determinism` hold it to that

    def __init__(self, graph: str, contents: Contents, tensors: GraphTensors, weights: Contents | None = None) -> None:
        """weights: of the file beside it, where the manifest lists one. Raises StudentError when `contents` reaches for any
        other file, is refused, or has other tensors than expected."""
        self.session = open_graph(graph, contents, weights, [PROVIDER])
        self.outputs = list(tensors.outputs)
        check_names(graph, "inputs", tensors.inputs, [node.name for node in self.session.get_inputs()])
        check_names(graph, "outputs", tensors.outputs, [node.name for node in self.session.get_outputs()])

    def run(self, tensors: Tensors) -> list[npt.NDArray[Any]]:
        return [np.asarray(output) for output in self.session.run(self.outputs, tensors)]


def open_graph(
    graph: str, contents: Contents, weights: Contents | None, providers: Sequence[str | tuple[str, dict[str, str]]]
) -> ort.InferenceSession:
    """A graph as onnxruntime runs it; weights: of the file beside it, where the manifest lists one. Raises StudentError when it
    reaches for any other file or is refused."""
    share_threads()
    file = f"{graph}.onnx"
    check_external_data(file, contents, weights_of(file), None if weights is None else len(weights))
    options = session_options()
    if weights is not None:  # the bytes that were verified, by the name that the graph has for them
        options.add_external_initializers_from_files_in_memory([weights_of(file)], [weights], [len(weights)])
    try:
        return ort.InferenceSession(bytes(contents), options, providers=providers)
    except Exception as error:  # onnxruntime's exceptions share no public base class
        raise StudentError(f"{graph}.onnx: onnxruntime refuses it: {first_line(error)}; export the student again") from None


def cpu_threads() -> int:
    """How many threads work on one call: $FEWSTEP_CPU_THREADS, else half of the cores, at most 4. Raises StudentError.

    The other half is for the gateway and Triton: threads wait for each other many times in a call, so one that has lost its
    core to somebody else holds up all. See benchmarks/results/LOG.md.

    All sessions of a process share one pool. With a pool of its own each, the threads of one graph still spin, waiting for
    more, when the next graph wants their cores: on two cores an image took twice as long.
    """
    told = os.environ.get(THREADS_VARIABLE) or str(DEFAULT_CPU_THREADS)
    if not re.fullmatch(r"[1-9][0-9]{0,2}", told):
        raise StudentError(f"${THREADS_VARIABLE} must be a whole number from 1 to 999, got {told!r:.40}")
    return int(told)


@functools.cache
def share_threads() -> None:
    """Makes the process's one pool of threads, before its first session."""
    ort.set_global_thread_pool_sizes(cpu_threads(), 1)


def session_options() -> ort.SessionOptions:
    """Every choice that could change a bit, made here and nowhere else."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.use_per_session_threads = False  # see cpu_threads
    options.use_deterministic_compute = True
    options.log_severity_level = LOG_FATAL_ONLY
    options.add_session_config_entry("session.load_model_format", "ONNX")
    return options


def check_names(graph: str, kind: str, expected: tuple[str, ...], actual: list[str]) -> None:
    """Raises StudentError when a graph lacks a tensor, or has one that nobody knows."""
    missing, unknown = sorted(set(expected) - set(actual)), sorted(set(actual) - set(expected))
    if missing or unknown:
        said = [f"{word} {', '.join(names)}" for word, names in (("lacks", missing), ("has unknown", unknown)) if names]
        raise StudentError(f"{graph}.onnx: {kind}: {'; '.join(said)}; expected {', '.join(expected)}; export the student again")


def first_line(error: Exception) -> str:
    """An error message without the lines after the first."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
