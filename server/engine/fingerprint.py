"""Names everything that decides the pixels: same fingerprint and same request, same pixels."""

import hashlib
import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

from server.engine.noise import RNG_VERSION
from server.engine.student import StudentManifest

# onnxruntime chooses its kernels by these, and kernels differ in the last bits.
INSTRUCTION_SETS = ("avx", "avx2", "fma", "avx512f", "avx512vl", "avx512_vnni", "avx512_bf16", "amx_tile", "asimd", "sve")


def fingerprint(parts: dict[str, str]) -> str:
    """`fp_` and 32 hexadecimal digits of the sha256 over all parts."""
    return "fp_" + digest(parts)[:32]


def fingerprint_parts(manifest: StudentManifest, batch_policy: str, runtime: dict[str, str]) -> dict[str, str]:
    """Everything that decides the pixels, by name, so that two fingerprints can be compared by a person. runtime: what runs
    the graphs, and on what.

    The number of threads is not among it: `fewstep bench sessions` and a test show that it changes no bit.
    """
    tokenizers = [tokenizer.model_dump() for tokenizer in manifest.tokenizers]
    settings = {"sizes": manifest.sizes, "tokenizers": tokenizers, "init_noise_sigma": manifest.init_noise_sigma}
    return {
        **{name: sha256[:16] for name, sha256 in sorted(manifest.files.items())},
        "tables": digest(manifest.tables)[:16],
        "settings": digest(settings)[:16],
        "precision": ", ".join(f"{graph} {precision}" for graph, precision in sorted(manifest.precision.items())),
        **runtime,
        "batch_policy": batch_policy,
        "rng": RNG_VERSION,
        "tokenizers": importlib.metadata.version("tokenizers"),
    }


def digest(value: Any) -> str:
    """sha256 of a value's JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def device_class() -> str:
    """Processor architecture and those of its instruction sets that choose kernels."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()  # not Linux: one class per architecture is all that can be said
    words = next((line.split(":", 1)[1].split() for line in lines if line.startswith(("flags", "Features"))), [])
    return " ".join([platform.machine(), *(name for name in INSTRUCTION_SETS if name in words)])
