"""What `fewstep eval` tells beyond its rows: the mean and spread over training seeds, and a plot."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.evaluation import Decoder, Evaluation, Row, check_nfe, description_of, report, student_rows

MEASURES = {"adherence": "adherence", "frechet": "Fréchet distance"}


@dataclass(frozen=True)
class Group:
    """Students that differ by their training seed alone. `adherence` and `frechet`: NFE -> one value per student."""

    name: str
    seeds: tuple[int | None, ...]
    adherence: dict[int, list[float]]
    frechet: dict[int, list[float]]

    def as_json(self) -> dict[str, Any]:
        """Mean and sample standard deviation over the seeds; the latter is null for one alone."""
        rows = [
            {"nfe": nfe} | {measure: spread(getattr(self, measure)[nfe]) for measure in MEASURES}
            for nfe in sorted(self.adherence)
        ]
        return {"name": self.name, "seeds": list(self.seeds), "rows": rows}


def spread(values: Sequence[float]) -> dict[str, float | None]:
    return {"mean": round(mean(values), 4), "stdev": round(stdev(values), 4) if len(values) > 1 else None}


def names_of(folders: Sequence[Path]) -> list[str]:
    """What to call students: `student` where there is one alone, else the run's or the exported student's folder."""
    if len(folders) == 1:
        return ["student"]
    names = [folder.resolve().parent.name if folder.name == "student" else folder.name for folder in folders]
    if len(set(names)) < len(names):
        raise ValueError(f"students {', '.join(map(str, folders))}: their folders must have different names")
    return names


def check(folders: Sequence[Path], nfe_counts: list[int]) -> None:
    """Refuses students that cannot be told apart or do not have these NFE counts, before any work. Raises ValueError."""
    names_of(folders)
    for folder in folders:
        check_nfe(nfe_counts, description_of(folder)["nfe"])


def rows_of(
    folders: Sequence[Path], nfe_counts: list[int], evaluation: Evaluation, open_decoder: Callable[[Path], Decoder]
) -> list[list[Row]]:
    """The rows of every student; for open_decoder see student_rows."""
    named = zip(folders, names_of(folders), strict=True)
    return [student_rows(folder, nfe_counts, evaluation, open_decoder, name) for folder, name in named]


def groups_of(folders: Sequence[Path], rows: Sequence[Sequence[Row]]) -> list[Group]:
    """Students in groups that were taught alike, by what their student.json says; `rows` are those of each."""
    groups: dict[str, list[int]] = {}
    for index, folder in enumerate(folders):
        training = description_of(folder).get("training", {"exported": str(folder)})
        taught = json.dumps({name: value for name, value in training.items() if name != "seed"}, sort_keys=True)
        groups.setdefault(taught, []).append(index)
    return [group_of(folders, rows, members) for members in groups.values()]


def group_of(folders: Sequence[Path], rows: Sequence[Sequence[Row]], members: list[int]) -> Group:
    counts = sorted({row.nfe for row in rows[members[0]]})
    values = {
        measure: {nfe: [getattr(row, measure) for index in members for row in rows[index] if row.nfe == nfe] for nfe in counts}
        for measure in MEASURES
    }
    seeds = tuple(description_of(folders[index]).get("training", {}).get("seed") for index in members)
    return Group(rows[members[0]][0].what, seeds, **values)


def table(groups: Sequence[Group]) -> str:
    """Mean and spread of every group with several seeds, for people."""
    lines = []
    for group in groups:
        if len(group.seeds) < 2:
            continue
        lines.append(f"{group.name} over {len(group.seeds)} training seeds")
        for nfe in sorted(group.adherence, reverse=True):
            shares, distances = group.adherence[nfe], group.frechet[nfe]
            share, distance = f"{mean(shares):.1%} +- {stdev(shares):.1%}", f"{mean(distances):.2f} +- {stdev(distances):.2f}"
            lines.append(f"{'':14}{nfe:>4}{share:>26}{distance:>18}")
    return "\n".join(lines)


def tell(rows: list[Row], groups: Sequence[Group], captions: int, seed: int, picture: Path | None) -> None:
    """Tables on stderr, a plot where one is wanted, and one JSON document as the last line of stdout."""
    report(rows, captions, seed, table(groups), groups=[group.as_json() for group in groups])
    if picture:
        plot(rows, groups, picture)


def plot(rows: Sequence[Row], groups: Sequence[Group], file: Path) -> None:
    """Both measures over NFE: students with their spread, the teacher at its NFE, and the ceiling as a line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, (measure, title) in zip(figure.subplots(1, 2), MEASURES.items(), strict=True):
        for row in rows:
            value = getattr(row, measure)
            if row.nfe == 0:
                axes.axhline(value, color="0.6", linestyle=":" if row.what == "rendered" else "--", label=row.what)
        for guidance in sorted({row.guidance for row in rows if row.what == "teacher"}):
            points = sorted(
                (row.nfe, getattr(row, measure)) for row in rows if (row.what, row.guidance) == ("teacher", guidance)
            )
            axes.plot(*zip(*points, strict=True), "s-", linewidth=0.8, markersize=4, label=f"teacher, guidance {guidance:g}")
        for group in groups:
            values = getattr(group, measure)
            counts = sorted(values)
            errors = [stdev(values[nfe]) if len(values[nfe]) > 1 else 0.0 for nfe in counts]
            label = group.name if len(group.seeds) == 1 else f"{len(group.seeds)} training seeds"
            axes.errorbar(counts, [mean(values[nfe]) for nfe in counts], errors, fmt="o-", capsize=3, label=label)
        axes.set(title=title, xlabel="NFE", xscale="log", ylim=(0, 1) if measure == "adherence" else (0, None))
        ticks = sorted({row.nfe for row in rows if row.nfe})
        axes.set_xticks(ticks, map(str, ticks))
        axes.minorticks_off()
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", fontsize=7)
    figure.savefig(file, dpi=130)
