"""Settings that must stand before torch is imported by any test."""

import os

# Threads that wait give their core away: tests share the machine with servers and engines.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
