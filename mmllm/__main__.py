"""`python -m mmllm`: the same as the command `mmllm`."""

import sys

from mmllm.cli import main

sys.exit(main())
