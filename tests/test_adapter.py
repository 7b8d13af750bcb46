"""A released file is read tensor by tensor, each named and of the network's own shape, or it is refused by what is wrong."""

import os
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from tdm_train.adapter import read_tensors, write_adapter
from tdm_train.adopt import described_network
from tdm_train.backbones import backbone_named
from tdm_train.release import Positional
from tests.releases import BASES, RANK, RELEASES, write_release

SD3_FILE, SD3_5_FILE, DREAMSHAPER_FILE = "TDM_sd3_lora", "TDM_sd3-5_lora", "TDM_dreamshaper_LoRA"
LAYER = "transformer.transformer_blocks.0.attn.to_q"
KOHYA = "lora_unet_down_blocks_0_attentions_0_proj_in"


def converted(name: str, base: Path, weights: Path, to: Path, **changes: Any) -> set[str]:
    """The modules that the file `weights` adapts, read as the release `name` with `changes`."""
    release = RELEASES[name].model_copy(update=changes)
    component = backbone_named(release.pipeline).NETWORK
    kind = getattr(diffusers, release.pipeline)
    return write_adapter(weights, release, kind, component, described_network(release, base), to)


def total(tensor: torch.Tensor) -> float:
    return float(tensor.double().sum())


@pytest.mark.parametrize("name", RELEASES)
def test_every_layout_keeps_every_tensor(name: str, miniatures: Any, tmp_path: Path) -> None:
    base = miniatures(BASES[name])
    weights = write_release(name, base, tmp_path)
    modules = converted(name, base, weights, tmp_path / "to")
    kept = load_file(tmp_path / "to/pytorch_lora_weights.safetensors")
    held = read_tensors(weights, RELEASES[name].layout)
    assert len([key for key in kept if not key.endswith("alpha")]) == 2 * len(modules)
    if name == SD3_5_FILE:  # which tensor has which name: tests/test_adopt.py compares pictures
        assert sorted(map(total, kept.values())) == sorted(map(total, held["ema_parameters"]))
    else:
        assert kept.keys() == held.keys()
        assert all(torch.equal(kept[key], held[key]) for key in held)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda found: found.pop(), "ema_parameters holds 29 tensors, the base's SD3Transformer2DModel needs 30: two for each"),
        (lambda found: found.insert(0, found[0]), "ema_parameters holds 31 tensors"),
        (
            lambda found: found.reverse(),
            rf"ema_parameters\[0\] is 24 x {RANK}, transformer_blocks.0.attn.to_q.lora_A needs 4 x 24",
        ),
        (
            lambda found: found.__setitem__(17, torch.zeros(24, RANK + 1)),
            r"ema_parameters\[17\] is 24 x 5, transformer_blocks.1.attn.to_q.lora_B needs 24 x 4",
        ),
        (lambda found: found[3].fill_(torch.nan), r"ema_parameters\[3\] has values that are not finite"),
        (lambda found: found.__setitem__(2, 1.5), r"ema_parameters\[2\] is float, legal: a tensor"),
        (lambda found: found.__setitem__(2, torch.ones(4, 24).long()), r"ema_parameters\[2\] is torch.int64, legal: a tensor"),
    ],
)
def test_a_positional_file_is_refused_by_count_shape_and_order(change: Any, said: str, miniatures: Any, tmp_path: Path) -> None:
    weights = write_release(SD3_5_FILE, miniatures("sd3"), tmp_path)
    contents = torch.load(weights)
    change(contents["ema_parameters"])
    torch.save(contents, weights)
    with pytest.raises(ValueError, match=said):
        converted(SD3_5_FILE, miniatures("sd3"), weights, tmp_path / "to")


@pytest.mark.parametrize(
    ("modules", "said"),
    [
        (["to_q", "to_k"], "ema_parameters holds 30 tensors, the base's SD3Transformer2DModel needs 12"),
        (["attn.to_q", "attn.to_surprise"], "has no module 'attn.to_surprise'"),
    ],
)
def test_other_modules_than_the_files_are_refused(modules: list[str], said: str, miniatures: Any, tmp_path: Path) -> None:
    weights = write_release(SD3_5_FILE, miniatures("sd3"), tmp_path)
    positional = Positional(rank=RANK, alpha=8, modules=modules)
    with pytest.raises(ValueError, match=said):
        converted(SD3_5_FILE, miniatures("sd3"), weights, tmp_path / "to", positional=positional)


@pytest.mark.parametrize("contents", [[], {"ema_parameters": []}, {"decay": 0.9, "ema_parameters": {}}, torch.zeros(2)])
def test_a_positional_file_of_other_contents_is_refused(contents: Any, miniatures: Any, tmp_path: Path) -> None:
    torch.save(contents, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="legal: 'decay' and 'ema_parameters', a list of tensors"):
        converted(SD3_5_FILE, miniatures("sd3"), tmp_path / "other.ckpt", tmp_path / "to")


@pytest.mark.parametrize(
    ("name", "key", "tensor", "said"),
    [
        (SD3_FILE, f"{LAYER}.lora_B.weight", None, f"{LAYER}.lora_B.weight is missing"),
        (SD3_FILE, f"{LAYER}.alpha", torch.tensor(1.0), rf"{LAYER}.alpha is no layer .* with .lora_A.weight, .lora_B.weight"),
        (SD3_FILE, f"{LAYER}s.lora_A.weight", torch.ones(4, 24), f"{LAYER}s.lora_A.weight is no layer"),
        (SD3_FILE, "text_encoder.q_proj.lora_A.weight", torch.ones(4, 16), "text_encoder.q_proj.lora_A.weight is no layer"),
        (SD3_FILE, f"{LAYER}.lora_A.weight", torch.ones(4, 32), f"{LAYER}.lora_A.weight is 4 x 32, .*attn.to_q needs 4 x 24"),
        (SD3_FILE, f"{LAYER}.lora_B.weight", torch.ones(24, 3), f"{LAYER}.lora_B.weight is 24 x 3, .*attn.to_q needs 24 x 4"),
        (DREAMSHAPER_FILE, f"{KOHYA}.alpha", None, f"{KOHYA}.alpha is missing"),
        (DREAMSHAPER_FILE, f"{KOHYA}.lora_down.weight", None, f"{KOHYA}.lora_down.weight is missing"),
        (DREAMSHAPER_FILE, f"{KOHYA}.alpha", torch.ones(2), f"{KOHYA}.alpha is 2, .*proj_in needs one number"),
        (DREAMSHAPER_FILE, f"{KOHYA}.alpha", torch.tensor(torch.inf), f"{KOHYA}.alpha has values that are not finite"),
        (
            DREAMSHAPER_FILE,
            f"{KOHYA}.lora_down.weight",
            torch.ones(4, 8),
            f"{KOHYA}.lora_down.weight is 4 x 8, .*needs 4 x 8 x 1 x 1",
        ),
        (DREAMSHAPER_FILE, "lora_te_text_model.alpha", torch.tensor(1.0), "lora_te_text_model.alpha is no layer"),
        (DREAMSHAPER_FILE, f"{KOHYA}.dora_scale", torch.ones(1), f"{KOHYA}.dora_scale is no layer"),
    ],
)
def test_an_unknown_a_missing_and_a_misshapen_tensor_is_refused_by_name(
    name: str, key: str, tensor: torch.Tensor | None, said: str, miniatures: Any, tmp_path: Path
) -> None:
    base = miniatures(BASES[name])
    weights = write_release(name, base, tmp_path)
    tensors = read_tensors(weights, RELEASES[name].layout)
    if tensor is None:
        del tensors[key]
    else:
        tensors[key] = tensor
    save_file({name: held.contiguous() for name, held in tensors.items()}, tmp_path / "changed.safetensors")
    with pytest.raises(ValueError, match=said):
        converted(name, base, tmp_path / "changed.safetensors", tmp_path / "to")


def test_kohya_layers_come_in_safetensors_too(miniatures: Any, tmp_path: Path) -> None:
    base = miniatures("stable_diffusion")
    tensors = torch.load(write_release(DREAMSHAPER_FILE, base, tmp_path))
    save_file(tensors, tmp_path / "kohya.safetensors")
    assert converted(DREAMSHAPER_FILE, base, tmp_path / "kohya.safetensors", tmp_path / "to")


class Hostile:
    """Runs a command when it is unpickled."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.trace}",)


@pytest.mark.parametrize("layout", ["kohya", "positional"])
def test_a_pickle_with_code_in_it_is_refused_and_not_run(layout: str, tmp_path: Path) -> None:
    torch.save({"decay": 0.9, "ema_parameters": [Hostile(tmp_path / "trace")]}, tmp_path / "hostile.ckpt")
    with pytest.raises(ValueError, match=r"not a file of tensors alone: .*system"):
        read_tensors(tmp_path / "hostile.ckpt", layout)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize(("layout", "name"), [("diffusers", "a.safetensors"), ("kohya", "a.pt"), ("positional", "a.ckpt")])
@pytest.mark.parametrize("contents", [b"", b"no weights", b"PK\x03\x04" + bytes(40)])
def test_what_is_no_file_of_tensors_is_refused(layout: str, name: str, contents: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(contents)
    with pytest.raises(ValueError, match="not a file of tensors alone"):
        read_tensors(tmp_path / name, layout)


@pytest.mark.parametrize("name", ["a.pt", "a.bin", "a.ckpt", "a.pkl"])
def test_a_pickle_is_refused_where_safetensors_are_expected(name: str, tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / name)
    with pytest.raises(ValueError, match=r"a file of layout 'diffusers' ends in one of .safetensors"):
        read_tensors(tmp_path / name, "diffusers")
