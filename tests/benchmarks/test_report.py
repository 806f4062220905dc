"""The report on invented rows, and that what is committed is what the stored rows say."""

import re
from dataclasses import replace

from benchmarks import report
from benchmarks.rows import Row, append, newest, read

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
    assert "| d=8 T=1 | 7.00 eager |" in on_b
    assert "None: in every case" in on_b
    assert "**not right**" in on_c
    assert "lynx cpu is WRONG: nonsense" in on_c


def test_the_overview_counts_cases_and_losses():
    text = report.with_table("a <!-- benchmarks:start -->old<!-- benchmarks:end --> b", newest(invented()))
    assert "| `adapter` | forward | 1.12 (0.25 to 2.00) | **1** of 2 |" in text
    assert "| `adapter` | forward | 7.00 (7.00 to 7.00) | 0 of 1 |" in text
    assert text.endswith("<!-- benchmarks:end --> b")
    assert report.with_table(text, newest(invented())) == text


def test_rows_in_the_words_of_earlier_code_are_read(tmp_path):
    """And give way to newer ones of the same case."""
    old = [
        replace(ROW, kernel="loss", shape="fp32 T=8"),
        replace(ROW, kernel="planner", metric="fill", shape="fp32 ranks=1"),
        replace(ROW, kernel="generation", shape="fp32 new=8 pictures=1"),
        replace(ROW, kernel="generation", shape="fp32 new=8 pictures=2"),
    ]
    append([*old, replace(old[2], shape="fp32 new=8 images=1", time="2026-01-02")], tmp_path / "a.csv")
    found = {(row.kernel, row.metric, row.shape) for row in newest(read(tmp_path))}
    assert found == {
        ("linear_cross_entropy", "time", "fp32 T=8"),
        ("planner", "pack_utilization", "fp32 ranks=1"),
        ("generation", "time", "fp32 new=8 images=1"),
        ("generation", "time", "fp32 new=8 pictures=2"),
    }


def test_a_report_is_written_with_its_plots(tmp_path):
    append(invented(), tmp_path / "results" / "a.csv")
    [target] = report.write(tmp_path / "results")
    linked = set(re.findall(r"plots/([^)]+)", target.read_text()))
    assert linked == {path.name for path in (target.parent / "plots").iterdir()}
    assert "adapter-fp32-b-share.png" not in linked  # no floor there


def test_what_is_committed_is_what_the_stored_rows_say():
    rows = newest(read())
    assert report.PAGE.read_text() == report.page(rows)
    readme = report.README.read_text()
    assert report.with_table(readme, rows) == readme
