"""A pytest plugin, `-p outcomes`: each test's outcome is written to the file that OUTCOMES names as soon
as it is known, one JSON object a line, so that a run cut short tells what it found.

First comes {"collected": [node ids]}, then {"test": node id, "outcome": ..., "said": ...} of each; a test
that fails while it is torn down has a second line.  Works with and without xdist.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest


class Writer:
    def __init__(self, path: Path) -> None:
        self.file = path.open("w")
        self.collected = False

    def write(self, line: dict[str, Any]) -> None:
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()

    def collect(self, tests: list[str]) -> None:
        if not self.collected:  # xdist's workers all collect the same
            self.collected = True
            self.write({"collected": tests})

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.collect([item.nodeid for item in session.items])

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any, ids: list[str]) -> None:
        self.collect(list(ids))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.write({"test": report.nodeid, "outcome": "failed", "said": _said(report)})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            line = {"test": report.nodeid, "outcome": report.outcome}
            self.write(line | ({"said": _said(report)} if report.failed else {}))


def _said(report: Any) -> str:
    """The exception's own line, or the last that there is."""
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(crash.message if crash else report.longreprtext)[-300:]


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Writer(Path(os.environ["OUTCOMES"])))
