"""Every stage imports this before torch.

GNU's OpenMP lets threads that have nothing to do wait at full load, which slows down whatever else
runs on the machine. A short spin count sends them to sleep. Other OpenMP libraries ignore it.
"""

import os

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
