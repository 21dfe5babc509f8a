"""The command line: `fp4graph COMMAND`, one file each."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import click

import fp4graph
from fp4graph.cli.ablate import ablate_command
from fp4graph.cli.additivity import additivity_command
from fp4graph.cli.calibrate import calibrate_command
from fp4graph.cli.check_serve import check_serve_command
from fp4graph.cli.common import readable_errors
from fp4graph.cli.convert import convert_command
from fp4graph.cli.doctor import doctor_command
from fp4graph.cli.export import export_command
from fp4graph.cli.export_results import export_results_command
from fp4graph.cli.fit import fit_command
from fp4graph.cli.gpu_check import gpu_check_command
from fp4graph.cli.inspect import inspect_command
from fp4graph.cli.latency import latency_command
from fp4graph.cli.outliers import outliers_command
from fp4graph.cli.page import page_command
from fp4graph.cli.policy import policy_command
from fp4graph.cli.sensitivity import sensitivity_command
from fp4graph.cli.show import show_command
from fp4graph.cli.tasks import tasks_command


class _Group(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; what a user can mend comes out as one line."""
        with readable_errors():
            return super().invoke(ctx)


_NOISY = (
    *("torchao", "torch.utils._pytree"),  # about their own installation
    *("huggingface_hub", "lm_eval", "lm-eval"),  # retries; each task's every setting
)


@click.group(cls=_Group)
@click.version_option(fp4graph.__version__)
@click.option("-v", "--verbose", is_flag=True, help="Log every pass: its time, the ops it changed.")
def main(*, verbose: bool) -> None:
    """Find out which linears of a model can be FP4, and what that costs and saves."""
    warnings.filterwarnings("ignore", module="torch|torchao|transformers")
    logging.basicConfig(format="%(name)s: %(message)s")
    logging.getLogger("fp4graph").setLevel(logging.INFO if verbose else logging.WARNING)
    for noisy in _NOISY:
        logging.getLogger(noisy).setLevel(logging.ERROR)


main.add_command(doctor_command)
main.add_command(inspect_command)
main.add_command(ablate_command)
main.add_command(show_command)
main.add_command(page_command)
main.add_command(export_results_command)
main.add_command(calibrate_command)
main.add_command(policy_command)
main.add_command(fit_command)
main.add_command(convert_command)
main.add_command(export_command)
main.add_command(check_serve_command)
main.add_command(outliers_command)
main.add_command(sensitivity_command)
main.add_command(additivity_command)
main.add_command(tasks_command)
main.add_command(latency_command)
main.add_command(gpu_check_command)
