#!/usr/bin/env python3
"""The same as `vivit build`."""

import sys

from handler.cli.build import main

sys.exit(main())
