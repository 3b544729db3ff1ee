"""Does fusion gain most where the auxiliary's EF is highest?

    python tests/study.py runs/*              the results of several runs, as 05_eval.py leaves them

Where runs are alike in all but the injected stride, images and steps included, and another one is without fusion, a
table sets the gain over no fusion beside the EF at that stride, from three strides on with Spearman's rho.
"""

import sys
from collections import defaultdict
from pathlib import Path

from scipy import stats

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import run  # noqa: E402


def read(folder: Path) -> tuple:
    """(selection, model, what else must agree for a fair comparison, scores) of a run."""
    results = run.read_stage(folder, "results.json", "05_eval.py")
    selection = run.read_stage(folder, "selection.json", "03_select.py")
    ((benchmark, entry),) = results["benchmarks"].items()
    model = results["model"]
    same = {k: v for k, v in model.items() if k not in ("auxiliary", "stride", "fusion", "weights", "aux_mode")}
    return selection, model, (benchmark, entry["images"], *same.items()), entry["scores"]


def gains(folders: list[Path]) -> str:
    """A table for each group of runs that differ in the stride only."""
    runs = []
    for folder in folders:
        try:
            runs.append(read(folder))
        except run.UserError as error:
            print(f"left out: {error}")
    alone = {same: scores for _, model, same, scores in runs if model["fusion"] == "none"}
    groups = defaultdict(list)
    for selection, model, same, scores in runs:
        score = selection["score"].upper()
        ef = selection["scores"].get(model["auxiliary"], {}).get(score)
        if model["fusion"] == "replace" and ef and same in alone:
            key = same, model["aux_mode"], model["auxiliary"], score
            groups[key].append((model["stride"], ef[str(model["stride"])], model, scores))
    tables = []
    for (same, _, auxiliary, score), entries in groups.items():
        if len(entries) > 1:
            entries.sort(key=lambda entry: entry[0])
            tables.append(table(alone[same], entries, auxiliary, score))
    return "\n".join(tables) or "no runs differ in the stride only and have one without fusion beside them"


def table(base: dict, entries: list, auxiliary: str, score: str) -> str:
    names = [name for name in base if all(s.get(name) is not None for s in [base, *(entry[3] for entry in entries)])]
    rows = [["OS", score, *(f"{name} gained" for name in names)]]
    for stride, ef, _, scores in entries:
        rows.append([str(stride), f"{ef:.2f}", *(f"{scores[name] - base[name]:+.1f}" for name in names)])
    efs = [entry[1] for entry in entries]
    if len(set(efs)) > 2:
        columns = [[entry[3][name] for entry in entries] for name in names]
        rhos = [stats.spearmanr(efs, c).statistic if len(set(c)) > 1 else None for c in columns]
        rows.append(["rho", "", *("-" if rho is None else f"{rho:.2f}" for rho in rhos)])
    title = f"{auxiliary} injected into {entries[0][2]['master']}, against the master alone; rho: Spearman's\n"
    return f"{title}\n{run.table(rows)}"


if __name__ == "__main__":
    print(gains([Path(word) for word in sys.argv[1:]]) if sys.argv[1:] else __doc__)
