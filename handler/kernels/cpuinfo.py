"""Vendor and features of the processor, from /proc/cpuinfo."""

from pathlib import Path


def _read_words() -> frozenset[str]:
    cpuinfo = Path("/proc/cpuinfo")
    return frozenset(cpuinfo.read_text().split()) if cpuinfo.is_file() else frozenset()


# The words of /proc/cpuinfo: the vendor ("AuthenticAMD"), features ("avx512f") and others. Empty on other systems.
CPUINFO_WORDS = _read_words()
