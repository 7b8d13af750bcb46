"""The configuration of one distillation: which variant of the TDM objective, on which grids, for how long.

A recipe that exists is legal: whatever is not raises ValueError when it is made, before any work.
"""

import math
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import torch

from tdm_train.losses import FakeLoss, Rho
from tdm_train.query import Interval, draw_landing, draw_tau
from tdm_train.schedule import TRAIN_TIMESTEPS, grid, shifted
from tdm_train.targets import FakeTarget

Precision = Literal["no", "fp16", "bf16"]
STATED_APART = (
    "checkpoint_minutes",
    "tracker",
    "sample_every",
    "samples",
    "name",
    "teacher",
    "start",
    "base",
    "revision",
    "family",
    "nfe",
    "text_length",
    "frames",
    "fps",
)


@dataclass(frozen=True)
class TdmRecipe:
    """Trajectory Distribution Matching of a teacher into a steps-aware student. The batch size is per process.

    name: the student's. teacher: a diffusers folder, or a hub id at `revision`; base: what student.json says it is, where
    nothing its name. family: of the teacher, as the numbers are for; nothing for any.
    start: a student folder that the student begins as, of the same teacher, K set and K-conditioning; nothing for the teacher,
    as which the fake score begins in any case.
    prompts: a file (see read_prompts), or how many captions of the scenes world.
    text_length: tokens that prompts are padded to, as student.json has it.
    sizes: "WIDTHxHEIGHT" in pixels, trained for equally many iterations one after the other; the last is the student's, and
    without any it is the teacher's own. frames, fps: of videos, 0 for pictures.
    nfe: the K set of the student. shares: how often each K is drawn, as weights; without any, all alike. k_conditioning:
    student and fake score are told K; one K alone needs none. A grid is g_i = last_timestep * i/K, or the one of
    `grids` with K values, which fall (CogVideoX-2B: `((999, 856, 665, 399),)`); under alphas_cumprod it is rounded
    down, so that last_timestep=899 gives the public demo's 899, 674, 449, 224. shift: of a flow's grid, at u = g_i/1000
    shift*u / (1 + (shift - 1)*u).
    ladder: K of the first rungs of `ladder_iterations` each, before the K set (16, 8 before 4).
    guidance: of the teacher, at timesteps up to `guidance_until`; above them it is asked with its prompt alone.
    tau_shift: above 1, score queries are drawn nearer to the upper end of their interval, where it is decided what a picture
    holds: at place tau_shift*u / (1 + (tau_shift - 1)*u) of it for uniform u.
    guidance_until and tau_shift have one number for each K of `nfe`, or one for all; a ladder's rungs have the last.
    random_landing: the student's step lands between its grid's times (`randmid`).
    importance_clip: 1 leaves the importance weight out.
    fake_updates: of the fake score in an iteration, each on trajectories of its own, before the student's on the last ones.
    teacher_weight: of the regulariser towards the teacher, in the velocity loss alone.
    teacher_warmup: iterations in which the student learns the guided teacher's x0 at its own states; `warmup` is the
    learning rates'.
    betas: AdamW's, of student and fake score. ema: the decay of the student's averaged weights, 0 for none.
    checkpoint_minutes: time between checkpoints. tracker: of the numbers of every iteration. Every `sample_every` iterations, 0
    for never, `samples` pictures are drawn at every K and the gates look at them.
    weights: `full`, three networks; `lora`, adapters of `rank`, scaled by alpha / rank, on the modules whose names end in one
    of `targets`, over ONE frozen network, which is the teacher and in half the bytes where `precision` is bf16 or fp16.
    precision: of matrix products under autocast; what is trained is float32.
    accumulation: micro-batches of `batch` samples in an iteration. gradient_checkpointing: activations are computed again in
    the backward pass, in place of being kept.
    """

    name: str = "scenes"
    teacher: str = "tdm_train/scenes/teacher"
    revision: str = "1"
    base: str = "fewstep scenes teacher"
    start: str = ""
    family: Literal["", "pixart", "stable_diffusion", "sdxl", "sd3", "cogvideox"] = ""
    prompts: int | str = 20_000
    text_length: int = 32
    sizes: tuple[str, ...] = ()
    frames: int = 0
    fps: int = 0
    nfe: tuple[int, ...] = (1, 2, 3, 4)
    shares: tuple[float, ...] = ()
    k_conditioning: bool = True
    last_timestep: float = 999.0
    shift: float = 1.0
    grids: tuple[tuple[float, ...], ...] = ()
    ladder: tuple[int, ...] = ()
    ladder_iterations: int = 0
    guidance: float = 2.5
    guidance_until: tuple[float, ...] = (1000.0,)
    interval: Interval = "separate"
    tau_shift: tuple[float, ...] = (1.0,)
    random_landing: bool = False
    fake_loss: FakeLoss = "x0_minsnr"
    fake_target: FakeTarget = "x0_student"
    fake_updates: int = 1
    importance_clip: float = 2.0
    teacher_weight: float = 0.02
    rho: Rho = "huber_elementwise"
    teacher_warmup: int = 0
    iterations: int = 2000
    checkpoint_minutes: float = 3.0
    tracker: Literal["tensorboard", "none"] = "tensorboard"
    sample_every: int = 500
    samples: int = 64
    batch: int = 64
    accumulation: int = 1
    gradient_checkpointing: bool = False
    precision: Precision = "bf16"
    weights: Literal["full", "lora"] = "full"
    rank: int = 64
    alpha: int = 64
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    student_lr: float = 3e-4
    fake_lr: float = 1e-3
    betas: tuple[float, ...] = (0.0, 0.999)
    warmup: int = 30
    ema: float = 0.99
    seed: int = 4

    def __post_init__(self) -> None:
        for field in fields(self):
            if get_origin(field.type) is Literal and getattr(self, field.name) not in get_args(field.type):
                self.refuse(field.name, f"one of {', '.join(get_args(field.type))}")
        self.check_teacher()
        self.check_iterations()
        self.check_weights()
        self.check_grids()

    def train(self, out: Path, resume: bool) -> None:
        from tdm_train.trainer import train_tdm

        train_tdm(self, out, resume)

    def refuse(self, name: str, legal: str) -> None:
        raise ValueError(f"{name}={getattr(self, name)!r}, legal: {legal}")

    def check_teacher(self) -> None:
        if isinstance(self.prompts, int) and self.prompts < 1:
            self.refuse("prompts", "1 caption of the scenes world or more, or a file of prompts")
        for size in self.sizes:
            if not re.fullmatch(r"[1-9][0-9]{0,4}x[1-9][0-9]{0,4}", size):
                self.refuse("sizes", "a tuple of sizes in pixels, such as ('512x512', '1024x1024')")
        for name in ("text_length", "batch", "accumulation", "rank", "alpha", "samples", "fake_updates"):
            if getattr(self, name) < 1:
                self.refuse(name, "1 or more")
        if self.sample_every < 0:
            self.refuse("sample_every", "0 (never) or more")
        if not self.checkpoint_minutes >= 0:
            self.refuse("checkpoint_minutes", "0 (after every iteration) or more")
        if (self.frames > 0) != (self.fps > 0) or min(self.frames, self.fps) < 0:
            raise ValueError(f"frames={self.frames} and fps={self.fps}, legal: both above 0 for videos, both 0 for pictures")

    def check_iterations(self) -> None:
        if self.iterations < 0:
            self.refuse("iterations", "0 or more")
        if not 0 <= self.teacher_warmup <= self.iterations:
            self.refuse("teacher_warmup", f"0 to {self.iterations} (iterations)")
        if self.ladder and not 1 <= self.ladder_iterations * len(self.ladder) < self.iterations:
            self.refuse("ladder_iterations", f"1 or more, and fewer than {self.iterations} (iterations) in all its rungs")
        if self.ladder_iterations and not self.ladder:
            self.refuse("ladder_iterations", "0 without a ladder, such as (16, 8)")

    def check_weights(self) -> None:
        if self.start and self.weights != "full":
            self.refuse("start", f"nothing with weights={self.weights}, whose student is an adapter over the teacher")
        if self.start and self.ladder:
            self.refuse("start", "nothing with a ladder, whose rungs a trained student has behind it")
        if not self.importance_clip >= 1:
            self.refuse("importance_clip", "1 (no importance weight) or more")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            self.refuse("betas", "two values from 0 to below 1")
        if not 0 <= self.ema < 1:
            self.refuse("ema", "0 (no average) to below 1")
        if not self.teacher_weight >= 0:
            self.refuse("teacher_weight", "0 or more")
        if self.fake_loss != "velocity" and self.teacher_weight != type(self).teacher_weight:
            self.refuse("teacher_weight", f"to be set with fake_loss=velocity alone, not with {self.fake_loss}")

    def check_grids(self) -> None:
        for name in ("nfe", "ladder"):
            counts = getattr(self, name)
            if not all(isinstance(nfe, int) and nfe >= 1 for nfe in counts) or len(set(counts)) < len(counts):
                self.refuse(name, "different whole numbers from 1 on")
        if not self.nfe:
            self.refuse("nfe", "one NFE count or more")
        if self.shares and (len(self.shares) != len(self.nfe) or not all(0 < share < math.inf for share in self.shares)):
            self.refuse("shares", f"one number above 0 for each K of nfe={self.nfe}, or none")
        if not 0 < self.last_timestep <= TRAIN_TIMESTEPS:
            self.refuse("last_timestep", f"above 0 and up to {TRAIN_TIMESTEPS}")
        if not 0 < self.shift < math.inf:
            self.refuse("shift", "above 0; 1 shifts nothing")
        self.check_of_each("tau_shift", math.inf, "above 0; 1 shifts nothing")
        everywhere = f"above 0 and up to {TRAIN_TIMESTEPS}, where guidance holds at every timestep"
        self.check_of_each("guidance_until", TRAIN_TIMESTEPS, everywhere)
        if not all(isinstance(times, (tuple, list)) for times in self.grids):
            self.refuse("grids", "a tuple of grids, such as ((999, 856, 665, 399),)")
        sizes = [len(times) for times in self.grids]
        if len(set(sizes)) < len(sizes) or not set(sizes) <= {*self.nfe, *self.ladder}:
            self.refuse("grids", f"at most one for each K of nfe={self.nfe} and ladder={self.ladder}, with K values")
        for nfe in (*self.nfe, *self.ladder):
            self.check_grid(nfe)

    def check_of_each(self, name: str, largest: float, legal: str) -> None:
        values = getattr(self, name)
        numbers = all(isinstance(value, (int, float)) and 0 < value <= largest and value < math.inf for value in values)
        if not numbers or len(values) not in (1, len(self.nfe)):
            self.refuse(name, f"one number for each K of nfe={self.nfe}, or one in all, such as (2.0,), {legal}")

    def check_grid(self, nfe: int) -> None:
        times = self.grid(nfe)
        if times != sorted(set(times)) or times[-1] > TRAIN_TIMESTEPS:
            self.refuse("grids", f"values that fall strictly, from at most {TRAIN_TIMESTEPS} to above 0")
        steps, one = torch.tensor(times), torch.ones(nfe)
        landing, start = steps[:-1], steps[1:]
        low, high = (draw_tau(self.interval, landing, start, times[-1], uniform) for uniform in (0 * one, one))
        room = high - low
        if self.random_landing:
            room = torch.minimum(room, draw_landing(landing, start, one) - landing)
        if bool((room <= 0).any()):
            raise ValueError(
                f"the grid of {nfe} NFE, {', '.join(f'{t:g}' for t in times[:0:-1])}, leaves no room for tau: legal are longer "
                f"steps for interval={self.interval} with random_landing={self.random_landing}"
            )

    def grid(self, nfe: int) -> list[float]:
        """The timesteps of a trajectory of `nfe` evaluations, rising from 0: `nfe` + 1 values."""
        stated = {len(times): times for times in self.grids}
        if nfe in stated:
            return [0.0, *map(float, reversed(stated[nfe]))]
        even = [t / TRAIN_TIMESTEPS for t in grid(nfe, self.last_timestep)]
        if self.shift == 1:
            return grid(nfe, self.last_timestep)
        return [TRAIN_TIMESTEPS * shifted(u, self.shift) for u in even]

    @property
    def steps_aware(self) -> bool:
        """Whether student and fake score are told K: with one K in all there is nothing to tell."""
        return self.k_conditioning and len({*self.nfe, *self.ladder}) > 1

    def size_at(self, step: int) -> str | None:
        """The size of iteration `step`; None for the teacher's own."""
        return self.sizes[min(step * len(self.sizes) // self.iterations, len(self.sizes) - 1)] if self.sizes else None

    def nfe_at(self, step: int) -> tuple[int, ...]:
        """The K to draw from in iteration `step`: the rung of the ladder, and after it the K set."""
        rung = step // self.ladder_iterations if self.ladder else 0
        return self.ladder[rung : rung + 1] or self.nfe

    def of_nfe(self, values: tuple[float, ...], nfe: int) -> float:
        """The one of `tau_shift` or `guidance_until` that is for trajectories of `nfe` evaluations."""
        return values[self.nfe.index(nfe)] if len(values) > 1 and nfe in self.nfe else values[-1]

    def shares_at(self, step: int) -> tuple[float, ...]:
        """The weights of `nfe_at(step)`; nothing where all are alike."""
        return self.shares if self.nfe_at(step) == self.nfe else ()

    def objective(self) -> dict[str, Any]:
        """Every field that says how the student was taught, for student.json: all but what it says itself, and no folder."""
        told = asdict(self) | ({"prompts": Path(self.prompts).name} if isinstance(self.prompts, str) else {})
        return {name: value for name, value in told.items() if name not in STATED_APART}
