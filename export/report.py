"""The report of an export: what was written and how it compares with eager, as JSON, Markdown and a picture beside the student.

No digest covers it: digests name what decides the pixels, and seconds would give equal students unequal manifests. The report
names the manifest's digest instead, which says whose it is.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from export.comparison import AGAINST_FLOAT32, Check, Proof, Trajectory
from export.verify import PROMPTS
from server.engine.fingerprint import device_class
from server.engine.student import Precision, StudentManifest
from server.table import aligned, readable_size

AMPLIFIED = 128  # one level of 255 is grey, two are white
HALF_PRECISIONS: tuple[Precision, ...] = ("fp16", "bf16")
MARGIN, LINE, WIDEST = 8, 16, 256  # of the picture, in pixels; larger pictures are thinned out


@dataclass(frozen=True)
class GraphFile:
    """One exported graph: bytes of its file, seconds that tracing and writing took, and its TensorRT engine in words."""

    name: str
    precision: str
    bytes: int
    seconds: float
    engine: str | None = None


@dataclass(frozen=True)
class Report:
    """What an export wrote and proved."""

    manifest: StudentManifest
    graphs: tuple[GraphFile, ...]
    checks: tuple[Check, ...]
    seconds: float

    def rows(self) -> list[list[str]]:
        """The table: a row per graph, and one for the three together against diffusers."""
        errors_said = ["largest error", "mean error", "against float32"]
        rows = [["graph", "precision", "size", "seconds", *errors_said, "rows of a batch", "engine"]]
        for graph in self.graphs:
            eager = [check for check in self.checks if check.graph == graph.name and check.against == "eager"]
            half = [check for check in self.checks if check.graph == graph.name and check.against == "float32"]
            itself = [check for check in self.checks if check.graph == graph.name and check.against == "itself"]
            alike = "bit-identical" if all(check.error == 0 for check in itself) else "differ"
            size, seconds = readable_size(graph.bytes), f"{graph.seconds:.1f}"
            row = [graph.name, graph.precision, size, seconds, *errors(eager), *errors(half)[:1], alike, graph.engine or "none"]
            rows.append(row)
        whole = [check for check in self.checks if check.against == "diffusers" and not check.levels]
        half = [check for check in self.checks if check.against == "float32" and check.graph is None and check.levels]
        total = readable_size(sum(graph.bytes for graph in self.graphs))
        return [*rows, ["all, against diffusers", "", total, f"{self.seconds:.1f}", *errors(whole), *errors(half)[:1], "", ""]]

    def as_text(self) -> str:
        """The table and the checks, for a terminal."""
        checks = [
            ("passed" if check.passed else "FAILED", check.what, f"{check.error:.2g}", f"(at most {check.tolerance:g})")
            for check in self.checks
        ]
        return "\n".join([*aligned(self.rows(), right={2, 3, 4, 5, 6}), "", *aligned(checks, right={2})])

    def as_markdown(self) -> str:
        """report.md."""
        name, nfe = self.manifest.name, self.manifest.default_nfe
        head, *rows = self.rows()
        table = [head, ["---"] * len(head), *rows]
        checks = [["check", "largest", "mean", "at most"], ["---"] * 4]
        checks += [[c.what, f"{c.error:.2g}", f"{c.mean:.2g}", f"{c.tolerance:g}"] for c in self.checks]
        lines = [
            f"# {name}: the exported graphs against PyTorch",
            f"Errors are absolute, against the same modules run eagerly in the same precision; those of 255 are levels of a "
            f"colour. {half_precision(self.manifest)}"
            f"`fewstep inspect` on this folder explains the student (default: {nfe} NFE).",
            "\n".join(f"| {' | '.join(row)} |" for row in table),
            f"![Eager, exported and their difference](report.png)\n\nA row per NFE count, for each prompt: diffusers with the "
            f"eager decoder, the exported graphs, and their difference times {AMPLIFIED}. The prompts: "
            f"{'; '.join(PROMPTS)}.",
            "\n".join(f"| {' | '.join(row)} |" for row in checks),
        ]
        return "\n\n".join(lines) + "\n"

    def as_json(self) -> dict[str, Any]:
        """report.json."""
        return {
            "student": self.manifest.name,
            "manifest_sha256": self.manifest.digest(),
            "seconds": round(self.seconds, 3),
            "machine": device_class(),
            "graphs": [asdict(graph) | {"seconds": round(graph.seconds, 3)} for graph in self.graphs],
            "checks": [asdict(check) | {"passed": check.passed} for check in self.checks],
        }


def errors(checks: list[Check]) -> list[str]:
    """Largest and mean error over checks of one unit; empty words where there are none."""
    if not checks:
        return ["", ""]
    unit = " of 255" if checks[0].levels else ""
    return [f"{max(check.error for check in checks):.2g}{unit}", f"{np.mean([check.mean for check in checks]):.2g}{unit}"]


def half_precision(manifest: StudentManifest) -> str:
    """What must be known of errors in half precision; nothing for a student in float32."""
    used = [precision for precision in HALF_PRECISIONS if precision in manifest.precision.values()]
    allowed = [
        f"{p} {AGAINST_FLOAT32[p].largest:.2g} of the largest value and {AGAINST_FLOAT32[p].levels} levels" for p in used
    ]
    said = f"Tolerated in half precision: {', '.join(allowed)}. " if allowed else ""
    if "bf16" in used:
        said += (
            "onnxruntime computes no bfloat16 on CPU: such a graph was computed in float32 and held to eager float32 over the "
            "weights as bfloat16 rounds them, and its error against float32 is that of eager bfloat16. "
        )
    return said


def write_report(report: Report, proof: Proof, folder: Path) -> None:
    """Writes report.json, report.md and report.png beside config.pbtxt, where Triton looks at nothing else."""
    (folder / "report.json").write_text(json.dumps(report.as_json(), indent=1) + "\n")
    (folder / "report.md").write_text(report.as_markdown())
    side_by_side(proof.trajectories).save(folder / "report.png", optimize=True)


def side_by_side(trajectories: tuple[Trajectory, ...]) -> Image.Image:
    """At the default size, a row per NFE count; for each prompt the eager picture, the exported one and their difference."""
    shown = [t for t in trajectories if not t.size]
    rows = [[tile for pair in zip(t.eager.images, t.exported.images, strict=True) for tile in triple(*pair)] for t in shown]
    height, width = rows[0][0].shape[:2]
    label = 48
    columns = len(rows[0])
    canvas = Image.new("RGB", (label + columns * (width + MARGIN), LINE + len(rows) * (height + MARGIN)), "white")
    draw = ImageDraw.Draw(canvas)
    for column in range(columns):
        head = ("eager", "exported", f"difference x {AMPLIFIED}")[column % 3]
        draw.text((label + column * (width + MARGIN), 2), head, fill="black")
    for row, (trajectory, tiles) in enumerate(zip(shown, rows, strict=True)):
        top = LINE + row * (height + MARGIN)
        draw.text((4, top + 2), f"{trajectory.nfe} NFE", fill="black")
        for column, tile in enumerate(tiles):
            canvas.paste(Image.fromarray(tile), (label + column * (width + MARGIN), top))
    return canvas


def triple(eager: NDArray[np.uint8], exported: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    """Two pictures, or the middle frames of two videos, and their difference times AMPLIFIED: uint8 [H, W, 3], at most WIDEST
    wide."""
    if eager.ndim == 4:
        eager, exported = eager[len(eager) // 2], exported[len(exported) // 2]
    difference = np.abs(eager.astype(np.int32) - exported) * AMPLIFIED
    stride = -(-eager.shape[1] // WIDEST)
    return [image[::stride, ::stride] for image in (eager, exported, difference.clip(0, 255).astype(np.uint8))]
