"""`snakemake --logger halfstep`: a line for each job that starts or ends, and the time left.

Snakemake finds this package by its name. The full log is in .snakemake/log as ever, and a failed
job's last lines are in the banner at the end (Snakefile, onerror).
"""

import sys
from logging import WARNING, LogRecord

from snakemake_interface_logger_plugins.base import LogHandlerBase
from snakemake_interface_logger_plugins.common import LogEvent

KEPT = ("Nothing to be done", "Trying to restart job", "Unlocked", "Shutting down", "Terminating")
"""Beginnings of the remarks of Snakemake that a person needs"""


class LogHandler(LogHandlerBase):
    """Writes to stderr; a dry run, `-p` and `--verbose` look as they do without this plugin."""

    writes_to_stream = True
    writes_to_file = False
    has_filter = False
    has_formatter = False
    needs_rulegraph = False

    def __post_init__(self) -> None:
        given = self.common_settings
        self.plain = given.dryrun or given.printshellcmds or given.verbose or given.debug_dag

    def emit(self, record: LogRecord) -> None:
        try:
            text = self.format(record) if self.plain else self.line(record)
            if text not in (None, "", "None"):
                print(text, file=sys.stderr, flush=True)
        except BrokenPipeError:
            raise
        except Exception:
            self.handleError(record)

    def line(self, record: LogRecord) -> str | None:
        """What a person sees of a record; None for nothing."""
        from halfstep.workflow import timeline  # late: Snakemake imports all of its plugins

        event, run = getattr(record, "event", None), timeline.CURRENT
        if run and event == LogEvent.JOB_INFO:
            return run.start(record.jobid, record.rule_name, record.wildcards, record.created)
        if run and event == LogEvent.JOB_FINISHED:
            return run.finish(record.job_id, record.created)
        if run and event == LogEvent.JOB_ERROR:
            return run.fail(record.jobid)
        if record.levelno >= WARNING or (event is None and record.getMessage().startswith(KEPT)):
            return self.format(record)
        return None
