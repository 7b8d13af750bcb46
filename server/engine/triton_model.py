"""The scheduler inside Triton's Python backend: one Triton request is one image or video, answered on a decoupled stream.

Only this file and triton_metrics.py import triton_python_backend_utils, which exists inside Triton's stub process alone.
"""

import gc
import json
import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb

from server.engine.device import DeviceLock, priority_of
from server.engine.engine import Determinism, Engine
from server.engine.errors import Cancelled, EngineError, StudentError, to_wire
from server.engine.request import Pixels, Request, Result
from server.engine.scheduler import Scheduler
from server.engine.triton_metrics import TritonMetrics

logger = logging.getLogger("fewstep")

STALE_SECONDS = 0.1  # after which an answer about a cancellation is not good enough for whoever has waited


class TritonPythonModel:
    """Triton calls initialize once, execute for every batch of requests, finalize at the end."""

    def initialize(self, args: dict[str, str]) -> None:
        """Opens the student; an exception here makes Triton report the model as failed, with its message."""
        version = Path(args["model_repository"]) / args["model_version"]  # "repository" is the model's folder
        engine = Engine.open(version.parent, determinism())
        check_config(json.loads(args["model_config"]), engine.manifest.digest())
        self.metrics = TritonMetrics(engine.manifest.name)
        self.scheduler = Scheduler(engine, DeviceLock(engine.device, priority_of(engine.manifest.media_type)), self.metrics)
        self.thread = self.scheduler.start()
        gc.freeze()  # what is here now stays, and need not be looked through while requests wait
        # Calls into Triton's process take tenths of a millisecond, in which the device would wait.
        self.sending = ThreadPoolExecutor(1, "send")
        self.polling = ThreadPoolExecutor(1, "poll")

    def execute(self, requests: list[Any]) -> None:
        """Hands every request to the scheduler; an exception here would fail its neighbours too, so none leaves."""
        for request in requests:
            sink = TritonSink(request.get_response_sender(), self.sending, self.polling)
            try:
                asked, seconds = read_request(request)
                self.scheduler.submit(asked, sink, seconds)
            except EngineError as error:
                sink.failed(error)
            except Exception as error:
                sink.failed(EngineError(f"{type(error).__name__}: {error}"))

    def finalize(self) -> None:
        """Answers what is under way before Triton unloads the student."""
        self.scheduler.close()
        self.thread.join()
        self.sending.shutdown()
        self.polling.shutdown()
        self.metrics.close()


class TritonSink:
    """Answers go to one Triton request's stream, in order, from a thread of their own; see scheduler.Sink."""

    def __init__(self, sender: Any, sending: Executor, polling: Executor) -> None:
        self.sender, self.sending, self.polling = sender, sending, polling
        self.known_cancelled = self.asking = self.over = False
        self.asked = time.monotonic()
        self.using = threading.Lock()

    def cancelled(self) -> bool:
        """What was known when the last NFE began to run; the next answer is asked for while the coming one runs. Who has waited
        for a seat is asked on the spot, which takes 0.1 ms."""
        if not self.asking:
            self.asking = True
            if time.monotonic() - self.asked > STALE_SECONDS:
                self.ask()
            else:
                self.polling.submit(self.ask)
        return self.known_cancelled

    def ask(self) -> None:
        """Not while, and not after, the last word is sent: the sender's request is gone then, and asking kills the stub."""
        with self.using:
            if not self.over:
                self.known_cancelled = bool(self.sender.is_cancelled())
            self.asked, self.asking = time.monotonic(), False

    def stepped(self, step: int) -> None:
        self.send(lambda: pb.InferenceResponse(output_tensors=[report_tensor({"step": step})]))

    def preview(self, step: int, image: Pixels) -> None:
        self.send(lambda: image_response(image, {"preview": step}))

    def done(self, result: Result) -> None:
        """The report: spans (stage, begin, nanoseconds, batch), tokens, and the fingerprint with its parts."""
        self.over = True
        spans = [(span.stage, span.begin, span.nanoseconds, span.batch) for span in result.spans]
        report: dict[str, Any] = {"spans": spans, "tokens": result.tokens}
        report |= {"fingerprint": result.fingerprint, "fingerprint_parts": result.fingerprint_parts}
        self.send(lambda: image_response(result.image, report), pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def failed(self, error: EngineError) -> None:
        """The error as JSON in Triton's message: the gateway reads that, not Triton's code."""
        self.over = True
        code = pb.TritonError.CANCELLED if isinstance(error, Cancelled) else pb.TritonError.INTERNAL
        message = to_wire(error)
        self.send(lambda: pb.InferenceResponse(error=pb.TritonError(message, code)), pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def send(self, response: Callable[[], Any], flags: int = 0) -> None:
        """Builds and sends a response on the sending thread; a failure is told in the log."""
        self.sending.submit(self.deliver, response, flags)

    def deliver(self, response: Callable[[], Any], flags: int) -> None:
        try:
            with self.using:
                self.sender.send(response(), flags=flags)
        except Exception:
            logger.exception("an answer could not be delivered")


def read_request(request: Any) -> tuple[Request, float | None]:
    """Triton tensors (all of shape [1]) -> Request, and how many seconds it has. Bit i of previews: after NFE i + 1."""
    parameters = json.loads(request.parameters() or "{}")
    values = {tensor.name(): tensor.as_numpy()[0] for tensor in request.inputs()}
    asked = Request(
        prompt=values["prompt"].decode(),
        seed=int(values["seed"]),
        image_index=int(values["image_index"]),
        nfe=int(values["nfe"]),
        size=values["size"].decode(),
        previews=tuple(bit + 1 for bit in range(32) if int(values["previews"]) >> bit & 1),
        tells_steps=bool(parameters.get("tells_steps")),
        probe=bool(parameters.get("probe")),
        who=str(parameters.get("who", "")),
    )
    timeout = int(values["timeout_ms"])
    return asked, timeout / 1000 if timeout else None


def determinism() -> Determinism:
    """From $FEWSTEP_DETERMINISM, which the gateway sets; strict without it. Raises StudentError."""
    told = os.environ.get("FEWSTEP_DETERMINISM", "strict")
    if told not in ("strict", "fast"):
        raise StudentError(f"$FEWSTEP_DETERMINISM must be strict or fast, got {told!r:.40}")
    return "strict" if told == "strict" else "fast"


def image_response(image: Pixels, report: dict[str, Any]) -> Any:
    """image uint8 [H, W, 3], of a video [F, H, W, 3], and a report."""
    return pb.InferenceResponse(output_tensors=[pb.Tensor("image", image), report_tensor(report)])


def report_tensor(report: dict[str, Any]) -> Any:
    """What a response says, as JSON."""
    return pb.Tensor("report", np.array([json.dumps(report).encode()], np.object_))


def check_config(config: dict[str, Any], digest: str) -> None:
    """Raises StudentError when config.pbtxt speaks for another student than the one that was opened."""
    told = config["parameters"].get("manifest_sha256", {}).get("string_value")
    if told != digest:
        raise StudentError("config.pbtxt and 1/student.json do not belong together; export the student again")
