"""`python -m medley` is `medley`."""

from medley.cli import main

main(prog_name="medley")
