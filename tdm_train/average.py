"""`fewstep average`: students of several training seeds -> one student of their mean weights, at no cost when it runs.

Wortsman et al., "Model soups", arXiv 2203.05482: networks tuned from the same weights, each its own way, often lie in one
valley, and their mean is then as good as the best of them or better.
"""

import filecmp
import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tdm_train.backbones import backbone_named
from tdm_train.checkpoint import K_VECTORS, pipeline_config, refuse_missing_parts
from tdm_train.description import Description, read_description
from tdm_train.durable import publish


def average_students(folders: list[Path], out: Path) -> None:
    """Writes the student folder `out`: the first of `folders` with the mean of all their networks and K-conditionings.

    The mean is taken in float32 and saved in the first one's dtype. student.json has `averaged_seeds` where it had `seed`.
    Raises ValueError, before anything is written, for fewer than two students, for students that differ by more than their
    training seed, and for fused adapters, whose own files have no mean.
    """
    if out.exists():
        raise ValueError(f"{out} exists already: name another folder")
    description = averaged_description(folders)
    averaged = averaged_files(folders)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        folder = Path(scratch) / "student"
        shutil.copytree(folders[0], folder)
        for name in averaged:
            save_file(mean_of([one / name for one in folders]), folder / name, metadata={"format": "pt"})
        description.write(folder)
        publish(folder, out)


def averaged_description(folders: list[Path]) -> Description:
    """What student.json says of the mean; raises ValueError for students that have none."""
    if len(folders) < 2:
        raise ValueError(f"{len(folders)} student to average, legal: 2 or more, of different training seeds")
    descriptions = [read_description(folder) for folder in folders]
    first = descriptions[0]
    for folder, description in zip(folders, descriptions, strict=True):
        if description.adapter_scale is not None:
            raise ValueError(f"{folder} has an adapter fused in, legal: students of weights=full")
        if without_seed(description) != without_seed(first):
            raise ValueError(f"{folder} and {folders[0]} differ by more than their training seed, see their student.json")
    seeds = [description.training.get("seed") for description in descriptions]
    if None in seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"training seeds {', '.join(map(str, seeds))}, legal: different ones, stated in every student.json")
    return first.model_copy(update={"training": without_seed(first).training | {"averaged_seeds": seeds}})


def without_seed(description: Description) -> Description:
    training = {name: value for name, value in description.training.items() if name != "seed"}
    return description.model_copy(update={"training": training})


def averaged_files(folders: list[Path]) -> list[Path]:
    """The files to take the mean of, relative to the folders; raises ValueError where another one differs between them."""
    for folder in folders:
        refuse_missing_parts(folder)
    network = backbone_named(pipeline_config(folders[0])["_class_name"]).NETWORK
    names = [files_of(folder) for folder in folders]
    for folder, found in zip(folders, names, strict=True):
        if odd := sorted(map(str, found ^ names[0])):
            raise ValueError(f"{folder} and {folders[0]} are not of the same files: {', '.join(odd)}")
    averaged = [name for name in sorted(names[0]) if name.suffix == ".safetensors" and name.parts[0] in (network, K_VECTORS)]
    for name in sorted(names[0] - {*averaged, Path("student.json")}):
        for folder in folders[1:]:
            if not filecmp.cmp(folders[0] / name, folder / name, shallow=False):
                raise ValueError(f"{name} of {folder} is another than that of {folders[0]}: they have different teachers")
    return averaged


def files_of(folder: Path) -> set[Path]:
    return {file.relative_to(folder) for file in folder.rglob("*") if file.is_file()}


def mean_of(files: list[Path]) -> dict[str, torch.Tensor]:
    """Tensor by tensor: in float32, then in the first one's dtype. One tensor of each file at a time is in memory."""
    with ExitStack() as stack:
        opened = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
        mean = {}
        for name in sorted(opened[0].keys()):
            values = [file.get_tensor(name) for file in opened]
            mean[name] = torch.stack([value.float() for value in values]).mean(0).to(values[0].dtype)
        return mean
