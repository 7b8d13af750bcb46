"""Names everything that decides the pixels: same fingerprint and same request, same pixels."""

import hashlib
import json
import platform
from pathlib import Path
from typing import Any

import onnxruntime as ort
import tokenizers

from server.engine.noise import RNG_VERSION
from server.engine.session import BATCH_POLICY, OPTIMISATION_LEVEL, PROVIDER, THREADS
from server.engine.student import StudentManifest

# onnxruntime chooses its kernels by these, and kernels differ in the last bits.
INSTRUCTION_SETS = ("avx", "avx2", "fma", "avx512f", "avx512vl", "avx512_vnni", "avx512_bf16", "amx_tile", "asimd", "sve")


def fingerprint(manifest: StudentManifest) -> str:
    """`fp_` and 32 hexadecimal digits of the sha256 over `ingredients`."""
    text = json.dumps(ingredients(manifest), sort_keys=True)
    return "fp_" + hashlib.sha256(text.encode()).hexdigest()[:32]


def ingredients(manifest: StudentManifest) -> dict[str, Any]:
    """Every ingredient by name, so that two fingerprints can be compared by a person."""
    decisive = {"files", "tables", "sizes", "text_length", "init_noise_sigma", "precision"}
    return {
        "student": manifest.model_dump(mode="json", include=decisive),
        "provider": PROVIDER,
        "onnxruntime": ort.__version__,
        "optimisation_level": OPTIMISATION_LEVEL,
        "threads": THREADS,
        "batch_policy": BATCH_POLICY,
        "rng": RNG_VERSION,
        "tokenizers": tokenizers.__version__,
        "device": device_class(),
    }


def device_class() -> str:
    """Processor architecture and those of its instruction sets that choose kernels."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()  # not Linux: one class per architecture is all that can be said
    words = next((line.split(":", 1)[1].split() for line in lines if line.startswith(("flags", "Features"))), [])
    return " ".join([platform.machine(), *(name for name in INSTRUCTION_SETS if name in words)])
