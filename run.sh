#!/usr/bin/env bash
# Usage: ./run.sh [COMMAND] [ARGUMENTS]; `./run.sh help` lists the commands.
# The first call creates .venv and installs the locked packages; later calls reuse it.
set -euo pipefail
case $0 in */*) export LUNGJAX_RUN_SH=$0 ;; *) export LUNGJAX_RUN_SH=./$0 ;; esac  # for printed commands
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=$here/.venv

usage() {
  cat <<'END'
./run.sh                                train and test the demo
./run.sh --experiment=NAME [--set=...]  train an experiment (python -m lungjax.main; --list prints all)
./run.sh prepare --dataset=NAME ...     prepare a data set; --help prints where to get it
./run.sh explore --dataset=NAME         draw a page of figures about a prepared data set
./run.sh weights --list                 list the pretrained weights; --fetch=NAME downloads a file
./run.sh tables --list                  list the tables of published results
./run.sh explain --model=RUN ...        draw saliency maps
./run.sh runs [DIR]                     list runs, their scores, and the commands that resume them
./run.sh tensorboard RUN...             write TensorBoard events of runs
./run.sh compare RUN_A RUN_B...         compare runs on the same patients
./run.sh power --auc=0.85 --width=0.1   compute the patients that a test set needs
./run.sh checklist RUN --standard=claim  fill a reporting guideline from a run
./run.sh predict --model=RUN PATH...    predict images and scans
./run.sh export --model=RUN ...         export a standalone, ONNX, SavedModel or Triton model
./run.sh serve --model=RUN              start an HTTP service with a web page
./run.sh test [PYTEST ARGUMENTS]        run the tests

./run.sh COMMAND runs python -m lungjax.COMMAND; --help lists its flags. LUNGJAX_ACCEL=cpu|cuda|tpu selects the jax
packages (default: the detected accelerator), and PYTHON selects the interpreter for .venv.
END
}

accelerator() {
  if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU; then echo cuda
  elif [ -e /dev/accel0 ] || [ -n "${TPU_ACCELERATOR_TYPE:-}" ]; then echo tpu
  else echo cpu; fi
}

find_python() {
  for candidate in "${PYTHON:-}" python3 python3.14 python3.13 python3.12 python3.11; do
    if [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 &&
      "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"; return
    fi
  done
  echo "run.sh: no Python 3.11 or newer found; set PYTHON=/path/to/python" >&2
  exit 1
}

# install EXTRAS: does nothing if these extras were installed from the current lock file.
install() {
  local stamp=$venv/lungjax-$1 checksum
  checksum=$(cat "$here/pyproject.toml" "$here/requirements.lock" | cksum)
  if [ "$(cat "$stamp" 2>/dev/null)" = "$checksum" ]; then return; fi
  if [ ! -x "$venv/bin/python" ]; then
    local python; python=$(find_python)
    echo "Creating $venv with $("$python" --version) ..."
    "$python" -m venv "$venv"
  fi
  echo "Installing lungjax ($1) from requirements.lock ..."
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c "$here/requirements.lock" -e "$here[$1]"
  echo "$checksum" > "$stamp"
}

accel=${LUNGJAX_ACCEL:-$(accelerator)}
case $accel in
  cpu | cuda | tpu) ;;
  *) echo "run.sh: unknown LUNGJAX_ACCEL=$accel; expected cpu, cuda or tpu" >&2; exit 1 ;;
esac

case ${1:-} in
  help | -h)
    usage ;;
  test)
    shift
    install "$accel,test"
    unset LUNGJAX_RUN_SH  # the tests expect the form of `python -m`
    # Most programs of the tests run only a few times: compiling them with fewer optimizations saves a third of the time,
    # and in one piece, since two workers use the cores, another 7 %.
    fast="--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    export XLA_FLAGS=${XLA_FLAGS:-$fast --xla_cpu_parallel_codegen_split_count=1}
    cd "$here" && exec "$venv/bin/python" -m pytest -n 2 --dist=loadfile --no-loadscope-reorder "$@" ;;
  prepare | explore | weights | tables | explain | compare | checklist | power | predict | export | serve | runs | tensorboard)
    command=$1
    shift
    case $command in
      export | serve | tensorboard) install "$accel,$command" ;;
      prepare | predict | explain) install "$accel,dicom" ;;
      *) install "$accel" ;;
    esac
    exec "$venv/bin/python" -m "lungjax.$command" "$@" ;;
  "" | -*)
    install "$accel"
    [ $# -gt 0 ] || set -- --experiment=phantom_demo
    exec "$venv/bin/python" -m lungjax.main "$@" ;;
  *)
    echo "run.sh: unknown command $1; the commands are:" >&2
    usage >&2
    exit 1 ;;
esac
