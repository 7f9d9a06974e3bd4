"""Runs a command in a process group that does not outlive who started it: `guard.py LIFELINE COMMAND...`.

LIFELINE is a descriptor of the reading end of a pipe. When its writing end is closed, by whatever end of the process
that has it, SIGKILL included, the whole group is killed. Ends with the command's exit code.
"""

import os
import signal
import subprocess
import sys
import threading


def watch(lifeline):
    os.read(lifeline, 1)
    os.killpg(0, signal.SIGKILL)


signal.signal(signal.SIGTERM, lambda *_: None)  # the command's to obey; this waits until it has
command = subprocess.Popen(sys.argv[2:])
nothing = os.open(os.devnull, os.O_RDWR)
for pipe in (0, 1):  # they are the command's, and end with it
    os.dup2(nothing, pipe)
threading.Thread(target=watch, args=(int(sys.argv[1]),), daemon=True).start()
sys.exit(command.wait())
