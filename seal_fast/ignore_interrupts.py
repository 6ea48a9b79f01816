"""Imported first where scanning processes are forked from: Ctrl-C goes to the whole group, and the parent decides."""

import signal

signal.signal(signal.SIGINT, signal.SIG_IGN)
