"""student.json of a student folder: what the student is and how it must be run, strictly."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, PositiveInt, ValidationError, model_validator

FORMAT: Literal[2] = 2
VIDEO_EXAMPLES = {"frames": 49, "fps": 8}
Family = Literal["pixart", "stable_diffusion", "sdxl", "sd3", "cogvideox"]
Nfe = Annotated[int, Field(ge=1, le=64)]
Size = Annotated[str, Field(pattern=r"^[1-9][0-9]{0,4}x[1-9][0-9]{0,4}$")]


class Description(BaseModel):
    """student.json, format 2. Unknown keys are refused, and so is every field left out but frames, fps, timesteps and sigmas.

    base, revision: the model the student was made of, and which version of it.
    nfe: the ladder, rising; default_nfe is one of it.
    text_length: tokens that prompts are padded to (SD3: those of its T5).
    sizes: "WIDTHxHEIGHT" in pixels, the default first. frames, fps: of videos, and of videos alone.
    timesteps, sigmas: where each NFE count is evaluated, falling; without them, where the folder's scheduler says.
    k_conditioning: whether k_conditioning.safetensors holds a vector for each K; the weights are those of the largest K.
    adapter_scale: what a LoRA was multiplied by when it was fused into the weights, None where there was none.
    training: how the student was made, for people.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format: Literal[2] = FORMAT
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$", examples=["scenes"])]
    family: Annotated[Family, Field(examples=["pixart"])]
    base: Annotated[str, Field(examples=["stabilityai/stable-diffusion-xl-base-1.0"])]
    revision: Annotated[str, Field(examples=["main"])]
    nfe: Annotated[list[Nfe], Field(min_length=1, examples=[[1, 2, 4]])]
    default_nfe: Annotated[Nfe, Field(examples=[4])]
    text_length: Annotated[PositiveInt, Field(examples=[77])]
    sizes: Annotated[list[Size], Field(min_length=1, examples=[["1024x1024"]])]
    frames: Annotated[PositiveInt | None, Field(examples=[VIDEO_EXAMPLES["frames"]])] = None
    fps: Annotated[PositiveInt | None, Field(examples=[VIDEO_EXAMPLES["fps"]])] = None
    timesteps: Annotated[dict[Nfe, list[FiniteFloat]] | None, Field(examples=[{"4": [999, 856, 665, 399]}])] = None
    sigmas: Annotated[dict[Nfe, list[FiniteFloat]] | None, Field(examples=[{"2": [1.0, 0.75]}])] = None
    k_conditioning: Annotated[bool, Field(examples=[True])]
    adapter_scale: Annotated[FiniteFloat | None, Field(examples=[None])]
    training: Annotated[dict[str, Any], Field(examples=[{}])]

    @model_validator(mode="after")
    def agrees_with_itself(self) -> "Description":
        """Raises ValueError where two fields contradict each other."""
        if self.nfe != sorted(set(self.nfe)) or self.default_nfe not in self.nfe:
            raise ValueError(f"nfe must rise and hold default_nfe, got {self.nfe} and {self.default_nfe}")
        for field, example in VIDEO_EXAMPLES.items():
            if (getattr(self, field) is None) == (self.family == "cogvideox"):
                needed = f"is missing, for example {example}" if self.family == "cogvideox" else "is of videos alone"
                raise ValueError(f"{field} {needed} (family {self.family!r})")
        if self.timesteps is not None and self.sigmas is not None:
            raise ValueError("timesteps and sigmas: give one of them")
        for nfe, grid in ((self.timesteps or {}) | (self.sigmas or {})).items():
            if nfe not in self.nfe or len(grid) != nfe or grid != sorted(set(grid), reverse=True):
                raise ValueError(f"the grid of NFE {nfe} is {grid}, legal: {nfe} falling values for one of nfe {self.nfe}")
        return self

    def grid(self, nfe: int) -> tuple[list[float] | None, list[float] | None]:
        """(timesteps, sigmas) that this student states for `nfe` evaluations, falling; None where the scheduler decides."""
        return (self.timesteps or {}).get(nfe), (self.sigmas or {}).get(nfe)

    def write(self, folder: Path) -> None:
        """Writes `folder/student.json`."""
        (folder / "student.json").write_text(self.model_dump_json(indent=1, exclude_unset=False) + "\n")


def read_description(folder: Path) -> Description:
    """`folder/student.json`, of format 2 or 1; raises ValueError in one line, naming the field and an example of it."""
    file = folder / "student.json"
    if not file.is_file():
        raise ValueError(f"{folder} is not a student folder: it has no student.json (fewstep train makes one)")
    try:
        contents = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(contents, dict) or contents.get("format") not in (1, FORMAT):
        said = contents.get("format") if isinstance(contents, dict) else contents
        raise ValueError(f"{file} has format {said!r}, this version reads 1 and {FORMAT}")
    if contents["format"] == 1:
        contents = from_format_1(contents, folder)
    try:
        return Description.model_validate_json(json.dumps(contents))
    except ValidationError as error:
        raise ValueError(f"{file}: {first_error(error, Description)}") from None


def from_format_1(contents: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What format 1 left unsaid: a PixArt student with K-conditioning, of its transformer's own size, fused from no LoRA."""
    latents = json.loads((folder / "transformer" / "config.json").read_text())["sample_size"]
    vae = json.loads((folder / "vae" / "config.json").read_text())
    block = round((vae["out_channels"] / 3) ** 0.5)  # see tdm_train/backbones/sizes.py
    side = latents * 2 ** (len(vae["block_out_channels"]) - 1) * block
    unsaid = {"revision": "1", "sizes": [f"{side}x{side}"], "k_conditioning": True, "adapter_scale": None}
    return {**contents, **unsaid, "format": FORMAT}


def first_error(error: ValidationError, model: type[BaseModel]) -> str:
    """The first complaint about a `model` in one line: field, what is wrong, and an example for a field of its own."""
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    field = model.model_fields.get(str(first["loc"][0])) if first["loc"] else None
    example = f", for example {json.dumps(field.examples[0])}" if field is not None and field.examples else ""
    message = first["msg"].removeprefix("Value error, ")
    return f"{where}: {message}{example}" if where else message
