#!/usr/bin/env bash
# torch 2.13.0 with greenlet 3.5.6: a context manager of torch that is open in a paused greenlet acts on everybody else.
#
# A greenlet has its own contextvars: what it sets there is gone while it is paused. One would expect the same of the
# modes that `with torch.no_grad()` and `with torch.autocast(...)` set, as they read like such a context. They belong to
# the thread: while a greenlet stands still inside of one, its caller computes without gradients, and in bfloat16.
# Worse, each block restores what it found when it was entered. Two greenlets that enter one after the other and leave in
# the same order end with gradients off for the rest of the program, although every block has been left.
# Whoever pauses forwards of a model in greenlets must pause outside of such blocks, or set the modes around each step.
#
# Exits 0 if this is still so, 1 if it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 greenlet==3.5.6
cat > "$folder/check.py" <<'PY'
import contextvars
import sys

import torch
from greenlet import getcurrent, greenlet

name = contextvars.ContextVar("name", default="main")
weight = torch.ones(2, 2, requires_grad=True)


def paused_inside():
    name.set("greenlet")
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        getcurrent().parent.switch()


def paused_without_gradients():
    with torch.no_grad():
        getcurrent().parent.switch()


one = greenlet(paused_inside)
one.switch()
seen = (name.get(), torch.is_grad_enabled(), (weight @ weight).dtype)
print("while it is paused, outside: contextvar %r, gradients %s, products in %s" % seen)
one.switch()
print("after it has ended: gradients", torch.is_grad_enabled())

first, second = greenlet(paused_without_gradients), greenlet(paused_without_gradients)
for each in (first, second, first, second):
    each.switch()
ended = first.dead and second.dead
print("after two have ended in the order in which they began: gradients", torch.is_grad_enabled())
sys.exit(0 if seen == ("main", False, torch.bfloat16) and ended and not torch.is_grad_enabled() else 1)
PY
"$folder/venv/bin/python" "$folder/check.py"
