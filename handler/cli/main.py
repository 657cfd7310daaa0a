"""The command `vivit`."""

import sys


def main() -> int:
    sys.exit("not there yet")
