"""Ignore Ctrl-C in this process: it reaches every process of a scan, and only the parent decides what ends.

The server that scanning processes are forked from imports this first.
"""

import signal

signal.signal(signal.SIGINT, signal.SIG_IGN)
