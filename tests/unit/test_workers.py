"""How the scripts that tests and benchmarks start as ranks have to end."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Of adopt_process_group and init_process_group, too; who trains by the command has a group unseen.
GROUPS = ("process_group(", 'app(args=["train"')
SCRIPTS = sorted(
    path
    for folder in ("tests", "benchmarks")
    for path in (ROOT / folder).rglob("*.py")
    if "\nif __name__ == " in (text := path.read_text(encoding="utf-8")) and any(word in text for word in GROUPS)
)


def ends_itself(source: str) -> bool:
    """Whether what such a script calls last leaves without taking the interpreter apart."""
    tree = ast.parse(source)
    last, functions = ast.unparse(tree.body[-1]), [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    if "end_rank(" in last or "os._exit(" in last:
        return True
    # A parent that forks has no group; its children have, and leave by hand.
    forks = any("os.fork()" in ast.unparse(function) for function in functions) and "os._exit(" in source
    return forks or ast.unparse(functions[-1]).rstrip().splitlines()[-1].strip().startswith("os._exit(")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_rank_never_takes_the_interpreter_apart(path: Path) -> None:
    """Threads of process groups that something still refers to abort a process whose work is done, now and then.

    That was a failed suite once; a launcher would call it a failed run.
    """
    assert ends_itself(path.read_text(encoding="utf-8")), f"{path}: end with end_rank() when the work is done"


def test_what_this_looks_for_is_found() -> None:
    assert len(SCRIPTS) >= 14
    assert not ends_itself("def main():\n    pass\nif __name__ == '__main__':\n    main()\n")
    assert not ends_itself(
        "def main():\n    if x:\n        os._exit(1)\n    y()\nif __name__ == '__main__':\n    main()\n"
    )
    assert ends_itself("def main():\n    pass\nif __name__ == '__main__':\n    main()\n    end_rank()\n")
    assert ends_itself("def main():\n    y()\n    os._exit(1)\nif __name__ == '__main__':\n    main()\n")
