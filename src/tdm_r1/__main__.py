"""``python -m tdm_r1`` is ``tdm-r1``."""

import sys

from .cli import main

sys.exit(main())
