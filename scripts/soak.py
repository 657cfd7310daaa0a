#!/usr/bin/env python3
"""Runs scripts/stress/soak.py."""

import _checkout  # noqa: F401, I001  (restarts the script with .venv/bin/python if needed)

import sys

from stress.soak import main

sys.exit(main())
