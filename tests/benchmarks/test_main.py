import pytest

from benchmarks.__main__ import main


@pytest.mark.parametrize("arguments", [[], ["swop"]])
def test_an_unknown_benchmark_lists_the_known_ones(arguments, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["benchmarks", *arguments])
    assert main() == 2
    assert "quality: Quality: every optimizer" in capsys.readouterr().err


def test_help_goes_to_standard_output(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["benchmarks", "--help"])
    assert main() == 0
    assert "quality: Quality: every optimizer" in capsys.readouterr().out
