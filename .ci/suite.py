"""What the scripts here share: where the ops and their tests are, and what a pytest run reported."""

import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def ops() -> list[str]:
    """The public ops."""
    return sorted(path.stem for path in (ROOT / "python/tilewright/ops").glob("[a-z]*.py"))


def op_tests() -> list[str]:
    """tests/test_<op>.py, and test_<op>_<more>.py, of every op."""
    tests = {path for op in ops() for path in ROOT.glob(f"tests/test_{op}*.py")}
    return sorted(str(path.relative_to(ROOT)) for path in tests)


def testsuite(report: Path) -> ElementTree.Element | None:
    """The suite of a --junit-xml report; None where pytest ended before it wrote one."""
    return ElementTree.parse(report).getroot().find("testsuite") if report.is_file() else None
