"""`python -m triptych.cli`: the `triptych` command of this very interpreter, as workers are started."""

from triptych.cli import main

main()
