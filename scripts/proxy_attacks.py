#!/usr/bin/env python3
"""Runs scripts/stress/proxy.py."""

import _checkout  # noqa: F401, I001  (restarts the script with .venv/bin/python if needed)

import sys

from stress.proxy import main

sys.exit(main())
