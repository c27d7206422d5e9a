"""`python -m prism`, the same as `prism`."""

from __future__ import annotations

import sys

from prism.cli import main

sys.exit(main())
