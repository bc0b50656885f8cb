"""Where real preference data lies: beside the project and not in it, so a test that wants it may find nothing."""

from pathlib import Path

SHARED_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
