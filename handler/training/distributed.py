"""The processes of a run: one, or those that `torchrun` has started. Each computes a part of every batch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed


@dataclass(frozen=True)
class Group:
    """This process among those of the run.

    Attributes:
        rank: its number; 0 writes files and shows progress.
        size: number of processes.
        device: where it computes.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Adds up the values of all processes, in float64."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        distributed.all_reduce(total)
        summed: list[float] = total.tolist()
        return summed

    def gather(self, value: Any) -> list[Any]:
        """Returns the values of all processes, by rank."""
        values = [value] * self.size
        if self.size > 1:
            distributed.all_gather_object(values, value)
        return values


@contextlib.contextmanager
def start_group(device: str | torch.device) -> Iterator[Group]:
    """Joins the processes that torchrun has started, or makes a group of this process alone.

    Args:
        device: where to compute, for example "cpu" or "cuda:0".
    """
    size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    resolved = torch.device(device)
    if resolved.type == "cuda":
        torch.cuda.set_device(resolved)
    if size == 1:
        yield Group(0, 1, resolved)
        return
    distributed.init_process_group("nccl" if resolved.type == "cuda" else "gloo")
    try:
        yield Group(rank, size, resolved)
    finally:
        distributed.destroy_process_group()
