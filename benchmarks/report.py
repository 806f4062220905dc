"""What is written from the stored rows alone: the README's table, docs/benchmarks.md, and all the rest with plots in
benchmarks/report/, which is not kept.

Ratios are those stored: they were taken within a round of one run on one machine, so rows of different machines never
meet. Of several runs of a case on one machine the newest counts.
"""

from pathlib import Path

from benchmarks import drawing
from benchmarks.rows import RATIO, RESULTS, Row, newest, read
from benchmarks.tables import as_markdown, by_case, details, fastest_peer, is_slower, overview, summary

README = RESULTS.parents[1] / "README.md"
PAGE = RESULTS.parents[1] / "docs" / "benchmarks.md"
_START, _END = "<!-- benchmarks:start -->", "<!-- benchmarks:end -->"
_EMPTY = "Nothing is measured yet; `make bench` measures and fills this in."
_WRITTEN = "Written by `python -m benchmarks report` from `benchmarks/results/*.csv`; do not edit."
_PAGE = f"""# Benchmarks

{_WRITTEN}

How many times as fast is the implementation that `impl=None` takes as the fastest of the peers, which is named: medians
of ratios that are taken within a round, in which all providers take turns on one machine. **Bold** is slower. Every
provider was checked against fp64 first. `pack_frames` and `processors`: peers with a `~` behind their name resize in
their own way and may differ from Pillow by some levels. `make bench` measures; `python -m benchmarks report` also
writes `benchmarks/report/RESULTS.md`: of every provider time, spread, rate, share of the floor, memory, losses, plots.
"""
_HEAD = f"""# Results

{_WRITTEN}

- Providers take turns, and every ratio is taken within a round on one machine: median (20th-80th percentile) over
  rounds. Above 1 is faster; **bold** is one of ours that is slower.
- Summaries compare what `impl=None` takes with the fastest peer of each case, and name that peer.
- Floors: `matmuls`, the operation's bare products, and `copy`, moving as many bytes as the operation must. Shares say
  how near to them a provider comes. Work that mostly reads can be faster than a copy, half of which is writing.
- With few tokens reading the weights is the work: they are read from memory, not from a cache, and rates are in GB/s.
- FLOP of attention are those of pairs that see each other: no pads, nothing that a mask hides, causal as causal.
- On GPUs, calls of up to some thousand tokens are captured in CUDA graphs: no launch from Python is timed.
- `bound` in a shape: repeating the root that branches share takes so many times the FLOP. Where FLOP decide, sharing
  it cannot gain more than that over the provider with `repeated` before its name.
- `pack_frames` and `processors`: peers with a `~` behind their name resize in their own way and may differ from Pillow
  by some levels; all others give its bytes. How many threads PyTorch has is part of the shape.
- Peak memory is the most that a call has allocated at one time. Saved memory stays alive between forward and backward.
"""


def write(results: Path = RESULTS) -> list[Path]:
    """Write the report into a folder beside that of the results; from the stored ones also the page and the table."""
    rows, folder = newest(read(results)), results.parent / "report"
    folder.mkdir(exist_ok=True)
    for mine in _by_device_and_kernel(rows).values():
        for figure in drawing.figures(mine):
            drawing.draw(figure, folder / "plots")
    written = {folder / "RESULTS.md": text(rows)}
    if results == RESULTS:
        written |= {PAGE: page(rows), README: with_table(README.read_text(), rows)}
    for path, said in written.items():
        path.write_text(said)
    return list(written)


def page(rows: list[Row]) -> str:
    """One page for readers: ours against the fastest peer in every case."""
    parts = [_PAGE, *([] if rows else [_EMPTY + "\n"])]
    for (device, kernel), mine in _by_device_and_kernel(rows).items():
        if f"## {device}\n" not in parts:
            parts.append(f"## {device}\n")
        parts.append(f"### {kernel}\n\n{_count(mine)}\n\n{as_markdown(summary(mine))}\n")
    return "\n".join(parts)


def text(rows: list[Row]) -> str:
    """The report of the newest rows."""
    parts = [_HEAD, *([] if rows else [_EMPTY + "\n"])]
    for (device, kernel), mine in _by_device_and_kernel(rows).items():
        if f"## {device}\n" not in parts:
            parts.append(f"## {device}\n")
        parts.append(f"### {kernel}\n\n{_origin(mine)} {_count(mine)}\n\n{as_markdown(summary(mine))}\n")
        parts += [f"![{figure.title}](plots/{figure.name})\n" for figure in drawing.figures(mine)]
        for mode, dtype in dict.fromkeys((row.mode, row.dtype_and_workload[0]) for row in mine):
            chosen = [row for row in mine if row.mode == mode and row.dtype_and_workload[0] == dtype]
            title = f"<summary>{kernel} {mode} {dtype}: every provider</summary>"
            parts.append(f"<details>{title}\n\n{as_markdown(details(chosen))}\n\n</details>\n")
        parts.append(f"#### Losses of {kernel}\n\n{_losses(mine)}\n")
    return "\n".join(parts)


def with_table(readme: str, rows: list[Row]) -> str:
    """The README's text with the overview of the newest rows between its markers."""
    devices = sorted({row.device for row in rows})
    parts = [f"{each}:\n\n{as_markdown(overview([row for row in rows if row.device == each]))}" for each in devices]
    before, _, rest = readme.partition(_START)
    _, found, after = rest.partition(_END)
    if not found:
        raise ValueError(f"the README has no place for the table: no {_START} followed by {_END}")
    return "\n\n".join([before + _START, *(parts or [_EMPTY]), _END + after])


def _by_device_and_kernel(rows: list[Row]) -> dict[tuple[str, str], list[Row]]:
    keys = sorted({(row.device, row.kernel) for row in rows})
    return {key: [row for row in rows if (row.device, row.kernel) == key] for key in keys}


def _origin(rows: list[Row]) -> str:
    commits, versions = sorted({row.commit for row in rows}), sorted({row.versions for row in rows})
    return f"Commit {', '.join(commits)}; {'; '.join(versions)}; {rows[0].time[:10]} to {rows[-1].time[:10]}."


def _count(rows: list[Row]) -> str:
    fastest = [found for mine in by_case(rows).values() if (found := fastest_peer(mine))]
    slower = sorted((each for each in fastest if is_slower(each)), key=lambda row: row.p50)
    unusable = len({row.case for row in rows if row.metric in ("wrong", "failed")})
    said = f"Slower than the fastest peer in {len(slower)} of {len(fastest)} cases"
    if slower:
        said += f", at worst {slower[0].p50:.2f} times as fast ({slower[0].mode}, {slower[0].shape})"
    return said + "." + (f" In {unusable} a provider was wrong or failed." if unusable else "")


def _losses(rows: list[Row]) -> str:
    """What we must not hide: where the one ``impl=None`` takes is slower than a peer, and whoever is wrong."""
    lines = []
    for case, mine in by_case(rows).items():
        where = f"- {case[2]}, {case[3]}:"
        lines += [
            f"{where} {row.provider} {'is WRONG' if row.metric == 'wrong' else 'FAILED'}: {row.note}"
            for row in mine
            if row.metric in ("wrong", "failed")
        ]
        fastest = fastest_peer(mine)
        if fastest and is_slower(fastest):
            spread = f"{1 / fastest.p50:.2f} ({1 / fastest.p80:.2f}-{1 / fastest.p20:.2f})"
            peer = fastest.metric.removeprefix(RATIO)
            lines.append(f"{where} {fastest.provider} takes {spread} times the time of {peer}")
    return "\n".join(lines) or "None: in every case ours is at least as fast as the fastest peer."
