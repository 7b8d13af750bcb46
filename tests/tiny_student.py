"""Builds a small random exported student with the real one's files and tensors, in milliseconds and without torch."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from server.engine.student import StudentManifest
from server.engine.triton_config import MODEL_PY, triton_config

FILES = ("text_encoder.onnx", "student_step.onnx", "vae_decoder.onnx", "tokenizer.json")
VOCABULARY = ["<pad>", "</s>", "<unk>", "a", "red", "blue", "circle", "square", "above", "big"]
WIDTH, CHANNELS, SCALE, LENGTH = 6, 4, 8, 12
FLOAT, INT, BYTE = TensorProto.FLOAT, TensorProto.INT64, TensorProto.UINT8
LATENTS = ["B", CHANNELS, "h", "w"]


def build_tiny_student(repository: Path, name: str = "tiny", poisoned: bool = False) -> Path:
    """Writes `repository/name` and returns it; a poisoned student's second NFE gives NaN."""
    version = repository / name / "1"
    version.mkdir(parents=True)
    rng = np.random.default_rng(0)
    graphs = {"text_encoder": text_encoder(rng), "student_step": student_step(rng), "vae_decoder": vae_decoder(rng)}
    for graph, contents in graphs.items():
        onnx.save(contents, version / f"{graph}.onnx")
    tokenizer().save(str(version / "tokenizer.json"))
    manifest = tiny_manifest(version, name)
    if poisoned:  # 1e38 * 10 overflows to infinity in float32 after the first step, and infinity - infinity is NaN
        manifest["tables"]["2"] = [[1000.0, 1e38, 1e38, 0.0], [500.0, 1e38, -1e38, 0.0]]
    write_manifest(repository / name, manifest)
    return repository / name


def write_manifest(folder: Path, fields: dict[str, Any]) -> None:
    """Writes student.json, and the config.pbtxt and model.py that follow from it."""
    manifest = StudentManifest.model_validate(fields)
    (folder / "1" / "student.json").write_text(manifest.model_dump_json(indent=1))
    (folder / "1" / "model.py").write_text(MODEL_PY)
    (folder / "config.pbtxt").write_text(triton_config(manifest))


def tiny_manifest(version: Path, name: str, files: Sequence[str] = FILES) -> dict[str, Any]:
    """The contents of student.json; the tables are Euler steps of a flow from t = 1 to 0."""
    nfe = [1, 2, 3, 4]
    tables = {str(k): [[1000 * (k - i) / k, 1 - 1 / (k - i), 1 / (k - i), 0.0] for i in range(k)] for k in nfe}
    return {
        "format": 2,
        "name": name,
        "family": "tiny",
        "media_type": "image",
        "base": "random",
        "revision": "0",
        "prediction_type": "flow_prediction",
        "solver": "dpmsolver++1",
        "nfe": nfe,
        "default_nfe": 4,
        "tables": tables,
        "sizes": {"64x64": [CHANNELS, 8, 8], "64x32": [CHANNELS, 4, 8]},
        "frames": None,
        "fps": None,
        "chunks": None,
        "tokenizers": [{"file": "tokenizer.json", "length": LENGTH, "pad": 0, "masked": True, "truncates": False}],
        "conditions": ["text_emb", "mask"],
        "decoder": "full",
        "max_prompt_characters": 100,
        "max_batch": 16,
        "init_noise_sigma": 1.0,
        "precision": dict.fromkeys(("text_encoder", "student_step", "vae_decoder"), "fp32"),
        "k_conditioning": True,
        "training": {},
        "files": {file: hashlib.sha256((version / file).read_bytes()).hexdigest() for file in files},
        "versions": {"onnx": onnx.__version__},
    }


def text_encoder(rng: np.random.Generator) -> onnx.ModelProto:
    """An embedding table, multiplied by the mask."""
    nodes = [
        helper.make_node("Gather", ["table", "tokens"], ["embedded"]),
        helper.make_node("Cast", ["mask"], ["mask_float"], to=FLOAT),
        helper.make_node("Unsqueeze", ["mask_float", "last"], ["mask_column"]),
        helper.make_node("Mul", ["embedded", "mask_column"], ["text_emb"]),
    ]
    constants = {"table": floats(rng, len(VOCABULARY), WIDTH), "last": np.array([2])}
    inputs = {"tokens": (INT, ["B", "L"]), "mask": (INT, ["B", "L"])}
    return model(nodes, inputs, {"text_emb": (FLOAT, ["B", "L", WIDTH])}, constants)


def student_step(rng: np.random.Generator, video: bool = False) -> onnx.ModelProto:
    """x0 = tanh(latents / 2 + pooled text + timestep / 1000 + nfe / 10), then the solver's update."""
    latents = ["B", "F", CHANNELS, "h", "w"] if video else LATENTS
    nodes = [
        # The largest, since sums over a dimension in the middle have other bits for one row than for several.
        helper.make_node("ReduceMax", ["text_emb", "second"], ["pooled"], keepdims=0),
        helper.make_node("MatMul", ["pooled", "weight"], ["shift"]),
        helper.make_node("Cast", ["nfe"], ["nfe_float"], to=FLOAT),
        helper.make_node("Cast", ["mask"], ["mask_float"], to=FLOAT),
        helper.make_node("ReduceMean", ["mask_float", "second"], ["mask_mean"], keepdims=0),
        helper.make_node("Mul", ["timestep", "thousandth"], ["time"]),
        helper.make_node("Mul", ["nfe_float", "tenth"], ["rung"]),
        helper.make_node("Sum", ["time", "rung", "mask_mean"], ["scalar"]),
        helper.make_node("Unsqueeze", ["scalar", "second"], ["column"]),
        helper.make_node("Add", ["shift", "column"], ["condition"]),
        helper.make_node("Unsqueeze", ["condition", "not_channels"], ["condition_map"]),
        helper.make_node("Mul", ["latents", "half"], ["halved"]),
        helper.make_node("Add", ["halved", "condition_map"], ["before"]),
        helper.make_node("Tanh", ["before"], ["x0"]),
        helper.make_node("Unsqueeze", ["coefficients", "not_columns"], ["rows"]),
        helper.make_node("Split", ["rows"], ["c0", "c1", "c2"], axis=1, num_outputs=3),
        helper.make_node("Mul", ["c0", "latents"], ["kept"]),
        helper.make_node("Mul", ["c1", "x0"], ["moved"]),
        helper.make_node("Mul", ["c2", "x0_prev"], ["remembered"]),
        helper.make_node("Sum", ["kept", "moved", "remembered"], ["next_latents"]),
    ]
    constants = {
        "weight": floats(rng, WIDTH, CHANNELS),
        "second": np.array([1]),
        "not_channels": np.array([1, 3, 4] if video else [2, 3]),
        "not_columns": np.arange(2, len(latents)),
        "half": np.float32(0.5),
        "tenth": np.float32(0.1),
        "thousandth": np.float32(0.001),
    }
    inputs = {
        "latents": (FLOAT, latents),
        "x0_prev": (FLOAT, latents),
        "timestep": (FLOAT, ["B"]),
        "coefficients": (FLOAT, ["B", 3]),
        "nfe": (INT, ["B"]),
        "text_emb": (FLOAT, ["B", "L", WIDTH]),
        "mask": (INT, ["B", "L"]),
    }
    return model(nodes, inputs, {"next_latents": (FLOAT, latents), "x0": (FLOAT, latents)}, constants)


def vae_decoder(rng: np.random.Generator) -> onnx.ModelProto:
    """One transposed convolution, then rounding to uint8 with colours last."""
    nodes = [
        helper.make_node("ConvTranspose", ["latents", "kernel"], ["raw"], strides=[SCALE, SCALE]),
        helper.make_node("Tanh", ["raw"], ["bounded"]),
        helper.make_node("Add", ["bounded", "one"], ["positive"]),
        helper.make_node("Mul", ["positive", "half_range"], ["scaled"]),
        helper.make_node("Round", ["scaled"], ["rounded"]),
        helper.make_node("Cast", ["rounded"], ["bytes"], to=BYTE),
        helper.make_node("Transpose", ["bytes"], ["image"], perm=[0, 2, 3, 1]),
    ]
    kernel = floats(rng, CHANNELS, 3, SCALE, SCALE)
    constants = {"kernel": kernel, "one": np.float32(1), "half_range": np.float32(127.5)}
    return model(nodes, {"latents": (FLOAT, LATENTS)}, {"image": (BYTE, ["B", "H", "W", 3])}, constants)


def model(nodes: list[Any], inputs: dict[str, Any], outputs: dict[str, Any], constants: dict[str, Any]) -> onnx.ModelProto:
    """Wires a graph from named tensors: name -> (type, shape)."""
    values = [[helper.make_tensor_value_info(name, *spec) for name, spec in side.items()] for side in (inputs, outputs)]
    initialisers = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "tiny", *values, initialisers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def tokenizer() -> Tokenizer:
    """Words of VOCABULARY, lower-cased, with </s> appended."""
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", VOCABULARY.index("</s>"))])
    return words


def floats(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Random float32 weights."""
    return rng.standard_normal(shape).astype(np.float32)
