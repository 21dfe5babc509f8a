"""`python -m fp4graph.cli` is `fp4graph`."""

from fp4graph.cli import main

main(prog_name="fp4graph")
