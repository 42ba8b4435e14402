"""GRPO beside DAPO on the same problems: two runs, and what they recorded."""

import groupwise as gw

if __name__ == "__main__":
    short = {"steps": 6, "eval_problems": 100, "eval_every": 6}
    runs = {name: gw.train("quick", algorithm={"name": name}, training=short, quiet=True) for name in ("grpo", "dapo")}
    for name, run in runs.items():
        before, after = run.values("eval/pass@1")
        completions = sum(run.values("rollouts/completions"))
        print(f"{name}: pass@1 {before:.3f} -> {after:.3f} after {completions:,.0f} completions; {run.path}")
    print("groupwise report", *(run.path for run in runs.values()))
