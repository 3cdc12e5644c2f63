#!/usr/bin/env bash
# Makes .venv once from requirements.lock, then trains: the demo without arguments, else whatever the flags say.
#
#   ./run.sh                                  train and test the embedded demo
#   ./run.sh --experiment=NAME [--set=...]    any flag of python -m lungjax.main
#   ./run.sh prepare --dataset=NAME ...       any flag of python -m lungjax.prepare
#   ./run.sh explore --dataset=NAME           any flag of python -m lungjax.explore
#   ./run.sh weights --list                   any flag of python -m lungjax.weights
#   ./run.sh tables --list                    any flag of python -m lungjax.tables
#   ./run.sh explain --workdir=RUN ...        any flag of python -m lungjax.explain
#   ./run.sh compare RUN_A RUN_B              python -m lungjax.compare
#   ./run.sh predict --model=RUN PATH...      any flag of python -m lungjax.predict
#   ./run.sh export --workdir=RUN ...         any flag of python -m lungjax.export; installs the extra `export`
#   ./run.sh serve --model=RUN                any flag of python -m lungjax.serve; installs the extra `serve`
#   ./run.sh test [pytest arguments]          the tests
#
# LUNGJAX_ACCEL=cpu|cuda|tpu chooses jax's packages (default: what the machine has); PYTHON the interpreter.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=$here/.venv

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
  echo "run.sh: Python 3.11 or newer is needed; none was found (set PYTHON=/path/to/python)" >&2
  exit 1
}

# install EXTRAS: does nothing when this very lock file and these extras are installed already.
install() {
  local stamp=$venv/lungjax-$1 want
  want=$(cat "$here/pyproject.toml" "$here/requirements.lock" | cksum)
  if [ "$(cat "$stamp" 2>/dev/null)" = "$want" ]; then return; fi
  if [ ! -x "$venv/bin/python" ]; then
    local python; python=$(find_python)
    echo "Making $venv with $("$python" --version) ..."
    "$python" -m venv "$venv"
  fi
  echo "Installing lungjax ($1) from requirements.lock ..."
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c "$here/requirements.lock" -e "$here[$1]"
  echo "$want" > "$stamp"
}

accel=${LUNGJAX_ACCEL:-$(accelerator)}
case $accel in
  cpu | cuda | tpu) ;;
  *) echo "run.sh: LUNGJAX_ACCEL=$accel: allowed are cpu, cuda, tpu" >&2; exit 1 ;;
esac

case ${1:-} in
  test)
    shift
    install "$accel,test"
    cd "$here" && exec "$venv/bin/python" -m pytest -n 2 --dist=loadfile "$@" ;;
  prepare | explore | weights | tables | explain | compare | predict | export | serve)
    command=$1
    shift
    case $command in
      export | serve) install "$accel,$command" ;;
      predict) install "$accel,dicom" ;;
      *) install "$accel" ;;
    esac
    exec "$venv/bin/python" -m "lungjax.$command" "$@" ;;
  *)
    install "$accel"
    [ $# -gt 0 ] || set -- --experiment=phantom_demo
    exec "$venv/bin/python" -m lungjax.main "$@" ;;
esac
