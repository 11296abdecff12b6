"""Small faults, kept as text: `python -m tests.mutants` plants them one at a time and looks which test fails."""

import tomllib
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]


@dataclass(frozen=True)
class Mutant:
    """One line of the package, changed for the worse."""

    name: str
    file: str  # relative to the repository
    old: str
    new: str
    tests: tuple[str, ...]  # files or node ids, relative to the repository

    def plant(self, root: Path) -> None:
        """Change the file below `root`."""
        path = root / self.file
        text = path.read_text(encoding="utf-8")
        assert (count := text.count(self.old)) == 1, f"{self.name}: {self.old!r} occurs {count} times in {self.file}"
        path.write_text(text.replace(self.old, self.new), encoding="utf-8")


def load() -> list[Mutant]:
    """All of them, in the order of the files."""
    found = []
    for path in sorted(FOLDER.glob("*.toml")):
        for name, entry in tomllib.loads(path.read_text(encoding="utf-8")).items():
            tests = tuple(f"tests/{test}" for test in entry["tests"])
            found.append(Mutant(name, entry["file"], entry["old"], entry["new"], tests))
    return found
