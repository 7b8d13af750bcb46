"""What an iteration of TDM costs: three full copies against one shared base, and what the saved forwards are worth.

Each variant has a process of its own, so that its peak memory is its own; their iterations are interleaved, so that a machine
that slows down for a while slows all alike. The network is a PixArt transformer with random weights: what an iteration
costs does not depend on what they are.
"""

import json
import multiprocessing
import re
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel
from torch import nn
from tqdm import tqdm

from server.engine.fingerprint import device_class
from tdm_train.denoiser import Text
from tdm_train.roles import Roles
from tdm_train.run import Run
from tdm_train.samples import Samples
from tdm_train.tdm_recipe import TdmRecipe
from tdm_train.texts import Texts
from tdm_train.trainer import Batch, draw_batches, update_fake_score, update_student

VARIANTS = {
    "three full copies": ("full", True),
    "one shared base, LoRA": ("lora", True),
    "three full copies, no forwards saved": ("full", False),
    "one shared base, LoRA, no forwards saved": ("lora", False),
}
RECIPE = TdmRecipe(nfe=(4,), sizes=("128x128",), batch=4, rank=16, alpha=16, tracker="none", sample_every=0)
TOKENS, CAPTION = 32, 256  # of a prompt, and the width of its embeddings


def run(rounds: int, width: int, layers: int) -> None:
    """Measures, prints the table, and one line of JSON last."""
    seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    with ExitStack() as stack:
        workers = {variant: stack.enter_context(Worker(variant, width, layers)) for variant in VARIANTS}
        for index in tqdm(range(rounds + 1), desc="rounds", dynamic_ncols=True):
            for variant, worker in workers.items():
                spent = worker.ask("iterate")
                if index > 0:  # the first iteration of each makes the optimisers' moments
                    seconds[variant].append(spent)
        memory = {variant: worker.ask("memory") for variant, worker in workers.items()}
        parameters = workers["three full copies"].ask("parameters")
    report(seconds, memory, int(parameters), rounds)


class Worker:
    """A process that holds the roles of one variant and trains an iteration when it is told."""

    def __init__(self, variant: str, width: int, layers: int) -> None:
        self.ours, theirs = multiprocessing.Pipe()
        arguments = (theirs, *VARIANTS[variant], width, layers)
        self.process = multiprocessing.get_context("spawn").Process(target=obey, args=arguments, daemon=True)

    def __enter__(self) -> "Worker":
        self.process.start()
        return self

    def ask(self, what: str) -> float:
        """Seconds of an iteration, MiB of peak memory above the libraries', or the network's parameters."""
        self.ours.send(what)
        answer: float = self.ours.recv()
        return answer

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.join()


def obey(told: Connection, weights: Any, saving: bool, width: int, layers: int) -> None:
    """The worker's side."""
    torch.set_num_threads(1)
    before, recipe = peak_mebibytes(), replace(RECIPE, weights=weights)
    with tempfile.TemporaryDirectory() as out:
        training, step = Run(Path(out), recipe, resume=False), 0
        pipeline = new_pipeline(width, layers)
        roles, texts = Roles.of(pipeline, recipe, training), new_texts(pipeline, recipe, training.device)
        roles = roles if saving else replace(roles, teacher=Unbatched(roles.teacher))
        while True:
            match told.recv():
                case "iterate":
                    told.send(iterate(pipeline, roles, texts, recipe, training, step, saving))
                    step += 1
                case "memory":
                    told.send(peak_mebibytes() - (before if training.device.type == "cpu" else 0))
                case "parameters":
                    told.send(float(sum(parameter.numel() for parameter in pipeline.transformer.parameters())))


def iterate(pipeline: Any, roles: Roles, texts: Texts, recipe: TdmRecipe, training: Run, step: int, saving: bool) -> float:
    """Seconds of one iteration, as train_tdm has it."""
    begin = time.perf_counter()
    with training.accelerator.autocast():
        batches = draw_batches(pipeline, roles, texts, recipe, training, step, turn=0)
        if not saving:
            batches = [predicted_again(roles, batch) for batch in batches]
        update_fake_score(roles, batches, recipe, training)
        update_student(roles, batches, recipe, training, warm_up=False)
    return time.perf_counter() - begin


@torch.no_grad()
def predicted_again(roles: Roles, batch: Batch) -> Batch:
    """The student asked anew where it was asked in its rollout."""
    x0, eps = roles.student(batch.x_t, batch.start, batch.text, batch.nfe)
    return replace(batch, x0=x0, eps=eps)


class Unbatched(nn.Module):
    """A teacher that is asked with and without prompt one after the other."""

    def __init__(self, teacher: nn.Module):
        super().__init__()
        self.teacher = teacher

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, text: Text, nfe: torch.Tensor | None = None) -> Any:
        half = len(t) // 2
        halves = [self.teacher(x_t[part], t[part], text.select(part), None) for part in (slice(half), slice(half, None))]
        return tuple(torch.cat(pair) for pair in zip(*halves, strict=True))


def new_pipeline(width: int, layers: int) -> PixArtSigmaPipeline:
    """PixArt over 16 x 16 latents, which are 64 tokens, with random weights and no text encoder."""
    torch.manual_seed(0)
    network = PixArtTransformer2DModel(
        num_attention_heads=width // 64,
        attention_head_dim=64,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        cross_attention_dim=width,
        sample_size=16,
        caption_channels=CAPTION,
        use_additional_conditions=False,
    )
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = AutoencoderKL(block_out_channels=(8,) * 4, latent_channels=4, norm_num_groups=4, **blocks)
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    return PixArtSigmaPipeline(None, None, vae, network, scheduler)


def new_texts(pipeline: Any, recipe: TdmRecipe, device: torch.device) -> Texts:
    """Made-up embeddings of 64 prompts."""
    text = Text(torch.randn(64, TOKENS, CAPTION), torch.ones(64, TOKENS, dtype=torch.int64))
    empty = text.select(slice(recipe.batch)).to(device)
    return Texts(text, empty, Samples(pipeline, torch.zeros(0), text, empty, None))


def peak_mebibytes() -> float:
    """The most memory that this process has held: of the GPU where there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status").read_text()  # ru_maxrss would begin with what the parent held
    return int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1)) / 1024


def report(seconds: dict[str, list[float]], memory: dict[str, float], parameters: int, rounds: int) -> None:
    """Medians for people, then the document."""
    print(f"{parameters / 1e6:.1f} M parameters, batch {RECIPE.batch}, K = {RECIPE.nfe[0]}")
    print(f"{'':<42}{'iterations/s':>14}{'peak MiB':>10}")
    median = {variant: float(np.median(spent)) for variant, spent in seconds.items()}
    for variant in VARIANTS:
        print(f"{variant:<42}{1 / median[variant]:>14.3f}{memory[variant]:>10.0f}")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    document = {"benchmark": "training", "device": gpu or device_class(), "rounds": rounds, "parameters": parameters}
    document |= {"batch": RECIPE.batch, "nfe": list(RECIPE.nfe), "rank": RECIPE.rank, "precision": RECIPE.precision}
    document["iterations_per_second"] = {variant: round(1 / value, 4) for variant, value in median.items()}
    document["peak_mebibytes"] = {variant: round(value) for variant, value in memory.items()}
    print(json.dumps(document))
