"""`python -m handler.cli` is the command `vivit`."""

import sys

from handler.cli.main import main

sys.exit(main())
