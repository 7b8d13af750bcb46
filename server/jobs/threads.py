"""Where the blocking calls of jobs run: threads of their own, so that a locked database holds up nothing else."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

THREADS = ThreadPoolExecutor(max_workers=8, thread_name_prefix="jobs")

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


async def beside(function: Callable[Parameters, Result], *args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
    """Calls a function on one of the threads. Who is cancelled meanwhile leaves it to run to its end."""
    return await asyncio.get_running_loop().run_in_executor(THREADS, lambda: function(*args, **kwargs))
