"""The report on invented rows, and that what is committed is what the stored rows say."""

import re
from dataclasses import replace

import pytest

from benchmarks import report
from benchmarks.rows import RESULTS, Row, append, newest, read

ROW = Row("adapter", "eager", "forward", "time", "fp32 d=8 T=1", 1, 1, 1, "A", "torch 1", "abc", "2026-01-01")


def timed(times, floor=None, **changed):
    """Rows of one case: provider to microseconds; ratios as the harness makes them."""
    rows = []
    for provider, time in times.items():
        metrics = {"time": time}
        for other, theirs in times.items():
            if other == floor:
                metrics[f"share of {other}"] = theirs / time
            elif other == next(iter(times)) or (provider.startswith("lynx") and not other.startswith("lynx")):
                metrics[f"ratio to {other}"] = theirs / time
        for metric, value in metrics.items():
            rows.append(replace(ROW, provider=provider, metric=metric, p20=value, p50=value, p80=value, **changed))
    return rows


def invented():
    new = {"time": "2026-01-02"}
    return [
        *timed({"eager": 10, "stale": 2}),
        *timed({"eager": 10, "compile": 5, "lynx cpu": 20, "lynx reference": 1, "matmuls": 4}, "matmuls", **new),
        *timed({"eager": 40, "compile": 50, "lynx cpu": 20, "matmuls": 10}, "matmuls", shape="fp32 d=8 T=2048"),
        *timed({"eager": 7, "lynx cpu": 1}, device="B"),
        replace(ROW, provider="lynx cpu", metric="wrong", note="nonsense", device="C"),
    ]


def test_machines_stay_apart_and_losses_are_shown():
    text = report.text(newest(invented()))
    on_a, on_b, on_c = text.split("\n## ")[1:]
    assert "| d=8 T=1 | **0.25** compile |" in on_a  # the chosen one, not the best of ours
    assert "| d=8 T=2048 | 2.00 eager |" in on_a
    assert "in 1 of 2 cases, at worst 0.25 times as fast (forward, fp32 d=8 T=1)" in on_a
    assert "| fp32 d=8 T=1 | **0.50 (0.50-0.50)** | lynx cpu | 20 (20-20) | - | 20 % | - | - |" in on_a
    assert "- forward, fp32 d=8 T=1: lynx cpu takes 4.00 (4.00-4.00) times the time of compile" in on_a
    assert "stale" not in text  # the older run
    assert "| workload | fp32 forward |\n| --- | --- |\n| d=8 T=1 | 7.00 eager |" in on_b
    assert "None: in every case" in on_b
    assert "**not right**" in on_c
    assert "lynx cpu is WRONG: nonsense" in on_c


def test_readme_table_names_machine_and_losses():
    text = report.with_table("a <!-- benchmarks:start -->old<!-- benchmarks:end --> b", newest(invented()))
    assert text.startswith(
        "a <!-- benchmarks:start -->\n\n`adapter` on A. Slower than the fastest peer in 1 of 2 cases"
    )
    assert "old" not in text
    assert text.count("`adapter` on ") == 3
    assert text.endswith("<!-- benchmarks:end --> b")
    assert report.with_table(text, newest(invented())) == text
    with pytest.raises(ValueError, match="no place"):
        report.with_table("nothing", [])


def test_readme_table_picks_columns_evenly():
    rows = [row for t in range(9) for row in timed({"eager": 2, "lynx cpu": 1}, shape=f"fp32 d=8 T={2**t}")]
    text = report.with_table("<!-- benchmarks:start --><!-- benchmarks:end -->", rows)
    assert "| mode | shape | T=1 | T=4 | T=16 | T=64 | T=256 |" in text


def test_plots_are_written_and_stale_ones_go(tmp_path):
    grown = [
        row for t in range(3) for row in timed({"eager": 2, "lynx cpu": 1}, shape=f"bf16 d=8 T={2**t}", device="B")
    ]
    append([*invented(), *grown], tmp_path / "results" / "a.csv")
    [target] = report.write(tmp_path / "results")
    linked = set(re.findall(r"plots/([^)]+)", target.read_text()))
    assert linked == {path.name for path in (tmp_path / "plots").iterdir()}
    assert {"adapter-fp32-a-ratio.png", "adapter-fp32-a-share.png", "adapter-fp32-a-cost.png"} <= linked
    assert "adapter-fp32-b-share.png" not in linked  # no floor there
    (tmp_path / "plots" / "mine.png").write_bytes(b"")
    (tmp_path / "results" / "a.csv").unlink()
    [target] = report.write(tmp_path / "results")
    assert "Nothing is measured yet" in target.read_text()
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["mine.png"]


def test_what_is_committed_is_what_the_stored_rows_say():
    rows = newest(read())
    assert (RESULTS.parent / "RESULTS.md").read_text() == report.text(rows)
    readme = report.README.read_text()
    assert report.with_table(readme, rows) == readme
