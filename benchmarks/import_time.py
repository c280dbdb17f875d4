"""Seconds that `import ldadam_dist` takes beyond `import torch`, and the modules that take most of them.

    python benchmarks/import_time.py

Each in processes of their own, one after the other; the least of several is shown.
"""

from __future__ import annotations

import subprocess
import sys

REPEATS = 7

CODE = """
import time
import torch
start = time.perf_counter()
import ldadam_dist
print(time.perf_counter() - start)
"""


def main() -> None:
    seconds = [float(subprocess.check_output([sys.executable, "-c", CODE])) for _ in range(REPEATS)]
    print(f"import ldadam_dist, after torch: {min(seconds):.3f} s, the least of {REPEATS}")
    trace = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "import torch\nimport ldadam_dist"], capture_output=True, text=True
    ).stderr.splitlines()
    after = next(i for i, line in enumerate(trace) if line.endswith("| torch"))
    rows = [line.removeprefix("import time:").split("|") for line in trace[after + 1 :]]
    own = sorted(((int(cells[0]), cells[2].strip()) for cells in rows), reverse=True)
    for microseconds, module in own[:8]:
        print(f"  {microseconds / 1e3:6.1f} ms  {module}")


if __name__ == "__main__":
    main()
