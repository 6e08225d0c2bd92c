#!/usr/bin/env bash
# Makes .venv with everything the notebooks and tests need, and writes the stamp .venv/.ready when all is well.
#   scripts/setup.sh                 set up, or repair what an aborted run left behind
#   scripts/setup.sh --print-plan    only say what would be done
# PYTHON=/path/to/python3.12 picks the interpreter. `make` calls this when the stamp is missing or out of date.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly TESTED_TORCH="torch==2.13.0"
quiet=()
[ -t 1 ] || quiet=(-q)

say() { printf '%s\n' "$*"; }
fail() { printf '%s\n' "$*" >&2; exit 1; }

# setuptools takes {name} and $name in a path for variables, and ends in a traceback after minutes of downloads.
case $PWD in
    *[{}$]*) fail "文件夹的路径里有 { } 或 $ [unusable path]：$PWD，setuptools 装不了，请改名或换一个文件夹，再运行一次" ;;
esac

# The real interpreter behind a command (through pyenv shims and virtual environments), if it is new enough.
new_enough_python() {
    "$1" -c '
import os, sys
if sys.version_info < (3, 11):
    sys.exit(1)
print(os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable))' 2>/dev/null
}

choose_python() {
    local candidate found
    if [ -n "${PYTHON:-}" ]; then
        new_enough_python "$PYTHON" && return
        fail "PYTHON=$PYTHON 不能用 [Python >= 3.11 required]：它不存在或版本太旧，请换一个"
    fi
    for candidate in python3 python3.13 python3.12 python3.11 python; do
        found=$(new_enough_python "$candidate") && { say "$found"; return; }
    done
    fail "找不到 Python 3.11 或更新的版本 [Python >= 3.11 required]：请先安装，或写 make run PYTHON=/路径/python3.12"
}

# Asked of pip's own record, which knows the exact build (2.8.0+cu128); empty where torch cannot be imported.
torch_version() {
    "$1" -c '
import importlib.metadata, sys, torch
try:
    print(importlib.metadata.version("torch"))
except importlib.metadata.PackageNotFoundError:
    print(torch.__version__)' 2>/dev/null || true
}

at_least_2_6() {
    local major minor
    IFS=. read -r major minor _ <<<"${1//[!0-9.]/.}"
    [ "$major" -gt 2 ] || { [ "$major" -eq 2 ] && [ "${minor:-0}" -ge 6 ]; }
}

# Which kind of environment: "system" sees the image's packages, "plain" does not.
choose_kind() {
    image_torch=$(torch_version "$python")
    if [ -z "$image_torch" ]; then
        kind=plain reason="这个 Python 里没有 torch [no torch found]，将安装测试过的 $TESTED_TORCH"
    elif at_least_2_6 "$image_torch"; then
        kind=system reason="沿用镜像自带的 torch $image_torch [image torch kept]，不会改动它"
    else
        kind=plain
        reason="镜像自带的 torch $image_torch 低于 2.6 [torch too old]，将在 .venv 里另装 $TESTED_TORCH"
    fi
}

# pip writes RECORD last, so a package without one was cut off; pip itself would take it for installed.
half_installed() {
    local info
    for info in .venv/lib/python3.*/site-packages/*.dist-info; do
        [ -e "$info/RECORD" ] || return 0
    done
    return 1
}

# Used again only if it is whole, of the right kind and interpreter, and was made for this very folder.
reusable() {
    local wants_system=false
    [ "$kind" = plain ] || wants_system=true
    .venv/bin/python -m pip --version >/dev/null 2>&1 &&
        ! half_installed &&
        grep -qi "^include-system-site-packages = $wants_system" .venv/pyvenv.cfg &&
        [[ "$(grep '^command = ' .venv/pyvenv.cfg)" == *" $PWD/.venv" ]] &&
        [ "$(new_enough_python .venv/bin/python)" = "$python" ]
}

choose_action() {
    if [ ! -e .venv ]; then
        action=create
    elif reusable; then
        action=reuse
    else
        action=recreate
    fi
}

make_venv() {
    [ "$action" != reuse ] || return 0
    "$python" -c 'import ensurepip, venv' 2>/dev/null || fail \
        "这个 Python 缺少 venv/ensurepip [python3-venv missing]：请先运行 apt-get install -y python3-venv（或 $(
        basename "$python")-venv），再重试"
    local options=(--clear)
    [ "$kind" = plain ] || options+=(--system-site-packages)
    "$python" -m venv "${options[@]}" "$PWD/.venv"
}

pip_install() { .venv/bin/python -m pip install "${quiet[@]}" --disable-pip-version-check "$@"; }

# torch comes first and is then pinned, so that no other package can pull in a different build.
install_packages() {
    local before after
    [ "$kind" = system ] || pip_install "$TESTED_TORCH" -c constraints.txt
    before=$(torch_version .venv/bin/python)
    [ -n "$before" ] || fail "torch 不能导入 [cannot import torch]：请运行 .venv/bin/python -c 'import torch' 查看原因"
    pin=$(mktemp)
    trap 'rm -f "$pin"' EXIT
    say "torch==$before" >"$pin"
    [ "$kind" = plain ] || say "pip 若提示与镜像里其他软件包冲突，可以忽略：.venv 之外什么都不会改 [harmless]"
    pip_install -r requirements-dev.txt -c constraints.txt -c "$pin"
    # JupyterLab and papermill started from .venv take this kernel before one registered for the user.
    .venv/bin/python -m ipykernel install --sys-prefix >/dev/null 2>&1
    after=$(torch_version .venv/bin/python)
    [ "$after" = "$before" ] || fail "安装过程改动了 torch [torch changed]：$before -> $after。请删除 .venv 后重试"
}

print_plan() {
    printf '%s\n' "python=$python" "torch=${image_torch:-none}" "kind=$kind" "action=$action" "$reason"
}

main() {
    python=$(choose_python)
    choose_kind
    choose_action
    if [ "${1:-}" = --print-plan ]; then print_plan; return; fi
    say "$reason"
    say "准备 .venv（第一次需要几分钟）[setting up: $action]"
    rm -f .venv/.ready
    make_venv
    install_packages
    printf '%s\n' "$PWD" >.venv/.ready
    say "完成 [ready]：torch $(torch_version .venv/bin/python)"
}

main "$@"
