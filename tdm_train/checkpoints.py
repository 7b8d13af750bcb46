"""Checkpoints of a run: everything that it needs to go on as if nothing had been, whole or not there."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from tdm_train.durable import publish

RECIPE = "recipe.json"


class Checkpoints:
    """The checkpoints in `folder`, one a step: STEP/ holds accelerate's state (what is trained, optimisers, schedules,
    averages, and each process's generators of torch, numpy and Python) and the recipe. The newest alone is kept."""

    def __init__(self, folder: Path, accelerator: Accelerator, recipe: Any):
        self.folder, self.accelerator = folder, accelerator
        self.recipe = json.loads(json.dumps(asdict(recipe) | {"processes": accelerator.num_processes}))

    def newest(self) -> Path | None:
        """The folder of the last whole checkpoint."""
        return max(self.folder.glob("[0-9]*"), default=None)

    def refuse_other_recipe(self) -> None:
        """Raises ValueError where the newest checkpoint is of a run with another recipe, naming each field that differs."""
        if (newest := self.newest()) is None:
            return
        saved = json.loads((newest / RECIPE).read_text())
        for field in sorted(saved.keys() | self.recipe.keys()):
            if saved.get(field) != self.recipe.get(field):
                raise ValueError(
                    f"{newest} is of a run with {field}={saved.get(field)!r}, not {self.recipe.get(field)!r}: resume with "
                    "that, or begin another run in another folder"
                )

    def load(self) -> int:
        """Restores the newest checkpoint, if there is one, and returns its step; 0 without."""
        if (newest := self.newest()) is None:
            return 0
        self.accelerator.load_state(str(newest))
        return int(newest.name)

    def save(self, step: int) -> None:
        """Saves everything. A kill at any moment leaves the last whole checkpoint, and so does a full disk, which is an
        OSError that says so."""
        final, fresh = self.folder / f"{step:09d}", self.folder / ".partial"
        if final.exists():
            return
        try:
            self.write(fresh, final)
        except (OSError, RuntimeError) as error:  # torch says RuntimeError of a file that cannot grow
            shutil.rmtree(fresh, ignore_errors=True)
            kept = self.newest()
            raise OSError(
                f"the checkpoint of step {step} could not be written, as on a full disk ({str(error).splitlines()[0]}); "
                + (f"{kept} is whole: make room and go on with --resume" if kept else "there is none before it")
            ) from error

    def write(self, fresh: Path, final: Path) -> None:
        main = self.accelerator.is_main_process
        if main:
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(fresh), safe_serialization=False)
        self.accelerator.wait_for_everyone()
        if main:
            (fresh / RECIPE).write_text(json.dumps(self.recipe, indent=1))
            publish(fresh, final)
            for older in self.folder.glob("[0-9]*"):
                if older != final:
                    shutil.rmtree(older)
        self.accelerator.wait_for_everyone()
