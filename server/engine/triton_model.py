"""The engine inside Triton's Python backend: one Triton request is one image, answered on a decoupled stream.

The only file that imports triton_python_backend_utils, which exists inside Triton's stub process alone.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb

from server.engine.engine import Engine, Request, Result
from server.engine.errors import EngineError, StudentError, to_wire


class TritonPythonModel:
    """Triton calls initialize once, execute for every batch of requests."""

    def initialize(self, args: dict[str, str]) -> None:
        """Opens the student; an exception here makes Triton report the model as failed, with its message."""
        version = Path(args["model_repository"]) / args["model_version"]  # "repository" is the model's folder
        self.engine = Engine.open(version.parent)
        check_config(json.loads(args["model_config"]), self.engine.manifest.digest())

    def execute(self, requests: list[Any]) -> None:
        """Answers every request on its own stream; an exception here would fail its neighbours too, so none leaves."""
        for request in requests:
            sender = request.get_response_sender()
            sender.send(self.response(request), flags=pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def response(self, request: Any) -> Any:
        """The final response to one request: the image and its report, or a typed error."""
        try:
            return image_response(self.engine.run(read_request(request)))
        except EngineError as error:
            return error_response(error)
        except Exception as error:
            return error_response(EngineError(f"{type(error).__name__}: {error}"))


def read_request(request: Any) -> Request:
    """Triton tensors (all of shape [1]) -> Request."""
    values = {tensor.name(): tensor.as_numpy()[0] for tensor in request.inputs()}
    return Request(
        prompt=values["prompt"].decode(),
        seed=int(values["seed"]),
        image_index=int(values["image_index"]),
        nfe=int(values["nfe"]),
        size=values["size"].decode(),
    )


def image_response(result: Result) -> Any:
    """image uint8 [H, W, 3] and report, JSON: nanoseconds by stage, tokens, fingerprint."""
    report = {"nanoseconds": result.nanoseconds, "tokens": result.tokens, "fingerprint": result.fingerprint}
    text = np.array([json.dumps(report).encode()], np.object_)
    return pb.InferenceResponse(output_tensors=[pb.Tensor("image", result.image), pb.Tensor("report", text)])


def error_response(error: EngineError) -> Any:
    """The error as JSON in Triton's message: the gateway reads that, not Triton's code."""
    return pb.InferenceResponse(error=pb.TritonError(to_wire(error)))


def check_config(config: dict[str, Any], digest: str) -> None:
    """Raises StudentError when config.pbtxt speaks for another student than the one that was opened."""
    told = config["parameters"].get("manifest_sha256", {}).get("string_value")
    if told != digest:
        raise StudentError("config.pbtxt and 1/student.json do not belong together; export the student again")
