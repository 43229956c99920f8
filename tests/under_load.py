"""Run a command three times beside two busy processes per core; it must succeed every time.

Usage: python tests/under_load.py COMMAND ...
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

TIMES = 3
BUSY = [sys.executable, "-c", "while True: pass"]


def main(command: list[str]) -> int:
    busy = [subprocess.Popen(BUSY) for _ in range(2 * (os.cpu_count() or 1))]
    try:
        for number in range(1, TIMES + 1):
            start = time.monotonic()
            code = subprocess.run(command, check=False).returncode
            took_s = time.monotonic() - start
            print(
                f"{number} of {TIMES} beside {len(busy)} busy processes: {took_s:.0f} s", flush=True
            )
            if code:
                return code
    finally:
        for each in busy:
            each.kill()
            each.wait()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
