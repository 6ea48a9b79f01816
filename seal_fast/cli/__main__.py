"""python -m seal_fast.cli"""

from seal_fast.cli import main

main()
