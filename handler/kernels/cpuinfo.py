"""Vendor, name and features of the processor, from /proc/cpuinfo. Empty on other systems."""

import re
from pathlib import Path

import torch

_CPUINFO = Path("/proc/cpuinfo")
_TEXT = _CPUINFO.read_text() if _CPUINFO.is_file() else ""

# The words of the file: the vendor ("AuthenticAMD"), features ("avx512f") and others.
CPUINFO_WORDS = frozenset(_TEXT.split())

# The name of the first processor, such as "AMD EPYC 9654 96-Core Processor".
CPU_NAME = match[1] if (match := re.search(r"^model name\s*:\s*(.*)$", _TEXT, re.MULTILINE)) else ""

# The features that multiply matrices of a dtype faster than float32. The dtype that rounds most finely is first.
HALF_PRECISION_FEATURES = {
    torch.float16: frozenset({"amx_fp16", "avx512_fp16"}),
    torch.bfloat16: frozenset({"amx_bf16", "avx512_bf16"}),
}


def half_precision_features(dtype: torch.dtype) -> frozenset[str]:
    """Returns the features of this processor that multiply matrices of `dtype` faster than float32."""
    return HALF_PRECISION_FEATURES.get(dtype, frozenset()) & CPUINFO_WORDS
