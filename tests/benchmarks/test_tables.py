"""Tables in Markdown, and the text of the package's own tables."""

from benchmarks.tables import markdown
from deepopt._table import in_columns

ROWS = [("name", "ms"), ("a longer one", "1")]


def test_markdown_has_a_rule_below_the_head_and_pads_cells_only_if_asked():
    assert markdown(ROWS) == "| name | ms |\n| --- | --- |\n| a longer one | 1 |"
    assert markdown(ROWS, aligned=True) == (
        "| name         | ms |\n|--------------|----|\n| a longer one | 1  |"
    )


def test_columns_are_as_wide_as_their_widest_cell_and_lines_end_with_text():
    assert in_columns(ROWS) == "name          ms\na longer one  1"
