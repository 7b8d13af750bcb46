"""What every training run needs around its loop: processes, progress, averaged weights and checkpoints to resume from."""

import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm


def cosine(step: int, steps: int, warmup: int) -> float:
    """The factor on a learning rate at `step`: linear from 0 over `warmup` steps, then half a cosine down to 0."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(steps - warmup, 1)
    return 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * min(progress, 1.0)))))


class Run:
    """One training run in `out`: iterate over `steps()`, call `update()` once per optimiser in each.

    Args:
        out: folder of the run; checkpoints go to `out/checkpoint`.
        iterations: how many steps the run has in all.
        seed: of torch's generators, offset by the process's rank.
        resume: go on from the last checkpoint; without one, or with False, start at step 0.
        checkpoint_minutes: time between checkpoints.
    """

    def __init__(self, out: Path, iterations: int, seed: int, resume: bool, checkpoint_minutes: float = 3.0):
        self.out, self.iterations, self.resume = out, iterations, resume
        self.checkpoint_seconds = 60 * checkpoint_minutes
        use_cpu = not torch.cuda.is_available()
        self.accelerator = Accelerator(cpu=use_cpu, mixed_precision="bf16")
        self.rank, self.processes = self.accelerator.process_index, self.accelerator.num_processes
        self.device = self.accelerator.device
        self.averages: list[tuple[AveragedModel, nn.Module]] = []
        self.schedules: list[torch.optim.lr_scheduler.LambdaLR] = []
        self.first_step = 0
        torch.manual_seed(seed * 1000 + self.rank)
        out.mkdir(parents=True, exist_ok=True)

    def prepare(
        self, module: nn.Module, lr: float, warmup: int, ema: float, **adamw
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Wraps a module for data parallelism and mixed precision and gives it AdamW, a cosine schedule and an average.

        Only parameters that require gradients are trained. `ema` is the decay of the averaged weights (0 .. 1).
        """
        average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(ema)).to(self.device)
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=lr, **adamw)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine(step, self.iterations, warmup))
        wrapped, optimizer = self.accelerator.prepare(module, optimizer)
        self.accelerator.register_for_checkpointing(schedule, average)
        self.averages.append((average, module))
        self.schedules.append(schedule)
        return wrapped, optimizer

    def steps(self) -> Iterator[int]:
        """Yields the step numbers still to do, with a progress bar and a checkpoint every few minutes and at the end."""
        if self.resume and (self.checkpoint / "step").exists():
            self.accelerator.load_state(str(self.checkpoint))
            self.first_step = int((self.checkpoint / "step").read_text())
        self.bar = tqdm(
            total=self.iterations, initial=self.first_step, disable=self.rank > 0, dynamic_ncols=True, mininterval=2
        )
        saved = time.monotonic()
        for step in range(self.first_step, self.iterations):
            yield step
            self.bar.update()
            due = torch.tensor(time.monotonic() - saved > self.checkpoint_seconds, device=self.device)
            if step % 20 == 19 and bool(self.accelerator.reduce(due.float())):
                self.save(step + 1)
                saved = time.monotonic()
        self.save(self.iterations)
        self.bar.close()

    def update(self, loss: torch.Tensor, module: nn.Module, optimizer: torch.optim.Optimizer) -> float:
        """One optimiser step on `loss`; returns the gradient's norm before it was clipped to 1."""
        self.accelerator.backward(loss)
        norm = self.accelerator.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def end_step(self, **numbers: float) -> None:
        """Moves learning rates and averages on by one step and shows `numbers` behind the progress bar."""
        for schedule in self.schedules:
            schedule.step()
        for average, module in self.averages:
            average.update_parameters(module)
        self.bar.set_postfix({name: f"{value:.4g}" for name, value in numbers.items()}, refresh=False)

    @property
    def checkpoint(self) -> Path:
        return self.out / "checkpoint"

    def save(self, step: int) -> None:
        """Saves everything a resumed run needs. A kill at any moment leaves either the old or the new checkpoint."""
        fresh, old = self.out / "checkpoint.new", self.out / "checkpoint.old"
        self.accelerator.save_state(str(fresh), safe_serialization=False)
        self.accelerator.wait_for_everyone()
        if self.rank == 0:
            (fresh / "step").write_text(str(step))
            shutil.rmtree(old, ignore_errors=True)
            if self.checkpoint.exists():
                self.checkpoint.rename(old)
            fresh.rename(self.checkpoint)
            shutil.rmtree(old, ignore_errors=True)
        self.accelerator.wait_for_everyone()


def launch(train: Callable[..., None], processes: int, *arguments) -> None:
    """Calls `train(*arguments)` in `processes` data-parallel processes on this machine (in this process when it is 1)."""
    if processes == 1:
        train(*arguments)
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_worker, args=(processes, port, train, arguments), nprocs=processes)


def _worker(rank: int, processes: int, port: int, train: Callable[..., None], arguments: tuple) -> None:
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
    train(*arguments)


def _end_with_parent(parent: int) -> None:
    """Ends this process when the one that started it is gone, however it went: workers must not train on unseen."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
