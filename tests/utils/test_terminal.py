"""Tables in the terminal and in pipes."""

import io
import sys

import pytest

from pipeline.utils.terminal import print_table


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_piped_table_has_one_line_per_row_and_is_never_cut(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(["Dice", "setting"], [("0.99", "x" * 200), ("0.9", "y")], right=["Dice"])
    assert capsys.readouterr().out.splitlines() == ["Dice  setting", "0.99  " + "x" * 200, " 0.9  y"]


def test_a_table_on_a_terminal_keeps_every_character_and_reads_no_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "40")
    print_table(["Dice", "setting"], [("0.99", "[bold]" + "x" * 60)], right=["Dice"])
    text = "".join(terminal.getvalue().split())
    assert text.count("x") == 60
    assert "[bold]" in text
