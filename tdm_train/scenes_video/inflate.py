"""A trained image autoencoder turned into a video autoencoder that begins with what it knows.

Inflation (Carreira and Zisserman 2017): each 2-D kernel becomes the last of a causal 3-D kernel's taps, the one on the present
frame, and the others begin at 0. So every frame goes through the image autoencoder, and the temporal poolings of
AutoencoderKLCogVideoX average over time in between, until training tells the frames apart.
"""

import re

import torch
from diffusers import AutoencoderKL, AutoencoderKLCogVideoX


@torch.no_grad()
def inflate(image_vae: AutoencoderKL, vae: AutoencoderKLCogVideoX) -> None:
    """Overwrites the weights of `vae` by those of `image_vae`, in place.

    Both have the same channels of pixels and the same widths; `vae` has more latent channels, and those that are new begin
    close to unused. The image autoencoder's attention has no counterpart and is left out.
    """
    known, latents = image_vae.config.latent_channels, vae.config.latent_channels
    weights = _fold_quantisation(image_vae.state_dict(), known)
    wanted = vae.state_dict()
    _spread_latents(wanted, latents)
    for name, weight in weights.items():
        target = wanted[_counterpart(name, wanted)]
        if name.startswith("encoder.conv_out"):  # the means come first, then the logarithms of the variances
            _put(target[:known], weight[:known])
            _put(target[latents : latents + known], weight[known:])
        elif name == "decoder.conv_in.weight":
            _put(target[:, :known], weight)
        else:
            _put(target, weight)
    vae.load_state_dict(wanted)


def _fold_quantisation(weights: dict[str, torch.Tensor], latents: int) -> dict[str, torch.Tensor]:
    """The 1x1 convolutions before and after the latents, of which AutoencoderKLCogVideoX has none, go into their neighbours."""
    quant, post = weights["quant_conv.weight"][:, :, 0, 0], weights["post_quant_conv.weight"][:, :, 0, 0]
    assert post.shape == (latents, latents)
    out, into = weights["encoder.conv_out.weight"], weights["decoder.conv_in.weight"]
    folded = {
        "encoder.conv_out.weight": torch.einsum("oc,cihw->oihw", quant, out),
        "encoder.conv_out.bias": quant @ weights["encoder.conv_out.bias"] + weights["quant_conv.bias"],
        "decoder.conv_in.weight": torch.einsum("oihw,ic->ochw", into, post),
        "decoder.conv_in.bias": weights["decoder.conv_in.bias"] + into.sum((2, 3)) @ weights["post_quant_conv.bias"],
    }
    kept = {name: weight for name, weight in weights.items() if "attentions" not in name and "quant_conv" not in name}
    return kept | folded


def _spread_latents(wanted: dict[str, torch.Tensor], latents: int) -> None:
    """Where the image autoencoder says nothing: new latents that are certain (variance e^-3) and small, and normalisations
    that do not depend on the latents."""
    wanted["encoder.conv_out.conv.weight"][latents:] *= 0.1
    wanted["encoder.conv_out.conv.bias"][latents:] = -3
    wanted["decoder.conv_in.conv.weight"] *= 0.3
    for name, weight in wanted.items():
        if re.search(r"conv_[yb]\.conv\.", name):
            weight.fill_(float(name.endswith("conv_y.conv.bias")))


def _counterpart(name: str, wanted: dict[str, torch.Tensor]) -> str:
    """The name that AutoencoderKLCogVideoX has for a weight of AutoencoderKL."""
    name = name.replace("conv_norm_out", "norm_out")
    if name.startswith("decoder"):
        name = re.sub(r"(norm1|norm2|norm_out)\.", r"\1.norm_layer.", name)
    return name if name in wanted else re.sub(r"\.(weight|bias)$", r".conv.\1", name)


def _put(target: torch.Tensor, weight: torch.Tensor) -> None:
    if target.ndim == 5:
        target[:, :, :-1] = 0
        target[:, :, -1] = weight
    else:
        target.copy_(weight)
