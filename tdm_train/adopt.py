"""`fewstep adopt`: a released adapter and its base -> a student folder, with the adapter fused into the weights."""

import tempfile
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from tdm_train.adapter import write_adapter
from tdm_train.backbones import backbone_named, backbone_of
from tdm_train.checkpoint import open_pipeline, pipeline_config, save_student
from tdm_train.release import Release
from tdm_train.samplers import schedule_of


def adopt(release: Release, base: Path | str, weights: Path, out: Path, dtype: torch.dtype = torch.float16) -> None:
    """Writes the student folder `out`, with the adapter itself in pytorch_lora_weights.safetensors beside the fused weights.

    base: a diffusers folder, or a hub id, which is opened at the release's revision. weights: the released file. dtype: of the
    student's weights; float16 rounds what is fused once more, as it does for every student folder.
    Raises ValueError for a base or a file that is not the release's before the base's weights are read; `out` is then not made.
    """
    if out.exists():
        raise ValueError(f"{out} exists already: name another folder")
    if not weights.is_file():
        raise ValueError(f"{weights} is no file of released weights")
    network = described_network(release, base)
    refuse_other_schedule(release, base)
    component = backbone_named(release.pipeline).NETWORK
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        folder = Path(scratch) / "student"
        modules = write_adapter(weights, release, getattr(diffusers, release.pipeline), component, network, folder)
        pipeline = open_pipeline(base, release.student.revision)
        refuse_what_the_base_cannot_do(release, pipeline)
        fuse(pipeline, component, folder, release.student.adapter_scale, modules)
        sampler = release.new_sampler()
        save_student(pipeline, getattr(pipeline, component), release.student, folder, sampler, dtype)
        refuse_changed_sampler(release, sampler)
        folder.rename(out)


def described_network(release: Release, base: Path | str) -> nn.Module:
    """The base's network on the meta device, without weights; raises ValueError where it is not what the release stands on."""
    config = pipeline_config(base, release.student.revision)
    if config["_class_name"] != release.pipeline:
        raise ValueError(f"{base} is a {config['_class_name']}, {release.student.name} stands on a {release.pipeline}")
    component = backbone_named(release.pipeline).NETWORK
    kind = class_of(config, component)
    with torch.device("meta"):
        network: nn.Module = kind.from_config(kind.load_config(base, subfolder=component, revision=release.student.revision))
    for field, needed in release.network.items():
        found = network.config.get(field)
        found = list(found) if isinstance(found, tuple) else found
        if found != needed:
            raise ValueError(f"{base}: its {component} has {field}={found!r}, {release.student.name} stands on {needed!r}")
    return network


def class_of(config: dict[str, Any], component: str) -> Any:
    """The diffusers class that a model_index.json names for a component."""
    library, name = config.get(component, (None, None))
    if library != "diffusers" or not hasattr(diffusers, name):
        raise ValueError(
            f"the base's {component} is {name!r} of {library!r}, legal: a class of diffusers {diffusers.__version__}"
        )
    return getattr(diffusers, name)


def refuse_other_schedule(release: Release, base: Path | str) -> None:
    """Raises ValueError where the release's sampler does not read the network as the base's own scheduler does."""
    kind = class_of(pipeline_config(base, release.student.revision), "scheduler")
    scheduler, name = kind.from_pretrained(base, subfolder="scheduler", revision=release.student.revision), kind.__name__
    own, stated = schedule_of(scheduler), schedule_of(release.new_sampler())
    for field in ("prediction_type", "train_timesteps"):
        if getattr(own, field) != getattr(stated, field):
            raise ValueError(
                f"{base}: its {name} says {field}={getattr(own, field)!r}, the sampler of {release.student.name} "
                f"{getattr(stated, field)!r}"
            )
    if own.alphas_cumprod is not None and not torch.allclose(own.alphas_cumprod, stated.alphas_cumprod, rtol=1e-4, atol=1e-7):
        raise ValueError(
            f"{base}: the noise schedule (betas) of its {name} is not that of the sampler of {release.student.name}"
        )


def refuse_what_the_base_cannot_do(release: Release, pipeline: Any) -> None:
    """Raises ValueError for a size, a number of frames or a text length that the base does not take."""
    backbone, student = backbone_of(pipeline), release.student
    for size in student.sizes:
        width, height = map(int, size.split("x"))
        backbone.latent_shape(pipeline, width, height, student.frames)
    backbone.encode(pipeline, [""], student.text_length)


def fuse(pipeline: Any, component: str, adapter: Path, scale: float | None, modules: set[str]) -> None:
    """Adds the adapter in the folder `adapter`, `scale` times, to the weights of the pipeline's network."""
    pipeline.load_lora_weights(str(adapter), weight_name=LORA_WEIGHT_NAME_SAFE)
    network = getattr(pipeline, component).float()  # an adapter in half precision would round its update
    adapted = {name for name, module in network.named_modules() if isinstance(module, BaseTunerLayer)}
    assert adapted == modules, sorted(adapted ^ modules)
    pipeline.fuse_lora(components=[component], lora_scale=scale)
    pipeline.unload_lora_weights()


def refuse_changed_sampler(release: Release, sampler: Any) -> None:
    """Raises ValueError where the pipeline has set a field of its sampler to what it holds right, as Stable Diffusion's does
    with steps_offset and clip_sample: whoever opens the folder would run the student in another way than stated."""
    for field, stated in release.new_sampler().config.items():
        if sampler.config[field] != stated:
            raise ValueError(
                f"sampler.{field} is {stated!r} in the release, but {release.pipeline} sets it to {sampler.config[field]!r}: "
                "state that, if it is what the student was made for"
            )
