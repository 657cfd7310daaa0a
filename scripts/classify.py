#!/usr/bin/env python3
"""The same as `vivit classify`."""

import sys

from handler.cli.classify import main

sys.exit(main())
