"""Settings that must stand before any test runs or imports torch."""

import atexit
import os
import shutil
import signal
import tempfile
from pathlib import Path

# Threads that wait give their core away: tests share the machine with servers and engines.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Servers of tests are on this machine; a proxy does not know it.
for name in ("http_proxy", "https_proxy", "all_proxy"):
    os.environ.pop(name, None)
    os.environ.pop(name.upper(), None)

# vLLM and transformers keep what they compile and load below it.
if not os.access(Path.home(), os.W_OK):
    os.environ["HOME"] = tempfile.mkdtemp(prefix="gem-home-")
    atexit.register(shutil.rmtree, os.environ["HOME"], ignore_errors=True)

# A shell's background job, which a CI job may be, ignores Ctrl-C, and so would the processes that
# tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
