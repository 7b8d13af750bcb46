"""One image over Triton's gRPC stream, and what Triton's errors really mean."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
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
    BackendImage,
    BackendTimeout,
    BackendUnavailable,
    EngineError,
    ImageRequest,
    OnPreview,
    Span,
    StudentCard,
    from_wire,
)

LOST = "the image backend stopped while it worked on this request and is being restarted; send the request again"


class TritonClient:
    """Speaks to one run of tritonserver."""

    def __init__(self, port: int) -> None:
        self.client = InferenceServerClient(f"127.0.0.1:{port}")

    async def card(self, student: str) -> StudentCard:
        """What Triton says about a student it has loaded. Raises BackendUnavailable."""
        try:
            config = await self.client.get_model_config(student, as_json=True)
        except (InferenceServerException, grpc.RpcError):
            raise BackendUnavailable(LOST) from None
        parameters = config["config"]["parameters"]
        return StudentCard.parse({key: value["string_value"] for key, value in parameters.items()})

    async def generate(self, request: ImageRequest, seconds: float, on_preview: OnPreview | None = None) -> BackendImage:
        """One image within `seconds`. Raises an EngineError or a BackendError."""
        begin = time.perf_counter_ns()
        try:
            async with asyncio.timeout(seconds):
                result = await self.last_response(request, on_preview)
        except TimeoutError:
            raise BackendTimeout(f"the image backend gave no answer in {seconds:g} s") from None
        except (InferenceServerException, grpc.RpcError, asyncio.CancelledError) as error:
            raise lost_or_cancelled(error) from None
        report = json.loads(result.as_numpy("report")[0])
        spans = tuple(Span(*span) for span in report["spans"])
        elapsed = time.perf_counter_ns() - begin
        named = {name: report[name] for name in ("tokens", "fingerprint", "fingerprint_parts")}
        return BackendImage(picture(result, request), spans, **named, round_trip=elapsed)

    async def last_response(self, request: ImageRequest, on_preview: OnPreview | None) -> Any:
        """Reads the stream to its end and returns the response that holds the image; closes the stream in any case, which
        cancels the request inside Triton unless it is done."""
        trace = TRACEPARENT.get()
        stream = self.client.stream_infer(one_request(request), headers={"traceparent": trace} if trace else None)
        last = None
        try:
            async for result, error in stream:
                if error is not None:
                    raise typed_error(error.message())
                if result.as_numpy("image") is None:
                    continue
                if (step := json.loads(result.as_numpy("report")[0]).get("preview")) is None:
                    last = result
                elif on_preview:
                    on_preview(step, picture(result, request))
        finally:
            stream.cancel()
        if last is None:
            raise BackendUnavailable(LOST)
        return last

    async def close(self) -> None:
        await self.client.close()


def picture(result: Any, request: ImageRequest) -> npt.NDArray[np.uint8]:
    """uint8 [H, W, 3] of a response. Raises BackendFault when it is of another shape than asked."""
    image: npt.NDArray[np.uint8] = result.as_numpy("image")
    width, height = map(int, request.size.split("x"))
    if image.dtype != np.uint8 or image.shape != (height, width, 3):
        raise BackendFault(f"image is {image.dtype} {image.shape} for size {request.size}")
    return image


async def one_request(request: ImageRequest) -> AsyncIterator[dict[str, Any]]:
    """The stream's only request."""
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
    yield {"model_name": request.student, "inputs": inputs, "parameters": {"probe": True} if request.probe else None}


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
