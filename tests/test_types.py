"""The ratchet on type errors: fewer are written down, more fail."""

import importlib.util
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SPEC = importlib.util.spec_from_file_location("check_types", ROOT / "tests" / "check_types.py")
check_types = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(check_types)


def test_more_errors_fail_and_fewer_are_written_down():
    errors = {"a": ["a:1: x", "a:2: y"], "b": ["b:1: z"], "new": ["new:7: w"]}
    lines, numbers = check_types.judged(errors, {"a": 1, "b": 3, "gone": 2})
    assert lines == ["a:1: x", "a:2: y", "a: 1 errors before", "new:7: w", "new: 0 errors before"]
    assert numbers == {"a": 1, "b": 1}


def test_modules_that_were_made_clean_stay_so():
    known = json.loads(check_types.KNOWN.read_text())
    assert "lib/geodesic/settings.py" not in known
    assert not any(name.startswith("lib/geodesic/semidiscrete/") for name in known)
    assert all((ROOT / name).exists() for name in known)
