"""One image or video over Triton's gRPC stream, and what Triton's errors really mean."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
from tritonclient.grpc import InferInput
from tritonclient.grpc.aio import InferenceServerClient
from tritonclient.utils import InferenceServerException

from server.gateway.backend import (
    TRACEPARENT,
    BackendFault,
    BackendTimeout,
    BackendUnavailable,
    EngineError,
    Generated,
    GenerationRequest,
    OnPreview,
    OnStep,
    Span,
    StudentCard,
    from_wire,
)

Report = dict[str, Any]  # what a response says in JSON: of a step, of a preview, or of all that was done
MOST_IDLE = 64
LOST = "the image backend stopped while it worked on this request and is being restarted; send the request again"


class TritonClient:
    """Speaks to one run of tritonserver.

    A student's card is to be asked for before anything is made by it. heard: when each student last gave a sign of life, in
    seconds of time.monotonic.
    """

    def __init__(self, port: int) -> None:
        self.client = InferenceServerClient(f"127.0.0.1:{port}")  # messages may have 2 GiB: a video of 49 x 480 x 720 has 51 MB
        self.idle: list[Stream] = []
        self.frames: dict[str, int | None] = {}
        self.heard: dict[str, float] = {}

    async def card(self, student: str) -> StudentCard:
        """What Triton says about a student it has loaded. Raises BackendUnavailable."""
        try:
            config = await self.client.get_model_config(student, as_json=True)
        except (InferenceServerException, grpc.RpcError):
            raise BackendUnavailable(LOST) from None
        parameters = config["config"]["parameters"]
        card = StudentCard.parse({key: value["string_value"] for key, value in parameters.items()})
        self.frames[card.name] = card.frames
        return card

    async def generate(
        self,
        request: GenerationRequest,
        seconds: float,
        on_preview: OnPreview | None = None,
        on_step: OnStep | None = None,
    ) -> Generated:
        """One image or video; `seconds` is the longest silence, which previews and steps interrupt. Raises an EngineError or a
        BackendError."""
        begin = time.perf_counter_ns()

        def hear(result: Any, report: Report) -> None:
            silence.reschedule(asyncio.get_running_loop().time() + seconds)
            if on_step and "step" in report:
                on_step(report["step"])
            if on_preview and "preview" in report:
                on_preview(report["preview"], self.picture(result, request, shown=True))

        try:
            async with asyncio.timeout(seconds) as silence:
                result, report = await self.last_response(request, on_step is not None, hear)
        except TimeoutError:
            raise BackendTimeout(f"the image backend gave no answer in {seconds:g} s") from None
        except (InferenceServerException, grpc.RpcError, asyncio.CancelledError) as error:
            raise lost_or_cancelled(error) from None
        spans = tuple(Span(*span) for span in report["spans"])
        elapsed = time.perf_counter_ns() - begin
        named = {name: report[name] for name in ("tokens", "fingerprint", "fingerprint_parts")}
        return Generated(self.picture(result, request), spans, **named, round_trip=elapsed)

    async def last_response(
        self, request: GenerationRequest, tells_steps: bool, hear: Callable[[Any, Report], None]
    ) -> tuple[Any, Report]:
        """The response that holds the image or video, and its report, over a stream of this request's own; `hear` gets those
        before it. A stream that has done its work is kept for the next request, which saves a millisecond; any other is closed,
        which cancels the request inside Triton."""
        trace = TRACEPARENT.get()  # travels in the headers of the stream, so such a stream is for one request
        stream = self.idle.pop() if self.idle and not trace else Stream(self.client, trace)
        try:
            async for result in stream.answers(request, tells_steps):
                self.heard[request.student] = time.monotonic()
                report: Report = json.loads(result.as_numpy("report")[0])
                if "fingerprint" in report:
                    break
                hear(result, report)
        except BaseException:
            stream.close()
            raise
        if trace or len(self.idle) >= MOST_IDLE:
            stream.close()
        else:
            self.idle.append(stream)
        return result, report

    def picture(self, result: Any, request: GenerationRequest, shown: bool = False) -> npt.NDArray[np.uint8]:
        """uint8 [H, W, 3] of a response, of a video [F, H, W, 3]; one that is shown on the way may have fewer frames. Raises
        BackendFault when it is of another shape than asked."""
        image: npt.NDArray[np.uint8] = result.as_numpy("image")
        width, height = map(int, request.size.split("x"))
        frames = self.frames[request.student]
        legal = [()] if frames is None else [(count,) for count in range(1 if shown else frames, frames + 1)]
        if image.dtype != np.uint8 or image.shape not in [(*count, height, width, 3) for count in legal]:
            raise BackendFault(f"image is {image.dtype} {image.shape} for size {request.size} and {frames or 'no'} frames")
        return image

    def hang_up(self) -> None:
        """Closes the streams that are kept; Triton would wait for them when it is asked to stop."""
        while self.idle:
            self.idle.pop().close()

    async def close(self) -> None:
        self.hang_up()
        await self.client.close()


class Stream:
    """One gRPC stream to Triton, for one request at a time."""

    def __init__(self, client: InferenceServerClient, trace: str | None) -> None:
        self.asked: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.heard = client.stream_infer(self.requests(), headers={"traceparent": trace} if trace else None)

    async def requests(self) -> AsyncIterator[dict[str, Any]]:
        while True:
            yield await self.asked.get()

    async def answers(self, request: GenerationRequest, tells_steps: bool) -> AsyncIterator[Any]:
        """The responses that say something, in the order in which the student gave them; whoever reads them stops after the
        last. Raises what became of the request otherwise."""
        self.asked.put_nowait(triton_request(request, tells_steps))
        async for result, error in self.heard:
            if error is not None:
                raise typed_error(error.message())
            if result.as_numpy("report") is not None:  # Triton's own word that nothing follows has none
                yield result
        raise BackendUnavailable(LOST)

    def close(self) -> None:
        self.heard.cancel()


def triton_request(request: GenerationRequest, tells_steps: bool) -> dict[str, Any]:
    """In the form of tritonclient."""
    columns = {
        "prompt": np.array([request.prompt.encode()], np.object_),
        "seed": np.array([request.seed], np.uint64),
        "image_index": np.array([request.image_index], np.uint32),
        "nfe": np.array([request.nfe], np.int32),
        "size": np.array([request.size.encode()], np.object_),
        "previews": np.array([sum(1 << (step - 1) for step in request.previews)], np.uint32),
        "timeout_ms": np.array([request.timeout_ms or 0], np.uint32),
    }
    datatypes = {"prompt": "BYTES", "size": "BYTES", "seed": "UINT64", "image_index": "UINT32", "nfe": "INT32"}
    datatypes |= {"previews": "UINT32", "timeout_ms": "UINT32"}
    inputs = [InferInput(name, [1], datatypes[name]) for name in columns]
    for tensor in inputs:
        tensor.set_data_from_numpy(columns[tensor.name()])
    parameters = {"probe": request.probe, "who": request.who, "tells_steps": tells_steps}
    return {"model_name": request.student, "inputs": inputs, "parameters": parameters}


def typed_error(message: str) -> Exception:
    """Triton's error text -> our error. Words that are not our model's are Triton's, and mean that a stub died."""
    error = from_wire(message)
    if error is None:
        return BackendUnavailable(LOST)
    return BackendFault(str(error)) if type(error) is EngineError else error


def lost_or_cancelled(error: BaseException) -> BaseException:
    """grpc.aio raises CancelledError when its channel dies too; only a cancelled task is really cancelled."""
    task = asyncio.current_task()
    if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
        return error
    return BackendUnavailable(LOST)
