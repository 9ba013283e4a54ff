"""`python -m mbib_timm` is `mbib`."""

import sys

from mbib_timm.cli import main

sys.exit(main())
