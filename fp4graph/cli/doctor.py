"""fp4graph doctor: what this machine has, and what to do about what it lacks."""

from __future__ import annotations

import click

from fp4graph.cli.common import output, print_json
from fp4graph.cli.options import json_option


@click.command("doctor", short_help="Say what this machine can run, and what it lacks.")
@json_option
def doctor_command(*, as_json: bool) -> None:
    """Say which kernels this machine can run, and what to install for those that it cannot."""
    from fp4graph.cli.findings import findings

    found = findings()
    if as_json:
        for finding in found:
            print_json(finding)
        return
    width = max(len(finding.what) for finding in found)
    lines = [f"{finding.what.ljust(width)}  {finding.found}" for finding in found]
    advice = [f"{finding.what}: {finding.advice}" for finding in found if finding.advice]
    heading = "to do, or to gain:" if advice else "nothing is lacking"
    for line in (*lines, "", heading, *advice):
        output(as_json=False).print(line, markup=False, soft_wrap=True)
