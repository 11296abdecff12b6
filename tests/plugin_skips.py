"""pytest plugin: prints skipped tests by reason, and fails the run on a reason that is not listed here.

A skip is how a test stops testing without anyone noticing, so each allowed reason says where it does run.
"""

from collections import Counter

import pytest

# A reason is allowed if it starts with one of these.
ALLOWED_REASONS = {
    "needs ../shared": "real data and recorded numbers that are not ours to pass on; they lie beside the project in CI",
    "needs a GPU": "run by hand on a machine with one",
    "needs flash-attn": "has no CPU build",
    "needs a network namespace": "run as root, as in CI, or by a user whom the system lets make one",
    "needs a package index": "SkyPilot cannot be installed beside what we need; CI, which installs, has an index",
    "needs nvcc": "run by hand, with `-m slow`, on a machine with CUDA's compiler",
}


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    """The text given to skip(); pytest keeps (path, line, 'Skipped: text')."""
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.removeprefix("Skipped: ")


def _skips(terminalreporter: pytest.TerminalReporter) -> Counter[str]:
    # An expected failure also counts as skipped in pytest's eyes, under another heading.
    return Counter(_reason(report) for report in terminalreporter.stats.get("skipped", []))


def _unlisted(reasons: Counter[str]) -> list[str]:
    return sorted(reason for reason in reasons if not reason.startswith(tuple(ALLOWED_REASONS)))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Turn a run that would pass into a failed one."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and exitstatus == pytest.ExitCode.OK and _unlisted(_skips(reporter)):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reasons = _skips(terminalreporter)
    if not reasons:
        return
    unlisted = _unlisted(reasons)
    terminalreporter.section("skipped tests by reason")
    for reason, count in sorted(reasons.items()):
        mark = "NOT ALLOWED  " if reason in unlisted else ""
        terminalreporter.write_line(f"{count:5d}  {mark}{reason}")
    if unlisted:
        terminalreporter.write_line("FAILED: list the reason in tests/plugin_skips.py, or let the test run.", red=True)
