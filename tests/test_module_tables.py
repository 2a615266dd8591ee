"""docs/architecture.md lists every module, by what its docstring says it is."""

from tests.module_tables import PAGE, packages, table, written


def test_the_page_says_what_the_docstrings_say() -> None:
    """`python -m tests.module_tables` writes the tables anew."""
    assert written(PAGE.read_text(encoding="utf-8")) == {folder: table(folder) for folder in packages()}
