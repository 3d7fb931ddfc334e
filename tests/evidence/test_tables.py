"""Markdown tables that stand in line."""

from fp4bench.evidence.tables import markdown_table


def test_columns_stand_in_line():
    assert markdown_table(["name", "m"], [["a", "1024"], ["", "1"]]) == [
        "| name |    m |",
        "| ---- | ---: |",
        "| a    | 1024 |",
        "|      |    1 |",
    ]


def test_a_table_without_rows_has_its_head():
    assert markdown_table(["a", "b"], [], left=2) == ["| a   | b   |", "| --- | --- |"]
