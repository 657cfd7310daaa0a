#!/usr/bin/env python3
"""The same as `vivit build`."""

import _checkout  # noqa: F401, I001  (restarts the script with .venv/bin/python if needed)

import sys

from handler.cli.build import main

sys.exit(main())
