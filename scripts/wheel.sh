#!/usr/bin/env bash
# Builds the wheel, with and without a C++ compiler, and shows that each works where no source is: installed into a new
# virtual environment, it quantizes the demo model and generates text, and `paley doctor` tells what it has.
# PYTHON=/path/to/python picks the interpreter, whose packages the new environment reads; its setuptools builds.
# The wheel with kernels stays in $OUT, if that is set.
set -euo pipefail
cd "$(dirname "$0")/.."

python=$(realpath -s "${PYTHON:-.venv/bin/python}")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
unset PYTHONPATH

fail() {
    printf 'wheel: %s\n' "$*" >&2
    exit 1
}

# build FOLDER VARIABLES...: a wheel of what is in the working tree and git does not ignore.
build() {
    local to=$1
    shift
    rm -rf "$work/source" && mkdir "$work/source"
    git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents -t "$work/source"
    env "$@" "$python" -m pip wheel --no-deps --no-build-isolation -q -w "$to" "$work/source"
}

build "$work/with"
build "$work/without" CC=/nonexistent CXX=/nonexistent
for each in "$work"/with*/*.whl; do
    printf 'wheel: %s, %d bytes\n' "${each##*/}" "$(stat -c %s "$each")"
done
compgen -G "$work/with/paley-*-py3-none-linux_*.whl" >/dev/null || fail "the name must say py3-none and the platform"
compgen -G "$work/without/paley-*-py3-none-any.whl" >/dev/null || fail "without kernels it must be for every platform"

"$python" -m venv --without-pip "$work/venv"
"$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$work/others.pth"
cp "$work/others.pth" "$("$work/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
cp -r assets/demo-model "$work/model"
cd "$work" # so that no source is found
for kind in with without; do
    "$python" -m pip --python "$work/venv/bin/python" install -q --no-deps --force-reinstall "$work/$kind"/*.whl
    where=$("$work/venv/bin/python" -c 'import paley; print(paley.__file__)')
    [[ $where == "$work/venv/"* ]] || fail "$where is not what was installed"
    "$work/venv/bin/paley" doctor > "$work/doctor" && code=0 || code=$?
    sed 's/^/wheel:   /' "$work/doctor"
    if [[ $kind == with ]]; then
        [[ $code == 0 ]] || fail "paley doctor ended with $code"
        grep -q "native library: $work/venv" "$work/doctor" || fail "the library is not the wheel's"
    else
        [[ $code == 1 ]] || fail "paley doctor ended with $code without a library"
        grep -q "install a C++ compiler" "$work/doctor" || fail "paley doctor does not say how to get kernels"
    fi
    "$work/venv/bin/paley" quantize "$work/model" --preset higgs-4 --no-score --output "$work/out-$kind" >"$work/log" 2>&1 ||
        { cat "$work/log" >&2; fail "paley quantize failed"; }
    "$work/venv/bin/paley" generate "$work/out-$kind" "The" --max-new-tokens 8 >"$work/text-$kind" 2>>"$work/log" ||
        { cat "$work/log" >&2; fail "paley generate failed"; }
    printf 'wheel: %s kernels, it generates: %s\n' "$kind" "$(tr '\n' ' ' < "$work/text-$kind")"
done
cmp "$work/out-with/model.safetensors" "$work/out-without/model.safetensors" || fail "kernels changed the codes"
if [[ -n ${OUT:-} ]]; then cp "$work"/with/*.whl "$OUT"; fi
echo "wheel: both work"
