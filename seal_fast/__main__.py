"""python -m seal_fast"""

from seal_fast.cli import main

main()
