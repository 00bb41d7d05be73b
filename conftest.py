"""Settings that must stand before any test runs or imports torch."""

import os
import signal

# Threads that wait give their core away: tests share the machine with servers and engines.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# A shell's background job, which a CI job may be, ignores Ctrl-C, and so would the processes that
# tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
