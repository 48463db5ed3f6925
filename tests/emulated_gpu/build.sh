#!/usr/bin/env bash
# Builds the emulated GPU's three libraries into the folder $1, from the sources beside this script, against the
# LibTorch that LIBTORCH names. Does nothing if they are newer than their sources.

set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
out=$1
mkdir -p "$out"

compile() {
  local source=$1 library=$2
  shift 2
  if [[ $out/$library -nt $here/$source && $out/$library -nt $here/gpu.h && $out/$library -nt $here/build.sh ]]; then
    return
  fi
  "${CXX:-c++}" -std=c++17 -O1 -Wall -Wextra -fPIC -shared "$here/$source" -o "$out/$library.new" \
    -Wl,-soname,"$library" -L"$out" -Wl,-rpath,"\$ORIGIN" "$@"
  mv "$out/$library.new" "$out/$library"
}

compile driver.cpp libcuda.so.1 -pthread -ldl
ln -sfn libcuda.so.1 "$out/libcuda.so"
compile nccl.cpp libnccl.so -l:libcuda.so.1 -pthread
compile torch_cuda.cpp libtorch_cuda.so -isystem "$LIBTORCH/include" -L"$LIBTORCH/lib" -ltorch_cpu -lc10 -l:libcuda.so.1 \
  -D_GLIBCXX_USE_CXX11_ABI="${LIBTORCH_CXX11_ABI:-1}"
cp -u "$here/operators.txt" "$out"
