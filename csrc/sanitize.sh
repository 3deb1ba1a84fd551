#!/usr/bin/env bash
# Builds the kernels with AddressSanitizer and UndefinedBehaviorSanitizer and runs their tests and the fuzzer on them.
#   csrc/sanitize.sh [seconds of fuzzing, default 60]
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${1:-60}
python=${PYTHON:-python}
build=${BUILD_DIR:-$(mktemp -d)}
cmake -S . -B "$build" -DALRO_FAST_SANITIZE=ON -DPython_EXECUTABLE="$("$python" -c 'import sys; print(sys.executable)')" \
  > "$build.log" || { cat "$build.log"; exit 1; }
cmake --build "$build" --parallel >> "$build.log" || { cat "$build.log"; exit 1; }
module=$(ls "$build"/_cpp*.so)

# The sanitised module takes the place of the installed one; the process must not fork or start others.
run() {
  LD_PRELOAD="$(g++ -print-file-name=libasan.so):$(g++ -print-file-name=libubsan.so)" \
    ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 OMP_NUM_THREADS=1 \
    "$python" -c "
import importlib.util, runpy, sys
spec = importlib.util.spec_from_file_location('alro_fast._cpp', '$module')
import alro_fast
alro_fast._cpp = sys.modules['alro_fast._cpp'] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(alro_fast._cpp)
$1"
}
run "
import pytest
sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', 'tests/csrc/test_csrc.py', 'tests/modeling/test_cpp_attention.py', '-k', 'not fork and not workers and not end_in_results']))"
run "
sys.argv = ['fuzz_csrc.py', '--seconds', '$seconds']
runpy.run_path('tests/csrc/fuzz_csrc.py', run_name='__main__')"
