"""The command line: `minference` and `python -m experiments` are the same."""

import sys
from collections.abc import Sequence
from typing import Annotated

import tyro

from experiments.common.command import PromptCommand
from experiments.common.devices import join_processes
from experiments.common.errors import UserError, parse_reporting_errors, run_reporting_errors
from experiments.compare.command import Compare, CompareSummary
from experiments.generate import Generate
from experiments.infinitebench.command import InfiniteBench
from experiments.latency.command import Latency
from experiments.needle.command import Needle
from experiments.patterns.command import Patterns
from experiments.perplexity.command import Perplexity
from experiments.prefill import Prefill
from experiments.report.command import Report
from experiments.ruler.command import Ruler
from experiments.scbench.command import SCBench
from experiments.search.command import Search
from experiments.ttft.command import Ttft
from experiments.visited.command import Visited

Command = tyro.conf.OmitArgPrefixes[
    Annotated[Generate, tyro.conf.subcommand("generate", prefix_name=False)]
    | Annotated[Prefill, tyro.conf.subcommand("prefill", prefix_name=False)]
    | Annotated[Search, tyro.conf.subcommand("search", prefix_name=False)]
    | Annotated[Compare, tyro.conf.subcommand("compare", prefix_name=False)]
    | Annotated[CompareSummary, tyro.conf.subcommand("compare-summary", prefix_name=False)]
    | Annotated[Needle, tyro.conf.subcommand("needle", prefix_name=False)]
    | Annotated[Ruler, tyro.conf.subcommand("ruler", prefix_name=False)]
    | Annotated[InfiniteBench, tyro.conf.subcommand("infinitebench", prefix_name=False)]
    | Annotated[SCBench, tyro.conf.subcommand("scbench", prefix_name=False)]
    | Annotated[Perplexity, tyro.conf.subcommand("perplexity", prefix_name=False)]
    | Annotated[Report, tyro.conf.subcommand("report", prefix_name=False)]
    | Annotated[Latency, tyro.conf.subcommand("latency", prefix_name=False)]
    | Annotated[Ttft, tyro.conf.subcommand("ttft", prefix_name=False)]
    | Annotated[Patterns, tyro.conf.subcommand("patterns", prefix_name=False)]
    | Annotated[Visited, tyro.conf.subcommand("visited", prefix_name=False)]
]
DESCRIPTION = "MInference in JAX: long prompts read with sparse attention."


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: the arguments after the program's name; those of the process if None.

    Returns:
        The exit code: 0, or 2 if the input could not be used (told in one line on standard error).
    """

    def command() -> None:
        several = join_processes()
        parsed = parse_reporting_errors(
            lambda: tyro.cli(Command, args=argv, prog="minference", description=DESCRIPTION)
        )
        if several and not isinstance(parsed, PromptCommand):
            raise UserError("only `generate` and `prefill` run as several processes")
        parsed.run()

    return run_reporting_errors(command)


if __name__ == "__main__":
    sys.exit(main())
