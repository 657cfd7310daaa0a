#!/usr/bin/env python3
"""The same as `vivit finetune`."""

import _checkout  # noqa: F401, I001  (restarts the script with .venv/bin/python if needed)

import sys

from handler.cli.finetune import main

sys.exit(main())
