"""What tests ask the stand-in to do badly."""

import os
import signal
import subprocess
import sys
import time


def told(step, error):
    if os.environ.get("FAKE_FAIL") == step:
        raise error(f"the stand-in was told to fail at {step}")
    if os.environ.get("FAKE_CRASH") == step:
        print("segmentation fault ahead", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    if os.environ.get("FAKE_HANG") == step:
        with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]):
            time.sleep(600)
