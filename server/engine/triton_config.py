"""config.pbtxt and model.py of an exported student: what Triton, and through it the gateway, knows about it."""

import json

from server.engine.student import StudentManifest

MODEL_PY = '''"""Triton loads this file; everything it does is in server/engine/triton_model.py."""

from server.engine.triton_model import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''

INPUTS = {
    "prompt": "TYPE_STRING",
    "seed": "TYPE_UINT64",
    "image_index": "TYPE_UINT32",
    "nfe": "TYPE_INT32",
    "size": "TYPE_STRING",
    "previews": "TYPE_UINT32",
    "timeout_ms": "TYPE_UINT32",
}


def triton_config(manifest: StudentManifest) -> str:
    """The text of config.pbtxt: one request is one image or video, answered on a stream whose last response holds
    the pixels.

    previews: bit i set means that x0 is shown after NFE i + 1; timeout_ms: 0 for no deadline.

    max_batch_size is 0 because the engine batches between NFEs itself, which Triton cannot do.
    """
    inputs = ",\n".join(tensor(name, dtype, "1") for name, dtype in INPUTS.items())
    shape = "-1, -1, 3" if manifest.media_type == "image" else "-1, -1, -1, 3"
    outputs = ",\n".join([tensor("image", "TYPE_UINT8", shape), tensor("report", "TYPE_STRING", "1")])
    parameters = "\n".join(parameter(key, value) for key, value in student_parameters(manifest).items())
    return (
        f'name: "{manifest.name}"\nbackend: "python"\nmax_batch_size: 0\n'
        "model_transaction_policy { decoupled: true }\n"
        "instance_group [ { kind: KIND_CPU, count: 1 } ]\n"
        f"input [\n{inputs}\n]\noutput [\n{outputs}\n]\n{parameters}\n"
    )


def student_parameters(manifest: StudentManifest) -> dict[str, str]:
    """What the gateway must know to speak for a student; values that are not text are JSON."""
    return {
        "name": manifest.name,
        "media_type": manifest.media_type,
        "family": manifest.family,
        "revision": manifest.revision,
        "nfe": json.dumps(manifest.nfe),
        "default_nfe": json.dumps(manifest.default_nfe),
        "sizes": json.dumps(manifest.sizes),
        "frames": json.dumps(manifest.frames),
        "fps": json.dumps(manifest.fps),
        "text_length": json.dumps(manifest.text_length),
        "max_prompt_characters": json.dumps(manifest.max_prompt_characters),
        "manifest_sha256": manifest.digest(),
    }


def tensor(name: str, dtype: str, dims: str) -> str:
    """One input or output of the model."""
    return f'  {{ name: "{name}" data_type: {dtype} dims: [ {dims} ] }}'


def parameter(key: str, value: str) -> str:
    """One entry of `parameters`; a JSON string literal is also a text-format protobuf one."""
    return f'parameters {{ key: "{key}" value: {{ string_value: {json.dumps(value)} }} }}'
