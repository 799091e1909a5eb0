"""Processes that find each other through gloo, without Ray: for benchmarks and tests."""

import multiprocessing
import os
import queue
import socket
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch

_TIMEOUT_S = 240


def run_workers(
    function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = _TIMEOUT_S
) -> list[Any]:
    """Return what `function(rank, world_size, *args)` returns in processes that find each other."""
    context = multiprocessing.get_context("forkserver")
    # Imported once; the workers are forked from there, in milliseconds.
    context.set_forkserver_preload(["deepspeed", "orchestrator.train.strategies.strategy"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    answers = context.Queue()
    workers = [
        context.Process(target=_work, args=(rank, world_size, port, answers, function, args))
        for rank in range(world_size)
    ]
    for worker in workers:
        worker.start()
    try:
        found = dict(_answer(answers, timeout_s) for _ in workers)
        return [found[rank] for rank in range(world_size)]
    finally:
        for worker in workers:
            worker.kill()
            worker.join()


def _answer(answers: Any, timeout_s: float) -> tuple[int, Any]:
    try:
        rank, result, error = answers.get(timeout=timeout_s)
    except queue.Empty:
        raise TimeoutError(f"the workers said nothing for {timeout_s} s") from None
    if error:
        raise RuntimeError(f"worker {rank}: {error}")
    return rank, result


def _work(
    rank: int, world_size: int, port: int, answers: Any, function: Callable[..., Any], args: Any
) -> None:
    places = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in places.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    try:
        answers.put((rank, function(rank, world_size, *args), ""))
    except BaseException:  # told to the parent, which raises it
        answers.put((rank, None, traceback.format_exc()))
