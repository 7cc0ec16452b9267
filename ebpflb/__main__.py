"""`python -m ebpflb` is `ebpflb`."""

import sys

from ebpflb.cli import main

sys.exit(main())
