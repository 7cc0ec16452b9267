"""`python -m ebpflb` is `ebpflb`."""

import sys

try:
    from ebpflb.cli import main
except KeyboardInterrupt:  # before there is anybody to say it in one line
    sys.exit(130)

sys.exit(main())
