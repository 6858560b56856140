"""Tables of what `lowbit plan` says of models of many sizes, and of how right it was."""

from results import rows_of

RECIPES = {
    "rtn-w4a16-g128": "rtn, 4 bits",
    "gptq-w4a16-g128": "gptq, 4 bits",
    "omniquant-w4a16-g128": "omniquant, 4 bits",
    "quip-e8p-2bit": "quip, 2 bits",
    "trellis-2bit": "trellis, 2 bits",
    "ptq161": "ptq161, 1.6 bits",
}
ACCURACY = ("bytes", "memory", "seconds")


def plan_table(metric: str) -> str:
    """Returns a table of one metric of the benchmark "plans": a row for each model, by size.

    metric: "size", "memory", "GPU memory", "disk" or "time".
    """
    found: dict[str, dict[str, str]] = {}
    sizes = dict[str, float]()
    machines = dict[str, str]()
    for row in rows_of("plans"):
        shape, recipe = row["case"].split(" | ")
        if row["metric"] == "size":
            sizes[shape] = float(row["value"])
        if row["metric"] == metric:
            found.setdefault(shape, {})[recipe] = _shown(float(row["value"]), row["unit"])
            machines[row["case"]] = row["machine"]
    if not found:
        return "The benchmark `plans` has no rows yet."
    recipes = [recipe for recipe in RECIPES if any(recipe in each for each in found.values())]
    lines = [
        f"| model | {' | '.join(RECIPES[recipe] for recipe in recipes)} |",
        f"| --- |{' --- |' * len(recipes)}",
        *(
            f"| {shape} | {' | '.join(each.get(recipe, '') for recipe in recipes)} |"
            for shape, each in sorted(found.items(), key=lambda item: sizes.get(item[0], 0.0))
        ),
    ]
    if metric == "time":
        lines += ["", f"Machine: {'; '.join(sorted(set(machines.values())))}."]
    return "\n".join(lines)


def _shown(value: float, unit: str) -> str:
    """Returns a number with two or three digits that mean something."""
    if unit == "h" and value < 1:
        return f"{60 * value:.0f} min"
    if unit == "h" and value >= 100:
        return f"{value / 24:.0f} days"
    return f"{value:.1f} {unit}" if value < 100 else f"{value:,.0f} {unit}"


def plan_accuracy() -> str:
    """Returns a table of planned over measured values, the newest row of each case.

    Older rows, of a plan that always tried a whole block, called that a rehearsal.
    """
    rows = [row for row in rows_of("plan") if row["metric"] in ACCURACY]
    old = {row["commit"] for row in rows if "rehearsal" in row["notes"]}
    found: dict[str, dict[str, str]] = {}
    for row in rows:
        if row["commit"] not in old:
            found.setdefault(row["case"], {})[row["metric"]] = row["value"]
    if not found:
        return "The benchmark `plan` has no rows yet."
    lines = [
        "| model, method, windows of text | size | memory | time |",
        "| --- | --- | --- | --- |",
        *(
            f"| {case.replace(' | ', ', ')} | {' | '.join(each.get(m, '') for m in ACCURACY)} |"
            for case, each in found.items()
        ),
    ]
    return "\n".join(lines)
