#!/usr/bin/env python3
"""Runs stress.soak."""

import sys

from stress.soak import main

sys.exit(main())
