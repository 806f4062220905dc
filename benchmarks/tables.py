"""Stored rows as tables, ratio first: one case for the terminal, many cases or a summary for Markdown."""

from statistics import median

from benchmarks.rows import MEMORY, NO_NUMBERS, OURS, RATES, RATIO, SHARE, Row

Table = list[list[str]]  # the header first


def by_case(rows: list[Row]) -> dict[tuple[str, ...], list[Row]]:
    cases: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        cases.setdefault(row.case, []).append(row)
    return cases


def chosen(rows: list[Row]) -> str | None:
    """Of the providers of one case the one that ``impl=None`` takes: the first of ours."""
    return next((row.provider for row in rows if row.provider.startswith(OURS)), None)


def fastest_peer(rows: list[Row]) -> Row | None:
    """The row with the smallest ratio of the chosen one of ours to a peer, or None where it was not timed."""
    ours = chosen(rows)
    ratios = [row for row in rows if row.provider == ours and row.metric.startswith(RATIO)]
    return min(ratios, key=lambda row: row.p50, default=None)


def is_slower(ratio: Row) -> bool:
    """Whether a ratio is below 1, to the two digits that are printed."""
    return round(ratio.p50, 2) < 1


def is_curve(rows: list[Row]) -> bool:
    """Whether something grows in these rows, so that lines over it say more than workloads side by side."""
    values: dict[str, set[int]] = {}
    for row in rows:
        values.setdefault(row.group, set()).add(row.grows[1])
    return any(len(each) > 2 for each in values.values())


def details(rows: list[Row]) -> Table:
    """A line for each provider of each case, slower ones of ours in bold."""
    baseline = next((row.metric for row in rows if row.metric.startswith(RATIO)), RATIO + "-")
    shares = list(dict.fromkeys(row.metric for row in rows if row.metric.startswith(SHARE)))
    known = {"time", *RATES, *MEMORY, *NO_NUMBERS}
    qualities = [
        each
        for each in dict.fromkeys(row.metric for row in rows)
        if not each.startswith((RATIO, SHARE)) and each not in known
    ]
    table = [["shape", baseline, "provider", "time, us", "rate", *shares, "peak MiB", "saved MiB", *qualities]]
    for case, mine in by_case(rows).items():
        for provider in dict.fromkeys(row.provider for row in mine):
            found = {row.metric: row for row in mine if row.provider == provider}
            table.append([case[-1], *_cells(provider, found, baseline, shares, qualities)])
    return table


def _cells(provider: str, found: dict[str, Row], baseline: str, shares: list[str], qualities: list[str]) -> list[str]:
    for metric in NO_NUMBERS:
        if metric in found:
            said = metric if metric == "left out" else f"**{metric}**"
            return [said, provider, found[metric].note, *["-"] * (len(shares) + len(qualities) + 3)]
    rate = ", ".join(f"{_short(found[unit].p50)} {unit}" for unit in RATES if unit in found) or "-"
    time = f"{_short(found['time'].p50)} ({_short(found['time'].p20)}-{_short(found['time'].p80)})"
    if found["time"].note.startswith("launched"):
        time += f" ({found['time'].note})"
    ratio = found.get(baseline)
    said = f"{ratio.p50:.2f} ({ratio.p20:.2f}-{ratio.p80:.2f})" if ratio else "-"
    if ratio and is_slower(ratio) and provider.startswith(OURS):
        said = f"**{said}**"
    percents = [f"{100 * found[share].p50:.0f} %" if share in found else "-" for share in shares]
    memory = [f"{_short(found[name].p50)}" if name in found else "-" for name in MEMORY]
    results = [f"{found[name].p50:.4g}" if name in found else "-" for name in qualities]
    return [said, provider, time, rate, *percents, *memory, *results]


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def overview(rows: list[Row]) -> Table:
    """Ours against the fastest peer: a line for each kernel and mode; ``rows`` are of one device."""
    modes: dict[tuple[str, str], list[Row]] = {}
    for mine in by_case(rows).values():
        if fastest := fastest_peer(mine):
            modes.setdefault((fastest.kernel, fastest.mode), []).append(fastest)
    table = [["operation", "mode", "times as fast: median (lowest to highest)", "slower in"]]
    for (kernel, mode), ratios in sorted(modes.items(), key=lambda item: item[0][0]):
        speeds, slower = [row.p50 for row in ratios], sum(map(is_slower, ratios))
        said = f"{median(speeds):.2f} ({min(speeds):.2f} to {max(speeds):.2f})"
        table.append([f"`{kernel}`", mode, said, f"{f'**{slower}**' if slower else slower} of {len(ratios)}"])
    return table


def summary(rows: list[Row]) -> Table:
    """Ours against the fastest peer: a line for each mode and group, a column for what grows.

    Where nothing grows: a line for each workload, a column for each dtype and mode. ``rows`` are of one device and
    kernel.
    """
    if not is_curve(rows):
        return _workloads(rows)
    cells: dict[tuple[str, str], dict[tuple[str, int], str]] = {}
    for mine in by_case(rows).values():
        cells.setdefault((mine[0].mode, mine[0].group), {})[mine[0].grows] = _against_fastest(mine)
    grown = sorted({value for line in cells.values() for value in line})
    table = [["mode", "shape", *(f"{name}={value}" for name, value in grown)]]
    return table + [[mode, group, *(line.get(value, "-") for value in grown)] for (mode, group), line in cells.items()]


def _workloads(rows: list[Row]) -> Table:
    cells: dict[str, dict[str, str]] = {}
    for mine in by_case(rows).values():
        dtype, workload = mine[0].dtype_and_workload
        cells.setdefault(workload, {})[f"{dtype} {mine[0].mode}"] = _against_fastest(mine)
    columns = list(dict.fromkeys(column for line in cells.values() for column in line))
    lines = [[workload, *(line.get(column, "-") for column in columns)] for workload, line in cells.items()]
    return [["workload", *columns], *lines]


def _against_fastest(rows: list[Row]) -> str:
    """ "1.20 compile": that many times as fast as compile, the fastest peer; slower ones in bold."""
    fastest = fastest_peer(rows)
    if fastest is None:
        wrong = any(row.provider == chosen(rows) and row.metric in ("wrong", "failed") for row in rows)
        return "**not right**" if wrong else "-"
    said = f"{fastest.p50:.2f}"
    return f"{f'**{said}**' if is_slower(fastest) else said} {fastest.metric.removeprefix(RATIO)}"


def as_markdown(table: Table) -> str:
    head, *lines = table
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *lines])


def as_text(rows: list[Row]) -> str:
    """The rows of one case for a terminal."""
    table = [[cell.replace("**", "") for cell in line[1:]] for line in details(rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    return "\n".join(
        "  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in table
    )
