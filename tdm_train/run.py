"""What every training run needs around its loop: processes, progress, averaged weights and checkpoints to resume from."""

import os
import platform
import random
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from tdm_train.checkpoints import Checkpoints
from tdm_train.gates import refuse_not_finite

Batch = TypeVar("Batch")
SLOW_BF16 = (
    "this processor has no AVX-512 and computes bf16 by software, several times slower than float32; a distillation is faster "
    "with --set precision=no"
)


def cosine(step: int, steps: int, warmup: int) -> float:
    """The factor on a learning rate at `step`: linear from 0 over `warmup` steps, then half a cosine down to 0."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(steps - warmup, 1)
    return 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * min(progress, 1.0)))))


class Run:
    """One training run in `out`: iterate over `steps()`, call `update()` once per optimiser in each.

    Args:
        out: folder of the run; checkpoints go to `out/checkpoints`.
        recipe: a frozen dataclass with `iterations`, how many steps the run has in all, and `seed`, of torch's generators,
            which is offset by the process's rank.
        resume: go on from the last checkpoint; without one, or with False, start at step 0.
        checkpoint_minutes: time between checkpoints.
        precision: of matrix products under autocast: bf16, fp16, or no.
        tracker: where accelerate sends the numbers of every step: tensorboard (in `out/log`), or none.
    """

    def __init__(
        self,
        out: Path,
        recipe: Any,
        resume: bool,
        checkpoint_minutes: float = 3.0,
        precision: str = "bf16",
        tracker: str = "none",
    ):
        self.out, self.iterations, self.resume = out, recipe.iterations, resume
        self.checkpoint_seconds = 60 * checkpoint_minutes
        use_cpu = not torch.cuda.is_available()
        self.accelerator = Accelerator(
            cpu=use_cpu, mixed_precision=precision, project_dir=out, log_with=None if tracker == "none" else tracker
        )
        self.rank, self.processes = self.accelerator.process_index, self.accelerator.num_processes
        if precision == "bf16" and use_cpu and self.rank == 0 and not has_fast_bf16():
            print(SLOW_BF16, file=sys.stderr)
        self.device = self.accelerator.device
        self.averages: list[tuple[AveragedModel, nn.Module]] = []
        self.schedules: list[torch.optim.lr_scheduler.LambdaLR] = []
        self.first_step = 0
        self.checkpoints = Checkpoints(out / "checkpoints", self.accelerator, recipe)
        if resume:
            self.checkpoints.refuse_other_recipe()
        random.seed(recipe.seed * 1000 + self.rank)
        np.random.seed(recipe.seed * 1000 + self.rank)
        torch.manual_seed(recipe.seed * 1000 + self.rank)
        out.mkdir(parents=True, exist_ok=True)
        if tracker != "none":
            self.accelerator.init_trackers("log")

    def prepare(
        self, module: nn.Module, lr: float, warmup: int, ema: float, **adamw
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Wraps a module for data parallelism and mixed precision and gives it AdamW, a cosine schedule and an average.

        Only parameters that require gradients are trained. `ema` is the decay of the averaged weights (0 .. 1), 0 for none.
        """
        module.to(self.device)
        average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(ema)) if ema > 0 else None
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=lr, **adamw)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine(step, self.iterations, warmup))
        wrapped, optimizer = self.accelerator.prepare(module, optimizer)
        self.accelerator.register_for_checkpointing(schedule)
        if average is not None:
            self.accelerator.register_for_checkpointing(average)
            self.averages.append((average, module))
        self.schedules.append(schedule)
        return wrapped, optimizer

    def averaged(self, module: nn.Module) -> nn.Module:
        """The module with averaged weights, or the module itself where it was prepared with ema=0."""
        return next((average.module for average, live in self.averages if live is module), module)

    def gather(self, module: nn.Module) -> None:
        """Puts parameters that FSDP has cut up together again, in place: every process must call this, after its last step."""
        for name, parameter in list(module.named_parameters()):
            if isinstance(parameter, DTensor):
                owner, _, last = name.rpartition(".")
                whole = nn.Parameter(parameter.full_tensor().detach(), requires_grad=False)
                module.get_submodule(owner).register_parameter(last, whole)

    def steps(self) -> Iterator[int]:
        """Yields the step numbers still to do, with a progress bar and a checkpoint every few minutes and at the end."""
        if self.resume:
            self.first_step = self.checkpoints.load()
        self.bar = tqdm(
            total=self.iterations, initial=self.first_step, disable=self.rank > 0, dynamic_ncols=True, mininterval=2
        )
        saved = time.monotonic()
        for step in range(self.first_step, self.iterations):
            self.step = step
            yield step
            self.bar.update()
            due = torch.tensor(time.monotonic() - saved > self.checkpoint_seconds, device=self.device)
            if bool(self.accelerator.reduce(due.float())):
                self.checkpoints.save(step + 1)
                saved = time.monotonic()
        self.checkpoints.save(self.iterations)
        self.bar.close()
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def update(self, loss: torch.Tensor, module: nn.Module, optimizer: torch.optim.Optimizer) -> float:
        """One optimiser step on `loss`; returns the gradient's norm before it was clipped to 1."""
        self.accelerator.backward(loss)
        return self.step_optimizer(module, optimizer)

    def micro_batches(self, batches: Sequence[Batch], module: nn.Module) -> Iterator[Batch]:
        """Yields batches whose gradients add up; processes exchange those of `module` after the last alone."""
        for index, batch in enumerate(batches):
            with self.accelerator.no_sync(module) if index < len(batches) - 1 else nullcontext():
                yield batch

    def step_optimizer(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> float:
        """One optimiser step on the gradients that there are; returns their norm before it was clipped to 1."""
        norm = self.accelerator.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def end_step(self, **numbers: float) -> None:
        """Moves learning rates and averages on by one step and shows `numbers`, which are means over the processes, behind the
        progress bar and in the tracker. Raises BadRunError where one is not finite."""
        names, values = list(numbers), torch.tensor(list(numbers.values()), device=self.device)
        shown = dict(zip(names, self.accelerator.reduce(values, "mean").tolist(), strict=True))
        refuse_not_finite(shown, self.step)
        for schedule in self.schedules:
            schedule.step()
        for average, module in self.averages:
            average.update_parameters(module)
        self.bar.set_postfix({name: f"{value:.4g}" for name, value in shown.items()}, refresh=False)
        self.log(**shown)

    def log(self, **numbers: float) -> None:
        """Sends numbers of this step to the tracker."""
        self.accelerator.log(numbers, step=self.step)


def has_fast_bf16() -> bool:
    """Whether this processor computes matrix products in bf16 faster than software would; those of x86 do from AVX-512 on."""
    return platform.machine() not in ("x86_64", "AMD64") or torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "AVX2")


def default_processes() -> int:
    """One process per GPU, or per core where there is none."""
    return torch.cuda.device_count() or os.cpu_count() or 1


def launch(train: Callable[..., None], processes: int, *arguments) -> None:
    """Calls `train(*arguments)` in `processes` data-parallel processes on this machine (in this process when it is 1)."""
    if processes == 1 or "RANK" in os.environ:  # or `accelerate launch` has started the processes
        train(*arguments)
        leave_group()
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_worker, args=(os.getpid(), processes, port, train, arguments), nprocs=processes)


def _worker(rank: int, parent: int, processes: int, port: int, train: Callable[..., None], arguments: tuple) -> None:
    threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
    tqdm.set_lock(threading.RLock())  # its own has a semaphore, which would be reported as leaked when this process ends
    train(*arguments)
    leave_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # everything is written; were the interpreter to end first, threads of torch's would abort it now and then


def leave_group() -> None:
    """Ends what connects the processes. To be called when nothing is left to be gathered."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _end_with_parent(parent: int) -> None:
    """Ends this process when the one that started it is gone, however it went: workers must not train on unseen."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
