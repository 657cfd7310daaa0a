#!/usr/bin/env python3
"""The same as `vivit build`, but archives go to the checkout's model_store by default."""

import _checkout  # noqa: I001  (restarts the script with .venv/bin/python if needed)

import sys

from handler.cli.build import main

sys.exit(main(["--export-path", str(_checkout.ROOT / "model_store"), *sys.argv[1:]]))
