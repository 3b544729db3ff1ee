"""Imported before torch: with all its threads waiting at full load, whatever else runs on the machine would stop it."""

import os

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # GNU's OpenMP; others know no such word, which harms nobody
