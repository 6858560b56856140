"""python -m lowbit"""

from lowbit.cli import main

main()
