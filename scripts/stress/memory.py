"""Memory that decoder processes keep after a video, which is missing for the next ones."""

from collections.abc import Iterable

import psutil

from handler.sandbox import DecoderSettings


def growth_bytes(decoder: psutil.Process, settings: DecoderSettings) -> int:
    """Returns by how much a process's address space has grown since its start; 0 while it is starting.

    Raises:
        psutil.NoSuchProcess: It has exited.
    """
    limit, _ = decoder.rlimit(psutil.RLIMIT_AS)  # address space after the start, plus max_memory_bytes
    return 0 if limit == psutil.RLIM_INFINITY else decoder.memory_info().vms - (limit - settings.max_memory_bytes)


def check_growth(decoders: Iterable[psutil.Process], settings: DecoderSettings) -> list[str]:
    """Returns a complaint for each idle process that the pool should have replaced."""
    return [
        f"decoder process {decoder.pid} keeps {growth / 1e6:.0f} MB, more than {settings.max_growth_bytes / 1e6:.0f} MB"
        for decoder in decoders
        if (growth := growth_bytes(decoder, settings)) > settings.max_growth_bytes
    ]
