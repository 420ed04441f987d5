#!/usr/bin/env bash
# lm-eval 0.4.13 (with torch 2.13.0, transformers 5.24.0): a dict that names a registered task and changes one field of it
# does so in a group, but not when it is given to TaskManager.load() or simple_evaluate().
#
# In a group's list such an entry is a "task reference with overrides" (lm_eval/tasks/_factory.py): what it does not name
# comes from the registered task. One would expect the same entry to mean the same in the list of tasks that load() takes.
# There it is a whole task of its own, under the registered name, without that task's data set, prompts and choices: it
# becomes a task that generates text, and fails at its first document for want of a data set. To score a registered task
# on other documents one must write a group around it.
# Seen: by name: multiple_choice question red; in a group: multiple_choice question blue; given to load(): TypeError.
#
# Exits 0 if it is still so, 1 if it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 'lm-eval[hf]==0.4.13'
cat > "$folder/check.py" <<'PY'
import json
import sys
from pathlib import Path

from lm_eval.tasks import TaskManager

folder = Path(sys.argv[1])
(folder / "tasks").mkdir()
for name, word in (("first", "red"), ("second", "blue")):
    (folder / f"{name}.jsonl").write_text(json.dumps({"question": word, "choices": ["a", "b"], "label": 0}) + "\n")
toy = {
    "task": "toy", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "first.jsonl")}},
    "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "question", "doc_to_choice": "choices",
    "doc_to_target": "label", "num_fewshot": 0,
}
other = {"task": "toy", "dataset_kwargs": {"data_files": {"test": str(folder / "second.jsonl")}}}
(folder / "tasks" / "toy.yaml").write_text(json.dumps(toy))  # JSON is YAML
(folder / "tasks" / "group.yaml").write_text(json.dumps({"group": "both", "task": [other]}))
manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)


def described(spec):
    (task,) = manager.load([spec])["tasks"].values()
    return task.config.output_type, task.config.doc_to_text, next(iter(task.test_docs()))["question"]


by_name, in_group = described("toy"), described("both")
print("by name:", *by_name)
print("in a group, with its own file:", *in_group)
try:
    alone = described(other)
except Exception as error:
    alone = (type(error).__name__,)
print("the same entry, given to load():", *alone)
expected = ("multiple_choice", "question")
sys.exit(0 if by_name == (*expected, "red") and in_group == (*expected, "blue") and alone[:2] != expected else 1)
PY
HF_HUB_OFFLINE=1 HF_DATASETS_CACHE="$folder/cache" "$folder/venv/bin/python" "$folder/check.py" "$folder"
