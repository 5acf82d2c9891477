"""lm-evaluation-harness on a task of this machine's files, without a network; run as a program, for what it imports.

    python harness.py FOLDER < runs.json     {run: {"model": backend, "model_args": {...}}}

writes {run: {"scores": {task: score}, "answers": {task: [what the model said to each question]}}} to FOLDER/found.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

_TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: prompt
"""
CHOOSE = (
    _TASK
    + """
output_type: multiple_choice
doc_to_choice: choices
doc_to_target: 0
metric_list: [{{metric: acc}}]
"""
)
WRITE = (
    _TASK
    + """
output_type: generate_until
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 12}}
metric_list: [{{metric: exact_match}}]
"""
)
TASKS = {"choose": (CHOOSE, "acc,none"), "write": (WRITE, "exact_match,none")}


def evaluate(folder: Path, questions: list[dict[str, Any]], runs: dict[str, Any], environ: dict[str, str]) -> Any:
    """What each of `runs` finds, as the program writes it. questions: {"prompt", "choices"}, the right one first."""
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in questions))
    for name, (task, _) in TASKS.items():
        (folder / f"{name}.yaml").write_text(task.format(name=name, data=data))
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"), "1")
    done = subprocess.run(
        [sys.executable, __file__, str(folder)],
        env=os.environ | offline | {"HF_HOME": str(folder / "hub")} | environ,
        input=json.dumps(runs),
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "found.json").read_text())


def main() -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    folder = Path(sys.argv[1])
    tasks = TaskManager(include_path=str(folder), include_defaults=False)
    found = {}
    for name, run in json.load(sys.stdin).items():
        results = simple_evaluate(
            **run, tasks=list(TASKS), task_manager=tasks, batch_size=8, device="cpu", bootstrap_iters=0
        )
        found[name] = {
            "scores": {task: results["results"][task][metric] for task, (_, metric) in TASKS.items()},
            "answers": {task: _answers(results["samples"][task]) for task in TASKS},
        }
    (folder / "found.json").write_text(json.dumps(found))


def _answers(samples: list[dict[str, Any]]) -> list[Any]:
    return [sample["filtered_resps"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]


if __name__ == "__main__":
    main()
