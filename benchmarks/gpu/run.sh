#!/usr/bin/env bash
# Builds, tests, checks and measures everything that needs an NVIDIA GPU, in under ten minutes. See docs/gpu.md.
set -uo pipefail

usage="usage: benchmarks/gpu/run.sh --out DIR [--wheels DIR] [--commit HASH] [--only STAGE,...] [--dry-run]"
python=${PYTHON:-python3} out="" wheels="" commit="" only="" dry=""
while (($#)); do
    case $1 in
        --out) out=$(realpath -m "$2") && shift 2 ;;
        --wheels) wheels=$(realpath -m "$2") && shift 2 ;;
        --commit) commit=$2 && shift 2 ;;
        --only) only=$2 && shift 2 ;;
        --dry-run) dry=yes && shift ;;
        *) echo "$usage" >&2 && exit 4 ;;
    esac
done
[[ -n $out ]] || { echo "$usage" >&2; exit 4; }
[[ -z $wheels || -n $(compgen -G "$wheels/*.whl") ]] || { echo "there are no wheels in $wheels" >&2; exit 4; }

cd "$(dirname "$0")/../.."
# cmake and ninja may be Python packages
PATH=$(dirname "$(command -v "$python")"):$PATH
command -v nvcc >/dev/null || PATH=$PATH:/usr/local/cuda/bin
if [[ -n $dry ]]; then
    export CUDA_VISIBLE_DEVICES=
elif ! "$python" -c "import torch; raise SystemExit(not torch.cuda.is_available())"; then
    echo "torch of $python sees no CUDA device: run this on a machine with an NVIDIA GPU, or with --dry-run" >&2
    exit 2
fi

mkdir -p "$out"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
parts=$work/parts venv=$work/venv/bin/python
mkdir "$parts"
: >"$parts/stages.tsv"
: >"$out/run.log"
# a dry run proves the stages, not their time: on two cores the installation alone came close to its limit
patience=1
[[ -n $dry ]] && patience=5
deadline=$((570 * patience))
export python wheels work venv dry

wanted() { [[ -z $only || ",$only," == *",$1,"* ]]; }

record() { printf '%s\t%s\t%s\t%s\n' "$@" >>"$parts/stages.tsv"; }

# stage NAME SECONDS COMMAND...: with a time limit; what fails is recorded, and the rest goes on
stage() {
    local name=$1 limit=$(($2 * patience)) began=$SECONDS left=$((deadline - SECONDS)) status=ok detail=""
    shift 2
    wanted "$name" || [[ $name == install ]] || return 0
    ((limit > left)) && limit=$left
    echo "== $name" | tee -a "$out/run.log"
    if ((limit < 5)); then
        record "$name" "out of time" 0 ""
        return 1
    fi
    timeout --kill-after=5 "$limit" "$@" >"$parts/log" 2>&1
    case $? in
        0) ;;
        124 | 137) status="timed out" detail="limit $limit s" ;;
        *) status=failed detail=$(grep -v '^\s*$' "$parts/log" | tail -n 1 | tr '\t' ' ' | cut -c -200) ;;
    esac
    cat "$parts/log" >>"$out/run.log"
    [[ $status == ok ]] || tail -n 15 "$parts/log"
    record "$name" "$status" $((SECONDS - began)) "$detail"
    [[ $status == ok ]]
}

# An environment over the machine's own packages, above all its torch: what is installed here comes first, nothing there changes.
install() {
    set -e
    "$python" -m venv --without-pip "$work/venv"
    "$python" -c 'import site, sysconfig; print("import site;", *(f"site.addsitedir({p!r});" for p in
        dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()])))' |
        tr '\n' ' ' >"$("$venv" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/machine.pth"
    pip=("$python" -m pip --python "$venv" --disable-pip-version-check install --quiet)
    if [[ -n $wheels ]]; then
        "${pip[@]}" --no-index --no-deps "$wheels"/*.whl
        "$venv" -m benchmarks.gpu.requirements
    fi
    "${pip[@]}" --no-build-isolation ${wheels:+--no-index --no-deps} --editable .
    "$venv" -m seal_fast doctor
    "$venv" -c 'import torch; from seal_fast.ops import backends
needed = [backends.CPU, *([backends.CUDA] if torch.cuda.is_available() else [])]
raise SystemExit("; ".join(one.reason for one in needed if one.reason) or None)'
}
export -f install

# sanitised TOOL SECONDS
sanitised() {
    local reason=""
    command -v compute-sanitizer >/dev/null || reason="compute-sanitizer is not installed"
    [[ -n $dry ]] && reason="needs a GPU"
    if [[ -n $reason ]]; then
        wanted "$1" && record "$1" skipped 0 "$reason"
        return
    fi
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 stage "$1" "$2" \
        compute-sanitizer --tool "$1" --error-exitcode 9 "$venv" -m benchmarks.gpu.every_kernel
}

if stage install 150 bash -c install; then
    measure() { stage "$1" "$2" "$venv" -m benchmarks.gpu.stages "$1" --parts "$parts" ${dry:+--tiny}; }
    measure device 40
    stage tests 150 "$venv" -m pytest -q -p no:cacheprovider -m gpu ${dry:+--ignore=tests/ops/test_cross_attention_triton.py}
    sanitised memcheck 60
    sanitised racecheck 60
    measure reversion 110
    measure unlearning 90
    measure ops 120
    measure models 90
    measure scan 60
else
    venv=$python
fi
"$venv" -m benchmarks.gpu.report --parts "$parts" --out "$out/results.json" ${commit:+--commit "$commit"} ${dry:+--dry-run}
