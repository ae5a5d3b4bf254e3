"""The picture of a session: whole steps beside optax's, and methods by rate and distance."""

from typing import Any

from matplotlib.figure import Figure

BASELINE = "optax.contrib.muon"
COLOURS = {"optax": "#E69F00", "torch": "#CC79A7", "": "#0072B2"}


def draw(rows: dict[str, list[dict[str, Any]]], title: str) -> Figure:
    """One panel per workload of "updates", one per shape of "matrices"."""
    steps = _by(rows.get("updates", []), "workload", "update")
    methods = _by(rows.get("matrices", []), "shape", "method")
    across = max(len(steps), len(methods), 1)
    figure = Figure(figsize=(5 * across, 10), layout="constrained")
    panels = figure.subplots(2, across, squeeze=False)
    for axes in panels.flat:
        axes.set_visible(False)
    for axes, (workload, found) in zip(panels[0], steps.items(), strict=False):
        axes.set_visible(True)
        names = [row["update"] for row in found]
        axes.barh(names, [row["ms"] for row in found], color=[_colour(name) for name in names])
        axes.invert_yaxis()
        axes.set(title=workload, xlabel="ms a step", xscale="log")
        axes.grid(axis="x", alpha=0.3)
    for axes, (shape, found) in zip(panels[1], methods.items(), strict=False):
        axes.set_visible(True)
        for row in (row for row in found if "distance" in row):
            colour = _colour(row["method"])
            axes.plot(row["ms"], row["distance"], "o", color=colour, markersize=4)
            label = f"{row['method']}, {row['mode']}"
            axes.annotate(label, (row["ms"], row["distance"]), fontsize=5)
        axes.set(title=shape, xlabel="ms", ylabel="distance to the polar factor", xscale="log")
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    return figure


def _by(rows: list[dict[str, Any]], key: str, needed: str) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if "ms" in row and needed in row:
            groups.setdefault(str(row[key]), []).append(row)
    return groups


def _colour(name: str) -> str:
    return next(colour for start, colour in COLOURS.items() if name.startswith(start))
