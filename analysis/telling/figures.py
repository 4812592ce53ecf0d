"""Pictures of the report as SVG text: the same bytes on every run, readable without colour.

Every function returns one `<svg>` on a white ground. Text is drawn as paths, so that no label depends on the
fonts of the reader. Hovering over a cell shows its numbers.
"""

from __future__ import annotations

import math
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from analysis.changes.tables import NO_STAGE, cosines
from analysis.telling.skills import Change
from analysis.telling.svg import FAINT, GREY, INK, STYLE, WIDTH, Tips, bare, draw_cell, layer_grid, to_svg
from analysis.telling.text import percent, score, scored

# Okabe and Ito's colours, which keep apart for every kind of colour vision; hatches serve print and grey.
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442"]
HATCHES = ["", "//", "..", "\\\\", "xx", "--", "++"]


@mpl.rc_context(STYLE)
def heat_maps(cells: pd.DataFrame, names: list[str], titles: list[str], modules: list[str], layers: int) -> str:
    """Relative change by layer and kind of module, one panel for each checkpoint, all on one layer axis.

    Args:
        cells: columns stage, layer, module, relative_change, floor; absent cells are hatched, and those whose weights
            were zero, so that nothing can be put in relation to them, are grey.
        names: checkpoints, from top to bottom.
        titles: of the panels.
        modules: rows of every panel.
        layers: how many layers the model has.
    """
    changed = cells.loc[cells["relative_change"] > 0, "relative_change"]
    low, high = (changed.min(), changed.max()) if len(changed) else (1e-4, 1e-2)
    norm = LogNorm(low / 1.05, high * 1.05)
    colour = mpl.colormaps["cividis"]
    tips: Tips = {}
    figure = Figure((WIDTH, len(names) * (0.17 * len(modules) + 0.42) + 0.6), layout="constrained")
    panels = figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0]
    for number, (axes, name, title) in enumerate(zip(panels, names, titles, strict=True)):
        layer_grid(axes, _short(modules), layers)
        axes.set_title(title)
        for row in cells[cells["stage"] == name].itertuples():
            gid, line = f"h{number}_{row.layer}_{modules.index(row.module)}", modules.index(row.module)
            was_zero = math.isnan(row.relative_change)
            draw_cell(axes, row.layer, line, GREY if was_zero else colour(norm(row.relative_change)), gid)
            if was_zero:
                tips[gid] = f"{name}, layer {row.layer}, {row.module}: changed, and was zero before"
                continue
            if row.relative_change < row.floor:
                axes.plot(row.layer, line, ".", color="white", markersize=3.5, mec=INK, mew=0.4)
            tips[gid] = (
                f"{name}, layer {row.layer}, {row.module}: {percent(row.relative_change)}"
                f" (rounding {percent(row.floor)})"
            )
    panels[-1].set_xlabel("layer (0 is next to the input)")
    bar = figure.colorbar(ScalarMappable(norm, colour), ax=list(panels), pad=0.01, aspect=40, fraction=0.03)
    bar.ax.yaxis.set_major_locator(_log_ticks(low, high))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: percent(value, 1)))
    bar.ax.yaxis.set_minor_locator(mpl.ticker.NullLocator())
    bar.set_label("relative change  ‖Δ‖ / ‖W‖")
    bar.outline.set_visible(False)
    return to_svg(figure, tips, "Relative change by layer and module")


@mpl.rc_context(STYLE)
def evaluation_matrix(
    evaluation: dict[str, Any], labels: dict[str, str], own: dict[str, str], changed: list[Change]
) -> str:
    """Models down, skills across: a skill's measure large, the other one small, and an arrow where it got worse.

    Args:
        evaluation: content of reports/evaluation.json.
        labels: a second line for the name of each model.
        own: by stage, the skill that it was trained on; its cell is framed.
        changed: skills before and after; those that are worse get an arrow.
    """
    matrix, measures = evaluation["matrix"], evaluation["measures"]
    models, skills = list(matrix), list(measures)
    worse = {(change.model, change.dataset): change for change in changed if change.worse}
    colour, tips = mpl.colormaps["Blues"], {}
    figure = Figure((max(7.0, 3.2 + 1.75 * len(skills)), 0.74 * len(models) + 0.75), layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(-0.5, len(skills) - 0.5), ylim=(len(models) - 0.5, -0.5))
    for y, model in enumerate(models):
        for x, skill in enumerate(skills):
            cell, measure, gid = matrix[model][skill], measures[skill], f"e{y}_{x}"
            shade = 0.0 if measure == "loss" else 0.75 * cell[measure]
            draw_cell(axes, x, y, colour(shade), gid)
            ink = "white" if shade > 0.55 else INK
            large = scored(cell[measure], measure)
            small = "".join(scored(value, other) for other, value in cell.items() if other != measure)
            low, high = (score(end, measure) for end in evaluation["intervals"][model][skill][measure])
            tips[gid] = f"{model} on {skill}: {large} ({low} to {high} in 95 %), {small}".removesuffix(", ")
            if lost := worse.get((model, skill)):
                large = f"▼ {large}"
                small = f"{small}   was {score(lost.before, lost.measure)}"
            axes.text(x, y - 0.1, large, ha="center", va="center", fontsize=13, color=ink, weight="bold")
            axes.text(x, y + 0.26, small, ha="center", va="center", fontsize=8, color=ink)
            if own.get(model) == skill:
                axes.add_patch(Rectangle((x - 0.46, y - 0.46), 0.92, 0.92, fill=False, ec="#D55E00", lw=2.2))
    kinds = ["skill" if skill in own.values() else "guard" for skill in skills]
    axes.set_xticks(range(len(skills)), map(": ".join, zip(kinds, skills, strict=True)), weight="bold")
    axes.set_yticks(range(len(models)), [f"{model}\n{labels[model]}".strip() for model in models])
    axes.xaxis.tick_top()
    bare(axes)
    return to_svg(figure, tips, "Every model on every skill")


@mpl.rc_context(STYLE)
def cosine_maps(gram: np.ndarray, grams: dict[int, np.ndarray], names: list[str], layers: int, paired: int) -> str:
    """Whether changes point the same way: all pairs over the whole model, and pairs of the first few by layer.

    Args:
        gram: inner products over the whole model, [names, names].
        grams: the same by layer.
        names: stages, then `merged`; or models.
        layers: how many layers the model has.
        paired: how many of `names`, from the first, are compared by layer.
    """
    norm, colour, tips = Normalize(-1, 1), mpl.colormaps["PuOr_r"], {}
    count, whole = len(names), cosines(gram)
    pairs = [(i, j) for i in range(paired) for j in range(i)]
    side = 0.62 * count + 0.9
    figure = Figure((WIDTH, max(side, 2.4)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[side, WIDTH - side - 0.5])
    left.set(xlim=(-0.5, count - 0.5), ylim=(count - 0.5, -0.5), aspect="equal", title="whole model")
    for i, j in np.ndindex(count, count):
        value = whole[i, j]
        draw_cell(left, j, i, colour(norm(value)) if np.isfinite(value) else "white", f"c{i}_{j}")
        ink = "white" if abs(value) > 0.65 else INK
        left.text(j, i, f"{value:+.2f}" if np.isfinite(value) else "–", ha="center", va="center", color=ink)
        tips[f"c{i}_{j}"] = f"{names[i]} and {names[j]}: cosine {value:+.4f}"
    left.set_xticks(range(count), names, rotation=35, ha="right")
    left.set_yticks(range(count), names)
    bare(left)
    layer_grid(right, [f"{names[j]} – {names[i]}" for i, j in pairs], layers)
    right.set(title="pairs, by layer (hatched: not in the same layer)", xlabel="layer")
    for line, (i, j) in enumerate(pairs):
        for layer, inner in sorted(grams.items()):
            value = cosines(inner)[i, j]
            if layer >= 0 and np.isfinite(value):
                draw_cell(right, layer, line, colour(norm(value)), f"p{line}_{layer}", edge=FAINT)
                tips[f"p{line}_{layer}"] = f"{names[j]} and {names[i]}, layer {layer}: cosine {value:+.4f}"
    return to_svg(figure, tips, "Cosine between the changes")


@mpl.rc_context(STYLE)
def whose_change(shares: pd.DataFrame, stages: list[str], layers: int) -> str:
    """Share of the merged change that each stage explains, by layer, stacked; the rest is no stage's.

    Args:
        shares: columns layer, stage (or NO_STAGE), survival, share.
        stages: in the order of params.yaml.
        layers: how many layers the model has.
    """
    table = shares.pivot(index="layer", columns="stage", values="share").reindex(range(layers))
    tips: Tips = {}
    above, below = np.zeros(layers), np.zeros(layers)
    figure = Figure((WIDTH, 2.9), layout="constrained")
    axes = figure.subplots()
    for name in [*(stage for stage in stages if stage in table), NO_STAGE]:
        heights = 100 * table[name].fillna(0).to_numpy()
        number = None if name == NO_STAGE else stages.index(name)
        bars = axes.bar(
            range(layers),
            heights,
            bottom=np.where(heights >= 0, above, below),
            color=GREY if number is None else COLOURS[number % len(COLOURS)],
            hatch="" if number is None else HATCHES[number % len(HATCHES)],
            width=0.86,
            edgecolor="white",
            linewidth=0.4,
            label=name,
        )
        above, below = above + heights.clip(0), below + heights.clip(max=0)
        for layer, bar in enumerate(bars):
            gid = f"w{'u' if number is None else number}_{layer}"
            bar.set_gid(gid)
            tips[gid] = f"layer {layer}: {heights[layer]:.1f} % of the merged change: {name}"
    axes.set(xlabel="layer", ylabel="% of the merged change", xlim=(-0.6, layers - 0.4))
    axes.set_ylim(min(0, below.min()), max(100, above.max()))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))
    figure.legend(loc="outside upper left", ncols=4, frameon=False, handlelength=2.4, handleheight=1.2)
    return to_svg(figure, tips, "Whose change is it, by layer of the merged file")


@mpl.rc_context(STYLE)
def floor_lines(cells: pd.DataFrame, layers: int) -> str:
    """The merged model's relative change against what rounding to the file's dtype alters, by layer.

    Args:
        cells: of the merged model, columns layer, relative_change, floor; of one layer at least.
        layers: how many layers the model has.
    """
    table = cells.set_index("layer").reindex(range(layers))
    change, floor = 100 * table["relative_change"], 100 * table["floor"]
    figure = Figure((WIDTH, 2.7), layout="constrained")
    axes = figure.subplots()
    axes.fill_between(range(layers), 0, floor, color=GREY, lw=0, step="mid")
    axes.plot(range(layers), change, "o-", color=COLOURS[0], lw=1.6, ms=4)
    axes.set(xlabel="layer", ylabel="% of the weights' size", xlim=(-0.6, layers - 0.4))
    axes.set_ylim(0, 1.25 * np.nanmax([change.max(), floor.max(), 1e-9]))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))
    head: dict[str, Any] = {"transform": axes.transAxes, "va": "top", "weight": "bold"}
    axes.text(0.01, 0.98, "●  change in the merged file", color=COLOURS[0], **head)
    axes.text(0.34, 0.98, "■  lost or added by rounding", color=FAINT, **head)
    return to_svg(figure, {}, "Relative change and rounding floor of the merged model, by layer")


@mpl.rc_context(STYLE)
def drift_lines(probe: dict[str, Any], layers: int) -> str:
    """How far the hidden states of each checkpoint are from the base's, by layer, on both kinds of texts.

    Args:
        probe: of reports/probe.json.
        layers: how many layers the model has.
    """
    checkpoints, floor = probe["checkpoints"], 100 * np.array(probe["floor"]["drift"])
    lines = math.ceil(len(checkpoints) / 2)
    top = max(max(each[domain]["drift"]["high"]) for each in checkpoints.values() for domain in ("on", "off"))
    figure = Figure((WIDTH, 2.1 * lines + 0.4), layout="constrained")
    panels = figure.subplots(lines, 2, sharex=True, sharey=True, squeeze=False).ravel()
    kinds = [("off", "texts of other kinds", COLOURS[5], "--"), ("on", "texts like the training's", COLOURS[0], "-")]
    for axes, (name, checkpoint) in zip(panels, checkpoints.items(), strict=False):
        for layer in checkpoint["trained"]:
            axes.axvspan(layer - 0.5, layer + 0.5, color="#eef3f8", lw=0)
        axes.fill_between(range(layers), 0, floor, color=GREY, lw=0, label="noise of bfloat16")
        for domain, label, colour, style in kinds:
            mean, low, high = (100 * np.array(checkpoint[domain]["drift"][end]) for end in ("mean", "low", "high"))
            axes.fill_between(range(layers), low, high, color=colour, alpha=0.2, lw=0)
            axes.plot(range(layers), mean, style, color=colour, lw=1.6, label=label)
        axes.set(title=name, xlim=(-0.5, layers - 0.5), ylim=(0, 105 * max(top, 1e-6)))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    for axes in panels[len(checkpoints) :]:
        axes.set_axis_off()
    for axes in panels[-2:]:
        axes.set_xlabel("layer (shaded: trained by it or its parents)")
    figure.supylabel("drift, % of the hidden state's size", fontsize=9)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=3, frameon=False)
    return to_svg(figure, {}, "Drift of the hidden states by layer")


@mpl.rc_context(STYLE)
def behaviour_lines(probe: dict[str, Any], layers: int) -> str:
    """By layer and checkpoint: the logit lens's divergence from the base, and how much more every part writes.

    Args:
        probe: of reports/probe.json.
        layers: how many layers the model has.
    """
    checkpoints, base = probe["checkpoints"], probe["base"]["written"]
    figure = Figure((WIDTH, 3.0), layout="constrained")
    panels = figure.subplots(1, 1 + len(base), sharex=True)
    floor = np.maximum(np.array(probe["floor"]["lens"], float), 1e-6)
    lens = {name: np.array(checkpoint["lens"], float) for name, checkpoint in checkpoints.items()}
    lowest = 0.5 * np.nanmin([*floor, *(value for each in lens.values() for value in each if value > 0)])
    panels[0].fill_between(range(layers), lowest, floor, color=GREY, lw=0, label="noise of bfloat16")
    panels[0].set(yscale="log", title="predictions read off each layer", ylabel="KL to the base, nats")
    for number, (name, checkpoint) in enumerate(checkpoints.items()):
        if name == "merged":
            look: dict[str, Any] = {"color": INK, "lw": 2.2, "ls": "-", "label": name}
        else:
            style = ["--", ":", "-.", (0, (5, 1, 1, 1, 1, 1))][number % 4]
            look = {"color": COLOURS[number % len(COLOURS)], "lw": 1.4, "ls": style, "label": name}
        panels[0].plot(range(layers), np.where(lens[name] == 0, math.nan, lens[name]), **look)
        for axes, (module, before) in zip(panels[1:], base.items(), strict=True):
            wrote = np.array(before, float)
            wrote[wrote == 0] = math.nan  # an adapter that the base has for a stage to train
            axes.plot(range(layers), 100 * (np.array(checkpoint["written"][module], float) / wrote - 1), **look)
    for axes, module in zip(panels[1:], base, strict=True):
        axes.axhline(0, color=FAINT, lw=0.6)
        axes.set(title=f"{module} writes more by", ylabel="%")
    for axes in panels:
        axes.set(xlabel="layer", xlim=(-0.5, layers - 0.5))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=7, frameon=False)
    return to_svg(figure, {}, "Logit lens, and what each part of a layer writes, by layer")


@mpl.rc_context(STYLE)
def head_maps(heads: pd.DataFrame, divergence: list[list[float | None]]) -> str:
    """What changed in every attention head of the merged file: where it looks on other texts, and its two circuits.

    Args:
        heads: of the merged file, columns layer, head, qk, ov; may be empty.
        divergence: of the attention, in bits, by layer and head; None where a layer has none.
    """
    moved = np.array(divergence, float).T  # [heads, layers]
    maps = [("where it looks: attention moved", "bits", moved)]
    for key, title in (("qk", "what it looks for: QK changed"), ("ov", "what it copies: OV changed")):
        table = heads.pivot(index="head", columns="layer", values=key)
        values = 100 * table.reindex(index=range(len(moved)), columns=range(moved.shape[1])).to_numpy(float)
        maps += [(title, "%", values)] if np.isfinite(values).any() else []
    figure = Figure((WIDTH, len(maps) * (0.11 * len(moved) + 0.55) + 0.3), layout="constrained")
    panels = figure.subplots(len(maps), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (title, unit, values) in zip(panels, maps, strict=True):
        layer_grid(axes, [], moved.shape[1])
        axes.set(title=title, ylabel="head", ylim=(len(moved) - 0.5, -0.5))
        axes.patches[0].set_height(len(moved))
        # One bitmap, for a cell of its own for every head would be megabytes.
        bitmap = axes.imshow(values, "cividis", Normalize(0), aspect="auto", interpolation="nearest", zorder=2)
        bar = figure.colorbar(bitmap, ax=axes, pad=0.01, aspect=8, fraction=0.03)
        bar.set_label(unit)
        bar.outline.set_visible(False)
    panels[-1].set_xlabel("layer")
    return to_svg(figure, {}, "Every attention head of the merged file")


@mpl.rc_context(STYLE)
def ablation_map(rows: list[dict[str, Any]], own: dict[str, str]) -> str:
    """Change of the loss on every skill when a group of a stage's layers is as its parent has them.

    Args:
        rows: of reports/probe.json: stage, layers, dataset, loss, without.
        own: by stage, the skill that it was trained on; its cells are framed.
    """
    skills = list(dict.fromkeys(row["dataset"] for row in rows))
    groups = list(dict.fromkeys((row["stage"], row["layers"][0], row["layers"][-1]) for row in rows))
    largest = max((abs(row["without"] - row["loss"]) for row in rows), default=0) or 1.0
    norm, colour, tips = Normalize(-largest, largest), mpl.colormaps["PuOr_r"], {}
    figure = Figure((max(7.0, 3.2 + 1.6 * len(skills)), 0.36 * len(groups) + 0.6), layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(-0.5, len(skills) - 0.5), ylim=(max(len(groups), 1) - 0.5, -0.5))
    for row in rows:
        x, y = skills.index(row["dataset"]), groups.index((row["stage"], row["layers"][0], row["layers"][-1]))
        change, gid = row["without"] - row["loss"], f"a{y}_{x}"
        draw_cell(axes, x, y, colour(norm(change)), gid)
        ink = "white" if abs(change) > 0.65 * largest else INK
        axes.text(x, y, f"{change:+.2f}", ha="center", va="center", color=ink)
        tips[gid] = f"{row['dataset']}: loss {row['loss']:.3f} with all of {row['stage']}, {row['without']:.3f} without"
        if own[row["stage"]] == row["dataset"]:
            axes.add_patch(Rectangle((x - 0.47, y - 0.44), 0.94, 0.88, fill=False, ec="#D55E00", lw=1.8))
    kinds = ["skill" if skill in own.values() else "guard" for skill in skills]
    axes.set_xticks(range(len(skills)), map(": ".join, zip(kinds, skills, strict=True)), weight="bold")
    axes.set_yticks(range(len(groups)), [f"{stage}, layers {first}-{last}" for stage, first, last in groups])
    axes.xaxis.tick_top()
    bare(axes)
    return to_svg(figure, tips, "Loss of every skill without a group of layers")


@mpl.rc_context(STYLE)
def loss_curves(curves: dict[str, list[dict[str, Any]]]) -> str:
    """Training loss by step, one panel for each stage on one scale.

    Args:
        curves: by stage, the points of reports/train/NAME.curve.json; of one stage at least.
    """
    columns = min(4, max(2, len(curves)))
    lines = math.ceil(len(curves) / columns)
    highest = max((point["loss"] for curve in curves.values() for point in curve), default=1.0)
    figure = Figure((WIDTH, 2.2 * lines + 0.3), layout="constrained")
    panels = figure.subplots(lines, columns, sharey=True, squeeze=False).ravel()
    for number, (axes, (name, curve)) in enumerate(zip(panels, curves.items(), strict=False)):
        steps, losses = [point["step"] for point in curve], [point["loss"] for point in curve]
        dot = "o" if len(curve) == 1 else None  # a line needs two
        axes.plot(steps, losses, color=COLOURS[number % len(COLOURS)], lw=1.6, marker=dot)
        axes.set(title=name, xlabel="step", ylim=(0, 1.1 * highest))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
        axes.text(1, 1, f"last {losses[-1]:.2f}", ha="right", va="bottom", transform=axes.transAxes)
    for axes in panels[len(curves) :]:
        axes.set_axis_off()
    panels[0].set_ylabel("loss (nats per token)")
    return to_svg(figure, {}, "Training loss of every stage")


def _short(modules: list[str]) -> list[str]:
    """Last parts of the names, where these tell the modules apart."""
    last = [module.rpartition(".")[2] for module in modules]
    return last if len(set(last)) == len(last) else modules


def _log_ticks(low: float, high: float) -> Any:
    subs = [1, 3] if high / low > 5 else [1, 1.5, 2, 3, 4, 5, 7]
    return mpl.ticker.LogLocator(subs=subs)
