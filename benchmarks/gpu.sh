#!/usr/bin/env bash
# Everything that needs a GPU, in one command on a bare machine: benchmarks/gpu.sh [--dry] [SECTION...]
# Sections, without any all, in this order: correctness first, then the step, inference and data as a whole, then single
# operations. Nothing has to be installed but torch, triton and what `need` below asks for; missing packages can lie as
# wheels in .whl/ (benchmarks/README.md).
# A section that fails or runs out of time does not stop the others; the summary comes last. All of them may take more than
# BUDGET: name some in each call.
#
#   OUT     where results go (default: benchmarks/results/<gpu>; of a dry run a temporary folder)
#   BUDGET  seconds for everything (default 570); a section gets its share of what is left
#   PYTHON  the interpreter (default python3)
#   IMAGES  folder of JPEG files for the section loader (default: MiniVOC is drawn)
#
# --dry, and any machine without a GPU: tiny sizes on the CPU, to see that the script works.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

PYTHON=${PYTHON:-python3}
BUDGET=${BUDGET:-570}
ALL=(versions tests modules step fps memory precision stages loader sanitizer tune bench sweep profile)

case "${1:-}" in -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; exit ;; esac
dry=
[ "${1:-}" = --dry ] && { dry=1; shift; }
nvidia-smi >/dev/null 2>&1 || dry=1
sections=("$@")
[ ${#sections[@]} -gt 0 ] || sections=("${ALL[@]}")
for name in "${sections[@]}"; do
  case " ${ALL[*]} " in
    *" $name "*) ;;
    *) echo "error: no section $name; there are: ${ALL[*]}" >&2; exit 2 ;;
  esac
done

export PYTHONPATH="kernels:.${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TRITON_DEFAULT_FP_FUSION=1
# The compiler's cache outside the tree, which may be read-only.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-/tmp/cosa-triton}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-/tmp/cosa-inductor}
if compgen -G '.whl/*.whl' >/dev/null; then
  "$PYTHON" -m pip install -q --no-index --no-deps --no-cache-dir --upgrade --target /tmp/cosa-site .whl/*.whl &&
    export PYTHONPATH="/tmp/cosa-site:$PYTHONPATH"
fi

if [ -n "$dry" ]; then
  OUT=${OUT:-$(mktemp -d)}
  small=(--device cpu --tiny --seconds 0.05 --turns 2)
  echo "dry run: no GPU is used, sizes are tiny and the numbers mean nothing"
else
  gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1)
  gpu=$(printf %s "$gpu" | tr '[:upper:]' '[:lower:]' | tr -cs 'a-z0-9' -)
  OUT=${OUT:-benchmarks/results/$gpu}
  small=()
fi
mkdir -p "$OUT" || exit 1
log=$OUT/gpu.log
: >"$log"
summary=()

has() { "$PYTHON" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }

# section NAME SECONDS COMMAND...: run it within its time, everything it says into the log.
section() {
  local name=$1 limit=$2 left=$((BUDGET - SECONDS)) begin=$SECONDS status result
  shift 2
  [ "$left" -lt "$limit" ] && limit=$left
  printf '\n== %s: %s\n' "$name" "$*" >>"$log"
  if [ "$limit" -lt 5 ]; then
    summary+=("$name|not run, no time left|0")
    return
  fi
  timeout --kill-after=5 "$limit" "$@" >>"$log" 2>&1
  status=$?
  case $status in
    0) result=ok ;;
    124 | 137) result="stopped after $limit s" ;;
    *) result="FAILED ($status)" ;;
  esac
  summary+=("$name|$result|$((SECONDS - begin))")
}

skip() {
  printf '\n== %s: not run, %s\n' "$1" "$2" >>"$log"
  summary+=("$1|not run, $2|0")
}

# need SECTION PACKAGE...: whether the packages are there; says so where they are not.
need() {
  local name=$1 package
  shift
  for package in "$@"; do
    has "$package" || { skip "$name" "the Python package $package is missing (carry it as a wheel)"; return 1; }
  done
}

versions() {
  section versions 60 "$PYTHON" -c '
import importlib.metadata as m, platform, torch
print("python", platform.python_version())
for name in ("torch", "triton", "numpy", "tyro", "tqdm", "matplotlib", "scikit-learn", "pytest"):
    try: print(name, m.version(name))
    except m.PackageNotFoundError: print(name, "absent")
if torch.cuda.is_available(): print(torch.cuda.get_device_properties(0))'
  [ -n "$dry" ] || section nvidia-smi 20 nvidia-smi
}

tests() {
  need tests pytest || return
  if [ -n "$dry" ]; then
    section tests 60 "$PYTHON" -m pytest tests/kernels -q --collect-only
    return
  fi
  # Compiling is what takes time, and it parallelises.
  local workers=()
  has xdist && workers=(-n 8)
  section tests 240 "$PYTHON" -m pytest tests/kernels --ignore tests/kernels/test_offline_compile.py -q -rfEs \
    -p no:cacheprovider --durations=5 "${workers[@]}"
}

modules() {
  need modules pytest pydantic yaml tyro timm torchvision torchmetrics segmentation_models_pytorch zarr || return
  local files
  mapfile -t files < <(grep -l 'mark\.gpu' tests/test_*.py)
  local only=(-m gpu)
  [ -n "$dry" ] && only=(-m gpu --collect-only)
  section modules 240 "$PYTHON" -m pytest "${files[@]}" "${only[@]}" -q -rfEs -p no:cacheprovider
}

step() {
  need step pydantic yaml tyro tqdm timm || return
  # Every compiled variant takes a minute before the first figure: what the goals are about first.
  local voc=(--presets voc_b4 --phases guided --variants release fp32 bf16 bf16_compile)
  local coco=(--presets coco_b8 --phases guided --variants release bf16_compile)
  local rest=(--presets voc_b4 --phases guided warmup --variants release bf16_graphs fp8_compile)
  local how=(--presets voc_b4 --phases guided --variants release bf16_compile)
  if [ -n "$dry" ]; then
    voc=("${small[@]}" --phases guided)
    coco=("${small[@]}" --phases guided --presets coco_b8)
    rest=("${small[@]}")
    how=(--device cpu --tiny --presets minivoc --phases guided --variants release fp32)
  fi
  section step 180 "$PYTHON" -m benchmarks.step --csv "$OUT/step.csv" "${voc[@]}"
  section step-profile 60 "$PYTHON" -m benchmarks.step --profile "$OUT/step" "${how[@]}"
  section step-coco 150 "$PYTHON" -m benchmarks.step --csv "$OUT/step.csv" "${coco[@]}"
  section step-others 180 "$PYTHON" -m benchmarks.step --csv "$OUT/step.csv" "${rest[@]}"
}

fps() {
  need fps pydantic yaml tyro tqdm timm segmentation_models_pytorch PIL || return
  local crf=() how=(--threads 8)
  has pydensecrf || crf=(--crf none)
  [ -n "$dry" ] && how=("${small[@]}")
  section fps 180 "$PYTHON" -m benchmarks.fps --csv "$OUT/fps.csv" --networks voc --precisions bf16 "${crf[@]}" "${how[@]}"
  section fps-others 120 "$PYTHON" -m benchmarks.fps --csv "$OUT/fps.csv" --networks coco resnet101 --compile off --crf none \
    "${how[@]}"
}

memory() {
  need memory pydantic yaml tyro tqdm timm segmentation_models_pytorch PIL || return
  local how=() standalone=(ms_resnet101 ms_wide_resnet38 ms_swin_base ms_swin_large)
  local evaluated=(evaluation_voc evaluation_coco evaluation_ms_resnet101 evaluation_ms_swin_large)
  local ours=("$PYTHON" -m benchmarks.memory --csv "$OUT/memory.csv")
  [ -n "$dry" ] && how=(--device cpu --tiny --batch-sizes 2 --variants bf16)
  section memory 60 "${ours[@]}" --presets voc_b4 coco_b8 "${how[@]}"
  section memory-standalone 60 "${ours[@]}" --presets "${standalone[@]}" --batch-sizes 16 8 4 2 "${how[@]}"
  section memory-evaluation 40 "${ours[@]}" --presets "${evaluated[@]}" --batch-sizes 8 1 "${how[@]}"
}

precision() {
  need precision pydantic yaml tyro tqdm timm matplotlib || return
  local how=()
  [ -n "$dry" ] && how=(--device cpu --tiny --steps 8)
  section precision 90 "$PYTHON" -m benchmarks.precision --output "$OUT" "${how[@]}"
}

# The pipeline's stages one after the other on the demo's dataset, without Snakemake; tables and panel go to $OUT/stages.
stages() {
  need stages pydantic yaml tyro tqdm timm torchvision torchmetrics segmentation_models_pytorch zarr tensorboard || return
  local config=config/config.yaml device=cuda
  [ -n "$dry" ] && config=.test/config/config.yaml device=cpu
  # shellcheck disable=SC2016
  section stages 240 bash -ec '
    stage() { "$0" -m cosa_fast.cli "$@" --threads 2; }
    at=$(mktemp -d) config=(--config "$2") on=(--runtime.device "$3")
    trap "rm -rf $at" EXIT
    stage data index --output "$at/index.json" --cache "$at/data" "${config[@]}"
    stage data masks --index "$at/index.json" --output "$at/masks.json" --cache "$at/data"
    stage train --index "$at/index.json" --masks "$at/masks.json" --output "$at/cosa.safetensors" --resume "$at/resume" \
      "${config[@]}" "${on[@]}" --loader.backend torch
    stage pseudo-labels --index "$at/index.json" --checkpoint "$at/cosa.safetensors" --output "$at/labels.zarr" \
      "${config[@]}" "${on[@]}"
    stage multistage --index "$at/index.json" --store "$at/labels.zarr" --output "$at/segmenter.safetensors" \
      --resume "$at/resume-ms" "${config[@]}" "${on[@]}"
    stage evaluate --index "$at/index.json" --masks "$at/masks.json" --checkpoint "$at/cosa.safetensors" \
      --segmenter "$at/segmenter.safetensors" --store "$at/labels.zarr" --output "$at/miou.txt" --csv "$at/iou.csv" \
      --panel "$at/panel.png" "${config[@]}" "${on[@]}"
    mkdir -p "$1"
    cp "$at/miou.txt" "$at/iou.csv" "$at/panel.png" "$1"
    head -n 12 "$at/miou.txt"
  ' "$PYTHON" "$OUT/stages" "$config" "$device"
}

sanitizer() {
  need sanitizer tyro tqdm || return
  if [ -n "$dry" ]; then
    section "smoke (without sanitizer)" 120 "$PYTHON" -m benchmarks.kernels --smoke --device cpu
    return
  fi
  local tool found
  found=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -n 1)
  [ -n "$found" ] || { skip sanitizer "there is no compute-sanitizer"; return; }
  # Compiled before, so that the checker sees launches only. No cached blocks: an access beyond a tensor is an error.
  section smoke 120 "$PYTHON" -m benchmarks.kernels --smoke
  for tool in memcheck racecheck; do
    section "$tool" 90 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$found" --tool "$tool" --error-exitcode 9 --print-limit 20 \
      "$PYTHON" -m benchmarks.kernels --smoke
  done
}

tune() {
  need tune tyro || return
  [ -n "$dry" ] && { skip tune "it needs a GPU"; return; }
  section tune 150 "$PYTHON" -m benchmarks.tune
}

bench() {
  need bench tyro tqdm || return
  section bench 330 "$PYTHON" -m benchmarks.kernels --csv "$OUT/kernels.csv" "${small[@]}"
}

sweep() {
  need sweep tyro tqdm matplotlib || return
  section sweep 120 "$PYTHON" -m benchmarks.kernels --sweep --csv "$OUT/kernels_sweep.csv" "${small[@]}"
}

profile() {
  need profile tyro || return
  local shapes=(--shapes voc_b16_aux)
  [ -n "$dry" ] && shapes=(--shapes tiny_aux)
  section profile 60 "$PYTHON" -m benchmarks.kernels --profile --ops raw_cross_entropy "${shapes[@]}" "${small[@]}"
}

loader() {
  need loader nvidia.dali pydantic yaml torchvision PIL tyro tqdm || return
  local how=(--device cuda --workers 2 8 --consume 200)
  [ -n "$dry" ] && how=(--tiny --consume 200)
  section loader 120 "$PYTHON" -m benchmarks.loader ${IMAGES:+--images "$IMAGES"} "${how[@]}" --csv "$OUT/loader.csv"
}

for name in "${sections[@]}"; do "$name"; done

# At most 12,000 characters in all: the end of the table, and what failed.
shorten() { tr -cd '\11\12\40-\176' | tail -c "$1"; }
if [ -f "$OUT/kernels.csv" ] && has tyro; then
  device=()
  [ -n "$dry" ] && device=(--device cpu)
  "$PYTHON" -m benchmarks.kernels --table --csv "$OUT/kernels.csv" "${device[@]}" >"$OUT/kernels.md" 2>>"$log"
  echo "-- ms, graph ms, speed-up over eager, extra MiB of a whole step (all: $OUT/kernels.md)"
  # Of losses the whole step, of the others the only mode they have.
  grep -E '\| full \||(teacher_targets|fit_bimodal_threshold) ' "$OUT/kernels.md" | cut -d '|' -f 2-9 | shorten 5000
fi
if [ -f "$OUT/step.csv" ]; then
  echo "-- the training step (all: $OUT/step.csv)"
  "$PYTHON" -m benchmarks.step --table --csv "$OUT/step.csv" ${dry:+--device cpu} 2>>"$log" |
    grep '^|' | cut -d '|' -f 2-12 | shorten 2500
fi
notable='^(FAILED|ERROR) |(ERROR|RACECHECK) SUMMARY|^[A-Za-z.]*(Error|Exception): |is wrong, so|[0-9] (passed|failed)'
grep -E "$notable" "$log" | cut -c -300 | shorten 3000
echo
printf '%s\n' "-- summary (everything: $log)" '| section | result | s |' '|---|---|---|'
for line in "${summary[@]}"; do
  IFS='|' read -r name result seconds <<<"$line"
  printf '| %s | %s | %s |\n' "$name" "$result" "$seconds"
done
[[ "${summary[*]}" != *FAILED* ]]
