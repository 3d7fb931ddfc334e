"""`python -m fp4bench`, the same as `fp4bench`."""

import sys

from fp4bench.cli import main

sys.exit(main())
