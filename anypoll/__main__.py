"""`python -m anypoll` is the command `anypoll`."""

import sys

from ._cli import main

sys.exit(main())
