#!/usr/bin/env python3
"""Runs stress.fuzz."""

import sys

from stress.fuzz import main

sys.exit(main())
