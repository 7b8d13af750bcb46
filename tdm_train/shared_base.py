"""LoRA (arXiv 2106.09685) with one frozen network under teacher, student and fake score.

Student and fake score are peft adapters on it; with both off it is the teacher. So a role costs its adapter alone, where full
training holds the network three times.
"""

import warnings
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from tdm_train.denoiser import Denoiser, Text
from tdm_train.steps_aware import StepsAwareEmbedding, new_k_embedding, timestep_embedding

ADAPTED = ("student", "fake_score")


class SharedBase:
    """A denoiser whose network acts as one role at a time: "teacher", "student" or "fake_score".

    config: of both adapters. nfe_set: the K that each adapted role has a vector for; empty for no K-conditioning. dtype: of the
    frozen network; what is trained is float32.
    Raises ValueError for targets that the network has no module of.
    """

    def __init__(self, denoiser: Denoiser, config: LoraConfig, nfe_set: tuple[int, ...], dtype: torch.dtype):
        refuse_unknown_targets(denoiser.network, config)
        self.denoiser = denoiser
        network = denoiser.network.requires_grad_(False).to(dtype)
        self.place, plain = timestep_embedding(network)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # two adapters are the very point
            for role in ADAPTED:
                inject_adapter_in_model(config, network, adapter_name=role)
        self.embeddings: dict[str, nn.Module] = dict.fromkeys(("teacher", *ADAPTED), plain)
        if nfe_set:
            self.embeddings |= {role: StepsAwareEmbedding(plain, new_k_embedding(network, nfe_set).float()) for role in ADAPTED}
        self.layers = [module for module in network.modules() if isinstance(module, BaseTunerLayer)]
        for parameter in self.adapters():
            parameter.data = parameter.data.float()

    def __deepcopy__(self, memo: dict[int, Any]) -> "SharedBase":
        return self  # a copy of a role has parameters of its own, but no second network

    def adapters(self) -> list[nn.Parameter]:
        """The parameters of both adapters."""
        return [parameter for name, parameter in self.denoiser.network.named_parameters() if ".lora_" in name]

    def of_role(self, role: str) -> dict[str, nn.Parameter]:
        """A role's own parameters: module.lora_A.weight and module.lora_B.weight of every adapted module, and k_embedding."""
        found = self.denoiser.network.named_parameters()
        own = {name.replace(f".{role}.", "."): parameter for name, parameter in found if f".{role}." in name}
        embedding = self.embeddings[role]
        return own | ({"k_embedding": embedding.k_embedding} if isinstance(embedding, StepsAwareEmbedding) else {})

    def act_as(self, role: str) -> None:
        """Has the network act as a role from now on."""
        for layer in self.layers:
            if role in ADAPTED:
                layer.set_adapter(role)
            layer.enable_adapters(role in ADAPTED)
        for parameter in self.adapters():
            parameter.requires_grad_(True)  # peft freezes what is not active, but a backward pass may still be due to it
        self.denoiser.network.set_submodule(self.place, self.embeddings[role])


class SharedRole(nn.Module):
    """A role of a shared base, called as a Denoiser is. Its parameters and its state are its own alone, without the base's."""

    def __init__(self, base: SharedBase, role: str):
        super().__init__()
        self.base, self.role, self.schedule = base, role, base.denoiser.schedule
        own = base.of_role(role) if role in ADAPTED else {}
        self.names = list(own)
        self.own = nn.ParameterList(own.values())

    def forward(
        self, x_t: torch.Tensor, t: torch.Tensor, text: Text, nfe: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """-> (x0_hat, eps_hat), as Denoiser.forward."""
        self.base.act_as(self.role)
        x0, eps = self.base.denoiser(x_t, t, text, nfe)
        for result in (x0, eps):
            if result.requires_grad:  # gradient checkpointing calls the network again, when others may have had it since
                result.register_hook(lambda _: self.base.act_as(self.role))
        return x0, eps


def refuse_unknown_targets(network: nn.Module, config: LoraConfig) -> None:
    """Raises ValueError for a target that no linear layer or convolution of the network ends in."""
    linear = [f".{name}" for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    for target in config.target_modules or ():
        if not any(name.endswith(f".{target}") for name in linear):
            ends = sorted({name.rpartition(".")[2] for name in linear if not name.rpartition(".")[2].isdigit()})
            raise ValueError(
                f"targets: {type(network).__name__} has no module {target!r}, legal are for example {', '.join(ends)}"
            )
